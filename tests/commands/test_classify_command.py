"""``vdm-hub classify`` as a user sees it: what it prints, the files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tiny import tiny_pipeline, tiny_unet
from tiny_text import LIMIT, WIDTH, tiny_encoder, tiny_tokenizer
from vdm_hub import ClassificationEffort, VDMPipeline, VDMScheduler, load_split
from vdm_hub.commands import main

FEW = ("--max_images", "6", "--budget", "40", "--pilot_evaluations", "40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify") / "pipeline"
    tiny_pipeline(tiny_unet(num_class_embeds=10)).save_pretrained(folder)
    return folder


def words(folder: Path, *more: object) -> list[str]:
    return ["classify", str(folder), "--dataset_name", "digits", *map(str, more)]


def test_it_prints_an_object_and_writes_files_that_agree_with_the_pipeline(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(words(folder, *FEW, "--label_column", "label", "--seed", "3", "--json", "--output_dir", out)) == 0
    figures = json.loads(capsys.readouterr().out)
    assert json.loads((out / "classification.json").read_text()) == figures
    assert {"accuracy", "accuracy_error", "expected_calibration_error", "confusion", "dataset", "weights"} <= set(
        figures
    )
    assert sum(map(sum, figures["confusion"])) == figures["num_images"] == 6
    assert Image.open(out / "confusion.png").width > 300
    images = load_split("digits", "test[:6]", num_levels=17, label_column="label")
    effort = {name: value for name, value in figures["effort"].items() if value is not None}
    report: Any = VDMPipeline.from_pretrained(folder).classify(
        images.levels, effort=ClassificationEffort(**effort), seed=3, labels=images.labels
    )
    assert report.accuracy == figures["accuracy"]
    rows = pq.read_table(out / "posterior.parquet").to_pydict()
    assert rows["found"] == [str(one) for one in report.predicted.tolist()]
    assert rows["is"] == [str(one) for one in images.labels.tolist()]  # type: ignore[union-attr]
    for number in range(10):
        assert torch.tensor(rows[f"p({number})"]) == pytest.approx(report.posterior[:, number].float(), abs=1e-6)


def test_a_table_has_a_row_for_each_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, *FEW, "--label_column", "label", "--equal_effort")) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "40.0 evaluations an image" in shown
    assert all(f"\n  {number} " in shown for number in range(10))


def test_images_without_labels_have_no_accuracy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = ",".join(["0.1"] * 10)
    assert main(words(folder, *FEW, "--output_dir", tmp_path, "--prior", prior, "--json", "--transitions", "5")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "accuracy" not in figures and figures["transitions"] == 5 and not (tmp_path / "confusion.png").exists()
    assert main(words(folder, *FEW, "--output_dir", tmp_path)) == 2, "files are not replaced unasked"
    assert main(words(folder, *FEW, "--output_dir", tmp_path, "--overwrite")) == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--equal_effort", "--confidence", "0.9"), ("0.9", "--equal_effort")),
        (("--confidence", "1.5"), ("1.5",)),
        (("--prior", "0.5;0.5"), ("0.5;0.5",)),
        (("--prior", "0.5,0.5"), ("0.5", "10 numbers")),
        (("--budget", "12"), ("12", "20")),
        (("--max_images", "0"), ("max_images", "0")),
    ],
)
def test_what_is_refused_names_its_value(
    more: tuple[str, ...], named: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(folder, *more)) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in named) and "Traceback" not in said


@pytest.mark.parametrize(("more", "named"), [(("--prior", "0.5,0.5"), "10 numbers"), (("--budget", "12"), "take 20")])
def test_candidates_are_looked_at_before_images_are_read(
    more: tuple[str, ...], named: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", str(folder), "--dataset_name", str(tmp_path / "nowhere"), *more]) == 2
    assert named in capsys.readouterr().err


def test_an_unconditional_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    assert main(words(tmp_path / "pipeline", "--label_column", "label")) == 2
    assert "class-conditional" in capsys.readouterr().err


@pytest.fixture(scope="module")
def told_captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was told captions made of the digits' classes."""
    folder = tmp_path_factory.mktemp("captions") / "pipeline"
    captions = {"column": "label", "template": "a {label}", "max_length": LIMIT, "dropout": 0.0, "examples": []}
    parts: Any = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer(), "captions": captions}
    VDMPipeline(tiny_unet(cross_attention_dim=WIDTH), tiny_pipeline().scheduler, **parts).save_pretrained(folder)
    return folder


def test_captions_are_chosen_from_those_of_the_images(told_captions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    effort = ("--max_images", "12", "--budget", "100", "--pilot_evaluations", "0")
    assert main(words(told_captions, *effort, "--json")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["candidates"] == [f"a {number}" for number in range(10)], "whichever the images are"
    assert sum(map(sum, figures["confusion"])) == 12
    named = [f"a {number}" for number in range(10)]
    assert main(words(told_captions, *effort, "--json", "--candidates", *named)) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == named
    assert main(words(told_captions, *effort, "--json", "--candidates", "a 0", "a 1")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "accuracy" not in figures and "none of the candidates" in figures["notes"][0]
    assert main(words(told_captions, *effort, "--candidates", "a 0", "a 1", "--label_column", "label")) == 2
    assert "none of the candidates" in capsys.readouterr().err


def test_classes_are_chosen_by_number_or_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder, *FEW, "--candidates", "7", "3", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == ["7", "3"]
    assert main(words(folder, *FEW, "--candidates", "7", "12")) == 2
    assert "12" in capsys.readouterr().err


def test_images_without_a_column_are_classified_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        Image.new("L", (8, 8), 16 * number).save(images / f"{number}.png")
    classes = {"count": 3, "names": ["cat", "dog", "eel"], "dropout": 0.0, "column": "kind"}
    pipe = VDMPipeline(tiny_unet(num_class_embeds=3), VDMScheduler(num_levels=17), classes=classes)
    pipe.save_pretrained(tmp_path / "pipeline")
    effort = ["--budget", "12", "--pilot_evaluations", "0"]
    asked = ["classify", str(tmp_path / "pipeline"), "--dataset_name", str(images), "--split", "train", *effort]
    assert main([*asked, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "accuracy" not in figures and "'kind'" in figures["notes"][0]
    assert main([*asked, "--label_column", "kind"]) == 2, "a column that was asked for must be there"
