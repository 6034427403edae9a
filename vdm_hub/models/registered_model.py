"""The component for what is registered and has weights: a noise schedule, a process, a plugin's network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.loading import CheckedModel
from vdm_hub.registry import Serialised

_SUBMODULES = {"noise_schedule": "schedule", "forward_process": "process", "network": "body"}
"""Where the module of each argument is; an attribute of an argument's own name would be the config's."""


class RegisteredModel(CheckedModel, ModelMixin, ConfigMixin):
    """Carries the weights of what a registered name means through ``save_pretrained``.

    Its only argument is the serialised form, so that model_index.json names no library but diffusers and vdm_hub,
    whichever plugin the class comes from. Casting the pipeline to half precision leaves schedules and processes alone,
    as gamma in bfloat16 has two digits; a network is cast.

    Args:
        noise_schedule: The serialised form of a schedule with weights, or
        forward_process: all fields of a process with weights of its own (`ForwardProcess.fields`), or
        network: the serialised form of a plugin's network.

    Raises:
        ConfigurationError: Not exactly one of them is given.

    >>> import torch
    >>> model = RegisteredModel({"name": "learned_linear", "config": {"gamma_min": -8.0}})
    >>> model.to(torch.bfloat16).dtype, model.module.gamma_min.dtype
    (torch.bfloat16, torch.float32)
    """

    _dtype_follower: Tensor
    _keep_in_fp32_modules = ["schedule", "process"]

    @register_to_config
    def __init__(
        self,
        noise_schedule: Serialised | None = None,
        forward_process: dict[str, Any] | None = None,
        network: Serialised | None = None,
    ) -> None:
        super().__init__()
        given = {"noise_schedule": noise_schedule, "forward_process": forward_process, "network": network}
        forms: dict[str, Any] = {name: copy.deepcopy(form) for name, form in given.items() if form is not None}
        if len(forms) != 1:
            raise ConfigurationError(f"{' and '.join(forms) or 'nothing'} was given: give one of {', '.join(given)}.")
        ((self._carried, form),) = forms.items()
        kind = registry.SERIALISED_FIELDS.get(self._carried, "networks")
        if self._carried == "forward_process":
            named = form.get("forward_process", "gaussian")
            form |= {"forward_process": registry.with_package(kind, named)}
            module = registry.resolve_class(kind, named)[0].from_fields(form)  # type: ignore[attr-defined]
        else:
            module, form = registry.build(kind, form), registry.with_package(kind, form)
        # Where a plugin was given by its name alone, the config says which package brings it.
        self.register_to_config(**{self._carried: form})
        setattr(self, _SUBMODULES[self._carried], module)
        # Follows every cast, so that `.dtype` answers what the user asked for.
        self.register_buffer("_dtype_follower", torch.zeros(1))

    @classmethod
    def carrying(cls, module: nn.Module) -> RegisteredModel:
        """A model with a copy of the weights of a registered schedule, process or network, on their device."""
        if isinstance(module, NoiseSchedule):
            model = cls(noise_schedule=registry.serialise("noise_schedules", module))
        elif isinstance(module, ForwardProcess):
            model = cls(forward_process=module.fields())
        else:
            model = cls(network=registry.serialise("networks", module))
        weights = module.state_dict()
        if isinstance(module, ForwardProcess):  # what is learned of a schedule may be baked into the fields
            weights = {name: weight for name, weight in weights.items() if name in model.module.state_dict()}
        model.module.load_state_dict(weights)
        model.to(next((weight.device for weight in weights.values()), torch.device("cpu")))
        return model

    @property
    def module(self) -> Any:
        """What is carried."""
        return getattr(self, _SUBMODULES[self._carried])

    def forward(self, *arguments: Any, **by_name: Any) -> Any:
        """As the carried module is called: gamma at times t, or a network's output."""
        return self.module(*arguments, **by_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._carried == "network":
            return super()._apply(fn, recurse)
        # Weights move between devices but keep their dtype; only the follower is cast.
        self._dtype_follower = fn(self._dtype_follower)
        self.module._apply(partial(_moved, fn))
        return self


def bare_network(network: Any) -> Any:
    """A network itself, out of the component that carries it, if one does."""
    return network.module if isinstance(network, RegisteredModel) else network


def config_of(network: Any) -> Mapping[str, Any]:
    """The config of a network, whatever carries it; empty where it has none that is a mapping."""
    config = getattr(bare_network(network), "config", None)
    return config if isinstance(config, Mapping) else {}


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` gives, but for a cast, which would round: then the tensor itself, on the same device."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


RegisteredModel.__module__ = "vdm_hub"
