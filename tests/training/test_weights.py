"""Moving averages and borrowed weights, in one process: what is kept, what is given back, what never moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from runs import configuration
from vdm_hub.training.parts.weights import averages, build_ema, step_ema, using_weights


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fails", [False, True])
def test_other_weights_are_there_within_the_block_and_the_own_ones_after_it(fails: bool) -> None:
    model, other = network(), own(network(1))
    before, places = own(model), [parameter.data_ptr() for parameter in model.parameters()]
    try:
        with using_weights(model, other):
            assert equal(own(model), other)
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    assert equal(own(model), before) and places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    with using_weights(model, {}):
        assert equal(own(model), before)


@pytest.mark.parametrize("offload_ema", [False, True])
def test_a_constant_decay_averages_from_the_first_step_on(offload_ema: bool, tmp_path: Path) -> None:
    """``average + (1 - decay) (weights - average)``: of weights that rise by one a step, its closed form."""
    training = configuration(
        tmp_path / "run", ema_warmup=False, ema_max_decay=0.75, offload_ema=offload_ema, use_ema=True
    ).training
    model = network()
    first = own(model)
    ema = build_ema(training, model, torch.device("cpu"))
    assert ema is not None and equal(averages(model, ema), first)
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        step_ema(ema, list(model.parameters()), offload=offload_ema)
        # Of x_k = k: k - d (1 - d^k) / (1 - d).
        moved = step - 0.75 * (1 - 0.75**step) / 0.25
        for name, average in averages(model, ema).items():
            torch.testing.assert_close(average, first[name] + moved, rtol=1e-6, atol=1e-6)
    assert not any(average.requires_grad for average in averages(model, ema).values())


def test_no_average_where_the_recipe_wants_none(tmp_path: Path) -> None:
    training = configuration(tmp_path / "run", use_ema=False).training
    assert build_ema(training, network(), torch.device("cpu")) is None
    assert averages(network(), None) == {}
