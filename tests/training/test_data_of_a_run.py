"""What a run says of its images at the start, and what it refuses before it reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from image_folders import folder_of
from naming import naming
from runs import TINY, train_here
from vdm_hub.errors import DataError
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.state.outputs import OutputFolder

OF_A_FOLDER: dict[str, Any] = {"dataset_name": None, "test_split": None, "num_levels": 256, "train_batch_size": 2}


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_says_what_it_reads_and_what_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    folder = folder_of(tmp_path / "data", *(f"{c}/{i}.png" for c in ("car", "bus", "train") for i in range(4)))
    (folder / "car" / "0.txt").write_text("a caption")
    fields = OF_A_FOLDER | {"max_train_steps": 1, "validation_size": 3, "dry_run": dry_run}
    train_here(tmp_path / "run", train_data_dir=str(folder), **fields)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data from")]
    assert "9 of the 12 images" in said and "3 of the 12" in said and "car/0.txt" in said and "train/" in said


def test_an_output_among_the_images_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for output in ("runs/tiny", ".", "link/runs"):
        with pytest.raises(DataError, match="output_dir"):
            train_here(Path(output), train_data_dir=".", **OF_A_FOLDER)
    chosen = Configuration.from_dict(TINY | {"train_data_dir": "."} | OF_A_FOLDER, recipe="tiny")
    with pytest.raises(DataError, match="output_dir"):
        OutputFolder(chosen).check(chosen)
    assert sorted(tmp_path.iterdir()) == before


def test_too_many_images_held_out_are_told_from_too_large_a_batch(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", *(f"{i}.png" for i in range(30)))
    fields = OF_A_FOLDER | {"train_batch_size": 12, "validation_size": 25}
    with pytest.raises(DataError, match=naming(5, 25, 30, 18, "validation_size")):
        train_here(tmp_path / "run", train_data_dir=str(folder), **fields)
    assert not (tmp_path / "run").exists()
