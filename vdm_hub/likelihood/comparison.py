"""The forms of a bound on the same images: one expectation, and how much one evaluation of each scatters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import image_generator
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.calls import evaluating
from vdm_hub.objectives.decompositions import decompositions
from vdm_hub.objectives.variational_bound import Batch, Objective

_DRAWS = 108  # a stream of draws


@dataclass(frozen=True)
class FormsOfBound:
    """The mean and the spread of each form's estimator on the same images.

    Attributes:
        bits_per_dim: By name: the mean over images and draws.
        standard_error: By name: of that mean.
        variance: By name: of one evaluation within an image, averaged over images, in (bits/dim)^2.
        draws: Of each image.
    """

    bits_per_dim: Mapping[str, float]
    standard_error: Mapping[str, float]
    variance: Mapping[str, float]
    draws: int

    def __str__(self) -> str:
        lines = [f"{'form':<20}{'bits/dim':>10}{'se':>9}{'variance of one evaluation':>30}"]
        lines += [
            f"{name:<20}{bits:>10.4f}{self.standard_error[name]:>9.4f}{self.variance[name]:>30.4g}"
            for name, bits in self.bits_per_dim.items()
        ]
        return "\n".join(lines)


@torch.no_grad()
def compare_decompositions(objective: Objective, batch: Batch, draws: int = 32, seed: int = 0) -> FormsOfBound:
    """Every form of the bound on the same images, and how much one evaluation of each scatters.

    Args:
        objective: The model.
        batch: The images.
        draws: Of each image and form, at least 2; times are uniform and independent, with no technique that would
            reduce their variance.
        seed: Of all draws.

    Raises:
        ConfigurationError: The draws are too few for a variance.
    """
    if draws < 2:
        raise ConfigurationError(f"draws is {draws}: a variance needs at least 2.")
    values = {}
    for name, form in decompositions(objective).items():
        with evaluating(form):
            values[name] = torch.stack([_one_draw(form, batch, (seed, draw)) for draw in range(draws)])
    return FormsOfBound(
        {name: float(each.mean()) for name, each in values.items()},
        {name: float(each.mean(1).std() / math.sqrt(draws)) for name, each in values.items()},
        {name: float(each.var(0).mean()) for name, each in values.items()},
        draws,
    )


def _one_draw(form: Objective, batch: Batch, key: tuple[int, int]) -> Tensor:
    levels = batch["levels"]
    generators = [image_generator(*key, image, _DRAWS) for image in range(len(levels))]
    times = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(levels.device)
    bound = form(batch, times, form.draw_noise(batch, generators))
    bits: Tensor = bound.total.double().cpu() / (bound.dimensions * math.log(2))
    return bits
