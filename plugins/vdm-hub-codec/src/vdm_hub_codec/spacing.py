r"""Where the latents of a VDM's chain lie in time: close together where a wide step costs most.

A step from gamma_t to gamma_s costs ``1/2 expm1(gamma_t - gamma_s) m(gamma_t)`` nats (VDM eq. 14), m the mean of
``|eps - eps_hat|^2``, and continuous time ``1/2 int m dgamma``. To second order the difference is
``1/4 (m + m') (gamma_t - gamma_s)^2``; so of all chains of T steps that one has the shortest files whose steps are as
dense as ``sqrt(m + m')``. It is measured on a few of the data, for `CELLS` equal cells of time, and kept in the file.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vdm_hub import NoiseSchedule, NonFiniteLossError, VDMPipeline

if TYPE_CHECKING:
    from vdm_hub_codec.report import CodecReport

CELLS = 16
DRAWS = 16
"""For the picture of lengths."""
_DATA = 32
_DENSEST = 255
_FEWEST = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Of the mean density: what a cell has at least, as wide steps cost more than the second order says."""


@dataclass(frozen=True)
class StepCosts:
    """What steps cost of some data, measured at the edges of the cells of time.

    Attributes:
        schedule: The model's gamma.
        gammas: At the edges, (CELLS + 1,), float64.
        errors: ``|eps - eps_hat|^2`` there, the mean over the data, summed over dimensions, (draws, CELLS + 1).
        others: What the other terms of the bound are, in nats, (draws,).
        dimensions: Of a datum.
        data: How many they are measured on.
    """

    schedule: NoiseSchedule
    gammas: Tensor
    errors: Tensor
    others: Tensor
    dimensions: int
    data: int

    @property
    def evaluations(self) -> int:
        """How many of the network, each of one datum, measuring them took."""
        return self.errors.numel() * self.data

    @classmethod
    def of(cls, pipeline: VDMPipeline, levels: Tensor, told: Tensor | None = None, draws: int = 1) -> StepCosts | None:
        """Those of the first 32 of the data, of classes (N,) where there are; ``None`` without one gamma a time.

        One draw of noise is the same at all edges, as how they differ is what a spacing is found by. Of several draws
        each edge has its own, so that their errors hardly add up where lengths are asked for.
        """
        if (schedule := pipeline.process.scalar_gamma) is None:
            return None
        objective, batch = pipeline.objective(None), {"levels": levels[:_DATA]}
        batch |= {} if told is None else {"class_labels": told[:_DATA]}
        generator = torch.Generator().manual_seed(0)
        noise = objective.draw_noise(batch, generator)
        edges = torch.linspace(0, 1 - 1e-6, CELLS + 1, dtype=torch.float64)
        gammas, slope = (found.detach().double() for found in schedule.with_derivative(edges))
        errors, others = torch.empty(draws, len(edges), dtype=torch.float64), torch.empty(draws, dtype=torch.float64)
        for draw, (place, edge) in itertools.product(range(draws), enumerate(edges)):
            noise = objective.draw_noise(batch, generator) if draws > 1 else noise
            with torch.no_grad():
                terms = objective(batch, edge.float().expand(len(batch["levels"])), noise).terms
            means = {name: term.double().mean() for name, term in terms.items()}
            errors[draw, place] = means.pop("diffusion") / (0.5 * slope[place])
            others[draw] = sum(means.values())
        if not bool(errors.isfinite().all() & others.isfinite().all()):
            raise NonFiniteLossError(
                "the model's bound on these data is not finite, so that they have no code: its weights are at fault. "
                "Load an earlier checkpoint."
            )
        return cls(schedule, gammas, errors, others, levels[0].numel(), len(batch["levels"]))

    def spacing(self, transitions: int) -> bytes | None:
        """How dense T steps are best in each cell of time, 1 to 255; ``None`` where equal steps are as good."""
        rise, errors = self.gammas.diff(), self.errors.mean(0)
        density = ((errors[1:] * rise + errors.diff()).clamp(min=0) * rise).sqrt()
        shares = [(density / density.mean()).clamp(min=fewest) for fewest in _FEWEST]
        spacings = [bytes((one / one.max() * _DENSEST).round().clamp(1).int().tolist()) for one in shares]
        return min([None, *spacings], key=lambda one: self.bits_per_dim(transitions, one))

    def bits_per_dim(self, transitions: int, spacing: bytes | None) -> float:
        """About the bound with T steps, so spaced: the errors between the edges by straight lines."""
        return float(self._by_draw(transitions, spacing).mean())

    def standard_error(self, transitions: int, spacing: bytes | None) -> float:
        """Of `bits_per_dim`, from several draws: of these very data."""
        by_draw = self._by_draw(transitions, spacing)
        return float(by_draw.std(ddof=1) / math.sqrt(len(by_draw)))

    def _by_draw(self, transitions: int, spacing: bytes | None) -> np.ndarray:
        times = torch.tensor(times_of(spacing or bytes([1]), transitions), dtype=torch.float64)
        gammas = self.schedule(times).detach().double().numpy()
        errors = np.stack([np.interp(gammas[1:], self.gammas.numpy(), one) for one in self.errors.numpy()])
        nats: np.ndarray = 0.5 * errors @ np.expm1(np.diff(gammas)) + self.others.numpy()
        return nats / self.dimensions / math.log(2)


Lengths = dict[int, tuple[float, float]]
"""The bound by the number of steps, in bits/dim, and its standard error."""


def bounds_of(costs: StepCosts, transitions: int) -> Lengths:
    """The bound by the number of steps, these among them."""
    spacings = {number: costs.spacing(number) for number in sorted({*(10 * 2**i for i in range(8)), transitions})}
    return {
        number: (costs.bits_per_dim(number, one), costs.standard_error(number, one))
        for number, one in spacings.items()
    }


def plot_lengths(costs: StepCosts, lengths: Lengths, report: CodecReport, path: Path) -> None:
    """Draw the bound against the number of steps, and the file, where the model made it.

    Args:
        costs: Of the data.
        lengths: As `bounds_of` gives them.
        report: Of the file.
        path: Of the PNG.
    """
    equal, by = [costs.bits_per_dim(number, None) for number in lengths], f"({costs.data} of the data)"
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(lengths), equal, "--", color="tab:gray", label=f"bound, equal steps {by}")
    bits, errors = zip(*lengths.values(), strict=True)
    axes.errorbar(list(lengths), bits, errors, marker=".", capsize=2, label=f"bound, steps as in a file {by}")
    if report.bound is not None and report.transitions is not None:
        axes.plot(report.transitions, report.bits_per_dim, "x", color="black", label="the file")
    axes.set_xscale("log")
    axes.set_xlabel("transitions T")
    axes.set_ylabel("bits/dim")
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def times_of(spacing: bytes, transitions: int) -> list[float]:
    """The T + 1 times, from 0 to 1.

    >>> times_of(bytes([1, 1]), 4), times_of(bytes([3, 1]), 4)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.16666666666666666, 0.3333333333333333, 0.5, 1.0])
    """
    steps = np.cumsum([0, *spacing]) / math.fsum(spacing) * transitions
    times = np.interp(np.arange(transitions + 1), steps, np.linspace(0, 1, len(spacing) + 1))
    return [0.0, *times[1:-1].tolist(), 1.0]
