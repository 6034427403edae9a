r"""What the network predicts. Every linear target is ``F = a(gamma) x + b(gamma) eps`` (Luo section 4; VDM++ App. D).

A new target is one class with one method, `Parameterization.coefficients`. Everything else follows once, here: with
``z = alpha x + sigma eps`` and ``d = a sigma - b alpha``,

    x_hat = (sigma F - b z) / d,   eps_hat = (a z - alpha F) / d,   |eps - eps_hat|^2 = (alpha / d)^2 |target - F|^2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.gaussian import alpha, broadcast, sigma


class Parameterization(ABC):
    """One target; all tensors broadcast, gamma of shape (B,) or (B, *data)."""

    @abstractmethod
    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``(a, b)`` of ``F = a x + b eps``, shaped like gamma."""

    def input_scale(self, gamma: Tensor) -> Tensor:
        """The factor on z_t before the network sees it."""
        return torch.ones_like(gamma)

    def output_scale(self, gamma: Tensor) -> Tensor:
        """The factor on the network's raw output that makes it F: for targets too large for a network to emit."""
        return torch.ones_like(gamma)

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}

    def target(self, x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
        """``F = a x + b eps``."""
        a, b = self.coefficients(broadcast(gamma, x))
        return a * x + b * eps

    def x_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        """The data that the output implies: ``(sigma F - b z) / d``."""
        gamma = broadcast(gamma, z)
        a, b = self.coefficients(gamma)
        return (sigma(gamma) * output - b * z) / self._determinant(a, b, gamma)

    def eps_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        """The noise that the output implies: ``(a z - alpha F) / d``."""
        gamma = broadcast(gamma, z)
        a, b = self.coefficients(gamma)
        return (a * z - alpha(gamma) * output) / self._determinant(a, b, gamma)

    def score_hat(self, output: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
        """The score of the marginal that the output implies: ``-eps_hat / sigma`` (Luo eq. 151, Tweedie)."""
        return -self.eps_hat(output, z, gamma) / sigma(broadcast(gamma, z))

    def eps_error(self, output: Tensor, x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
        """``|eps - eps_hat|^2`` elementwise, as ``(alpha / d)^2 |target - F|^2``: nothing large cancels."""
        gamma = broadcast(gamma, x)
        a, b = self.coefficients(gamma)
        ratio = alpha(gamma) / self._determinant(a, b, gamma)
        return (ratio * (a * x + b * eps - output)) ** 2

    def _determinant(self, a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
        return a * sigma(gamma) - b * alpha(gamma)


class Epsilon(Parameterization):
    """The noise: ``F = eps`` (DDPM; Luo eq. 130).

    >>> gamma, z, eps = torch.zeros(1), torch.ones(1, 1), torch.zeros(1, 1)
    >>> float(Epsilon().x_hat(eps, z, gamma))  # z / alpha
    1.4142135381698608
    """

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(gamma), torch.ones_like(gamma)


class Sample(Parameterization):
    """The data: ``F = x`` (Luo eq. 99)."""

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(gamma), torch.zeros_like(gamma)


class Score(Parameterization):
    """The score: ``F = grad log q(z_t) = -eps / sigma`` (Luo eq. 148), up to 773 a unit at gamma = -13.3.

    So the network's raw output is scaled by ``1 / sigma``.
    """

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(gamma), -1 / sigma(gamma)

    def output_scale(self, gamma: Tensor) -> Tensor:
        return 1 / sigma(gamma)


class Velocity(Parameterization):
    """The velocity: ``F = alpha eps - sigma x`` (Salimans and Ho, arXiv 2202.00512, section 4)."""

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma(gamma), alpha(gamma)
