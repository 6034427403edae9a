"""Labels are whole numbers of classes; whatever else a column holds is refused with its row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from image_folders import refused
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.conditions import ClassCondition
from vdm_hub.data.labels import read_labels
from vdm_hub.data.loading import load_data, load_split

ClassLabel, Value = datasets.ClassLabel, datasets.Value

REFUSED: dict[str, tuple[list[Any], Any, str]] = {
    "floats": ([0.5, 1.0, 2.0], Value("float64"), "0.5"),
    "whole floats": ([0.0, 1.0, 2.0], Value("float32"), "float32"),
    "strings": (["cat", "dog", "cat"], Value("string"), "cat"),
    "digits as strings": (["0", "1", "0"], Value("string"), "string"),
    "truths": ([True, False, True], Value("bool"), "bool"),
    "lists": ([[0], [1], [2]], datasets.List(Value("int64")), "List"),
    "a null": ([0, None, 1], Value("int64"), "row 1 "),
    "a null class": ([0, 1, None], ClassLabel(num_classes=2), "row 2 "),
    "no label": ([0, -1, 1], ClassLabel(num_classes=2), "row 1 "),
    "a negative number": ([0, 1, -5], Value("int32"), "row 2 "),
    "beyond int64": ([0, 2**63, 1], Value("uint64"), "row 1 "),
    "dates": ([0, 1, 2], Value("timestamp[s]"), "timestamp"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_number_of_a_class_is_refused(what: str) -> None:
    values, feature, said = REFUSED[what]
    features = datasets.Features({"label": feature})
    dataset = datasets.Dataset(pa.table({"label": values}, schema=features.arrow_schema))
    message = refused(read_labels, dataset, "label")
    assert "'label'" in message and said in message


@pytest.mark.parametrize("number", [2, 10, 255])
def test_more_than_the_classes_is_refused(tmp_path: Path, number: int) -> None:
    """In a file whose own description says so, as `datasets` would not write it."""
    features = datasets.Features({"image": datasets.Image(), "label": ClassLabel(num_classes=2)})
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 3, "label": [0, 1, number]}
    pq.write_table(pa.table(rows, schema=features.arrow_schema), tmp_path / "a.parquet")
    assert "row 2 " in refused(load_split, str(tmp_path), "train", label_column="label")
    assert "0 to 1" in refused(load_split, str(tmp_path), "train", label_column="label")
    assert load_split(str(tmp_path), "train[:2]", label_column="label").labels is not None


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_integers_of_any_size_are_labels(dtype: str) -> None:
    dataset = datasets.Dataset.from_dict({"x": [3, 0, 100]}, features=datasets.Features({"x": Value(dtype)}))
    assert torch.equal(read_labels(dataset.select([2, 0]), "x"), torch.tensor([100, 3]))


def test_numbers_that_count_no_classes_are_refused_before_a_network_is_made(tmp_path: Path) -> None:
    """An id named by mistake would ask for a table of billions of classes."""
    for number in range(3):
        Image.new("L", (4, 4)).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(3)]
    pq.write_table(pa.table({"file_name": names, "id": [10**9, 10**9 + 1, 3]}), tmp_path / "metadata.parquet")
    arguments = DataArguments(train_data_dir=str(tmp_path), label_column="id", test_split=None)
    message = refused(load_data, arguments)
    assert "'id'" in message and "1000000001" in message


@pytest.mark.parametrize("told", ["label_column", "caption_column"])
def test_a_row_has_its_own_number_though_others_are_held_out(tmp_path: Path, told: str) -> None:
    for number in range(20):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number:02}.png")
    values: list[Any] = ["a"] * 20 if told == "caption_column" else [0, 1] * 10
    values[13] = None
    names = [f"{number:02}.png" for number in range(20)]
    pq.write_table(pa.table({"file_name": names, "told": values}), tmp_path / "metadata.parquet")
    arguments = DataArguments(train_data_dir=str(tmp_path), test_split=None, test_size=5, **{told: "told"})
    assert "row 13 " in refused(load_data, arguments)


def test_a_sign_that_is_no_number_is_the_name_of_no_class() -> None:
    assert ClassCondition(3).choices_of(["²", "2", "٢"]) == ["²", 2, 2]


@pytest.mark.parametrize("count", [5, 12])
def test_named_classes_are_as_many_as_their_names(count: int) -> None:
    arguments = DataArguments(dataset_name="digits", num_levels=17, label_column="label", num_classes=count)
    message = refused(load_data, arguments)
    assert f"num_classes is {count}" in message and "10 classes" in message
