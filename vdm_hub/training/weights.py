"""The weights of a run that are measured and published: its own, their moving average, or the best that were seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.shards import own_part, put_together


def build_ema(training: TrainingArguments, model: nn.Module, device: torch.device) -> EMAModel | None:
    """The moving average of the weights, with diffusers' warm-up; ``None`` where the recipe wants none."""
    if not training.use_ema:
        return None
    ema = EMAModel(
        [own_part(parameter) for parameter in model.parameters()],
        decay=training.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=training.ema_inv_gamma,
        power=training.ema_power,
        foreach=True,
    )
    ema.to(device)
    if training.offload_ema and device.type == "cuda":
        ema.pin_memory()
    return ema


def step_ema(ema: EMAModel, parameters: Sequence[Tensor], *, offload: bool) -> None:
    """Average once more; one that lives in the host's memory visits the GPU for that."""
    parameters = [own_part(parameter) for parameter in parameters]
    device = parameters[0].device
    offload = offload and device.type == "cuda"
    if offload:
        ema.to(device, non_blocking=True)
    ema.step(parameters)
    if offload:
        ema.to("cpu", non_blocking=True)


def averages(model: nn.Module, ema: EMAModel | None) -> dict[str, Tensor]:
    """The moving averages by name, each sharded as its parameter is; none where there are none."""
    if ema is None:
        return {}
    pairs = zip(model.named_parameters(), ema.shadow_params, strict=True)
    return {name: put_together(average, parameter) for (name, parameter), average in pairs}


@contextmanager
def these_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights, by name, within the block; with its own, where none are given."""
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
