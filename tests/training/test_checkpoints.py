"""Checkpoints: whole or refused, never pickled, never more than asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naming import naming
from runs import ROOT, contents, environment
from vdm_hub.errors import CheckpointError, OutputError
from vdm_hub.files import entries
from vdm_hub.hub.json_files import MAX_JSON_BYTES
from vdm_hub.training.state.checkpoints import (
    checkpoints,
    find_checkpoint,
    foreign_entries,
    holds_nothing_else,
    load_checkpoint,
    save_checkpoint,
    tidy,
)
from vdm_hub.training.state.resuming import find_resume_point

FILES = ("manifest.json", "objective.safetensors", "optimizer.safetensors", "state.json")


def save(folder: Path, step: int, keep: int | None = None) -> Path:
    tensors = {"objective": {"weight": torch.full((50,), float(step))}, "optimizer": {"0.step": torch.tensor(1.0)}}
    return save_checkpoint(folder, step, tensors, {"step": step}, keep)


def test_what_is_saved_is_what_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    views = {"plain": base, "the same memory": base[1:3], "not contiguous": base.T, "empty": base[:0]}
    kinds = {"double": base.double(), "half": base.half(), "bfloat": base.bfloat16(), "count": torch.tensor(7)}
    special = {"odd": torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-45])}
    state = {"step": 3, "rates": [0.1, 1e-17], "text": "é", "none": None}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 3, {"a": views | special, "b": kinds}, state))
    assert loaded.state == state
    assert loaded.tensors.keys() == {"a", "b"}
    for group, saved in (("a", views | special), ("b", kinds)):
        for name, tensor in saved.items():
            assert loaded.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[group][name].nan_to_num(99), tensor.nan_to_num(99)), name


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    assert sorted(file.name for file in save(tmp_path, 1).iterdir()) == sorted(FILES)
    for file in (tmp_path / "step-00000001").glob("*.json"):
        json.loads(file.read_text())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.none() | st.integers(1, 4))
def test_the_limit_keeps_the_latest_and_the_one_just_written(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int | None
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    for count, step in enumerate(steps, start=1):
        before = {path.name for path in checkpoints(folder)}
        written = save(folder, step, keep)
        found = [path.name for path in checkpoints(folder)]
        everything = sorted(before | {written.name})
        assert written.name in found
        assert len(found) == min(len(everything), keep or count)
        others = [name for name in everything if name != written.name]
        assert set(found) - {written.name} == set(others[len(others) - len(found) + 1 :])


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_found_and_named(name: str, damage: str, tmp_path: Path) -> None:
    other, path = save(tmp_path, 1), save(tmp_path, 2)
    file = path / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = data.index(b"{") if name == "manifest.json" else len(data) // 2
        file.write_bytes(data[:middle] if damage == "truncated" else data[:middle] + b"\xff" + data[middle + 1 :])
    with pytest.raises(CheckpointError, match="manifest.json" if name == "manifest.json" else f"damaged: {name}") as e:
        load_checkpoint(path)
    assert "\n" not in str(e.value)
    assert name == "manifest.json" or f"resume from {other} instead" in str(e.value)
    assert load_checkpoint(other).state == {"step": 1}


@pytest.mark.parametrize("name", FILES[1:3])
def test_a_file_that_the_manifest_leaves_out_is_found_and_named(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=naming("manifest", name)):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "[]",
        '{"format": "another tool", "files": {}}',
        '{"format": "vdm_hub checkpoint 1", "files": {}}',
        '{"format": "vdm_hub checkpoint 1", "files": ["state.json"]}',
        '{"format": "vdm_hub checkpoint 1", "files": {"state.json": {}}}',
        '{"format": "vdm_hub checkpoint 1", "files": {"../state.json": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_foreign_folder_is_refused(manifest: str | None, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="vdm_hub"):
        load_checkpoint(tmp_path)


def test_latest_and_paths(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest") is None
    first, second = save(tmp_path, 9), save(tmp_path, 10)
    assert find_checkpoint(tmp_path, "latest") == second
    assert find_checkpoint(tmp_path, str(first)) == first
    with pytest.raises(CheckpointError, match="step-00000010"):
        find_checkpoint(tmp_path, str(tmp_path / "step-00000011"))


WRITE_FOR_EVER = """
import itertools, sys, torch
from pathlib import Path
from vdm_hub.training.state.checkpoints import save_checkpoint
for step in itertools.count(1):
    tensors = {name: {"weight": torch.full((1_000_000,), float(step))} for name in ("objective", "ema", "optimizer")}
    save_checkpoint(Path(sys.argv[1]), step, tensors, {"step": step}, keep=2)
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)]
    writer = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    try:
        while not (len(checkpoints(tmp_path)) == 2 and list(tmp_path.glob(".step-*/*.safetensors"))):
            assert writer.poll() is None, writer.stderr and writer.stderr.read().decode()
            assert time.monotonic() < deadline
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    leftovers = list(tmp_path.glob(".step-*"))
    found = checkpoints(tmp_path)
    assert found
    assert not set(leftovers) & set(found)
    step = load_checkpoint(found[-1]).state["step"]
    assert found[-1].name == f"step-{step:08d}"
    assert find_checkpoint(tmp_path, "latest") == found[-1]
    save(tmp_path, step + 1, keep=1)
    assert {name.split("/")[0] for name in contents(tmp_path)} == {f"step-{step + 1:08d}"}


