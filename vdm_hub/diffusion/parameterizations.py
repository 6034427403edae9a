r"""What the network predicts. Every linear target is ``F = a(gamma) x + b(gamma) eps`` (Luo section 4; VDM++ App. D).

A new target is one class with one method, `Parameterization.coefficients`. Everything else follows once, here: with
``z = alpha x + sigma eps`` and ``d = a sigma - b alpha``,

    x_hat = (sigma F - b z) / d,   eps_hat = (a z - alpha F) / d,   |eps - eps_hat|^2 = (alpha / d)^2 |target - F|^2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.gaussian import alpha, broadcast, sigma
from vdm_hub.errors import ConfigurationError, unknown_name


class Parameterization(ABC):
    """One target; all tensors broadcast, gamma of shape (B,) or (B, *data)."""

    networks_scale: bool = False
    """Whether its networks bring what they read and emit to a size that suits them, so that nothing here need."""

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


# ---- targets whose networks read another latent, which is a scaled one all the same ---------------------------------


class FlowPrediction(Parameterization):
    """Rectified flow's velocity ``F = eps - x``, for a network that reads ``(1 - u) x + u eps = z/(alpha + sigma)``.

    With ``u = sigma/(alpha + sigma)`` it is the VDM at the same signal-to-noise ratio. It is the target of diffusers'
    flow-matching schedulers: Liu et al., arXiv 2209.03003, eq. 1; Esser et al., arXiv 2403.03206, eq. 13.

    >>> gamma, z = torch.zeros(1), torch.ones(1, 1)  # u = 1/2: the network reads z / sqrt(2)
    >>> float(FlowPrediction().x_hat(torch.zeros(1, 1), z, gamma)), float(FlowPrediction().input_scale(gamma))
    (0.7071067690849304, 0.7071067690849304)
    """

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(gamma), torch.ones_like(gamma)

    def input_scale(self, gamma: Tensor) -> Tensor:
        return 1 / (alpha(gamma) + sigma(gamma))


class EDMPrediction(Parameterization):
    r"""EDM's target: ``F = (x - c_skip y)/c_out`` with ``y = x + s eps``, for a network that reads ``c_in y``.

    With ``s = sigma/alpha``, ``c_skip = sd^2/(s^2 + sd^2)``, ``c_out = s sd/sqrt(s^2 + sd^2)`` and
    ``c_in = 1/sqrt(s^2 + sd^2)`` (Karras et al., arXiv 2206.00364, eq. 7 and table 1):

        F = (sigma/sd x - sd alpha eps)/n,   c_in y = z/n,   n = sqrt(sigma^2 + sd^2 alpha^2).

    Args:
        sigma_data: sd, the standard deviation of the data as they are encoded.
        prediction_type: ``epsilon``, or ``v_prediction`` for the other sign of c_out, as diffusers' EDM schedulers
            name the two.

    >>> a, b = EDMPrediction(0.5).coefficients(torch.tensor([0.0]))  # sigma = alpha: n = sqrt(1.25) sigma
    >>> round(float(a), 4), round(float(b), 4)
    (1.7889, -0.4472)
    """

    def __init__(self, sigma_data: float = 0.5, prediction_type: str = "epsilon") -> None:
        if not 0 < sigma_data < math.inf:
            raise ConfigurationError(f"the target 'edm' got sigma_data={sigma_data}: give a finite number above 0.")
        if prediction_type not in _EDM_SIGNS:
            raise unknown_name("prediction_type of the target 'edm'", prediction_type, _EDM_SIGNS)
        self.sigma_data, self.prediction_type = float(sigma_data), prediction_type

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        scale, sd = _EDM_SIGNS[self.prediction_type] * self.input_scale(gamma), self.sigma_data
        return scale * sigma(gamma) / sd, -scale * alpha(gamma) * sd

    def input_scale(self, gamma: Tensor) -> Tensor:
        return torch.rsqrt(torch.sigmoid(gamma) + self.sigma_data**2 * torch.sigmoid(-gamma))

    def to_config(self) -> dict[str, Any]:
        return {"sigma_data": self.sigma_data, "prediction_type": self.prediction_type}


_EDM_SIGNS = {"epsilon": 1.0, "v_prediction": -1.0}


class VEScore(Parameterization):
    r"""The score of ``y = x + s eps``, ``F = grad log q(y) = -eps/s``, for a network that reads ``y = z/alpha``.

    It is what the networks of the variance-exploding SDE give (Song et al., arXiv 2011.13456, eq. 9 and app. B), with
    ``s = sigma/alpha``.

    >>> gamma, z = torch.zeros(1), torch.ones(1, 1)  # s = 1
    >>> float(VEScore().eps_hat(torch.full((1, 1), -2.0), z, gamma)), float(VEScore().input_scale(gamma))
    (2.0, 1.4142135381698608)
    """

    networks_scale = True  # NCSN++ divides by s what it emits (`UNet2DModel` with Fourier features does)

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(gamma), -torch.exp(-gamma / 2)

    def input_scale(self, gamma: Tensor) -> Tensor:
        return 1 / alpha(gamma)
