"""The likelihood methods of a hierarchical VAE: its bound, and importance weights over its latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import image_generator
from vdm_hub.fields import whole_number
from vdm_hub.likelihood.importance_weighted import effective_sizes, weighted
from vdm_hub.likelihood.measurement import Measured, Measurement
from vdm_hub.objectives.hierarchical import HierarchicalObjective, JointHVAEObjective
from vdm_hub.objectives.variational_bound import Batch, Terms

_NO_TIMES = torch.empty(0)
_LATENTS, _CHAINS = 106, 107  # streams of draws that share no key


class HierarchicalMeasurement(Measurement):
    """The method ``bound`` of a hierarchical VAE: one draw of all latents an image and replicate.

    A latent whose term stays at zero over the whole evaluation carries nothing of the data: the posterior collapsed.
    The report names it.

    Args:
        objective: The model.
        seed: Of all draws.

    >>> from vdm_hub import HVAEObjective, MarkovianHVAE
    >>> objective = HVAEObjective(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(4,)]))
    >>> batch = {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long), "indices": torch.arange(2)}
    >>> list(HierarchicalMeasurement(objective).measure(batch, replicate=0).terms)
    ['reconstruction', 'prior']
    """

    objective: HierarchicalObjective

    def __init__(self, objective: HierarchicalObjective, seed: int = 0) -> None:
        super().__init__(objective, seed)

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of one draw of each image."""
        generators = [image_generator(self.seed, replicate, int(i), _LATENTS) for i in batch["indices"]]
        bound = self.objective(batch, _NO_TIMES, self.objective.draw_noise(batch, generators))
        return Measured(bound.terms, {"evaluations": torch.ones(len(generators))})

    def protocol(self) -> dict[str, Any]:
        """The number of latents, as plain JSON."""
        return {"hierarchy": {"depth": self.objective.model.depth}}


class HierarchicalChains(Measurement):
    """The method ``importance_weighted`` of a hierarchical VAE: K draws of all latents, ``log 1/K sum_k w_k``.

    ``w = p(x, z_1..z_T) / q(z_1..z_T|x)`` (Burda et al., arXiv 1509.00519, eq. 8); nothing is in closed form.

    Args:
        objective: The model.
        draws: K. Draw k of an image is a function of (seed, replicate, image, k), so fewer are a part of more.
        seed: Of all draws.

    Raises:
        ConfigurationError: K is below 1.
    """

    method = "importance_weighted"
    objective: JointHVAEObjective

    def __init__(self, objective: HierarchicalObjective, draws: int = 16, seed: int = 0) -> None:
        whole_number("draws", draws)
        super().__init__(JointHVAEObjective(objective.model), seed)
        self.draws = draws

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of K draws of each image."""
        drawn = [self._terms(batch, replicate, k) for k in range(self.draws)]
        terms, size = weighted(drawn)
        evaluations = torch.full((len(size),), float(self.draws))
        return Measured(terms, {"evaluations": evaluations, "effective_sample_size": size})

    def _terms(self, batch: Batch, replicate: int, k: int) -> Terms:
        generators = [image_generator(self.seed, replicate, int(i), k, _CHAINS) for i in batch["indices"]]
        noise = self.objective.draw_noise(batch, generators)
        return {name: term.double() for name, term in self.objective(batch, _NO_TIMES, noise).terms.items()}

    def protocol(self) -> dict[str, Any]:
        """The number of draws K, and what is drawn."""
        weights = {"importance_weights": {"over": "latents", "draws": self.draws}}
        return weights | {"hierarchy": {"depth": self.objective.model.depth}}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The protocol with the effective sample sizes."""
        protocol = self.protocol()
        return protocol | {"importance_weights": protocol["importance_weights"] | effective_sizes(diagnostics)}
