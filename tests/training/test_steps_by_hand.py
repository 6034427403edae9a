"""Optimiser steps as they are written in a book: gradient, clipping, AdamW, learning rate and moving average.

The gradient is the objective's own, which other tests hold against formulas; all that follows it is written out here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import start
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.parts.weights import averages

STEPS = 5
KEPT_FROM_DECAY = "gamma_"  # the schedule's endpoints
BY_CASE: dict[str, dict[str, Any]] = {
    "as VDM's reference code": {
        "decay_biases": False,
        "max_grad_norm": None,
        "ema_warmup": False,
        "ema_max_decay": 0.9,
    },
    "clipped, and a rising average": {"max_grad_norm": 0.5, "ema_inv_gamma": 2.0, "ema_power": 0.7},
    "two micro-batches, a rate scaled by the batch, and a cosine": {
        **{"gradient_accumulation_steps": 2, "scale_lr": True, "learning_rate": 3e-4, "lr_scheduler": "cosine"},
        **{"max_grad_norm": 0.5, "use_ema": False},
    },
    "an average that has risen": {"max_grad_norm": 1e9, "ema_max_decay": 0.3, "ema_inv_gamma": 0.1},
}


def by_hand(run: Any, fields: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and averages after `STEPS` steps; the run is only asked for its gradients."""
    weights = {name: value.detach().double().clone() for name, value in run.model.named_parameters()}
    first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    average = {name: value.clone() for name, value in weights.items()}
    warmup, decay, beta1, beta2, epsilon = 3, 0.3, 0.8, 0.95, 1e-4
    rate = fields["learning_rate"] * (16 * 2 if fields.get("scale_lr") else 1)
    for step in range(1, STEPS + 1):
        run.step = step - 1
        run.model.zero_grad()
        for parameter, value in zip(run.model.parameters(), weights.values(), strict=True):
            parameter.data.copy_(value)
        batches = next(run.batches())
        assert len(batches) == fields["gradient_accumulation_steps"]
        for part, batch in enumerate(batches):
            run.model(batch, run._times(part), run._noise(batch, part)).loss.backward()
        gradient = {name: value.grad.double() / len(batches) for name, value in run.model.named_parameters()}
        norm = math.sqrt(sum(float(value.square().sum()) for value in gradient.values()))
        limit = fields.get("max_grad_norm")
        shrink = 1.0 if limit is None else min(1.0, limit / norm)
        now = rate * min(1.0, (step - 1) / warmup)
        if fields["lr_scheduler"] == "cosine" and step - 1 > warmup:
            now *= (1 + math.cos(math.pi * (step - 1 - warmup) / (fields["max_train_steps"] - warmup))) / 2
        for name, value in weights.items():
            g = gradient[name] * shrink
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            m, v = first[name] / (1 - beta1**step), second[name] / (1 - beta2**step)
            is_bias = name.endswith(".bias") and not fields.get("decay_biases", True)
            lost = 0.0 if is_bias or KEPT_FROM_DECAY in name else now * decay
            weights[name] = value * (1 - lost) - now * m / (v.sqrt() + epsilon)
        kept = fields.get("ema_max_decay", 0.9999)
        if fields.get("ema_warmup", True):
            rise = 1 - (1 + (step - 1) / fields.get("ema_inv_gamma", 1.0)) ** -fields.get("ema_power", 0.75)
            kept = min(kept, rise)
        average = {name: kept * average[name] + (1 - kept) * weights[name] for name in weights}
    return weights, average


@pytest.mark.parametrize("case", BY_CASE)
def test_a_step_is_what_the_book_says(case: str, tmp_path: Path) -> None:
    fields = {
        **{"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-4, "adam_weight_decay": 0.3},
        **{"learning_rate": 1e-2, "lr_warmup_steps": 3, "lr_scheduler": "constant_with_warmup"},
        **{"max_train_steps": 10, "gradient_accumulation_steps": 1},
        "noise_schedule": {"name": "learned_linear", "config": {"gamma_min": -7.0, "gamma_max": 5.0}},
    } | BY_CASE[case]
    weights, average = by_hand(start(tmp_path / "by hand", **fields), fields)
    run = start(tmp_path / "run", **fields)
    batches = run.batches()
    for _ in range(STEPS):
        run.optimise(next(batches))
    assert (run.ema is None) == (not fields.get("use_ema", True))
    # Float32 against float64 over five steps of about a hundredth.
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value.detach().double(), weights[name], rtol=1e-4, atol=2e-5, msg=name)
    for name, averaged in averages(run.model, run.ema).items():
        torch.testing.assert_close(averaged.double(), average[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("recipe", ["cifar10", "imagenet32"])
def test_a_recipe_that_is_said_to_be_the_papers_is(recipe: str) -> None:
    """What google-research/vdm's configs say, and its code does where they say nothing."""
    configuration = parse_recipe([recipe])
    training, diffusion = configuration.training, configuration.diffusion
    assert '"learned_linear"' in diffusion.noise_schedule and '"gamma_min": -13.3' in diffusion.noise_schedule
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.99, 1e-8)
    assert (training.learning_rate, training.adam_weight_decay, training.decay_biases) == (2e-4, 0.01, False)
    assert (training.lr_scheduler, training.lr_warmup_steps) == ("constant_with_warmup", 100)
    assert (training.ema_warmup, training.ema_max_decay) == (False, 0.9999)
    assert training.max_grad_norm is None and training.mixed_precision == "no" and training.compile == "none"
    assert (training.max_train_steps, training.train_batch_size) == (10_000_000, 128)
