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
from vdm_hub.fields import whole_number


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
        self.num_train_timesteps = whole_number("num_train_timesteps of 'flow_time'", num_train_timesteps)

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> FlowTime:
        return cls(num_train_timesteps)

    def __call__(self, gamma: Tensor) -> Tensor:
        return self.num_train_timesteps * torch.sigmoid(gamma / 2)

    def inverse(self, timestep: Tensor) -> Tensor:
        return 2 * torch.logit(timestep / self.num_train_timesteps)

    def to_config(self) -> dict[str, Any]:
        return {"num_train_timesteps": self.num_train_timesteps}


class EDMNoise(Conditioning):
    """``c_noise = ln(s)/4 = gamma/8``, ``s = sigma/alpha`` (Karras et al., arXiv 2206.00364, table 1).

    >>> EDMNoise()(torch.tensor([-8.0, 4.0]))
    tensor([-1.0000,  0.5000])
    """

    integer_timesteps = False

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> EDMNoise:
        return cls()

    def __call__(self, gamma: Tensor) -> Tensor:
        return gamma / 8

    def inverse(self, timestep: Tensor) -> Tensor:
        return 8 * timestep

    def to_config(self) -> dict[str, Any]:
        return {}


class VENoise(Conditioning):
    """``s = sigma/alpha = exp(gamma/2)``, the deviation of the noise itself, which networks of the VE SDE read.

    Source: Song et al., arXiv 2011.13456, app. C.

    >>> VENoise()(torch.tensor([0.0, 2.0]))
    tensor([1.0000, 2.7183])
    """

    integer_timesteps = False

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule, num_train_timesteps: int) -> VENoise:
        return cls()

    def __call__(self, gamma: Tensor) -> Tensor:
        return torch.exp(gamma / 2)

    def inverse(self, timestep: Tensor) -> Tensor:
        return 2 * torch.log(timestep)

    def to_config(self) -> dict[str, Any]:
        return {}


def _interpolate(value: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The values of the piecewise linear function through increasing knots, continued linearly beyond them."""
    index = (torch.searchsorted(inputs, value.detach().contiguous(), right=True) - 1).clamp(0, inputs.numel() - 2)
    slope = (outputs[index + 1] - outputs[index]) / (inputs[index + 1] - inputs[index])
    return outputs[index] + (value - inputs[index]) * slope
