"""What stops a run: a loss that is not finite, that no bound can be, or that has exploded; and nothing less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from naming import naming
from vdm_hub.errors import NonFiniteLossError
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.losses import GRADIENT_NORM, LossWatch


def watch(folder: Path, *losses: float, norm: float = 1.0) -> None:
    one = LossWatch(TrainingArguments(max_train_steps=9), folder, looks_at_once=True)
    for step, loss in enumerate(losses, 1):
        one.add(step, {"diffusion": torch.tensor(loss), "prior": torch.tensor(0.0), GRADIENT_NORM: torch.tensor(norm)})


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss: float, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=naming("step 2")):
        watch(tmp_path, 3.0, loss)


def test_a_negative_bound_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match=naming("step 2")):
        watch(tmp_path, 3.0, -0.1)


def test_an_explosion_stops_the_run_at_a_thousand_times_the_lowest_bound(tmp_path: Path) -> None:
    watch(tmp_path, 90.0, 3.0, 2999.0)
    with pytest.raises(NonFiniteLossError, match=naming("step 3", 1000, 3)):
        watch(tmp_path, 90.0, 3.0, 3001.0)


def test_a_large_gradient_that_will_be_clipped_is_no_loss(tmp_path: Path) -> None:
    watch(tmp_path, 3.0, 3.0, norm=1e6)
