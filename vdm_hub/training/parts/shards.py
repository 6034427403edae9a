"""Whole tensors of a model whose parameters are sharded over the processes (FSDP2), and each process's own part.

Where nothing is sharded each of these gives what it got. Those that put parts together are to be called on all
processes at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from vdm_hub.errors import ConfigurationError
from vdm_hub.objectives.variational_bound import Bound, Objective
from vdm_hub.recipes.configuration import TrainingArguments


def check_shards(accelerator: Accelerator, training: TrainingArguments) -> None:
    """Make FSDP2 train what DDP trains: parameters stay in float32, and autocast alone lowers the precision.

    accelerate's own policy would cast the noise schedule and the times to bfloat16 with everything else.

    Raises:
        ConfigurationError: It is FSDP 1, or the recipe asks for what sharded parameters do not allow.
    """
    plugin = accelerator.state.fsdp_plugin
    refused = {
        "fsdp_version: 1": plugin.fsdp_version != 2,
        "fsdp_offload_params": plugin.cpu_offload is True or isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing instead of gradient_checkpointing": plugin.activation_checkpointing,
        "mixed_precision: fp16": accelerator.mixed_precision == "fp16",
        f"optimizer: {training.optimizer}": training.optimizer != "adamw",
        "channels_last": training.channels_last,  # FSDP2 takes contiguous parameters only
        f"compile: {training.compile}": training.compile != "none",
    }
    if wrong := [name for name, is_so in refused.items() if is_so]:
        raise ConfigurationError(
            f"parameters are sharded by FSDP, and this run asks for {', '.join(wrong)}, which is not supported with "
            f"it: leave it out, or use scripts/accelerate/ddp.yaml."
        )
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.cpu_ram_efficient_loading = False  # every process builds the same model from the seed
    _know_the_bound()


def plan_shards(accelerator: Accelerator, objective: Objective, blocks: list[str]) -> list[nn.Parameter]:
    """Plan which modules are sharded by themselves, and which not at all; before the objective is prepared.

    Args:
        accelerator: With FSDP2.
        objective: The model.
        blocks: The classes of the blocks that it repeats, for a plugin that names none.

    Returns:
        The parameters that stay whole on every process, those of the noise schedule, as FSDP2 shards no scalars:
        `average_gradients` is to average their gradients.
    """
    plugin, schedule = accelerator.state.fsdp_plugin, objective.parts.get("schedule")
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or _without_tied(objective, blocks)
    if schedule is None:
        return []
    plugin.ignored_modules = [schedule]
    return list(schedule.parameters())


def _without_tied(model: nn.Module, blocks: list[str]) -> list[str]:
    """Those of the classes that hold no tied parameter, such as an embedding that is the output layer, too.

    A tied parameter is sharded with the whole model, where all that share it are.
    """
    times = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {
        type(module).__name__ for module in model.modules() if any(times[id(one)] > 1 for one in module.parameters())
    }
    return [name for name in blocks if name not in tied]


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Average over all processes, in place, the gradients of parameters that are whole on each of them."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="mean"))


@cache
def _know_the_bound() -> None:
    """Register `Bound` as a container: FSDP2 waits for the gradients of the tensors that it finds in such."""
    torch.export.register_dataclass(Bound)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors, one after the other, on the processes that keep them; the others take part and keep none."""
    found = {}
    for name, tensor in tensors.items():
        complete = full_tensor(tensor.detach()).cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = complete
    return found


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, in the same memory, and asking for a gradient where it does."""
    if not isinstance(parameter, DTensor):
        return parameter
    part: Tensor = parameter.to_local().detach()
    return part.requires_grad_(parameter.requires_grad)


def sharded_from_part(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which the processes hold these parts, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return part
    place = like.device_mesh, like.placements
    return DTensor.from_local(part.detach(), *place, run_check=False, shape=like.shape, stride=like.stride())


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
