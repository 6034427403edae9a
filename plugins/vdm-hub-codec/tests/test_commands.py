"""``vdm-hub compress`` and ``decompress``, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_pipeline
from vdm_hub import load_split
from vdm_hub.commands import main


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def compress(model: str, output: Path, *more: str) -> int:
    words = ["compress", model, "--dataset_name", "digits", "--split", "test[:6]", "-o", str(output)]
    return main([*words, "--transitions", "4", *more])


@pytest.mark.parametrize("output", ["again", "again.parquet"])
def test_images_come_back_as_they_are_read(model: str, tmp_path: Path, output: str) -> None:
    file, again = tmp_path / "digits.vdmz", tmp_path / output
    assert compress(model, file) == 0
    assert main(["decompress", str(file), "-o", str(again), "--batch_size", "2"]) == 0
    expected = load_split("digits", "test[:6]", num_levels=17).levels
    found = load_split(str(again), "train", num_levels=17).levels
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_the_report_is_one_object_with_what_others_make(model: str, tmp_path: Path, capsys: Any) -> None:
    assert compress(model, tmp_path / "a.vdmz", "--json", "--compare") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (tmp_path / "a.vdmz").stat().st_size
    assert {"PNG, each", "PNG, a sheet", "WEBP, each", "WEBP, a sheet"} <= told["others"].keys()


def test_nothing_is_written_where_something_is_wrong(model: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "a.vdmz"
    assert compress(model, file) == 0
    tiny_pipeline(noise_schedule="cosine").save_pretrained(tmp_path / "other")
    content = file.read_bytes()
    (tmp_path / "cut.vdmz").write_bytes(content[:-9])
    (tmp_path / "other.vdmz").write_bytes(b"PNG" + content)
    for words, said in (
        (["decompress", str(tmp_path / "cut.vdmz"), "-o", str(tmp_path / "x")], "cut off"),
        (["decompress", str(tmp_path / "other.vdmz"), "-o", str(tmp_path / "x")], "VDMZ"),
        (["decompress", str(tmp_path / "none.vdmz"), "-o", str(tmp_path / "x")], "none.vdmz"),
        (["decompress", str(file), "-o", str(tmp_path / "x"), "--model", str(tmp_path / "other")], model),
        (["decompress", str(file), "-o", str(tmp_path / "x.txt")], "a folder or a .parquet file"),
        (["compress", model, "--dataset_name", "digits", "-o", str(file)], "exists"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        shown = capsys.readouterr().err
        assert said in shown and "Traceback" not in shown
    assert not any((tmp_path / name).exists() for name in ("x", "x.txt"))
