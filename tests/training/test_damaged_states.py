"""What a checkpoint says beside its tensors: as a run writes it, or refused in one paragraph, whatever was changed."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.damage import LEAVES, changed, damaged_json, paths_of
from hub.test_fuzz import QUIET
from naming import naming
from runs import start, train_here
from vdm_hub.errors import MAX_MESSAGE, CheckpointError, VDMHubError
from vdm_hub.hub.json_files import parse_json
from vdm_hub.training.loop import TrainingRun
from vdm_hub.training.state.checkpoint_state import restore_state
from vdm_hub.training.state.checkpoints import Checkpoint, checkpoints, load_checkpoint, save_checkpoint
from vdm_hub.training.state.resuming import find_resume_point

FIELDS: dict[str, Any] = {"validation_size": 40, "validation_steps": 1, "early_stopping_patience": 9}
FIELDS |= {"max_train_steps": 2, "logging_steps": 1, "checkpointing_steps": 1, "lr_scheduler": "constant"}


@dataclass(repr=False)
class Saved:
    """A run that is to go on, and its last checkpoint."""

    run: TrainingRun
    path: Path
    checkpoint: Checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("states") / "run"
    train_here(folder, **FIELDS)
    path = checkpoints(folder / "checkpoints")[-1]
    return Saved(start(folder, **FIELDS, resume_from_checkpoint="latest"), path, load_checkpoint(path))


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    yield found
    print(f"\n{sum(found.values())} damaged states: {dict(found.most_common())}")


def restored(saved: Saved, state: dict[str, Any]) -> str:
    """What comes of a state; anything but a run that goes on, or a paragraph of ours, fails the test."""
    try:
        restore_state(saved.run, saved.path, replace(saved.checkpoint, state=copy.deepcopy(state)))
    except VDMHubError as error:
        text = str(error)
        assert isinstance(error, CheckpointError) and len(text) <= MAX_MESSAGE and "\n" not in text
        return "refused"
    run = saved.run
    assert run.step == 2 and run.lr_scheduler.last_epoch == 2 and run.ema.optimization_step == 2
    return "restored"


CHANGES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "a step of another": (("step",), 1),
    "a course of nothing": (("history", "train"), None),
    "a column of nothing": (("history", "train", "step"), None),
    "a column too short": (("history", "train", "bits_per_dim"), [1.0]),
    "steps that are to come": (("history", "validation", "step"), [1, 7]),
    "moments of nothing": (("optimizer", "parameters"), None),
    "moments of no parameter": (("optimizer", "parameters"), {"999.step": 1}),
    "a moment that is a tensor, too": (("optimizer", "parameters"), {"0.exp_avg": 1.0}),
    "groups of nothing": (("optimizer", "groups"), None),
    "a number that no optimiser has": (("optimizer", "groups", 0), {"betas": 1e300}),
    "another best": (("early_stopping", "best"), 0.5),
    "a best of another step": (("early_stopping", "best_step"), 2**40),
    "a wait that was not": (("early_stopping", "waited"), 8),
    "another number of images": (("provenance", "dataset", "images"), 7),
    "other images": (("provenance", "dataset", "fingerprint"), "x"),
    "another number of steps": (("provenance", "steps"), 1),
    "no time": (("training_seconds",), -1.0),
    "a recipe of nothing": (("recipe",), {}),
    "a recipe without a field": (("recipe", "noise_schedule"), ...),
    "a recipe with a field too many": (("recipe",), {"seed": 0, "learning_rat": 1e-3}),
    "another type in a recipe": (("recipe", "train_batch_size"), "x"),
    "text for a recipe's steps": (("recipe", "max_train_steps"), "2"),
    "a scale that no run has": (("scaler",), {"scale": 0.0}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_state_that_no_run_wrote_is_refused(what: str, saved: Saved) -> None:
    path, value = CHANGES[what]
    assert restored(
        saved, changed(saved.checkpoint.state | ({"scaler": {}} if "scaler" in path else {}), path, value)
    ) == ("refused")
    assert restored(saved, saved.checkpoint.state) == "restored"


@pytest.mark.parametrize("step", [..., None, "x", 2.0, 1, True, 10**30], ids=str)
def test_a_state_of_another_step_than_its_manifest_s_is_damaged(step: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 2, {}, {} if step is ... else {"step": step})
    with pytest.raises(CheckpointError, match=naming("manifest", "step 2")):
        find_resume_point(tmp_path, str(path))


def damage(saved: Saved, draw: Any, counts: Counter[str]) -> None:
    content = json.dumps(saved.checkpoint.state).encode()
    if draw(st.booleans()):
        state = saved.checkpoint.state
        content = json.dumps(
            changed(state, draw(st.sampled_from(list(paths_of(state))[1:])), draw(st.sampled_from([..., *LEAVES])))
        ).encode()
    else:
        content = draw(damaged_json(content))
    try:
        state = parse_json(content, "state.json")
    except CheckpointError:
        counts["no JSON"] += 1
        return
    counts[restored(saved, state)] += 1


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=QUIET, derandomize=True)
def test_a_damaged_state_is_refused_in_one_paragraph(saved: Saved, counts: Counter[str], data: st.DataObject) -> None:
    damage(saved, data.draw, counts)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET)
def test_a_damaged_state_is_refused_however_often_it_is_tried(
    saved: Saved, counts: Counter[str], data: st.DataObject
) -> None:
    damage(saved, data.draw, counts)
