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
from vdm_hub.data.labels import read_labels
from vdm_hub.data.loading import load_split

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
