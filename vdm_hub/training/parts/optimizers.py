"""Optimisers, and their state as named tensors and numbers, which safetensors and JSON hold."""

from __future__ import annotations

import importlib
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError
from vdm_hub.objectives.variational_bound import Objective
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.parts.shards import sharded_like

_ELSEWHERE = {"adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"), "prodigy": ("prodigyopt", "Prodigy")}
# What the recipe sets anew when a run goes on; the other numbers in the groups are state, as Prodigy's d.
_OF_THE_RECIPE = {"lr", "initial_lr", "eps", "weight_decay"}


def build_optimizer(objective: Objective, arguments: TrainingArguments, learning_rate: float) -> torch.optim.Optimizer:
    """The recipe's optimiser.

    The noise schedule's parameters are not decayed, as zero is no better a log-SNR than any, nor are biases where
    ``decay_biases`` is false.

    Raises:
        ConfigurationError: Its package is not installed.
    """
    named = dict(objective.named_parameters())
    kept = {id(parameter) for parameter in objective.parts.get("schedule", nn.Module()).parameters()}
    if not arguments.decay_biases:
        kept |= {id(parameter) for name, parameter in named.items() if name.rpartition(".")[2] == "bias"}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in named.values() if id(p) not in kept]},
        {"params": [p for p in named.values() if id(p) in kept], "weight_decay": 0.0},
    ]
    if arguments.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ConfigurationError(
                f"optimizer is 'muon', which torch {torch.__version__} does not have: `pip install 'torch>=2.9'`, or "
                f"choose adamw."
            )
        return MuonAndAdamW(
            [group for group in groups if group["params"]],
            hidden_matrices(objective),
            lr=learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            weight_decay=arguments.adam_weight_decay,
            eps=arguments.adam_epsilon,
        )
    fused = {"fused": True} if arguments.optimizer == "adamw" else {}
    optimizer: torch.optim.Optimizer = _optimizer_class(arguments.optimizer)(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        weight_decay=arguments.adam_weight_decay,
        eps=arguments.adam_epsilon,
        **fused,
    )
    return optimizer


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for some matrices, and AdamW for all other parameters, in one optimiser.

    Muon's step is its momentum with all singular values near one, times ``0.2 sqrt(max(rows, columns))``: as long as
    a step of AdamW, whose learning rate and weight decay it therefore shares (Liu et al., arXiv 2502.16982, eq. 4).

    Args:
        groups: Of parameters, as any optimiser takes them.
        matrices: The ``id`` of each parameter that is Muon's; of two dimensions.
        lr: The learning rate.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Of groups that do not say their own.

    >>> layer = nn.Linear(2, 2)
    >>> optimizer = MuonAndAdamW([{"params": layer.parameters()}], {id(layer.weight)}, lr=0.1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[layer.weight]), sorted(optimizer.state[layer.bias])
    (['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'])
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        matrices: Container[int],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        given = [{**group, "params": list(group["params"])} for group in groups]

        def those(of_muon: bool) -> list[dict[str, Any]]:
            chosen = [[p for p in group["params"] if (id(p) in matrices) is of_muon] for group in given]
            return [{**group, "params": some} for group, some in zip(given, chosen, strict=True) if some]

        shared: Any = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = []
        if muon := those(True):
            self.parts.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **shared))
        if adamw := those(False):
            self.parts.append(torch.optim.AdamW(adamw, betas=betas, eps=eps, fused=True, **shared))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for part in self.parts:  # state and groups are other objects after `load_state_dict`
            count = len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[place : place + count]
            place += count
            part.step()
        return loss


def hidden_matrices(module: nn.Module) -> set[int]:
    """The ``id`` of each weight of a linear layer that is neither a table of tokens nor gives their logits.

    >>> module = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 3))
    >>> hidden_matrices(module) == {id(module[1].weight)}
    True
    """
    outer = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for network in module.modules():  # those of transformers say which layer gives the logits
        last = getattr(network, "get_output_embeddings", lambda: None)()
        outer |= set() if last is None else {id(last.weight)}
    return {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)} - outer


def _optimizer_class(name: str) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    module, cls = _ELSEWHERE[name]
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise ConfigurationError(
            f"optimizer is {name!r}, and the package {package} can't be imported ({error}): `pip install {package}`, "
            f"or choose adamw."
        ) from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser as tensors named ``<parameter>.<moment>``, and the numbers beside them.

    bitsandbytes nests what is quantised: ``<parameter>.<its marker>.<moment>``.

    >>> parameter = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.AdamW([parameter])
    >>> parameter.sum().backward()
    >>> optimizer.step()
    >>> tensors, numbers = pack_optimizer(optimizer)
    >>> sorted(tensors), numbers
    (['0.exp_avg', '0.exp_avg_sq', '0.step'], {'parameters': {}, 'groups': [{}]})
    """
    state_dict = optimizer.state_dict()
    values = _flat(state_dict["state"])
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if name not in tensors}
    return tensors, {"parameters": numbers, "groups": [_numbers(group) for group in state_dict["param_groups"]]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Give an optimiser the state of `pack_optimizer`; its settings, such as the weight decay, stay those of now."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers["parameters"].items()]:
        index, *outer, name = key.split(".")
        values = state.setdefault(int(index), {})
        for part in outer:
            values = values.setdefault(part, {})
        if name in values:
            raise ValueError(f"the optimiser's state has {key} twice")
        values[name] = value
    groups = optimizer.state_dict()["param_groups"]
    if unknown := state.keys() - {index for group in groups for index in group["params"]}:
        raise ValueError(f"the optimiser's state is of parameters {sorted(unknown)[:4]}, which there are not")
    for group, saved in zip(groups, numbers["groups"], strict=True):
        own = _numbers(group).keys()  # Prodigy adds some as it steps
        if own - saved.keys() or saved.keys() & (group.keys() - own):
            raise ValueError(f"the optimiser's numbers are {sorted(saved)}, and were {sorted(own)}")
        group.update(saved)
    load_state(optimizer, {"state": state, "param_groups": groups})


def load_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load an optimiser's state, each moment laid out in memory as its parameter is.

    Fused kernels on CPUs take that for granted: beside a channels-last weight, a contiguous moment would be read in
    the wrong order, without an error.
    """
    optimizer.load_state_dict(state_dict)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(sharded_like(value, parameter))


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that JSON can hold; an infinite one is a setting, such as Prodigy's growth_rate."""
    numbers = {name: value for name, value in group.items() if type(value) in (int, float) and math.isfinite(value)}
    return {name: value for name, value in numbers.items() if name not in _OF_THE_RECIPE}
