"""A run whose held-out bits/dim stop falling ends, on all its processes, and publishes the best weights it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naming import naming
from runs import SHIM, TORCHRUN, configuration, contents, python, recipe, start, train_here
from vdm_hub import VDMPipeline
from vdm_hub.errors import ConfigurationError
from vdm_hub.training.parts.early_stopping import EarlyStopping
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

# At this learning rate the first steps help and later ones undo it, so the best weights are not the last ones.
PATIENT: dict[str, Any] = {
    "max_train_steps": 40,
    "validation_size": 64,
    "validation_steps": 2,
    "early_stopping_patience": 3,
    "learning_rate": 0.3,
    "lr_scheduler": "constant",
    "ema_max_decay": 0.5,
    "checkpointing_steps": 4,
}


@given(st.lists(st.floats(0, 10), min_size=1), st.integers(1, 5), st.floats(0, 1))
def test_it_ends_after_as_many_measurements_without_improvement(
    measured: list[float], patience: int, threshold: float
) -> None:
    stopping = EarlyStopping(patience, threshold)
    best, since = float("inf"), 0
    for step, value in enumerate(measured):
        improved = stopping.look(value, step)
        assert improved == (value < best - threshold)
        best, since = (value, 0) if improved else (best, since + 1)
        assert (stopping.best, stopping.is_over) == (best, since >= patience)


@given(st.lists(st.floats(0, 10), max_size=6), st.lists(st.floats(0, 10), max_size=6), st.floats(0, 1))
def test_one_that_is_loaded_goes_on_as_the_one_that_was_saved(
    before: list[float], after: list[float], threshold: float
) -> None:
    saved, loaded = EarlyStopping(2, threshold), EarlyStopping(2, threshold)
    for step, value in enumerate(before):
        saved.look(value, 10 + step)
    saved.weights = {"weight": torch.ones(2)}
    loaded.load(json.loads(json.dumps(saved.state(), allow_nan=False)), saved.weights)
    assert loaded.weights is saved.weights
    for step, value in enumerate(after):
        assert loaded.would_improve(value) == saved.would_improve(value) == (value < saved.best - threshold)
        assert loaded.look(value, 20 + step) == saved.look(value, 20 + step)
        assert (loaded.best, loaded.best_step, loaded.waited) == (saved.best, saved.best_step, saved.waited)


@pytest.mark.parametrize("patience", [None, 1])
def test_the_best_weights_are_copies_and_kept_only_with_patience(patience: int | None) -> None:
    model, stopping = torch.nn.Linear(2, 1), EarlyStopping(patience, 0.0)
    assert (stopping.best_step, stopping.waited, stopping.is_over) == (0, 0, False)
    stopping.keep(model)
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        model.weight.add_(1)
    assert stopping.weights.keys() == (kept.keys() if patience else set())
    assert all(torch.equal(value, kept[name]) for name, value in stopping.weights.items())
    assert stopping.look(3.0, 1) and not stopping.look(3.0, 2)  # as good is no improvement, whatever the threshold
    assert stopping.is_over == (patience is not None)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    train_here(run, **PATIENT)
    return run


def validations(run: Path) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = json.loads((run / "history.json").read_text())["validation"]
    return columns


def test_a_run_ends_early_and_publishes_the_weights_that_measured_best(stopped: Path) -> None:
    measured = validations(stopped)
    best = min(range(len(measured["step"])), key=lambda i: measured["bits_per_dim"][i])
    assert measured["step"][-1] - measured["step"][best] == 3 * 2, "patience x validation_steps"
    assert json.loads((stopped / "run.json").read_text())["steps"] == measured["step"][-1] < 40
    checkpoint = load_checkpoint(checkpoints(stopped / "checkpoints")[-1])
    network = VDMPipeline.from_pretrained(stopped / "pipeline").unet.state_dict()
    kept = {name: checkpoint.tensors["best"][f"network.{name}"] for name in network}
    assert all(torch.equal(network[name], kept[name]) for name in network)
    averaged = {name: checkpoint.tensors["ema"][f"network.{name}"] for name in network}
    assert any(not torch.equal(network[name], averaged[name]) for name in network), "those are the last weights"


def test_resuming_a_run_that_stopped_changes_nothing(stopped: Path) -> None:
    before = contents(stopped / "pipeline")
    train_here(stopped, **PATIENT, resume_from_checkpoint="latest")
    assert contents(stopped / "pipeline") == before


@pytest.mark.slow
def test_a_resumed_run_stops_where_the_undisturbed_one_does(stopped: Path, tmp_path: Path) -> None:
    train_here(tmp_path / "run", **PATIENT | {"max_train_steps": 4})
    train_here(tmp_path / "run", **PATIENT, resume_from_checkpoint="latest")
    assert contents(tmp_path / "run" / "pipeline") == contents(stopped / "pipeline")
    assert validations(tmp_path / "run") == validations(stopped)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    path = recipe(tmp_path, tmp_path / "run", **PATIENT | {"train_batch_size": 8})
    done = python(*TORCHRUN, SHIM, path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["steps"]
    assert steps == validations(tmp_path / "run")["step"][-1] < 40


def test_it_needs_something_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=naming("early_stopping_patience", 3, "validation_steps")):
        configuration(tmp_path / "run", **PATIENT | {"validation_steps": 0})
    with pytest.raises(ConfigurationError, match=naming("validation_steps", 2, "validation_size")):
        start(tmp_path / "run", **PATIENT | {"validation_size": 0})
