"""DeepSpeed's ZeRO-2: every process has all weights, and keeps the gradients and moments of a part of them.

The engine computes in float32, and torch's autocast lowers the precision as elsewhere: DeepSpeed's own bf16 would cast
the noise schedule, and the moving average would follow weights of low precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError
from vdm_hub.recipes.configuration import TrainingArguments

_NO_DEVICE = (None, "none")
_NOT_BROADCAST = "ds_optim_param"


def has_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs it: each process holds a part of the moments, and all of the parameters."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def check_zero(accelerator: Accelerator, training: TrainingArguments) -> None:
    """Make DeepSpeed train what DDP trains: the recipe decides all that changes the mathematics.

    Raises:
        ConfigurationError: It is another stage than 2, or the recipe or DeepSpeed's configuration asks for what a
            trainer with its own optimiser and float32 weights does not allow.
    """
    plugin = accelerator.state.deepspeed_plugin
    config, zero = plugin.deepspeed_config, plugin.deepspeed_config.get("zero_optimization", {})
    offloaded = [
        name for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device") not in _NO_DEVICE
    ]
    refused = {
        f"zero_stage: {zero.get('stage', 0)}": zero.get("stage") != 2,
        **dict.fromkeys(offloaded, True),
        **{f"{name} of DeepSpeed's own": name in config for name in ("optimizer", "scheduler")},
        "mixed_precision: fp16": accelerator.mixed_precision == "fp16",
        f"optimizer: {training.optimizer}": training.optimizer != "adamw",
        "channels_last": training.channels_last,  # it lays all weights out one after the other
        f"compile: {training.compile}": training.compile != "none",
    }
    if wrong := [name for name, is_so in refused.items() if is_so]:
        raise ConfigurationError(
            f"the optimiser is sharded by DeepSpeed, and this run asks for {', '.join(wrong)}, which is not supported "
            f"with it: leave it out, or use scripts/accelerate/ddp.yaml or fsdp2.yaml."
        )
    lowered = accelerator.mixed_precision == "bf16"
    config.pop("bf16", None)
    # No class is named as safe to send in bfloat16: gradients are averaged in float32.
    config["torch_autocast"] = {"enabled": lowered, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["gradient_clipping"] = training.max_grad_norm or 0.0
    config["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    config["train_micro_batch_size_per_gpu"] = training.train_batch_size
    config["train_batch_size"] = "auto"


def prepare_zero(
    accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, ZeroOptimizer]:
    """What ``accelerator.prepare`` does, for an optimiser whose checkpoints are those of the whole parameters."""
    groups = [list(group["params"]) for group in optimizer.param_groups]
    scalars = [parameter for parameter in objective.parameters() if parameter.dim() == 0]
    for scalar in scalars:
        # DeepSpeed 0.19 fails at broadcasting what has no dimension, and broadcasts nothing that is so marked: all
        # processes build the same model from the seed.
        setattr(scalar, _NOT_BROADCAST, True)
    prepared, inner = accelerator.prepare(objective, optimizer)
    for scalar in scalars:
        delattr(scalar, _NOT_BROADCAST)
    return prepared, ZeroOptimizer(inner, groups, accelerator)


def precision(accelerator: Accelerator) -> str:
    """What the network computes in: no, bf16 or fp16."""
    if not has_zero(accelerator):
        return str(accelerator.mixed_precision)
    return "bf16" if accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"


def gradient_norm(accelerator: Accelerator) -> Tensor:
    """The norm of the gradient of the step that the engine has just taken, before clipping; infinite if skipped."""
    return torch.as_tensor(accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm())


@dataclass(frozen=True)
class _Place:
    """A parameter's number in torch's format, and where it lies in its group."""

    index: int
    within: slice
    shape: torch.Size

    def __hash__(self) -> int:
        return self.index


class ZeroOptimizer:
    """A prepared optimiser whose state, to a checkpoint and back, is that of the whole parameters, as without ZeRO.

    The engine lays the parameters of a group one after the other, pads them, and gives each process an equal part.

    Args:
        prepared: What ``accelerator.prepare`` made of the optimiser.
        groups: The parameters of each group, as they were before.
        accelerator: Of the run; all its processes take part in `state_dict`.
    """

    def __init__(self, prepared: Any, groups: Sequence[Sequence[nn.Parameter]], accelerator: Accelerator) -> None:
        self._engine, self._accelerator = prepared.optimizer, accelerator
        self._own: torch.optim.Optimizer = prepared.optimizer.optimizer  # over this process's parts
        self._groups = groups

    def step(self) -> None:
        """Nothing: the engine takes the step as soon as the last gradient of a global batch is there."""

    def zero_grad(self) -> None:
        """Nothing, for the same reason."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, each with this process's part of its parameters."""
        return self._own.param_groups

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """The moments of this process's parts."""
        return self._own.state

    def state_dict(self) -> dict[str, Any]:
        """The state of the whole parameters, put together from all processes; torch's format."""
        state: dict[int, dict[str, Tensor]] = {}
        for part, places in self._parts():
            for name, value in self._own.state.get(part, {}).items():
                is_moment = value.shape == part.shape
                whole = self._accelerator.gather(value) if is_moment else value
                for place in places:
                    found = whole[place.within].view(place.shape) if is_moment else whole
                    state.setdefault(place.index, {})[name] = found.cpu()
        return {"state": state, "param_groups": self._described()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's parts of the moments, and of the weights that the model has now."""
        self._engine.refresh_fp32_params()
        state = {}
        for number, (part, places) in enumerate(self._parts()):
            known = {place: state_dict["state"][place.index] for place in places if place.index in state_dict["state"]}
            first: dict[str, Tensor] = next(iter(known.values()), {})
            state[number] = {
                # The number of steps is one for all parameters of a group.
                name: first[name] if name == "step" else self._part(part, name, known)
                for name in first
            }
        described = zip(state_dict["param_groups"], self._own.state_dict()["param_groups"], strict=True)
        groups = [told | {"params": own["params"]} for told, own in described]
        self._own.load_state_dict({"state": state, "param_groups": groups})

    def _part(self, part: Tensor, name: str, known: dict[_Place, dict[str, Tensor]]) -> Tensor:
        """This process's part of a moment of a group."""
        rank, size = self._accelerator.process_index, part.numel()
        whole = torch.zeros(size * self._accelerator.num_processes)
        for place, moments in known.items():
            whole[place.within] = moments[name].flatten()
        return whole[rank * size : (rank + 1) * size].to(part)

    def _parts(self) -> Iterator[tuple[Tensor, list[_Place]]]:
        """This process's part of each group, and where in the whole group each parameter lies."""
        start = 0
        flat_groups = self._engine.bit16_groups_flat  # named for low precision, and in the parameters' own
        for own, parameters, flat in zip(self._own.param_groups, self._groups, flat_groups, strict=True):
            places = []
            for index, parameter in enumerate(parameters, start):
                if parameter.requires_grad:
                    begin = parameter.storage_offset() - flat.storage_offset()
                    places.append(_Place(index, slice(begin, begin + parameter.numel()), parameter.shape))
            (part,) = own["params"]
            yield part, places
            start += len(parameters)

    def _described(self) -> list[dict[str, Any]]:
        numbers, start = [], 0
        for own, parameters in zip(self._own.param_groups, self._groups, strict=True):
            told = {name: value for name, value in own.items() if name != "params"}
            numbers.append(told | {"params": list(range(start, start + len(parameters)))})
            start += len(parameters)
        return numbers
