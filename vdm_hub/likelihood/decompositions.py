"""The forms that a model's bound has: one expectation, other terms, and estimators of other variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.likelihood.consistency import ConsistencyObjective
from vdm_hub.likelihood.hierarchical import HierarchicalObjective, HVAEObjective, JointHVAEObjective
from vdm_hub.likelihood.per_image import evaluating, image_generator
from vdm_hub.likelihood.restrictions import DenoisingHVAEObjective, has_linear_encoders
from vdm_hub.likelihood.variational_bound import Batch, Objective, VDMObjective

_DRAWS = 108  # a stream of draws


def decompositions(objective: Objective) -> dict[str, Objective]:
    """Every form of a model's bound, by name; all have the same expectation.

    A VDM has ``denoising_matching`` (Luo eq. 58) and, with a number of transitions, ``consistency`` (Luo eq. 44). A
    hierarchical VAE has ``consistency`` and ``joint``, in which nothing is in closed form, and ``denoising_matching``
    only where its encoders are linear Gaussians, as those of a VDM are.

    >>> from vdm_hub import HVAEObjective, MarkovianHVAE
    >>> list(decompositions(HVAEObjective(MarkovianHVAE(8, in_channels=1, latent_shapes=[(4,)]))))
    ['consistency', 'joint']
    """
    if isinstance(objective, HierarchicalObjective):
        model = objective.model
        forms: dict[str, Objective] = {"consistency": HVAEObjective(model), "joint": JointHVAEObjective(model)}
        return {"denoising_matching": DenoisingHVAEObjective(model)} | forms if has_linear_encoders(model) else forms
    if not isinstance(objective, VDMObjective):
        raise ConfigurationError(f"{type(objective).__name__} is no objective whose forms are known.")
    parts = objective.network, objective.process, objective.transitions
    known: dict[str, Objective] = {"denoising_matching": VDMObjective(*parts)}
    return known if objective.transitions is None else known | {"consistency": ConsistencyObjective(*parts)}


def form_of(objective: Objective, name: str | None, method: str = "bound") -> Objective:
    """A model's bound in one of its forms; the objective itself where no form is asked for.

    Raises:
        ConfigurationError: The model's bound has no such form, or the method is no bound of that kind.
    """
    if name is None:
        return objective
    if method != "bound":
        raise ConfigurationError(f"decomposition is {name!r}, and method {method!r} has none: leave one of them out.")
    known = decompositions(objective)
    if name == "consistency" and name not in known:
        raise ConfigurationError(
            "the consistency form is a sum over transitions, and continuous time has none: give a number of them."
        )
    if name == "denoising_matching" and name not in known:
        raise ConfigurationError(
            f"the denoising-matching form needs q(z_(t-1)|z_t, x), which learned encoders do not have: this model has "
            f"{' and '.join(known)}."
        )
    if name not in known:
        raise unknown_name("decomposition", name, list(known))
    return known[name]


@dataclass(frozen=True)
class FormsOfBound:
    """Mean and spread of each form's estimator on the same images.

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
