r"""The bound of a Markovian hierarchical VAE: the same named terms as a diffusion model's, and their other forms.

With latents ``z_1..z_T`` and ``z_0 = x``, ``-log p(x) <= E_q[log q(z_1..z_T|x) - log p(x, z_1..z_T)]`` (Luo, arXiv
2208.11970, eq. 25 to 28). Its terms, grouped by latent (as Luo eq. 44 does for a VDM):

    reconstruction   E[-log p(x|z_1)]
    consistency_t    E[log q(z_t|z_{t-1}) - log p(z_t|z_{t+1})],  t = 1..T-1
    prior            E[KL(q(z_T|z_{T-1}) || N(0, I))]

At T = 1 these are the two terms of the VAE (Luo eq. 19).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.forward_process import Noise
from vdm_hub.diffusion.gaussian import sum_dimensions
from vdm_hub.errors import DataError
from vdm_hub.models.hvae import MarkovianHVAE, Normal
from vdm_hub.objectives.variational_bound import Batch, Bound, Objective, Terms


class HierarchicalObjective(Objective):
    """A form of a hierarchical VAE's bound; all latents are drawn in every evaluation, so times are not read."""

    def __init__(self, model: MarkovianHVAE) -> None:
        super().__init__()
        self.model = model

    @property
    def body(self) -> nn.Module:
        """The hierarchical VAE."""
        return self.model

    def forward(self, batch: Batch, times: Tensor, noise: Noise) -> Bound:
        """The terms, each per datum, (B,), in nats."""
        levels = batch["levels"]
        _check_levels(levels, self.model.num_levels)
        draws = [noise[f"latent_{t}"] for t in range(1, self.model.depth + 1)]
        return Bound(self.terms(levels, draws), dimensions=levels[0].numel())

    @abstractmethod
    def terms(self, levels: Tensor, noise: Sequence[Tensor]) -> Terms:
        """The terms from one standard normal for each latent, ``z_1`` first."""

    def draw_noise(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """The noise ``latent_1`` to ``latent_T``, standard normal."""
        levels = batch["levels"]
        shapes = [(levels.shape[0], *shape) for shape in self.model.latent_shapes]
        return {f"latent_{t}": normal_noise(shape, generator, levels.device) for t, shape in enumerate(shapes, 1)}


class HVAEObjective(HierarchicalObjective):
    """The bound of a hierarchical VAE, to train and to evaluate; the prior's KL in closed form.

    Everything but the networks runs in float32 or better, outside autocast.

    >>> model = MarkovianHVAE(sample_size=8, in_channels=1, num_levels=17, depth=2, latent_shapes=[(4,)])
    >>> objective, batch = HVAEObjective(model), {"levels": torch.zeros(3, 1, 8, 8, dtype=torch.long)}
    >>> bound = objective(batch, torch.zeros(3), objective.draw_noise(batch, torch.Generator().manual_seed(0)))
    >>> {name: tuple(term.shape) for name, term in bound.terms.items()}
    {'reconstruction': (3,), 'consistency_1': (3,), 'prior': (3,)}
    """

    def terms(self, levels: Tensor, noise: Sequence[Tensor]) -> Terms:
        """The terms ``reconstruction``, ``consistency_1`` to ``consistency_{T-1}`` and ``prior``."""
        model, dtype = self.model, torch.promote_types(noise[0].dtype, torch.float32)
        climbed = list(model.climb(model.scale(levels, dtype), noise))
        terms = {"reconstruction": -model.log_likelihood(levels, climbed[0][1])}
        for t in range(1, model.depth):
            (q, z), (_, above) = climbed[t - 1], climbed[t]
            terms[f"consistency_{t}"] = log_density(q, z) - log_density(model.decode(t, above), z)
        terms["prior"] = standard_kl(climbed[-1][0])
        return terms


class JointHVAEObjective(HierarchicalObjective):
    """The same bound with nothing in closed form: ``log q(z|x) - log p(x, z)`` at one draw of all latents."""

    def terms(self, levels: Tensor, noise: Sequence[Tensor]) -> Terms:
        """The terms of `HVAEObjective`, the prior's sampled."""
        model, dtype = self.model, torch.promote_types(noise[0].dtype, torch.float32)
        return joint_terms(model, levels, model.latents(model.scale(levels, dtype), noise))


def joint_terms(model: MarkovianHVAE, levels: Tensor, latents: Sequence[Tensor]) -> Terms:
    """``log q(z_1..z_T|x) - log p(x, z_1..z_T)`` at given latents, in the terms of `HVAEObjective`, (B,), nats.

    Args:
        model: The model.
        levels: x, integers, (B, C, H, W).
        latents: ``z_1`` to ``z_T``, of whatever origin.
    """
    below = [model.scale(levels, latents[0].dtype), *latents]
    terms = {"reconstruction": -model.log_likelihood(levels, latents[0])}
    for t in range(1, model.depth + 1):
        log_q = log_density(model.encode(t, below[t - 1]), below[t])
        if t == model.depth:
            zero, one = torch.zeros_like(below[t]), torch.ones_like(below[t])
            terms["prior"] = log_q - log_density(Normal(zero, one), below[t])
        else:
            terms[f"consistency_{t}"] = log_q - log_density(model.decode(t, below[t + 1]), below[t])
    return terms


def log_density(normal: Normal, z: Tensor) -> Tensor:
    """``log N(z; mean, scale^2)`` in nats, (B, *latent) -> (B,)."""
    standard = (z - normal.mean) / normal.scale
    return -sum_dimensions(0.5 * standard**2 + normal.scale.log() + 0.5 * math.log(2 * math.pi))


def standard_kl(normal: Normal) -> Tensor:
    """``KL(N(mean, scale^2) || N(0, I))`` in nats, (B, *latent) -> (B,)."""
    zero, one = torch.zeros_like(normal.mean), torch.ones_like(normal.mean)
    return sum_dimensions(gaussian.kl_divergence(normal.mean, normal.scale**2, zero, one))


def _check_levels(levels: Tensor, num_levels: int) -> None:
    """Refuse values that are no levels; on a CPU only, where looking costs no synchronisation, and not compiled."""
    if levels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high >= num_levels:
        raise DataError(f"the batch holds levels {low} to {high}, and the model knows 0 to {num_levels - 1}.")
