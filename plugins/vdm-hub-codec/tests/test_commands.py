"""``vdm-hub compress`` and ``decompress``, as a user calls them."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_pipeline
from vdm_hub import Command, HVAEPipeline, MarkovianHVAE, VDMHubError, load_split
from vdm_hub_codec.commands import Compress, Decompress


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(command: Command, *words: object) -> None:
    parser = argparse.ArgumentParser()
    command.declare(parser)
    command.run(parser.parse_args([str(word) for word in words]))


def compress(model: str, output: Path, *more: str) -> None:
    words = [model, "--dataset_name", "digits", "--split", "test[:6]", "-o", output, "--transitions", "4"]
    run(Compress(), *words, *more)


@pytest.mark.parametrize("output", ["again", "again.parquet"])
def test_images_come_back_as_they_are_read(model: str, tmp_path: Path, output: str) -> None:
    file, again = tmp_path / "digits.vdmz", tmp_path / output
    compress(model, file)
    run(Decompress(), file, "-o", again, "--batch_size", 2)
    expected = load_split("digits", "test[:6]", num_levels=17).levels
    found = load_split(str(again), "train", num_levels=17).levels
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_the_report_is_one_object_with_what_others_make(model: str, tmp_path: Path, capsys: Any) -> None:
    compress(model, tmp_path / "a.vdmz", "--json", "--compare")
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (tmp_path / "a.vdmz").stat().st_size
    assert {"PNG, each", "PNG, a sheet", "WEBP, each", "WEBP, a sheet"} <= told["others"].keys()


def test_pictures_of_lengths_and_of_what_is_known_on_the_way(model: str, tmp_path: Path, capsys: Any) -> None:
    file, plot, steps = (tmp_path / name for name in ("a.vdmz", "lengths.png", "steps.png"))
    compress(model, file, "--json", "--length_plot", str(plot))
    lengths = list(json.loads(capsys.readouterr().out)["lengths"].values())
    assert lengths == sorted(lengths, reverse=True) and plot.stat().st_size > 1000
    run(Decompress(), file, "-o", tmp_path / "again", "--progressive", steps)
    HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(4,)])).save_pretrained(
        tmp_path / "vae"
    )
    words = ["--dataset_name", "digits", "--split", "test[:2]", "-o", tmp_path / "vae.vdmz"]
    run(Compress(), tmp_path / "vae", *words)
    with pytest.raises(VDMHubError, match="gamma"):
        run(Decompress(), tmp_path / "vae.vdmz", "-o", tmp_path / "none", "--progressive", tmp_path / "none.png")
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.png").exists()
    assert steps.stat().st_size > 1000 and "0.000 levels off" in capsys.readouterr().out


def test_nothing_is_written_where_something_is_wrong(model: str, tmp_path: Path) -> None:
    file = tmp_path / "a.vdmz"
    compress(model, file)
    tiny_pipeline(noise_schedule="cosine").save_pretrained(tmp_path / "other")
    content = file.read_bytes()
    (tmp_path / "cut.vdmz").write_bytes(content[:-9])
    (tmp_path / "other.vdmz").write_bytes(b"PNG" + content)
    folder = tmp_path / "x"
    for command, words, said in (
        (Decompress(), (tmp_path / "cut.vdmz", "-o", folder), "cut off"),
        (Decompress(), (tmp_path / "other.vdmz", "-o", folder), "VDMZ"),
        (Decompress(), (tmp_path / "none.vdmz", "-o", folder), "none.vdmz"),
        (Decompress(), (file, "-o", folder, "--model", tmp_path / "other"), model),
        (Decompress(), (file, "-o", tmp_path / "x.txt"), "a folder or a .parquet file"),
        (Compress(), (model, "--dataset_name", "digits", "-o", file), "exists"),
    ):
        with pytest.raises(VDMHubError, match=re.escape(said)):
            run(command, *words)
    assert not any((tmp_path / name).exists() for name in ("x", "x.txt"))
