"""A folder belongs to one run at a time, whenever and however often runs are started in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from naming import naming
from runs import configuration, contents, environment, recipe, train_here
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.state.checkpoints import checkpoints
from vdm_hub.training.state.outputs import OutputFolder

AT_ONCE = str(Path(__file__).with_name("at_once.py"))


@contextmanager
def started(folder: Path, *runs: Sequence[str], waiting: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Runs that were started at once in this folder; where they are to wait, they do so until the block ends."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "words.json").write_text(json.dumps(runs))
    if waiting:
        (folder / "wait").touch()
    command = [sys.executable, AT_ONCE, str(logs / "words.json")]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        (folder / "wait").unlink(missing_ok=True)
        process.communicate(timeout=120)


def ends(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def said(one: dict[str, Any]) -> str:
    lines = [line for line in one["said"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in one["said"], one["said"]
    return lines[0]


def check_one_ran(results: list[dict[str, Any]], folder: str) -> int:
    """The others left with status 2 and a paragraph that names the folder and what to do."""
    assert sorted(one["status"] for one in results) == [0] + [2] * (len(results) - 1), results
    for one in results:
        if one["status"]:
            assert folder in said(one) and "--output_dir" in said(one)
    return [one["status"] for one in results].index(0)


@pytest.mark.slow
def test_of_three_seeds_at_once_one_runs_and_two_say_why_not(tmp_path: Path) -> None:
    """With the folder that they have where none is named; then of three that go on with it, one does."""
    made = Path(recipe(tmp_path / "recipe", tmp_path / "unused", max_train_steps=60, checkpointing_steps=20))
    made.write_text("".join(line for line in made.read_text().splitlines(True) if not line.startswith("output_dir")))
    with started(tmp_path, *([str(made), "--seed", str(seed)] for seed in range(3))) as process:
        winner = check_one_ran(ends(process), "runs/tiny")
    run = tmp_path / "runs" / "tiny"
    assert parse_recipe([str(run / "recipe.yaml")]).training.seed == winner
    assert len(checkpoints(run / "checkpoints")) == 3
    assert not [name for name in contents(tmp_path / "runs") if Path(name).name.startswith(".")]

    words = [str(run / "recipe.yaml"), "--max_train_steps", "120", "--resume_from_checkpoint", "latest"]
    spelt = [["--output_dir", "runs/tiny"], ["--output_dir", str(run)], ["--output_dir", "runs/../runs/tiny/"]]
    with started(tmp_path, *([*words, *more] for more in spelt)) as process:
        check_one_ran(ends(process), "runs/")
    assert len(checkpoints(run / "checkpoints")) == 6


def test_a_killed_run_leaves_nothing_in_the_way_and_a_dry_run_claims_nothing(tmp_path: Path) -> None:
    fields = {"max_train_steps": 4, "checkpointing_steps": 1}
    made, run = recipe(tmp_path / "recipe", tmp_path / "run", **fields), tmp_path / "run"
    with started(tmp_path, [made], waiting=True) as process:
        wait_for(tmp_path / "logs" / "0.waits", process)
        before = contents(run)
        for more in ({}, {"resume_from_checkpoint": "latest"}, {"dry_run": True}):
            with pytest.raises(CheckpointError, match=naming("output_dir", "--output_dir")):
                train_here(run, **fields, **more)
        assert contents(run) == before
        os.kill(int((tmp_path / "logs" / "0.pid").read_text()), signal.SIGKILL)
        assert ends(process)[0]["status"] == -signal.SIGKILL
    assert contents(run) == before
    train_here(run, **fields, resume_from_checkpoint="latest", dry_run=True)
    assert contents(run) == before
    train_here(run, **fields, resume_from_checkpoint="latest")
    assert len(checkpoints(run / "checkpoints")) == 4
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_folder_is_kept_from_before_the_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vdm_hub.training import loop

    seen = []

    def load(arguments: Any, tokenization: Any = None) -> Any:
        seen.append([str(path.parent) for path in tmp_path.rglob(".*")])
        raise DataError("there are no images")

    monkeypatch.setattr(loop, "load_data", load)
    with pytest.raises(DataError):
        train_here(tmp_path / "runs" / "run")
    assert seen == [[str(tmp_path / "runs" / "run")]]
    assert list(tmp_path.iterdir()) == [], "a run that is refused leaves nothing behind"
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError):
        train_here(tmp_path / "here")
    assert list(tmp_path.iterdir()) == [tmp_path / "here"], "but what was there stays"


@pytest.mark.parametrize("kind", ["file", "pipe", "dangling link", "foreign folder"])
def test_what_is_no_folder_for_a_run_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "run"
    if kind == "file":
        place.write_text("years of work")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"{place}.*hoose another"):
        train_here(place)
    assert contents(tmp_path) == before and os.path.lexists(place)


def test_home_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train_here(Path("~/runs/one"), max_train_steps=1)
    train_here(Path("~/runs/one"), max_train_steps=2, resume_from_checkpoint="~/runs/one/checkpoints/step-00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert len(checkpoints(tmp_path / "runs" / "one" / "checkpoints")) == 2
    chosen = configuration(Path("~nobody-of-this-name/run"))
    with pytest.raises(ConfigurationError, match="nobody-of-this-name"):
        OutputFolder(chosen)


def test_a_pipeline_with_notes_in_it_is_not_replaced(tmp_path: Path) -> None:
    train_here(tmp_path / "run", max_train_steps=1)
    (tmp_path / "run" / "pipeline" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "run" / "pipeline")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        train_here(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
    assert contents(tmp_path / "run" / "pipeline") == before


def test_what_lies_where_a_checkpoint_would_is_refused_at_the_start(tmp_path: Path) -> None:
    train_here(tmp_path / "run", max_train_steps=1)
    (tmp_path / "run" / "checkpoints" / "step-00000003").write_text("mine")
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=naming("step-00000003")):
        train_here(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
    assert contents(tmp_path / "run") == before
