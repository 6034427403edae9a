"""Which of diffusers' samplers run a VDM's process: each on an exact denoiser, with every option that is offered.

``python tests/schedulers/sampler_table.py`` writes the table of docs/samplers.md.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

PLACES = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
sys.path[:0] = [place for place in PLACES if place not in sys.path]

from exact_denoisers import Mixture  # noqa: E402
from vdm_hub import VDMScheduler  # noqa: E402
from vdm_hub.schedulers.configs import SHOWN_SAMPLERS  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "samplers.md"
BEGIN, END = "<!-- table -->", "<!-- end -->"
STEPS, WORST = 50, 0.025
TWO_PEAKS = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([-0.6, 0.5], [0.02, 0.01], [0.3, 0.7])))
MEAN = -0.6 * 0.3 + 0.5 * 0.7
DEVIATION = math.sqrt(0.02 * 0.3 + 0.01 * 0.7 + 0.21 * 1.1**2)


def of_the_family() -> list[str]:
    """All that take a table of betas, as the DDPM family does."""
    classes = [(name, getattr(diffusers, name)) for name in dir(diffusers) if name.endswith("Scheduler")]
    return [name for name, cls in classes if "trained_betas" in inspect.signature(cls).parameters]


def draw(sampler: Any, ours: VDMScheduler, count: int) -> Tensor:
    """What it leaves of noise at the normal quantiles: a sampler that adds none has no statistical error."""
    generator, process = torch.Generator().manual_seed(0), ours.process
    sampler.set_timesteps(STEPS)
    ranks = (torch.randperm(count, generator=generator) + 0.5) / count
    z = torch.special.ndtri(ranks.double())[:, None] * sampler.init_noise_sigma
    noise = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    for t in sampler.timesteps:
        given = sampler.scale_model_input(z, t)
        gamma = process.conditioning.inverse(torch.as_tensor(float(t), dtype=torch.float64))
        output = process.parameterization.target(*TWO_PEAKS.posterior_means(given, gamma), gamma)
        z = sampler.step(output, t, z, **noise).prev_sample
    return z


def errors(sampler: Any, ours: VDMScheduler, count: int = 4000) -> tuple[float, float]:
    """Of the mean, and of the standard deviation."""
    z = draw(sampler, ours, count)
    return float(z.mean()) - MEAN, float(z.std()) - DEVIATION


def samplers(ours: VDMScheduler, name: str) -> Iterator[Any]:
    """Without options, then with each one that is offered, by itself, where it is not what it was."""
    stock = getattr(diffusers, name)
    yield ours.to_diffusers(stock)
    yield from (ours.to_diffusers(stock, **choice) for choice in choices(name))


def choices(name: str) -> list[dict[str, Any]]:
    """Each option that is offered, by itself, at each value that is not the sampler's own."""
    plain, shown = VDMScheduler().to_diffusers(getattr(diffusers, name)).config, SHOWN_SAMPLERS[name].options
    return [{option: value} for option, values in shown.items() for value in values if plain[option] != value]


def pairs(name: str) -> list[dict[str, Any]]:
    """Each two of them."""
    return [one | other for one, other in combinations(choices(name), 2) if one.keys() != other.keys()]


def row(name: str, target: str) -> str:
    """The larger errors over all options, rounded up to a hundredth."""
    ours = VDMScheduler(prediction_type=target)
    found = [errors(sampler, ours) for sampler in samplers(ours, name)]
    worst = (max(abs(each[i]) for each in found) for i in (0, 1))
    return f"| `{name}` | `{target}` | " + " | ".join(f"{math.ceil(100 * error) / 100:.2f}" for error in worst) + " |"


def cases() -> list[tuple[str, str]]:
    return [(name, target) for name, shown in SHOWN_SAMPLERS.items() for target in shown.targets]


def offered() -> list[str]:
    """The rows of options."""
    told = {
        name: "; ".join(
            f"`{key}`: {', '.join(f'`{value!r}`' for value in values)}" for key, values in shown.options.items()
        )
        for name, shown in SHOWN_SAMPLERS.items()
    }
    return [f"| `{name}` | {options} |" for name, options in told.items()]


def table() -> str:
    head = ["| sampler | target | mean off by at most | standard deviation |", "| --- | --- | --- | --- |"]
    more = ["| sampler | options |", "| --- | --- |"]
    return "\n".join([*head, *(row(*case) for case in cases()), "", *more, *offered()])


def main() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
