"""The test images that are held out of a training split: fixed, spread, apart from all others, and found again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from image_folders import png, refused
from naming import naming
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.held_out import choose_again, hold_out, label_column
from vdm_hub.data.loading import RunData, load_data, load_split
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.recipes.arguments import parse_recipe


def class_folders(root: Path, **classes: int) -> Path:
    """Images in folders by class, each of one value of its own."""
    value = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            Image.fromarray(np.full((4, 4), value, np.uint8)).save(root / name / f"{value:03}.png")
            value += 1
    return root


def load(root: Path, **arguments: Any) -> RunData:
    return load_data(DataArguments(train_data_dir=str(root), **arguments))


def values(images: Any) -> list[int]:
    """Which images they are, by their values."""
    return sorted(images.levels[:, 0, 0, 0].tolist())


def labelled(labels: list[Any], feature: Any = None, name: str = "label") -> datasets.Dataset:
    feature = feature or datasets.Value("int64")
    features = datasets.Features({"image": datasets.Value("int64"), name: feature})
    return datasets.Dataset.from_dict({"image": list(range(len(labels))), name: labels}, features=features)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("held") / "four", cat=20, dog=10, fox=6, owl=4)


def test_every_image_is_in_one_part_and_the_test_is_spread_over_the_classes(four: Path) -> None:
    data = load(four, test_size=0.25, validation_size=0.1)
    assert data.test is not None and data.validation is not None
    parts = [values(part) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [27, 3, 10]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(40)), "no image twice, and none lost"
    classes = np.repeat(["cat", "dog", "fox", "owl"], [20, 10, 6, 4])
    found = Counter(classes[parts[2]].tolist())
    assert found["cat"] == 5 and {found["dog"], found["fox"], found["owl"]} <= {1, 2, 3}
    assert data.held_out_test is not None and data.held_out_test["label_column"] == "label"


def test_the_choice_depends_on_the_data_and_the_size_alone(four: Path) -> None:
    first = load(four, test_size=0.1).test
    for more in ({"validation_size": 0.2}, {"max_train_samples": 5}, {"color": "rgb"}, {"num_workers": 2}):
        again = load(four, test_size=0.1, **more).test
        assert values(again) == values(first), more
    assert values(load(four, test_size=4).test) == values(first), "a share is a number of images"


@pytest.mark.parametrize("size", [0.1, 0.5, 1, 7])
def test_the_same_images_are_chosen_afterwards(four: Path, size: float) -> None:
    data = load(four, test_size=size)
    assert isinstance(data.test, type(data.train))
    again = load_split(str(four), "held_out", held_out=data.held_out_test)
    assert torch.equal(again.levels, data.test.levels)
    first = load_split(str(four), "held_out[:1]", held_out=data.held_out_test)
    assert torch.equal(first.levels, data.test.levels[:1])


def test_a_dataset_that_has_grown_or_lost_its_labels_is_refused(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "birds", jay=6, owl=6)
    how = load(root, test_size=0.25).held_out_test
    Image.fromarray(np.full((4, 4), 99, np.uint8)).save(root / "jay" / "new.png")
    with pytest.raises(DataError, match=naming(12, 13)) as caught:
        load_split(str(root), "held_out", held_out=how)
    assert "--split" in str(caught.value) and "\n" not in str(caught.value)
    kept, held, record = hold_out(labelled([0, 1] * 6), "train", 4)
    assert len(kept) == 8 and len(held) == 4
    with pytest.raises(DataError, match=naming("'label'")):
        choose_again(labelled([0, 1] * 6).remove_columns("label"), "birds", record)
    with pytest.raises(DataError, match="other labels"):
        choose_again(labelled(list(range(12))), "birds", record)


def test_the_only_image_of_a_class_is_one_to_train_on() -> None:
    labels = [0] * 10 + [1] * 10 + [2]
    kept, held, record = hold_out(labelled(labels), "train", 0.2)
    assert Counter(held["label"]) == {0: 2, 1: 2} and 2 in kept["label"]
    assert record["label_column"] == "label"


def test_classes_that_can_not_be_spread_are_said_to_be_left_to_the_seed() -> None:
    with pytest.warns(UserWarning, match="column 'label'"):
        _, held, record = hold_out(labelled(list(range(10)) * 2), "train", 3)
    assert len(held) == 3 and record["label_column"] is None
    again = choose_again(labelled(list(range(10)) * 2), "x", record)
    assert again["image"] == held["image"]


@pytest.mark.parametrize(
    ("name", "feature", "found"),
    [
        ("label", datasets.Value("int64"), "label"),
        ("labels", datasets.Value("uint8"), "labels"),
        ("fine_label", datasets.ClassLabel(num_classes=2), "fine_label"),
        ("weight", datasets.Value("float32"), None),
        ("id", datasets.Value("int64"), None),
    ],
)
def test_a_class_is_a_class_label_or_an_integer_of_a_usual_name(name: str, feature: Any, found: str | None) -> None:
    labels: list[Any] = ["0", "1"] * 4 if feature.dtype == "string" else [0, 1] * 4
    assert label_column(labelled(labels, feature, name)) == found


NO_LABELS: dict[str, pa.Array] = {
    "null": pa.array([0, None] * 6),
    "negative": pa.array([-1, 3] * 6),
    "beyond int64": pa.array([2**64 - 1, 0] * 6, pa.uint64()),
    "only nulls": pa.nulls(12),
    "words": pa.array(["a", "b"] * 6),
    "floats": pa.array([0.5, 1.0] * 6),
    "truths": pa.array([True, False] * 6),
    "decimals": pa.array([1, 2] * 6, pa.decimal128(5, 2)),
    "dates": pa.array([1, 2] * 6, pa.date32()),
    "lists": pa.array([[1], [2]] * 6),
    "mappings": pa.array([{"a": 1}, {"a": 2}] * 6),
    "no class": pa.array([9, 1] * 6),
}


@pytest.mark.parametrize("what", NO_LABELS)
def test_what_is_refused_as_labels_spreads_nothing_and_that_is_said(tmp_path: Path, what: str) -> None:
    rows = [{"bytes": png(i), "path": None} for i in range(12)]
    table = pa.table({"image": rows, "label": NO_LABELS[what]})
    if what == "no class":
        classes = datasets.ClassLabel(names=["a", "b"])
        told = datasets.Features(image=datasets.Image(), label=classes).arrow_schema.metadata
        table = table.replace_schema_metadata(told)
    pq.write_table(table, tmp_path / "a.parquet")
    reasons = refused(load_split, str(tmp_path), "train", label_column="label")
    with pytest.warns(UserWarning, match="column 'label'") as said:
        data = load(tmp_path, test_split=None, test_size=0.25)
    assert reasons.partition("'train', ")[2] in str(said[0].message)
    assert data.held_out_test is not None and data.held_out_test["label_column"] is None
    for column in ("label", "image", "nowhere", ""):
        record: Any = data.held_out_test | {"label_column": column}
        message = refused(load_split, str(tmp_path), "held_out", held_out=record)
        assert "chosen again" in message and repr(column) in message


# ---- where there is a test split, or none can be made ---------------------------------------------------------------


def test_a_test_split_of_its_own_is_taken_and_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        class_folders(tmp_path / "own" / split, a=6, b=6)
    with pytest.warns(UserWarning, match="--test_split none"):
        data = load(tmp_path / "own", test_size=0.25)
    assert (len(data.train), data.held_out_test) == (12, None)
    data = load(tmp_path / "own", test_size=0.25, test_split=None)
    assert (len(data.train), data.held_out_test is None) == (9, False)


def test_nothing_is_held_out_unless_asked_for(four: Path) -> None:
    with pytest.warns(UserWarning, match="--test_size"):
        data = load(four)
    assert (len(data.train), data.test, data.held_out_test) == (40, None, None)
    assert load(four, test_split=None).test is None


def test_a_stream_has_no_share(four: Path) -> None:
    with pytest.raises(DataError, match=naming("test_size", 0.1, "--test_split")):
        load(four, test_size=0.1, streaming=True)
    with pytest.raises(DataError, match=naming("validation_size", 0.1)):
        load(four, test_split=None, validation_size=0.1, streaming=True)


@pytest.mark.parametrize("size", [-1, -0.1, 1.0, 2.5, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["test_size", "validation_size"])
def test_what_is_neither_a_share_nor_a_number_is_refused(field: str, size: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is"):
        DataArguments(dataset_name="digits", **{field: size})


@pytest.mark.parametrize("size", [40, 41, 1000, 0.999])
def test_what_leaves_nothing_to_train_on_is_refused(four: Path, size: float) -> None:
    with pytest.raises(DataError, match="40 images"):
        load(four, test_size=size)


def test_a_share_is_written_as_a_number_or_as_an_integer() -> None:
    for text, value in (("0.1", 0.1), ("1e-1", 0.1), ("256", 256), ("1", 1), ("1e2", 100), ("0", 0)):
        found = parse_recipe(["digits", "--test_size", text]).data.test_size
        assert found == value and isinstance(found, type(value)), text
    for text in ("1.0", "many", "2.5", "-3", "true"):
        with pytest.raises(ConfigurationError, match="test_size"):
            parse_recipe(["digits", "--test_size", text])


def test_corrupt_images_are_left_out_of_both_parts_and_the_choice_stays(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "birds", jay=8, owl=8)
    whole = load(root, test_size=0.25)
    held = values(whole.test)
    (root / "jay" / f"{held[0]:03}.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out"):
        data = load(root, test_size=0.25, skip_corrupt_images=True)
    assert values(data.test) == held[1:] and values(data.train) == values(whole.train)
    with pytest.warns(UserWarning, match="left out"):
        again = load_split(str(root), "held_out", held_out=data.held_out_test)
    assert values(again) == held[1:]