def test_what_a_kill_left_is_cleared_and_a_checkpoint_it_hid_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / ".step-00000010-0123abcd.old")  # killed between two renames
    (tmp_path / ".step-00000020-0123abcd").mkdir()
    (tmp_path / ".step-00000005.removed").mkdir()
    (tmp_path / ".step-00000030-0123abcd").touch()  # a file, where a folder is expected
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000010"}
    assert load_checkpoint(tmp_path / "step-00000010").state["step"] == 10


# ---- what the run did not write -------------------------------------------------------------------------------------

COPIES = ("step-00000001-good", "step-00000002 (copy)", "step-00000001.bak", "step-1", "step-000000030", "best")
COPIES += ("Step-00000002", "step-00000003", ".step-00000001", ".step-00000001-good", ".step-00000001-0123abcd.bak")
COPIES += ("step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0669", "damaged-step-00000001", "step-00000001.removed")


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_checkpoint_is_kept_and_is_never_the_latest(name: str, tmp_path: Path) -> None:
    """Also one that has the name of a later step: its manifest says which it is."""
    shutil.copytree(save(tmp_path, 1), tmp_path / name)
    before = contents(tmp_path / name)
    found = find_resume_point(tmp_path, "latest")
    assert found is not None and found.path.name == "step-00000001"
    save(tmp_path, 2, keep=1)
    tidy(tmp_path, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    assert contents(tmp_path / name) == before
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "step-00000002"


@pytest.mark.parametrize("name", ["step-00000003", ".step-00000003.removed", ".step-00000003", "step-00000003.txt"])
@pytest.mark.parametrize("kind", ["a file", "a folder of other files", "a link", "a dangling link"])
def test_a_stranger_with_a_checkpoint_s_name_is_never_touched(kind: str, name: str, tmp_path: Path) -> None:
    place, away = tmp_path / "checkpoints" / name, tmp_path / "away"
    save(tmp_path / "checkpoints", 1)
    if kind == "a file":
        place.write_text("years of work")
    elif kind == "a folder of other files":
        place.mkdir()
        (place / "thesis.tex").write_text("years of work")
    else:
        if kind == "a link":
            away.mkdir()
            (away / "thesis.tex").write_text("years of work")
        place.symlink_to(away)
    before = contents(tmp_path)
    tidy(tmp_path / "checkpoints", keep=1)
    assert contents(tmp_path) == before
    assert os.path.lexists(place)
    if name == "step-00000003":
        assert foreign_entries(tmp_path / "checkpoints") == [place]
        if kind in ("a file", "a folder of other files"):
            with pytest.raises(OSError):
                save(tmp_path / "checkpoints", 3)
            assert contents(tmp_path) == before
    assert find_checkpoint(tmp_path / "checkpoints", "latest") == tmp_path / "checkpoints" / "step-00000001"


def test_a_checkpoint_that_holds_notes_is_kept_beyond_the_limit_and_says_so(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    (first / "notes.txt").write_text("the good one")
    with pytest.warns(UserWarning, match=naming("step-00000001")):
        save(tmp_path, 2, keep=1)
    assert (first / "notes.txt").read_text() == "the good one"
    with pytest.raises(OutputError, match=r"notes\.txt"):
        save(tmp_path, 1)
    assert load_checkpoint(first).state == {"step": 1}


def test_a_kill_within_safetensors_own_writing_leaves_nothing(tmp_path: Path) -> None:
    """safetensors writes to a name of its own, too, and renames: what a kill leaves of it was written by the run."""
    folder = tmp_path / "checkpoints"
    words = (
        "import sys, pathlib, torch; from vdm_hub.training.state.checkpoints import save_checkpoint\n"
        "[save_checkpoint(pathlib.Path(sys.argv[1]), step, {'ema': {'w': torch.zeros(10_000_000)}}, {}, keep=1)"
        " for step in range(1, 1000)]"
    )
    with subprocess.Popen([sys.executable, "-c", words, str(folder)], env=environment()) as saving:
        while not (met := list(folder.glob(".step-*/.tmp*"))) and saving.poll() is None:
            pass
        saving.kill()
    assert met, "no kill met safetensors' own file"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(folder, 1000)
    assert [path.name for path in entries(folder) if path.name.startswith(".")] == []
    foreign = folder / ".step-00001001-0123abcd"
    foreign.mkdir()
    (foreign / ".tmp.notes").touch()
    with pytest.warns(UserWarning, match="remove"):
        save(folder, 1002)
    assert foreign.is_dir()


def test_a_damaged_checkpoint_goes_aside_beside_what_has_that_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").write_text("{")
    (tmp_path / "damaged-step-00000002").symlink_to(tmp_path / "nowhere")
    start = find_resume_point(tmp_path, "latest")
    assert start is not None
    with pytest.warns(UserWarning, match=naming("damaged-step-00000002.2")):
        start.set_aside()
    assert (tmp_path / "damaged-step-00000002").is_symlink()
    (save(tmp_path, 3) / "state.json").write_text("{")
    (tmp_path / "step-00000003" / "notes.txt").write_text("mine")
    again = find_resume_point(tmp_path, "latest")
    assert again is not None
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=naming("step-00000003")):
        again.set_aside()
    assert contents(tmp_path) == before


def test_a_copy_named_by_its_path_is_gone_on_from(tmp_path: Path) -> None:
    copy = shutil.copytree(save(tmp_path, 1), tmp_path / "step-00000001-good")
    start = find_resume_point(tmp_path, str(copy))
    assert start is not None and start.checkpoint.state == {"step": 1}
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=naming("step-00000002")):
        find_resume_point(tmp_path, str(copy))


def test_tidying_keeps_the_latest_and_what_others_put_there(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for keep, left in ((None, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (3, [2, 3, 4])):
        tidy(tmp_path, keep)
        assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in left]
    (tmp_path / "step-00000002" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="step-00000002"):
        tidy(tmp_path, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


def test_the_hint_at_a_damaged_one_is_the_latest_other(tmp_path: Path) -> None:
    (damaged := save(tmp_path, 9)).joinpath("state.json").write_text("{")
    with pytest.raises(CheckpointError, match=naming("step-00000009", "output_dir")):
        load_checkpoint(damaged)
    save(tmp_path, 1)
    latest = save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=naming("step-00000009", str(latest))):
        load_checkpoint(damaged)


def test_a_state_without_a_json_form_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, {"step": 1, "loss": float("nan")})
    assert entries(tmp_path) == []


def test_each_file_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[str] = []

    def fsync(number: int) -> None:
        if not (tmp_path / "step-00000001").exists():
            synced.append(Path(f"/proc/self/fd/{number}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 1)
    assert set(FILES) <= set(synced)


def test_a_long_run_s_state_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    """Larger than what is read of other records."""
    state = {"step": 1, "figures": "9" * (MAX_JSON_BYTES + 1)}
    assert load_checkpoint(save_checkpoint(tmp_path, 1, {}, state)).state == state


def test_only_what_a_manifest_lists_is_a_checkpoint_s(tmp_path: Path) -> None:
    """An unlisted file is another's, also by a name that a checkpoint's file may have; a link is no checkpoint."""
    path = save(tmp_path, 5)
    assert holds_nothing_else(path)
    (path / "other.safetensors").write_bytes(b"")
    assert not holds_nothing_else(path)
    elsewhere = save(tmp_path / "elsewhere", 6)
    (tmp_path / "step-00000006").symlink_to(elsewhere)
    (tmp_path / "step-00000007").write_text("a file")
    assert [one.name for one in checkpoints(tmp_path)] == ["step-00000005"]
    assert [one.name for one in foreign_entries(tmp_path)] == ["step-00000006", "step-00000007"]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].pop("state.json"),
        lambda manifest: manifest["files"].update({"../state.json": manifest["files"]["state.json"]}),
    ],
    ids=["no state", "a file elsewhere"],
)
def test_a_manifest_of_other_files_is_none(change: Any, tmp_path: Path) -> None:
    path = save(tmp_path, 5) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=naming("manifest.json")):
        load_checkpoint(path.parent)


def test_an_older_manifest_s_step_is_that_of_the_folder_s_name(tmp_path: Path) -> None:
    path = save(tmp_path, 12345678)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["step"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoints(tmp_path) == [path]


def test_what_a_hidden_link_points_to_is_never_removed(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 3)
    (run := tmp_path / "run").mkdir()
    for name in (".step-00000003.removed", ".step-00000004-0123abcd"):
        (run / name).symlink_to(elsewhere)
    tidy(run)
    assert load_checkpoint(elsewhere).state["step"] == 3
    assert [path.name for path in entries(run)] == [".step-00000003.removed", ".step-00000004-0123abcd"]
