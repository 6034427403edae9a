"""The reverse step of a Gaussian diffusion as one object: ``p(z_s|z_t)``, to draw from, to evaluate, to compare.

Sampling, the consistency form of the bound, a VDM as a hierarchical VAE, importance weights and
`VDMScheduler.transition_log_prob` all use this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.gaussian import broadcast, sum_dimensions


@dataclass(frozen=True)
class ReverseKernel:
    """``N(mean, scale^2)`` in each dimension: a reverse step from t to s, or its target ``q(z_s|z_t, x)``.

    With ``c = -expm1(gamma_s - gamma_t)``, the mean is ``alpha_s ((1-c) z_t / alpha_t + c x_hat)``, the same as
    ``alpha_s / alpha_t (z_t - c sigma_t eps_hat)``, and the variance ``sigma_s^2 c`` (VDM eq. 29 to 32), divided by
    ``exp(log_ratio)`` where the model has another (`ReverseVariance`).

    Attributes:
        mean: (B, *data).
        scale: The standard deviation, which broadcasts with it.

    >>> zero, eps = torch.zeros(2, 3), torch.ones(2, 3)
    >>> kernel = ReverseKernel.from_data(zero, zero, torch.tensor(-1.0), torch.tensor(1.0))
    >>> kernel.log_prob(kernel.sample(eps)).shape, float(kernel.kl(kernel).sum())
    (torch.Size([2]), 0.0)
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def from_data(
        cls, z_t: Tensor, x: Tensor, gamma_s: Tensor, gamma_t: Tensor, log_ratio: Tensor | None = None
    ) -> Self:
        """The step at an estimate of the data: of the data themselves it is ``q(z_s|z_t, x)``.

        Args:
            z_t: (B, *data).
            x: Its estimate, likewise.
            gamma_s: Where the step ends: (), (B,) or (B, *data).
            gamma_t: Where it begins, likewise.
            log_ratio: ``log(v_q / v_p)``; the posterior's own variance where not given.
        """
        weight_z, weight_x, variance = gaussian.posterior(broadcast(gamma_s, z_t), broadcast(gamma_t, z_t))
        return cls(weight_z * z_t + weight_x * x, _scale(variance, log_ratio))

    @classmethod
    def from_noise(
        cls, z_t: Tensor, eps_hat: Tensor, gamma_s: Tensor, gamma_t: Tensor, log_ratio: Tensor | None = None
    ) -> Self:
        """The step at an estimate of the noise in ``z_t``; see `from_data`."""
        level_s, level_t = broadcast(gamma_s, z_t), broadcast(gamma_t, z_t)
        c = -torch.expm1(level_s - level_t)
        mean = gaussian.alpha(level_s) / gaussian.alpha(level_t) * (z_t - c * gaussian.sigma(level_t) * eps_hat)
        return cls(mean, _scale(torch.sigmoid(level_s) * c, log_ratio))

    def sample(self, eps: Tensor) -> Tensor:
        """A draw by the standard normal ``eps``, (B, *data)."""
        return self.mean + self.scale * eps

    def log_prob(self, z_s: Tensor) -> Tensor:
        """``log p(z_s|z_t)``, per datum, (B,), nats."""
        whitened = (z_s - self.mean) / self.scale
        return -sum_dimensions(0.5 * (whitened**2 + math.log(2 * math.pi)) + self.scale.log())

    def kl(self, other: ReverseKernel) -> Tensor:
        """``KL(self || other)``, per datum, (B,), nats.

        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> float(ReverseKernel(zero, one).kl(ReverseKernel(2 * one, one)))
        2.0
        """
        variance, other_variance = (one.scale.expand_as(one.mean) ** 2 for one in (self, other))
        return sum_dimensions(gaussian.kl_divergence(self.mean, variance, other.mean, other_variance))


def _scale(variance: Tensor, log_ratio: Tensor | None) -> Tensor:
    scale = variance.sqrt()
    return scale if log_ratio is None else scale * torch.exp(-0.5 * log_ratio)
