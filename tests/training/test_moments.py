"""An optimiser's state as tensors and numbers, and back: the next steps are those of the optimiser it came from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import prodigyopt
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tiny_tokens import network as token_network
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.parts.optimizers import (
    MuonAndAdamW,
    build_optimizer,
    hidden_matrices,
    load_state,
    pack_optimizer,
    unpack_optimizer,
)

MADE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
    "muon": lambda groups: MuonAndAdamW(
        groups, {id(p) for group in groups for p in group["params"] if p.ndim == 2}, lr=0.1
    ),
    "prodigy": lambda groups: prodigyopt.Prodigy(groups, lr=1.0),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3), nn.Linear(3, 4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    weights, biases = ([p for p in model.parameters() if (p.ndim == 1) == is_bias] for is_bias in (False, True))
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer | Both, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def through_files(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load(save({name: value.contiguous() for name, value in tensors.items()})), json.loads(
        json.dumps(numbers, allow_nan=False)
    )


@pytest.mark.parametrize("name", MADE)
def test_an_optimiser_goes_on_from_what_was_packed(name: str) -> None:
    calm = network()
    optimizer = MADE[name](groups(calm))
    steps(calm, optimizer, range(3))
    resumed = copy.deepcopy(calm)
    other = MADE[name](groups(resumed))
    unpack_optimizer(other, *through_files(*pack_optimizer(optimizer)))
    steps(calm, optimizer, range(3, 6))
    steps(resumed, other, range(3, 6))
    for ours, theirs in zip(resumed.parameters(), calm.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_recipes_settings_are_those_of_now_and_the_rest_is_state() -> None:
    model = network()
    optimizer = MADE["prodigy"](groups(model))
    steps(model, optimizer, range(3))
    tensors, numbers = pack_optimizer(optimizer)
    settings = {"lr": 0.25, "eps": 0.125, "weight_decay": 0.5}
    for group in optimizer.param_groups:
        group.update(settings)
    other = MADE["prodigy"](groups(network()))
    kept = [{name: group[name] for name in settings} for group in other.param_groups]
    unpack_optimizer(other, tensors, pack_optimizer(optimizer)[1])
    assert [{name: group[name] for name in settings} for group in other.param_groups] == kept
    assert [group["d"] for group in other.param_groups] == [group["d"] for group in optimizer.param_groups]
    assert all("growth_rate" not in group for group in numbers["groups"]), "infinite: JSON has no such number"


def test_moments_lie_in_memory_as_their_parameters_do() -> None:
    """A fused kernel on a CPU takes that for granted, and reads the wrong numbers otherwise."""
    model = network()
    optimizer = MADE["adamw"](groups(model))
    steps(model, optimizer, range(2))
    state = optimizer.state_dict()
    for values in state["state"].values():
        for name, value in values.items():
            values[name] = value.contiguous().double()
    load_state(optimizer, state)
    for parameter in model.parameters():
        moments = optimizer.state[parameter]
        assert moments["exp_avg"].stride() == parameter.stride() and moments["step"].shape == ()


def test_names_of_what_is_nested_are_paths() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"quantised": {"code": torch.arange(3.0), "blocks": 4}, "count": 7}
    tensors, numbers = pack_optimizer(optimizer)
    assert tensors.keys() == {"0.quantised.code"} and numbers["parameters"] == {"0.quantised.blocks": 4, "0.count": 7}
    other = torch.optim.SGD([parameter])
    unpack_optimizer(other, tensors, numbers)
    state = other.state_dict()["state"][0]
    assert state["count"] == 7 and state["quantised"]["blocks"] == 4
    assert torch.equal(state["quantised"]["code"], torch.arange(3.0))


class Bound(nn.Module):
    """As much of an objective as an optimiser is built from."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.parts = network(), {}


@pytest.mark.parametrize("decay_biases", [True, False])
def test_muon_takes_torch_s_own_steps_for_matrices_and_adamw_s_for_the_rest(decay_biases: bool) -> None:
    settings: dict[str, Any] = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3, "adam_weight_decay": 0.3}
    arguments = TrainingArguments(max_train_steps=1, optimizer="muon", decay_biases=decay_biases, **settings)
    ours, theirs = Bound(), Bound()
    optimizer = build_optimizer(ours, arguments, 0.01)  # type: ignore[arg-type]
    assert all(group["params"] for group in optimizer.param_groups)
    steps(ours.body, optimizer, range(3))
    matrix = theirs.body[2].weight
    biases = [p for p in theirs.body.parameters() if p.ndim == 1]
    others = [p for p in theirs.body.parameters() if p is not matrix and p.ndim > 1]
    groups = [{"params": others}, {"params": biases, "weight_decay": 0.3 if decay_biases else 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, fused=True)
    muon = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        steps(theirs.body, Both(adamw, muon), range(seed, seed + 1))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


class Both:
    """Two optimisers, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def test_muon_s_defaults_are_adamw_s_without_decay_and_a_closure_gives_the_loss() -> None:
    ours, theirs = network(), network()
    optimizer = MuonAndAdamW([{"params": ours.parameters()}], (), lr=0.1)
    steps(ours, optimizer, range(2))
    steps(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0, fused=True), range(2))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7 and optimizer.step() is None


def test_what_begins_and_ends_a_network_of_tokens_is_no_hidden_matrix() -> None:
    model = token_network(7)
    found = hidden_matrices(model)
    outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    linear = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    assert found == linear - outer and found
    tied = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(3, 3, bias=False)])
    tied[1].weight = tied[0].weight  # of a network that does not say which layer gives the logits
    assert hidden_matrices(tied) == {id(tied[2].weight)}
    model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    assert id(model.get_output_embeddings().weight) not in hidden_matrices(model), "nor where it is untied"
