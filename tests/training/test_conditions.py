"""A run that is told the classes of its images: what it trains on, publishes, samples and measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from naming import naming
from runs import as_process, configuration, start, train_here
from vdm_hub import VDMPipeline, load_split
from vdm_hub.data.conditions import ClassCondition
from vdm_hub.data.images import labels_as
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.plots import rows_of_choices

LABELLED: dict[str, Any] = {"label_column": "label"}
NAMES = ["cat", "dog", "eel"]


def folder(path: Path, feature: Any, splits: dict[str, list[int]]) -> str:
    """A folder of Parquet files of random 8x8 images with these labels."""
    draws = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    for split, labels in splits.items():
        pictures = [Image.fromarray(draws.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in labels]
        (path / split).mkdir(parents=True)
        rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        rows.to_parquet(path / split / "rows.parquet")
    return str(path)


def named(path: Path, test: list[str] = NAMES, **splits: list[int]) -> str:
    """A folder whose test split has its classes in an order of its own."""
    folder(path, datasets.ClassLabel(names=NAMES), {"train": [0, 1, 2] * 8})
    return folder(path, datasets.ClassLabel(names=test), {"test": [0, 1, 2, 2]} | splits)


def test_a_run_publishes_samples_and_measures_the_classes(tmp_path: Path) -> None:
    fields = {"num_sample_images": 20, "evaluation_replicates": 2, "validation_size": 64, "validation_steps": 3}
    report = train_here(tmp_path / "run", **LABELLED, **fields)
    assert report is not None and report.details["condition"] == "class"
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert told["dataset"]["label_column"] == "label"
    pipe = VDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.class_names == tuple("0123456789") and pipe.unet.config.num_class_embeds == 11
    images = load_split("digits", "test[:4]", num_levels=17, label_column="label")
    right, wrong = (
        pipe.bits_per_dim(images.levels, class_labels=labels).per_image
        for labels in (images.labels, (images.labels + 1) % 10)  # type: ignore[operator]
    )
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_stay_with_their_images_in_memory_and_in_a_stream(tmp_path: Path, streaming: bool) -> None:
    labels = [0, 2, 1, 1, 0, 2, 2, 0] * 6
    path = folder(tmp_path / "data", datasets.ClassLabel(names=NAMES), {"train": labels})
    run = start(
        tmp_path / "run", dataset_name=path, num_levels=256, streaming=streaming, train_batch_size=8, **LABELLED
    )
    whole = load_split(path, "train", label_column="label")
    of_image = {image.numpy().tobytes(): int(label) for image, label in zip(whole.levels, whole.labels, strict=True)}  # type: ignore[arg-type]
    for _, (batch,) in zip(range(5), run.batches(), strict=False):
        assert [of_image[image.numpy().tobytes()] for image in batch["levels"]] == batch["class_labels"].tolist()
    assert run.model.condition == ClassCondition(3, tuple(NAMES), 0.1)


def test_a_stream_of_integers_must_be_told_how_many_classes_there_are(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", datasets.Value("int64"), {"train": [0, 3, 1, 2] * 8})
    fields = {"dataset_name": path, "num_levels": 256, **LABELLED}
    with pytest.raises(DataError, match="--num_classes"):
        start(tmp_path / "run", **fields, streaming=True)
    assert start(tmp_path / "run", **fields, streaming=True, num_classes=5).model.condition.count == 5  # type: ignore[union-attr]
    assert start(tmp_path / "run", **fields).model.condition.count == 4  # type: ignore[union-attr]
    with pytest.raises(DataError, match=naming(3, 4)):
        start(tmp_path / "run", **fields, num_classes=3)


def test_classes_are_found_by_their_names_where_a_split_has_them_in_another_order(tmp_path: Path) -> None:
    path = named(tmp_path / "data", test=["eel", "cat", "dog"])
    run = start(tmp_path / "run", dataset_name=path, num_levels=256, **LABELLED)
    assert run.data.test is not None and run.data.test.labels.tolist() == [2, 0, 1, 1]  # type: ignore[union-attr]


def test_a_class_that_was_not_trained_on_is_refused(tmp_path: Path) -> None:
    path = named(tmp_path / "data", test=["eels", "cat", "dog"])
    with pytest.raises(DataError, match="'eel'"):
        start(tmp_path / "run", dataset_name=path, num_levels=256, **LABELLED)
    three = ClassCondition(3)
    with pytest.raises(DataError, match=naming(3, "0 to 2")):
        labels_as(torch.tensor([0, 3]), None, three)
    with pytest.raises(DataError, match="--label_column"):
        labels_as(None, None, three)


def test_classes_that_are_taken_by_number_and_those_without_an_image_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="by number"):
        assert labels_as(torch.tensor([0, 1]), None, ClassCondition(3, tuple(NAMES))).tolist() == [0, 1]
    with pytest.warns(UserWarning, match="by number"):
        labels_as(torch.tensor([0, 1]), tuple(NAMES), ClassCondition(3))
    path = folder(tmp_path / "data", datasets.ClassLabel(names=NAMES), {"train": [0, 2] * 12})
    with pytest.warns(UserWarning, match="'dog'"):
        start(tmp_path / "run", dataset_name=path, num_levels=256, **LABELLED)


def test_what_is_hidden_is_a_draw_of_the_place_in_the_global_batch(tmp_path: Path) -> None:
    run = start(tmp_path / "run", **LABELLED, condition_dropout=0.25, train_batch_size=40)
    labels, hidden = torch.arange(40) % 10, torch.zeros(200, 40, dtype=torch.bool)
    for step in range(200):
        run.step = step
        batch = run._condition({"class_labels": labels}, 0)["class_labels"]
        hidden[step] = batch == 10
        assert torch.equal(batch[~hidden[step]], labels[~hidden[step]])
    share = hidden.float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / hidden.numel()) ** 0.5  # five standard errors of a fair draw
    # The second of two processes sees what the second micro-batch of one sees.
    second = run._condition({"class_labels": labels}, 1)["class_labels"]
    as_process(1, 2)
    assert torch.equal(run._condition({"class_labels": labels}, 0)["class_labels"], second)
    assert not torch.equal(second == 10, hidden[-1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"condition_dropout": 0.2}, ("condition_dropout", "label_column")),
        ({"num_classes": 10}, ("num_classes", "label_column")),
        ({"label_column": "label", "condition_dropout": 1.0}, ("condition_dropout", "1")),
        ({"label_column": "label", "model": "hvae", "noise_schedule": "linear", "unet": {}}, ("label_column", "hvae")),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(tmp_path: Path, fields: Any, said: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*said)):
        configuration(tmp_path / "run", **fields)


@pytest.mark.parametrize("classes", [2, 10, 11, 300])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_a_grid_has_a_row_for_each_class_and_no_more_than_asked_for(classes: int, count: int) -> None:
    told, columns = rows_of_choices(classes, count)
    rows = torch.tensor(told).view(-1, columns or 0)
    assert rows.numel() <= count and int(rows.max()) < classes
    assert (rows == rows[:, :1]).all() and (len(rows) < 2 or bool((rows[:, 0].diff() > 0).all()))
