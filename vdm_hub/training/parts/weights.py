"""The weights of a run that are measured and published: its own, their moving average, or the best that were seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.parts.shards import local_part, sharded_from_part


def build_ema(training: TrainingArguments, model: nn.Module, device: torch.device) -> EMAModel | None:
    """The moving average of the weights, by diffusers; ``None`` where the recipe wants none.

    Its decay rises as `EMAModel` has it, or is constant from the first step on, as in VDM's reference code:
    ``average + (1 - decay) (weights - average)``, starting at the initial weights.
    """
    if not training.use_ema:
        return None
    # diffusers counts the first step as none, and has a rise of its own without the warm-up.
    constant = {} if training.ema_warmup else {"min_decay": training.ema_max_decay, "update_after_step": -1}
    ema = EMAModel(
        [local_part(parameter) for parameter in model.parameters()],
        decay=training.ema_max_decay,
        use_ema_warmup=training.ema_warmup,
        inv_gamma=training.ema_inv_gamma,
        power=training.ema_power,
        **constant,
    )
    ema.to(device)
    if training.offload_ema and device.type == "cuda":
        ema.pin_memory()
    return ema


def step_ema(ema: EMAModel, parameters: Sequence[Tensor], *, offload: bool) -> None:
    """Update the moving average; one that lives in the host's memory visits the GPU for that."""
    parameters = [local_part(parameter) for parameter in parameters]
    device = parameters[0].device
    offload = offload and device.type == "cuda"
    if offload:
        ema.to(device, non_blocking=True)
    # `EMAModel.step` in one pass over the weights, where its own makes a copy of them all.
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    get_ema_multi_avg_fn(ema.cur_decay_value)(ema.shadow_params, parameters, None)
    if offload:
        ema.to("cpu", non_blocking=True)


def averages(model: nn.Module, ema: EMAModel | None) -> dict[str, Tensor]:
    """The moving averages by name, each sharded as its parameter is; none where there are none."""
    if ema is None:
        return {}
    pairs = zip(model.named_parameters(), ema.shadow_params, strict=True)
    return {name: sharded_from_part(average, parameter) for (name, parameter), average in pairs}


@contextmanager
def using_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which the model has other weights, by name; its own, where none are given."""
    if not weights:
        yield
        return
    own = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    try:
        _copy(weights, model)
        yield
    finally:
        _copy(own, model)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
