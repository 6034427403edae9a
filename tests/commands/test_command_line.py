"""What every command line refuses: an option given twice, a number beyond its range, a place of another kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from naming import naming
from vdm_hub.commands import main
from vdm_hub.errors import CheckpointError, ConfigurationError, HubError, OutputError, PublishError
from vdm_hub.evaluation.journal import Journal
from vdm_hub.hub.outgoing import refuse_secrets
from vdm_hub.hub.repositories import open_files
from vdm_hub.likelihood.measurement import Measured, Results
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.recipes.plain_yaml import load

EVALUATE = ("evaluate", "nowhere/at-all", "--dataset_name", "digits")
SAMPLE = ("sample", "nowhere/at-all")


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says in one paragraph, before it looks for any model."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as end:
        status = int(end.code or 0)
    shown = capsys.readouterr()
    (said,) = [line for line in shown.err.splitlines() if "error: " in line]
    assert status == 2 and shown.out == "" and "Traceback" not in shown.err and len(said) < 1100
    return said


TWICE: dict[str, tuple[list[str], list[str]]] = {
    "a number": (["--seed", "1", "--seed", "2"], ["--seed 1", "--seed 2"]),
    "a number, in one word": (["--seed=1", "--seed", "2"], ["--seed 1", "--seed 2"]),
    "the same value": (["--seed", "3", "--seed", "3"], ["--seed 3"]),
    "two spellings": (["--max_train_steps", "1", "--max-train-steps", "2"], ["--max_train_steps 1", "steps 2"]),
    "a truth value and its contrary": (["--use_ema", "--no_use_ema"], ["--use_ema", "--no_use_ema"]),
    "a mapping": (["--unet", '{"dropout": 0.1}', "--unet", '{"layers_per_block": 1}'], ["0.1", "layers_per_block"]),
    "a key": (["--unet.dropout", "0.1", "--unet.dropout=0.2"], ["--unet.dropout", "0.1", "0.2"]),
    "a key in two spellings": (
        ["--noise-schedule.config.gamma_min", "-7", "--noise_schedule.config", '{"gamma_min": -8}'],
        ["noise_schedule.config.gamma_min", "-7", "-8"],
    ),
    "a key and one within": (["--unet.a", "1", "--unet.a.b", "2"], ["--unet.a", "1", "2"]),
}


@pytest.mark.parametrize("what", TWICE)
def test_a_recipe_is_told_nothing_twice(what: str) -> None:
    words, named = TWICE[what]
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe(["digits", *words])
    assert "twice" in str(caught.value) and all(word in str(caught.value) for word in named)


def test_keys_beside_each_other_are_no_doubles() -> None:
    parse_recipe(
        ["digits", "--unet.dropout", "0.1", "--unet.layers_per_block", "1", "--unet", '{"norm_num_groups": 4}']
    )


@pytest.mark.parametrize(
    "words",
    [
        (*SAMPLE, "--seed", "1", "--seed", "2"),
        (*SAMPLE, "--output", "a.png", "--output=b.png"),
        (*EVALUATE, "--dataset_name", "other"),
        (*EVALUATE, "--json", "--json"),
        (*EVALUATE, "--method", "ode", "--method", "bound"),
        ("publish", "runs/x", "me/x", "--revision", "a", "--revision", "b"),
        ("plugins", "--check", "--check"),
    ],
)
def test_a_command_is_told_nothing_twice(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *words)
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    doubled = next(option for option in options if options.count(option) == 2)
    assert f"{doubled} is given twice" in said and words[-1].rpartition("=")[2] in said


@pytest.mark.parametrize("word", ["b\udcff", "nul\0"])
def test_a_word_that_no_path_can_be_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "UTF-8" in refused(capsys, "sample", word)
    assert "UTF-8" in refused(capsys, *EVALUATE[:2], "--dataset_name", word)
    with pytest.raises(ConfigurationError, match="UTF-8"):
        parse_recipe(["digits", "--output_dir", word])


NUMBERS = (
    *(
        "batch_size",
        "replicates",
        "max_replicates",
        "max_evaluations",
        "times_per_datum",
        "pilot_evaluations",
        "draws",
    ),
    *("probes", "max_steps", "transitions", "max_images", "resolution", "seed", "num_levels"),
)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_evaluate_have_a_range(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    method = {"draws": "importance_weighted", "probes": "ode", "max_steps": "ode"}.get(name, "bound")
    for value in (-1, 10**30):
        said = refused(capsys, *EVALUATE, "--method", method, f"--{name}", value)
        assert f"{name} is {value}" in said and "at most" in said and "at least" in said


@pytest.mark.parametrize("name", ["x.pdf", "x.jpg", "x.gif", "x.md", "x", "x.png.bak", ".png"])
def test_samples_are_written_under_names_of_their_format_only(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, command in (("output", SAMPLE), ("plot", EVALUATE)):
        said = refused(capsys, *command, f"--{option}", tmp_path / name)
        assert name in said and "ends in .png" in said
        assert "nowhere/at-all" in refused(capsys, *command, f"--{option}", tmp_path / "X.PNG")
        assert "too long" in refused(capsys, *command, f"--{option}", tmp_path / f"{'x' * 300}.png")
    assert not list(tmp_path.iterdir())


PLACES = {
    "a file": lambda path: path.write_text("years of work"),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a link without end": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_journal_is_kept_in_a_folder_only(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "journal"
    PLACES[what](place)
    assert str(place) in refused(capsys, *EVALUATE, "--journal", place)
    with pytest.raises(OutputError, match="another place"):
        Journal(place, {})


@pytest.mark.parametrize("name", ["file/journal", "x" * 300, "/proc/journal", "/dev/null/journal"])
def test_a_journal_that_cannot_be_kept_is_refused_in_one_paragraph(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    with pytest.raises((OutputError, CheckpointError)) as caught:
        Journal(tmp_path / name, {})
    assert "name another" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_journal_in_a_new_folder_or_behind_a_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    for name in ("new/deep", "link"):
        Journal(tmp_path / name, {}).write(0, torch.arange(2), Measured({"a": torch.ones(2)}, {}), 1.0)
        Journal(tmp_path / name, {}).read(results := Results(2))
        assert not len(results.missing(0))


@pytest.mark.parametrize("name", ["runs/x", "runs", "me/not.there"])
def test_a_folder_that_is_missing_is_said_to_be(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what the Hub, or its cache, has to say of that name."""
    monkeypatch.chdir(tmp_path)
    for words in (("sample", name), ("evaluate", name, "--dataset_name", "digits")):
        assert f"there is no folder {name}" in refused(capsys, *words)
    with pytest.raises(HubError, match=naming(name)):
        open_files(name)


KEYS = {
    "? [a]\n: 1": "['a']",
    "? {a: [1]}\n: 1": "{'a': [1]}",
    "1: 2": "'1'",
    "true: 2": "'true'",
    "? [[1, 2]]\n: 1": "[[1, 2]]",
}


@pytest.mark.parametrize("text", KEYS)
def test_a_key_that_is_no_text_is_shown_as_it_is(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(text, "here")
    assert f"the key {KEYS[text]} is no text" in str(caught.value) and "Node" not in str(caught.value)


def _bitmap(path: Path) -> None:
    Image.new("L", (4, 4)).save(path, "BMP")


def _cut(path: Path) -> None:
    Image.effect_noise((64, 64), 9).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:200])


PICTURES: dict[str, Any] = {
    "schedule.png": lambda path: path.write_text("<svg/>"),
    "samples.png": _bitmap,
    "training_curve.png": _cut,
    "empty.png": lambda path: path.touch(),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_none_is_not_published_and_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "other.png")
    refuse_secrets(tmp_path)
    PICTURES[name](tmp_path / "images" / name)
    with pytest.raises(PublishError) as caught:
        refuse_secrets(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
