"""The pipeline component for noise schedules that have weights at inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vdm_hub import registry
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.models.loading import CheckedModel
from vdm_hub.registry import Serialised


class NoiseScheduleModel(CheckedModel, ModelMixin, ConfigMixin):
    """Carries a schedule's weights through ``save_pretrained``, always in float32.

    Its only argument is the schedule's serialised form, so that model_index.json names no library but diffusers and
    vdm_hub, whichever plugin the schedule comes from. Casting the pipeline to half precision leaves the schedule
    alone: gamma in bfloat16 has two digits.

    Args:
        noise_schedule: The serialised form of a schedule with weights.

    >>> import torch
    >>> model = NoiseScheduleModel({"name": "learned_linear", "config": {"gamma_min": -8.0}})
    >>> model.to(torch.bfloat16).dtype, model.schedule.gamma_min.dtype
    (torch.bfloat16, torch.float32)
    """

    _dtype_follower: Tensor
    _keep_in_fp32_modules = ["schedule"]

    @register_to_config
    def __init__(self, noise_schedule: Serialised = "learned_linear") -> None:
        super().__init__()
        # Where a plugin was given by its name alone, the config says which package brings it.
        self.register_to_config(noise_schedule=registry.with_package("noise_schedules", copy.deepcopy(noise_schedule)))
        self.schedule: NoiseSchedule = registry.build("noise_schedules", noise_schedule)
        # Follows every cast, so that `.dtype` answers what the user asked for.
        self.register_buffer("_dtype_follower", torch.zeros(1))

    @classmethod
    def from_schedule(cls, schedule: NoiseSchedule) -> NoiseScheduleModel:
        """A model with a copy of a registered schedule's weights, on their device."""
        model = cls(registry.serialise("noise_schedules", schedule))
        weights = schedule.state_dict()
        model.schedule.load_state_dict(weights)
        model.to(next((weight.device for weight in weights.values()), torch.device("cpu")))
        return model

    def forward(self, t: Tensor) -> Tensor:
        """The values of gamma at times t."""
        gamma: Tensor = self.schedule(t)
        return gamma

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Weights move between devices but keep their dtype; only the follower is cast.
        self._dtype_follower = fn(self._dtype_follower)
        self.schedule._apply(partial(_moved, fn))  # type: ignore[no-untyped-call]
        return self


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """The result of ``fn``; but where that is a cast, which would round, the tensor itself, on the same device."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


NoiseScheduleModel.__module__ = "vdm_hub"
