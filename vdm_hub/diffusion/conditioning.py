"""What the network is told of the noise level: ``tau(gamma)``, fixed and strictly increasing. It never sees t.

So a learned schedule, its published table, a stock sampler and an imported DDPM all speak to the network alike, and
the continuous-time bound does not depend on the schedule's shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.errors import ConfigurationError


class Conditioning(ABC):
    """A strictly increasing map from gamma to the timestep that a network reads."""

    integer_timesteps: bool = True
    """Whether the integers 0..num_train_timesteps-1 stand for noise levels, so that a table of betas can be made of
    them for stock samplers; a conditioning with another range says no."""

    @classmethod
    @abstractmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> Conditioning:
        """The conditioning that suits a schedule at the start of training."""

    @abstractmethod
    def __call__(self, gamma: Tensor) -> Tensor:
        """The timestep ``tau(gamma)``, elementwise."""

    @abstractmethod
    def inverse(self, timestep: Tensor) -> Tensor:
        """The gamma of a timestep, elementwise."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""


class AffineConditioning(Conditioning):
    """``tau = (T-1) (gamma - gamma_min) / (gamma_max - gamma_min)`` with constants that never follow a schedule.

    Args:
        gamma_min: Where the timestep is 0.
        gamma_max: Where the timestep is T - 1.
        num_train_timesteps: T.

    >>> AffineConditioning()(torch.tensor([-13.3, 5.0]))
    tensor([  0., 999.])
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, num_train_timesteps: int = 1000) -> None:
        if not gamma_min < gamma_max:
            raise ConfigurationError(
                f"affine conditioning got gamma_min={gamma_min} and gamma_max={gamma_max}: gamma_min must be smaller."
            )
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)
        self.num_train_timesteps = num_train_timesteps

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> AffineConditioning:
        # Rounded, so that a float32 parameter of -13.3 gives the constant -13.3.
        first, last = (float(f"{gamma:.6g}") for gamma in schedule.endpoints())
        return cls(first, last, num_train_timesteps)

    def __call__(self, gamma: Tensor) -> Tensor:
        # Divided first: gamma_max is then exactly T - 1, in float32 too.
        return (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min) * (self.num_train_timesteps - 1)

    def inverse(self, timestep: Tensor) -> Tensor:
        return timestep / (self.num_train_timesteps - 1) * (self.gamma_max - self.gamma_min) + self.gamma_min

    def to_config(self) -> dict[str, Any]:
        return {
            "gamma_min": self.gamma_min,
            "gamma_max": self.gamma_max,
            "num_train_timesteps": self.num_train_timesteps,
        }


class TableConditioning(Conditioning):
    """Interpolation through ``(gamma_i, i)``: the integer timesteps that a network trained on a beta table knows.

    Args:
        gammas: Entry i is the gamma whose timestep is i; strictly increasing.

    >>> TableConditioning([-5.0, 0.0, 5.0])(torch.tensor([-5.0, 2.5]))
    tensor([0.0000, 1.5000])
    """

    def __init__(self, gammas: Sequence[float]) -> None:
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # of each device, so that it is copied there once
        self._gammas = torch.as_tensor(gammas, dtype=torch.float64)
        if self._gammas.numel() < 2 or bool((self._gammas.diff() <= 0).any()):
            raise ConfigurationError("table conditioning needs at least two strictly increasing values of gamma.")

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> TableConditioning:
        with torch.no_grad():
            return cls(schedule(torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)).tolist())

    def __call__(self, gamma: Tensor) -> Tensor:
        gammas, timesteps = self._table(gamma.device)
        return _interpolate(gamma.double(), gammas, timesteps).to(gamma.dtype)

    def inverse(self, timestep: Tensor) -> Tensor:
        gammas, timesteps = self._table(timestep.device)
        return _interpolate(timestep.double(), timesteps, gammas).to(timestep.dtype)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            gammas = self._gammas.to(device)
            self._tables[device] = (gammas, torch.arange(gammas.numel()).to(gammas))
        return self._tables[device]

    def to_config(self) -> dict[str, Any]:
        return {"gammas": self._gammas.tolist()}


def _interpolate(value: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The values of the piecewise linear function through increasing knots, continued linearly beyond them."""
    index = (torch.searchsorted(inputs, value.detach().contiguous(), right=True) - 1).clamp(0, inputs.numel() - 2)
    slope = (outputs[index + 1] - outputs[index]) / (inputs[index + 1] - inputs[index])
    return outputs[index] + (value - inputs[index]) * slope
