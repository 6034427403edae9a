r"""Dequantisation: a density over z_0 turned into a probability of levels.

A level x owns a bin of width Delta around it (2/K under ``bin_centers``); a density ``p_0(z_0)`` gives it the mass
``P(x) = int_bin alpha_0^D p_0(alpha_0 y) dy``. With any ``q(z_0|x)`` on the bin, Jensen's inequality bounds it:

    log P(x) >= E_q[log p_0(z_0) - log q(z_0|x)] = E_q[log p_0(z_0)] + H(q).

So the entropy is as much a part of a likelihood in bits as the density. Importance weights need ``log q`` at the draw
itself, and not its mean: the two differ for every q but the uniform one.

Sources: uniform, Theis et al., arXiv 1511.01844; truncated normal, Zheng et al. (i-DODE), arXiv 2305.03935, and Sahoo
et al. (MuLAN), arXiv 2312.13236.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_hub.diffusion.gaussian import sum_dimensions
from vdm_hub.errors import unknown_name


@dataclass(frozen=True)
class Dequantized:
    """A draw from ``q(z_0|x)``.

    Attributes:
        z_0: The draw, (B, *data), float64.
        log_q: ``log q(z_0|x)`` of this very draw per datum, (B,), nats: for importance weights.
        entropy: ``H(q) = -E log q`` per datum, (B,), nats: for the bound.
    """

    z_0: Tensor
    log_q: Tensor
    entropy: Tensor


class Dequantization(ABC):
    """``q(z_0|x)``, supported on the bin of x in the space of ``z_0 = alpha_0 (x + ...)``."""

    @abstractmethod
    def draw(self, x: Tensor, gamma_0: Tensor, spacing: float, uniform: Tensor) -> Dequantized:
        """A draw from base noise.

        Args:
            x: The data on their levels, (B, *data).
            gamma_0: gamma at time 0, which broadcasts to x.
            spacing: Delta, the distance between two levels: `DataScaling.spacing`.
            uniform: Base noise from [0, 1), (B, *data).
        """


class UniformDequantization(Dequantization):
    """``z_0 = alpha_0 (x + u)``, u uniform on the bin: ``H = D ln(alpha_0 Delta)``.

    >>> draw = UniformDequantization().draw(
    ...     torch.zeros(1, 3), torch.tensor(-13.3), spacing=2 / 256, uniform=torch.rand(1, 3)
    ... )
    >>> round(float(draw.entropy), 4), bool(draw.log_q == -draw.entropy)
    (-14.5561, True)
    """

    def draw(self, x: Tensor, gamma_0: Tensor, spacing: float, uniform: Tensor) -> Dequantized:
        """A draw: see `Dequantization.draw`."""
        log_alpha, _ = _log_alpha_sigma(gamma_0)
        z_0 = torch.exp(log_alpha) * (x.double() + spacing * (uniform.double() - 0.5))
        entropy = sum_dimensions((log_alpha + math.log(spacing)).expand_as(x))
        return Dequantized(z_0, -entropy, entropy)


class TruncatedNormalDequantization(Dequantization):
    """``z_0 = alpha_0 x + sigma_0 eps``, eps a standard normal cut to the bin, ``[-tau, tau]``.

    It is what q(z_0|x) of the diffusion draws, except that it stays inside the bin. With ``tau = alpha_0 Delta /
    (2 sigma_0)`` (bin centres: alpha_0 / (K sigma_0), 3.0187 at gamma_0 = -13.3, K = 256), ``Z = erf(tau / sqrt 2)``
    and the normal density phi, ``H = D [ln sigma_0 + 1/2 ln(2 pi e) + ln Z - tau phi(tau) / Z]`` (i-DODE).

    >>> draw = TruncatedNormalDequantization().draw(
    ...     torch.zeros(1, 1), torch.tensor(-13.3), spacing=2 / 256, uniform=torch.tensor([[0.5]])
    ... )
    >>> round(float(draw.z_0), 6), round(float(draw.entropy), 4)
    (0.0, -5.2463)
    """

    def draw(self, x: Tensor, gamma_0: Tensor, spacing: float, uniform: Tensor) -> Dequantized:
        """A draw: see `Dequantization.draw`."""
        log_alpha, log_sigma = _log_alpha_sigma(gamma_0)
        tau = torch.exp(log_alpha - log_sigma) * spacing / 2
        mass = torch.special.erf(tau / math.sqrt(2))
        quantile = (2 * uniform.double() - 1).clamp(min=-1 + 2**-53)  # a draw of 0 is no draw of infinity
        eps = math.sqrt(2) * torch.special.erfinv(quantile * mass)
        eps = eps.clamp(-tau, tau)  # rounding must not leave the bin
        log_normaliser = log_sigma + 0.5 * math.log(2 * math.pi) + mass.log()
        density = torch.exp(-0.5 * tau**2) / math.sqrt(2 * math.pi)
        entropy = sum_dimensions((log_normaliser + 0.5 - tau * density / mass).expand_as(x))
        log_q = -sum_dimensions(0.5 * eps**2 + log_normaliser)
        return Dequantized(torch.exp(log_alpha) * x.double() + torch.exp(log_sigma) * eps, log_q, entropy)


def draw_of_latents(mean: Tensor, scale: Tensor, gamma_0: Tensor, eps: Tensor) -> Dequantized:
    """A draw ``z_0 = alpha_0 y``, ``y = mean + scale eps`` from an encoder's ``q(y|x)``, in place of a dequantisation.

    Latents have a density as they are, so that nothing is dequantised: ``log q(z_0|x) = log q(y|x) - D ln alpha_0``.

    Args:
        mean: Of ``q(y|x)``, (B, *latent), as scale.
        scale: Its deviations.
        gamma_0: gamma at time 0, which broadcasts to them.
        eps: A standard normal draw, (B, *latent), float64.

    >>> one = torch.ones(1, 2, dtype=torch.float64)
    >>> draw = draw_of_latents(0 * one, one, torch.tensor(-40.0), 0 * one)
    >>> round(float(draw.log_q), 4), round(float(draw.entropy), 4)  # of two standard normals at 0, and on average
    (-1.8379, 2.8379)
    """
    log_alpha, _ = _log_alpha_sigma(gamma_0)
    volume = sum_dimensions((scale.double().log() + log_alpha).expand_as(eps) + 0.5 * math.log(2 * math.pi))
    z_0 = torch.exp(log_alpha) * (mean.double() + scale.double() * eps)
    return Dequantized(z_0, -sum_dimensions(0.5 * eps**2) - volume, 0.5 * eps[0].numel() + volume)


_KINDS: dict[str, Dequantization] = {
    "uniform": UniformDequantization(),
    "truncated_normal": TruncatedNormalDequantization(),
}


def dequantization(name: str) -> Dequantization:
    """The dequantisation of that name.

    >>> type(dequantization("uniform")).__name__
    'UniformDequantization'
    """
    if name not in _KINDS:
        raise unknown_name("dequantization", name, _KINDS)
    return _KINDS[name]


def _log_alpha_sigma(gamma: Tensor) -> tuple[Tensor, Tensor]:
    gamma = gamma.double()
    return 0.5 * F.logsigmoid(-gamma), 0.5 * F.logsigmoid(gamma)
