r"""Two linear targets whose networks read another latent than the VDM's, which is a scaled one all the same.

Rectified flow's latent ``(1 - u) x + u eps``, ``u = sigma/(alpha + sigma)``, is ``z/(alpha + sigma)``; EDM's
``x + s eps``, ``s = sigma/alpha``, is ``z/alpha``. So both are the VDM at the same signal-to-noise ratio.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vdm_hub import ConfigurationError, Parameterization, alpha, sigma


class FlowPrediction(Parameterization):
    """Rectified flow's velocity ``F = eps - x``, for a network that reads ``(1 - u) x + u eps``.

    It is the target of diffusers' flow-matching examples and of its ``flow_prediction``: Liu et al., *Flow Straight
    and Fast*, arXiv 2209.03003, eq. 1; Esser et al., arXiv 2403.03206, eq. 13.

    >>> gamma, z = torch.zeros(1), torch.ones(1, 1)  # u = 1/2: the network reads z / sqrt(2)
    >>> float(FlowPrediction().x_hat(torch.zeros(1, 1), z, gamma)), float(FlowPrediction().input_scale(gamma))
    (0.7071067690849304, 0.7071067690849304)
    """

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``(-1, 1)``."""
        return -torch.ones_like(gamma), torch.ones_like(gamma)

    def input_scale(self, gamma: Tensor) -> Tensor:
        """``1/(alpha + sigma)``."""
        return 1 / (alpha(gamma) + sigma(gamma))


class EDMPrediction(Parameterization):
    r"""EDM's target: ``F = (x - c_skip y)/c_out`` with ``y = x + s eps``, for a network that reads ``c_in y``.

    With ``s = sigma/alpha``, ``c_skip = sd^2/(s^2 + sd^2)``, ``c_out = s sd/sqrt(s^2 + sd^2)`` and
    ``c_in = 1/sqrt(s^2 + sd^2)`` (Karras et al., arXiv 2206.00364, eq. 7 and table 1):

        F = (sigma/sd x - sd alpha eps)/n,   c_in y = z/n,   n = sqrt(sigma^2 + sd^2 alpha^2).

    Args:
        sigma_data: sd, the standard deviation of the data as they are encoded.

    >>> a, b = EDMPrediction(0.5).coefficients(torch.tensor([0.0]))  # sigma = alpha: n = sqrt(1.25) sigma
    >>> round(float(a), 4), round(float(b), 4)
    (1.7889, -0.4472)
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_data < math.inf:
            raise ConfigurationError(f"the target 'edm' got sigma_data={sigma_data}: give a finite number above 0.")
        self.sigma_data = float(sigma_data)

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``(sigma/(sd n), -sd alpha/n)``."""
        scale, sd = self.input_scale(gamma), self.sigma_data
        return scale * sigma(gamma) / sd, -scale * alpha(gamma) * sd

    def input_scale(self, gamma: Tensor) -> Tensor:
        """``1/n``."""
        return torch.rsqrt(torch.sigmoid(gamma) + self.sigma_data**2 * torch.sigmoid(-gamma))

    def to_config(self) -> dict[str, Any]:
        """``sigma_data``."""
        return {"sigma_data": self.sigma_data}
