"""What stops a run: a loss that is not finite, that no bound can be, or that has exploded; and nothing less."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from naming import naming
from vdm_hub.errors import NonFiniteLossError
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.state.checkpoints import save_checkpoint
from vdm_hub.training.state.losses import GRADIENT_NORM, LossWatch


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
    watch(tmp_path, 90.0, 3.0, 3000.0)
    with pytest.raises(NonFiniteLossError, match=naming("step 3", 1000, 3)):
        watch(tmp_path, 90.0, 3.0, 3001.0)
    watch(tmp_path, 0.5, 0.0, 0.9)  # of a bound that is nearly nothing a thousandth of a bit
    with pytest.raises(NonFiniteLossError, match=naming("step 3", 1000)):
        watch(tmp_path, 0.5, 0.0, 1.1)


def test_the_message_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="none yet"):
        watch(tmp_path, math.nan)
    saved = save_checkpoint(tmp_path, 7, {"objective": {"weight": torch.zeros(1)}}, {}, 1)
    with pytest.raises(NonFiniteLossError, match=naming(str(saved))):
        watch(tmp_path, math.nan)


def test_a_large_gradient_that_will_be_clipped_is_no_loss(tmp_path: Path) -> None:
    watch(tmp_path, 3.0, 3.0, norm=1e6)


def test_where_looking_waits_for_a_device_losses_are_looked_at_when_they_are_logged(tmp_path: Path) -> None:
    one = LossWatch(TrainingArguments(max_train_steps=9, logging_steps=2), tmp_path, looks_at_once=False)
    one.check_losses()  # none yet
    one.add(1, {"diffusion": torch.tensor(float("nan"))})
    with pytest.raises(NonFiniteLossError, match=naming("step 1")):
        one.add(2, {"diffusion": torch.tensor(3.0)})
