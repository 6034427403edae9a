"""What the networks of rectified flow and of EDM read of the noise level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdm_hub import Conditioning, ConfigurationError, NoiseSchedule


class FlowTime(Conditioning):
    """``tau = T u``, ``u = sigma/(alpha + sigma) = sigmoid(gamma/2)``: flow matching's own time, from data to noise.

    diffusers' flow-matching schedulers give their networks ``sigma * num_train_timesteps`` with u for sigma.

    Args:
        num_train_timesteps: T.

    >>> FlowTime()(torch.tensor([-2.0, 0.0]))
    tensor([268.9414, 500.0000])
    """

    integer_timesteps = False

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
            raise ConfigurationError(
                f"flow_time got num_train_timesteps={num_train_timesteps!r}: give a whole number of at least 1."
            )
        self.num_train_timesteps = num_train_timesteps

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> FlowTime:
        """The same for every schedule."""
        return cls(num_train_timesteps)

    def __call__(self, gamma: Tensor) -> Tensor:
        """``T sigmoid(gamma/2)``."""
        return self.num_train_timesteps * torch.sigmoid(gamma / 2)

    def inverse(self, timestep: Tensor) -> Tensor:
        """``2 logit(tau/T)``."""
        return 2 * torch.logit(timestep / self.num_train_timesteps)

    def to_config(self) -> dict[str, Any]:
        """``num_train_timesteps``."""
        return {"num_train_timesteps": self.num_train_timesteps}


class EDMNoise(Conditioning):
    """``c_noise = ln(s)/4 = gamma/8``, ``s = sigma/alpha`` (Karras et al., arXiv 2206.00364, table 1).

    >>> EDMNoise()(torch.tensor([-8.0, 4.0]))
    tensor([-1.0000,  0.5000])
    """

    integer_timesteps = False

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> EDMNoise:
        """The same for every schedule."""
        return cls()

    def __call__(self, gamma: Tensor) -> Tensor:
        """``gamma/8``."""
        return gamma / 8

    def inverse(self, timestep: Tensor) -> Tensor:
        """``8 c_noise``."""
        return 8 * timestep

    def to_config(self) -> dict[str, Any]:
        """No arguments."""
        return {}
