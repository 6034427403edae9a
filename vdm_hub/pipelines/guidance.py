"""Guidance: the network told its condition, and told nothing, combined by a guider of diffusers."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Mapping
from functools import cache
from numbers import Real
from typing import Any

import diffusers.guiders
import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError, explained, shortened, unknown_name

GUIDER = "ClassifierFreeGuidance"
"""The guider that is meant where none is named."""
_ANOTHER = "choose another guider"
_INPUTS = ["pred_cond", "pred_uncond"]
_EXPERIMENTAL = logging.getLogger("diffusers.guiders.guider_utils")  # says at each use that the interface may change


def guiders() -> list[str]:
    """The names of diffusers' guiders that combine these two predictions of images, and need no more.

    >>> "ClassifierFreeGuidance" in guiders(), "PerturbedAttentionGuidance" in guiders()
    (True, False)
    """
    classes = inspect.getmembers(diffusers.guiders, inspect.isclass)
    known = [cls for _, cls in classes if issubclass(cls, BaseGuidance) and _applies(cls)]
    return [cls.__name__ for cls in known if _by_scale(cls.__name__)]


def _applies(cls: type[BaseGuidance]) -> bool:
    # One that prepares the network changes its layers, which are of diffusers' own transformers.
    return cls._input_predictions == _INPUTS and cls.prepare_models is BaseGuidance.prepare_models


@cache
def _by_scale(name: str) -> bool:
    """Whether its scale alone makes a guider of that name, which then combines two images."""
    cls: Any = getattr(diffusers.guiders, name)
    if "guidance_scale" not in inspect.signature(cls).parameters:
        return False
    was, _EXPERIMENTAL.disabled = _EXPERIMENTAL.disabled, True
    try:
        guider: Any = cls(guidance_scale=2.0)
        guider.set_state(0, 1, torch.zeros(()))
        guider.forward(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    except Exception:  # whatever a library may raise at a shape that is not meant for it
        return False
    finally:
        _EXPERIMENTAL.disabled = was
    return True


def build_guider(guider: str | BaseGuidance, guidance_scale: float = 1.0) -> BaseGuidance | None:
    """A guider of one call's own; ``None`` where the scale is 1, and nothing is guided.

    Args:
        guider: Its name, or an object, whose own scale then holds.
        guidance_scale: Of one that is named.

    Raises:
        ConfigurationError: There is no such guider, it needs more than two predictions, the scale is no number of at
            least 0, or it is 1 and another guider than the usual one is named.

    >>> build_guider("ClassifierFreeGuidance", 1.0) is None, build_guider("ClassifierFreeGuidance", 4.0).guidance_scale
    (True, 4.0)
    """
    is_number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
    if not is_number or not 0 <= guidance_scale < math.inf:
        raise ConfigurationError(
            f"guidance_scale is {shortened(guidance_scale)}: give a number of at least 0; 1 guides nothing."
        )
    if isinstance(guider, BaseGuidance):
        if not _applies(type(guider)):
            raise unknown_name("guider", type(guider).__name__, guiders())
        if guidance_scale != 1:
            raise ConfigurationError(
                f"guidance_scale is {guidance_scale}, and guider is a {type(guider).__name__} with a scale of its "
                f"own: leave one of the two out."
            )
        return copy.deepcopy(guider)  # it counts steps
    if guider not in guiders():
        raise unknown_name("guider", guider, guiders())
    cls = getattr(diffusers.guiders, guider)
    if "guidance_scale" not in inspect.signature(cls).parameters:
        raise ConfigurationError(f"{guider} has no guidance_scale: give an object of it, with its own arguments.")
    if guidance_scale == 1:
        if guider != GUIDER:
            raise ConfigurationError(
                f"guider is {guider!r}, and acts only with guidance: give a guidance_scale other than 1, or leave it "
                f"out."
            )
        return None
    was, _EXPERIMENTAL.disabled = _EXPERIMENTAL.disabled, True
    try:
        with explained(f"{guider} takes no guidance_scale of {guidance_scale}", "give another", ConfigurationError):
            built: BaseGuidance = cls(guidance_scale=float(guidance_scale))
    finally:
        _EXPERIMENTAL.disabled = was
    return built


class GuidedNetwork:
    """The network of one call, as a process or a sampler calls it; guided, where there is a guider.

    With guidance of scale w it gives ``F_none + w (F_condition - F_none)``, of whatever the network predicts: targets
    are affine in each other at a given z_t and gamma, so it is the same in each. Both are one evaluation of twice the
    batch; two evaluations, one after the other, from the first time on that this does not fit in the GPU's memory.

    Args:
        network: The module.
        arguments: Its arguments by name, the condition among them, each (B, ...).
        instead: The same arguments without the condition.
        guider: What combines them.
        guided: How many channels of the output are guided, from the first; the others, such as a variance, are those
            of the condition. ``None`` for all.
    """

    def __init__(
        self,
        network: nn.Module,
        arguments: Mapping[str, Any],
        instead: Mapping[str, Any] | None = None,
        guider: BaseGuidance | None = None,
        guided: int | None = None,
    ) -> None:
        self._network, self._arguments, self._instead = network, dict(arguments), dict(instead or {})
        self._guider, self._guided, self._at_once = guider, guided, True

    def at_step(self, step: int, steps: int, timestep: Any) -> None:
        """Say which step of how many comes: some guiders act only in a part of them."""
        if self._guider is not None:
            self._guider.set_state(step, steps, timestep)

    def __call__(self, sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        """The output at a sample and its timestep."""
        if self._guider is None or self._guider.num_conditions == 1:
            return self._evaluate(sample, timestep, self._arguments | context)
        told, untold = self._both(sample, timestep, context)
        guided = slice(None, self._guided)
        name = type(self._guider).__name__
        with explained(f"{name} can't combine outputs of shape {tuple(told.shape)}", _ANOTHER, ConfigurationError):
            output: Tensor = self._guider.forward(told[:, guided], untold[:, guided]).pred
        return output if self._guided is None else torch.cat([output, told[:, self._guided :]], dim=1)

    def _both(self, sample: Tensor, timestep: Tensor, context: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self._at_once:
            try:
                told, untold = self._evaluate(*self._doubled(sample, timestep, context)).chunk(2)
                return told, untold
            except torch.OutOfMemoryError:
                self._at_once = False
        return (
            self._evaluate(sample, timestep, {**self._arguments, **context}),
            self._evaluate(sample, timestep, {**self._instead, **context}),
        )

    def _doubled(
        self, sample: Tensor, timestep: Tensor, context: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        size = len(sample)
        arguments = {name: _joined(value, self._instead[name], size) for name, value in self._arguments.items()}
        arguments |= {name: _joined(value, value, size) for name, value in context.items()}
        timestep = torch.as_tensor(timestep, device=sample.device)
        return torch.cat([sample, sample]), _joined(timestep, timestep, size), arguments

    def _evaluate(self, sample: Tensor, timestep: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        output: Tensor = self._network(sample, timestep, return_dict=False, **arguments)[0]
        return output


def _joined(first: Any, second: Any, size: int) -> Any:
    """Two arguments of a batch as one of twice the size; what is not one for each datum stays."""
    is_each = isinstance(first, Tensor) and first.ndim > 0 and len(first) == size
    return torch.cat([first, second]) if is_each else first
