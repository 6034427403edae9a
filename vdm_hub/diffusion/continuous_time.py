r"""The stochastic differential equation under Gaussian diffusion, forward and back in time.

The latents of a schedule are the solution of ``dz = f z dt + g dW``, ``f = d log alpha/dt``, ``g^2 = sigma^2 gamma'``
(SDE eq. 5; VDM eq. 19), started from the data. Its transition density satisfies Kolmogorov's equations (Feller, *On
the theory of stochastic processes*, Berkeley Symposium, 1949):

    forward, in (t, z_t):    d_t q = -d_z (f z q) + 1/2 g^2 d_z^2 q
    backward, in (s, z_s):  -d_s q = f z_s d_{z_s} q + 1/2 g^2 d_{z_s}^2 q

Time runs back by the reverse SDE ``dz = (f z - g^2 score) dt + g dW`` (SDE eq. 6), and without noise, with the same
marginals, by the probability-flow ODE ``dz = (f z - 1/2 g^2 score) dt`` (SDE eq. 13).

Sources: SDE is Song et al., arXiv 2011.13456; VDM is Kingma et al., arXiv 2107.00630.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.gaussian import broadcast
from vdm_hub.diffusion.noise_schedules import Gamma, gamma_and_derivative


class DiffusionSDE:
    """Drift and diffusion of a schedule, per dimension; gamma may differ between pixels.

    Args:
        gamma: A function of t: a `NoiseSchedule`, or what one is when bound to a batch.

    >>> from vdm_hub.diffusion.noise_schedules import LinearSchedule
    >>> sde, z, t = DiffusionSDE(LinearSchedule(-5.0, 5.0)), torch.ones(1, 1), torch.tensor([0.5])
    >>> float(sde.drift(z, t)), float(sde.diffusion_squared(z, t))  # -1/2 sigma^2 gamma' z, sigma^2 gamma'
    (-2.5, 5.0)
    """

    def __init__(self, gamma: Gamma) -> None:
        self.gamma = gamma

    def coefficients(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(f, g^2)`` at times t, (B,) or (), to multiply z, (B, *data)."""
        f, g_squared = gaussian.sde_coefficients(*gamma_and_derivative(self.gamma, t.expand(z.shape[0])))
        return broadcast(f, z), broadcast(g_squared, z)

    def gamma_at(self, t: Tensor, z: Tensor) -> Tensor:
        """Gamma at times t, (B,) or (), to multiply z, (B, *data)."""
        return broadcast(self.gamma(t.expand(z.shape[0])), z)

    def drift(self, z: Tensor, t: Tensor) -> Tensor:
        """``f z``, forward in time."""
        return self.coefficients(z, t)[0] * z

    def diffusion_squared(self, z: Tensor, t: Tensor) -> Tensor:
        """``g^2``, the same forward and back."""
        return self.coefficients(z, t)[1].expand_as(z)

    def reverse_drift(self, z: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """``f z - g^2 score``, of the SDE back in time (SDE eq. 6).

        Args:
            z: The latents at t, (B, *data).
            t: Times, (B,) or ().
            score: ``grad log q(z_t)``, which any target gives: `Parameterization.score_hat`.
        """
        f, g_squared = self.coefficients(z, t)
        return f * z - g_squared * score

    def flow_drift(self, z: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """``f z - 1/2 g^2 score``, of the probability-flow ODE (SDE eq. 13); arguments as `reverse_drift`."""
        f, g_squared = self.coefficients(z, t)
        return f * z - 0.5 * g_squared * score

    def log_transition(self, z_t: Tensor, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``log q(z_t|z_s)`` elementwise in nats, s < t: the density that solves Kolmogorov's equations."""
        gain, variance = gaussian.transition(self.gamma_at(s, z_t), self.gamma_at(t, z_t))
        return -0.5 * ((z_t - gain * z_s) ** 2 / variance + torch.log(2 * math.pi * variance))
