"""A run that is killed again and again ends where the undisturbed one does, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runs import LEARNED, ROOT, contents, environment, recipe
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

HARNESS = str(Path(__file__).with_name("kills.py"))
FIELDS: dict[str, Any] = {
    "max_train_steps": 96,
    "checkpointing_steps": 4,
    "checkpoints_total_limit": 3,
    "logging_steps": 1,
    "validation_size": 20,
    "validation_steps": 40,
    "sample_steps": 50,
    "num_sample_images": 4,
    "evaluation_replicates": 1,
    "random_flip": True,
    "noise_schedule": LEARNED,
    "unet": {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.1},
    "gradient_accumulation_steps": 2,
    "train_batch_size": 8,
}
THREE, TWENTY = "step:1,checkpoint:1,results:1", "any:4,step:5,checkpoint:6,results:5"


def survive(run: Path, plan: str, processes: int, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Run to the end, killed at each moment of the plan; what was killed, and where."""
    made = recipe(run.parent / f"recipe of {run.name}", run, **fields)
    command = [sys.executable, HARNESS, str(run), str(processes), "4", plan, made]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def without_names_and_times(run: Path) -> dict[str, str]:
    """What must be the same: each file's bytes, but for the folder's own name, and the seconds it took."""
    found = contents(run)
    for name in ("recipe.yaml", "run.json"):
        assert found.pop(name, None) is not None, name
    report = json.loads((run / "evaluation.json").read_text())
    del report["seconds"]
    found["evaluation.json"] = json.dumps(report)
    for checkpoint in checkpoints(run / "checkpoints"):
        place = f"checkpoints/{checkpoint.name}"
        state = load_checkpoint(checkpoint).state
        for own in ("training_seconds", "recipe"):
            del state[own]
        del state["provenance"]["training_seconds"]
        found[f"{place}/state.json"] = json.dumps(state, sort_keys=True)
        del found[f"{place}/manifest.json"]  # `load_checkpoint` found it right
    return found


def check(tmp_path: Path, plan: str, processes: int, fields: dict[str, Any]) -> None:
    survive(tmp_path / "calm", "any:0", processes, fields)
    attempts = survive(tmp_path / "killed", plan, processes, fields)
    killed = [attempt for attempt in attempts if attempt["outcome"] == "killed"]
    wanted = sum(int(part.split(":")[1]) for part in plan.split(","))
    assert len(killed) == wanted, attempts
    assert attempts[-1]["outcome"] == "finished"
    assert any(name.startswith(".step-") for one in killed for name in one["half_written"]), "no kill met a checkpoint"
    calm, other = (without_names_and_times(tmp_path / name) for name in ("calm", "killed"))
    assert other.keys() == calm.keys(), "something half-written was left, or something is missing"
    assert {name for name in calm if calm[name] != other[name]} == set()
    history = json.loads((tmp_path / "killed" / "history.json").read_text())
    assert history["train"]["step"] == list(range(1, fields["max_train_steps"] + 1)), "each step once"


@pytest.mark.parametrize("plan", [THREE, pytest.param(TWENTY, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, plan: str) -> None:
    """In steps, with checkpoints half-written, with results half-written; learned schedule, dropout, accumulation.

    Each step's bound is logged, and hangs on its images, times and noise: equal histories are equal orders of data.
    """
    check(tmp_path, plan, 1, FIELDS)


@pytest.mark.slow
def test_two_processes_that_are_killed_change_nothing(tmp_path: Path) -> None:
    check(tmp_path, "step:2,checkpoint:2,results:1", 2, FIELDS | {"max_train_steps": 40, "sample_steps": 0})


@pytest.mark.slow
def test_twenty_kills_of_two_processes_change_nothing(tmp_path: Path) -> None:
    check(tmp_path, TWENTY, 2, FIELDS)
