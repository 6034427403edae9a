"""The state of one run in another: it is all that the next step depends on, and no other run's."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hub.damage import changed
from naming import naming
from runs import LEARNED, UNET, start, weights
from vdm_hub.errors import CheckpointError
from vdm_hub.training.loop import TrainingRun
from vdm_hub.training.state.checkpoint_state import pack_state, restore_state
from vdm_hub.training.state.checkpoints import Checkpoint

STEPS = 3
WHOLE: dict[str, Any] = {"noise_schedule": LEARNED, "unet": UNET | {"dropout": 0.2}, "ema_max_decay": 0.9}
WHOLE |= {"validation_size": 16, "validation_steps": 2, "early_stopping_patience": 3}


@dataclass
class Packed:
    """A run after its third step, and its state as a checkpoint gives it back."""

    run: TrainingRun
    checkpoint: Checkpoint


def packed(output: Path, **fields: Any) -> Packed:
    run = start(output, **fields)
    batches = run.batches()
    for _ in range(STEPS):
        run.optimise(next(batches))
    run.seconds = 7.5
    if fields.get("early_stopping_patience"):
        run.history.add("validation", 2, {"bits_per_dim": 3.5, "standard_error": 0.1})
        run.early_stopping.keep(run.model)
        run.early_stopping.look(3.5, 2)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    tensors, state = pack_state(run)
    run.accelerator.scaler = None
    state["provenance"] = run.provenance.describe(run.step, run.seconds)
    return Packed(run, Checkpoint(copy.deepcopy(tensors), json.loads(json.dumps(state))))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed(tmp_path_factory.mktemp("packed") / "run", use_ema=False)


def restored(run: TrainingRun, checkpoint: Checkpoint, state: dict[str, Any] | None = None) -> TrainingRun:
    path = run.folder.checkpoints / f"step-{STEPS:08d}"
    restore_state(run, path, Checkpoint(checkpoint.tensors, state or checkpoint.state))
    return run


def test_a_run_that_is_restored_takes_the_next_step_as_the_one_that_was_packed(tmp_path: Path) -> None:
    first = packed(tmp_path / "first", **WHOLE)
    assert first.checkpoint.tensors.keys() == {"objective", "optimizer", "best", "ema"}
    run = start(tmp_path / "second", **WHOLE)
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    restored(run, first.checkpoint)
    assert run.accelerator.scaler.get_scale() == 2.0**9
    run.accelerator.scaler = None
    assert (run.step, run.seconds, run.ema.optimization_step) == (STEPS, 7.5, STEPS)
    assert run.history.to_dict() == first.run.history.to_dict()
    assert run.early_stopping.state() == first.run.early_stopping.state()
    best = first.run.early_stopping.weights
    assert all(torch.equal(value, best[name]) for name, value in run.early_stopping.weights.items()) and best
    with pytest.raises(CheckpointError, match="early_stopping"):  # no measurement came after the best
        restored(run, first.checkpoint, changed(first.checkpoint.state, ("early_stopping", "waited"), 1))
    for each in (run, first.run):
        each.optimise(next(each.batches()))
    assert torch.equal(weights(run), weights(first.run))
    assert all(torch.equal(*pair) for pair in zip(run.ema.shadow_params, first.run.ema.shadow_params, strict=True))
    assert run.lr_scheduler.state_dict() == first.run.lr_scheduler.state_dict()
    assert [group["lr"] for group in run.optimizer.param_groups] == run.lr_scheduler.get_last_lr()


def test_a_state_holds_no_more_than_the_run_has(plain: Packed, tmp_path: Path) -> None:
    assert plain.checkpoint.tensors.keys() == {"objective", "optimizer"} and "scaler" not in plain.checkpoint.state
    run = restored(start(tmp_path / "run", use_ema=False, max_train_steps=STEPS), plain.checkpoint)
    assert run.is_last() and run.step == STEPS and torch.equal(weights(run), weights(plain.run))


def test_a_run_of_fewer_steps_is_not_restored(plain: Packed, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=naming(STEPS, "max_train_steps", 2)):
        restored(start(tmp_path / "run", use_ema=False, max_train_steps=2), plain.checkpoint)


def test_what_was_trained_on_another_number_of_processes_is_not_restored(plain: Packed, tmp_path: Path) -> None:
    state = changed(plain.checkpoint.state, ("provenance", "processes"), 2)
    run = start(tmp_path / "run", use_ema=False)
    with pytest.raises(CheckpointError, match=naming("global_batch_size", 16)):
        restored(run, plain.checkpoint, state)
    with pytest.raises(CheckpointError, match=naming("processes was 2 and is 1")):
        restored(run, plain.checkpoint, changed(state, ("provenance", "global_batch_size"), 32))


def test_the_same_images_may_have_another_name_and_unknown_or_other_ones_may_not(
    plain: Packed, tmp_path: Path
) -> None:
    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        for place in (("recipe", "dataset_name"), ("provenance", "dataset", "name")):
            state = changed(state, place, "elsewhere")
        return state

    run = restored(start(tmp_path / "run", use_ema=False), plain.checkpoint, renamed(plain.checkpoint.state))
    others = changed(plain.checkpoint.state, ("provenance", "dataset", "fingerprint"), "sha256:" + "0" * 64)
    with pytest.raises(CheckpointError, match=naming("dataset_name", "elsewhere", "training data")):
        restored(run, plain.checkpoint, renamed(others))
    streamed = packed(tmp_path / "streamed", streaming=True, use_ema=False).checkpoint
    run = start(tmp_path / "again", streaming=True, use_ema=False)
    with pytest.raises(CheckpointError, match=naming("dataset_name", "elsewhere")):
        restored(run, streamed, renamed(streamed.state))
    restored(run, streamed)


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_only_an_older_version_s_recipe_may_lack_a_field(version: str | None, plain: Packed, tmp_path: Path) -> None:
    state = changed(plain.checkpoint.state, ("recipe", "ema_power"), ...)
    run = start(tmp_path / "run", use_ema=False)
    if version is None:
        with pytest.raises(CheckpointError, match=naming("ema_power")):
            restored(run, plain.checkpoint, state)
    else:
        restored(run, plain.checkpoint, changed(state, ("provenance", "versions", "vdm-hub"), version))
