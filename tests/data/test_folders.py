"""A folder is read as it is named, and whole; and what lies in it and is not read is named."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_folders import folder_of, greys, parquet_of, picture, png, read, refused
from naming import naming
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.layouts import read_layout
from vdm_hub.data.loading import check_outputs_apart, load_data, load_split
from vdm_hub.data.sources import open_folder, open_source
from vdm_hub.errors import DataError

both = pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])

# Each beside a folder that a pattern of this name, or an address, would find instead.
NAMES = {
    "run[1]": "run1",
    "set*": "set2",
    "a?c": "abc",
    "**": "any",
    "{a,b}": "a",
    "x::y": "y",
    "~": "home",
    "~root": "root",
    "two words": "two",
    "naïve-日本": "naive",
    "a@b": "a",
    "a#b": "a",
    "100%": "100",
    "%41": "A",
    "hf:/x": "x",
    "file:": "f",
    "!x": "x",
    "$HOME": "home",
    "a\\b": "ab",
    "[!a]": "b",
    "train[:1]": "train",
    "new\nline": "new",
}


@both
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_read_as_it_is_named(tmp_path: Path, name: str, streaming: bool) -> None:
    folder_of(tmp_path / "one" / NAMES[name], "1.png", "2.png", first=100)
    folder_of(tmp_path / "one" / name, f"{name.strip('/')}.png".replace("/", ""), "c[1].png")
    assert sorted(greys(read(tmp_path / "one" / name, streaming=streaming).train)) == [0, 1]


@both
@pytest.mark.parametrize("name", NAMES)
def test_a_parquet_file_is_read_as_it_is_named(tmp_path: Path, name: str, streaming: bool) -> None:
    _one_image(tmp_path / f"{NAMES[name]}.parquet", 100)
    wanted = _one_image(tmp_path / f"{name.replace('/', '')}.parquet", 7)
    assert greys(read(wanted, streaming=streaming).train) == [7]


def _one_image(path: Path, grey: int) -> Path:
    return parquet_of(path, [{"bytes": png(grey), "path": None}])


def test_a_relative_name_is_of_the_current_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("~", "one/run[1]", "digits", "a b")):
        folder_of(tmp_path / name, "x.png", first=number)
        assert greys(read(name).train) == [number]
    assert len(load_split("digits", "test", num_levels=17)) == 360 and greys(load_split("./digits", "train")) == [2]
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    assert greys(read("~/run[1]").train) == [1]


# --- splits ---------------------------------------------------------------------------------------------------------

# Names, and the splits that they make: (split, how many images).
SPLITS: dict[str, tuple[list[str], dict[str, int]]] = {
    "classes, one called train": ([f"{c}/{i}.png" for c in ("car", "bus", "train") for i in range(4)], {"train": 12}),
    "classes, one called test": ([f"{c}/{i}.png" for c in ("cat", "test") for i in range(3)], {"train": 6}),
    "files called train and test": ([f"{s}_{i}.png" for s in ("train", "test") for i in range(3)], {"train": 6}),
    "only files called test": (["test_0.png", "test_1.png"], {"train": 2}),
    "one image beside train and test": (["train/0.png", "test/0.png", "preview.png"], {"train": 3}),
    "one class of three called eval": (["cat/0.png", "eval/1.png", "dev/2.png"], {"train": 3}),
    "train.2024": (["train.2024/0.png", "test.2024/1.png"], {"train": 2}),
    "nested": (["a/train/x.png", "a/test/x.png", "b/train/x.png"], {"train": 3}),
    "train and test": (["train/0.png", "train/1.png", "test/0.png"], {"train": 2, "test": 1}),
    "other words for them": (["train/0.png", "val/0.png", "Test/1.png"], {"train": 1, "validation": 1, "test": 1}),
    "with classes": ([f"{s}/{c}/0.png" for s in ("train", "test") for c in "ab"], {"train": 2, "test": 2}),
    "only test": (["test/0.png", "test/1.png"], {"test": 2}),
    "a class that says nothing": (["training wheels/0.png", "latest/1.png"], {"train": 2}),
}


@pytest.mark.parametrize("what", SPLITS)
def test_splits_are_made_of_names_only_where_they_leave_no_image_out(tmp_path: Path, what: str) -> None:
    names, splits = SPLITS[what]
    source = open_folder(str(folder_of(tmp_path, *names)))
    assert dict(source.sizes) == splits
    assert sum(len(source.read(split)) for split in splits) == len(names)


@both
def test_a_folder_that_is_read_whole_says_so_and_how_to_name_splits(tmp_path: Path, streaming: bool) -> None:
    names, _ = SPLITS["classes, one called train"]
    data = read(folder_of(tmp_path, *names), streaming=streaming)
    assert len(greys(data.train)) == 12
    assert "train/" in data.summary and "test/" in data.summary and "at the top" in data.summary
    assert "at the top" not in read(folder_of(tmp_path / "plain", "cat/0.png", "dog/0.png")).summary


def test_parquet_files_are_divided_by_their_names(tmp_path: Path) -> None:
    for name in (
        "train-00000-of-00002",
        "train-00001-of-00002",
        "test-00000-of-00001-0123abcd",
        "extra-00000-of-00001",
    ):
        _one_image(tmp_path / "shards" / "data" / f"{name}.parquet", 1)
    assert dict(open_folder(str(tmp_path / "shards")).sizes) == {"train": 2, "test": 1, "extra": 1}
    for name in ("train", "test"):
        _one_image(tmp_path / "plain" / f"{name}.parquet", 1)
    assert dict(open_folder(str(tmp_path / "plain")).sizes) == {"train": 1, "test": 1}
    for name in ("train", "test_of_mine", "more"):
        _one_image(tmp_path / "others" / f"{name}.parquet", 1)
    assert dict(open_folder(str(tmp_path / "others")).sizes) == {"train": 3}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_parquet_file_is_named(tmp_path: Path, lost: int) -> None:
    for number in {0, 1, 2} - {lost}:
        _one_image(tmp_path / f"train-{number:05d}-of-00003.parquet", number)
    assert f"train-{lost:05d}-of-00003" in refused(read, tmp_path)


def test_slices_are_of_the_images_in_order(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, *(f"{i:02d}.png" for i in range(20))))
    for split, expected in {
        "train[:90%]": range(18),
        "train[5:7]": range(5, 7),
        "train[-3:]": range(17, 20),
        "train[:2]+train[10:11]": [0, 1, 10],
    }.items():
        assert greys(load_split(folder, split)) == list(expected)
    for split in ("train[", "train[30:]", "nothing", "train[:90%]x", ""):
        assert repr(split) in refused(load_split, folder, split)


# --- what is not used -----------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has a hundred characters
        one.bind(path.name)
        os.chdir(here)


UNUSED: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_text("a caption"),
    "notes.md": lambda path: path.write_text("notes"),
    ".hidden.png": lambda path: picture(9).save(path),
    ".DS_Store": lambda path: path.write_bytes(b"x"),
    "empty.png": lambda path: path.touch(),
    "archive.zip": lambda path: path.write_bytes(b"PK"),
    "broken.png": lambda path: path.symlink_to("nowhere.png"),
    "loop.png": lambda path: path.symlink_to("loop.png"),
    "pipe.png": _pipe,
    "socket.png": _socket,
    "device.png": lambda path: path.symlink_to("/dev/zero"),
    "no_suffix": lambda path: picture(9).save(path, "PNG"),
    "table.csv": lambda path: path.write_text("a,b\n1,2\n"),
    "up": lambda path: path.symlink_to(".."),
    "itself": lambda path: path.symlink_to("."),
}


@both
@pytest.mark.parametrize("name", UNUSED)
def test_what_is_not_read_is_named(tmp_path: Path, name: str, streaming: bool) -> None:
    folder_of(tmp_path / "data", "a.png", "b.png")
    folder_of(tmp_path / "beside", "c.png", first=100)
    UNUSED[name](tmp_path / "data" / name)
    data = read(tmp_path / "data", streaming=streaming)
    assert greys(data.train) == [0, 1] and name in data.summary and "\n" not in data.summary
    if name in ("pipe.png", "socket.png", "device.png"):
        assert "pipes, sockets or devices" in data.summary


def test_many_that_are_not_read_are_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{i}.png" for i in range(5)))
    for i in range(1000):
        (tmp_path / f"{i}.txt").write_text("a caption")
    summary = read(tmp_path).summary
    assert "1,000" in summary and "0.txt" in summary and len(summary) < 1000


def test_the_counts_and_the_other_splits_are_said(tmp_path: Path) -> None:
    names = [
        f"{split}/{i}.png" for split, size in (("train", 20), ("test", 7), ("validation", 3)) for i in range(size)
    ]
    folder = folder_of(tmp_path, *names)
    summary = read(folder, validation_size=4, max_train_samples=10).summary
    assert "trains on 10 of the 20 images of 'train'" in summary and "holds out for validation 4 of the 20" in summary
    assert "tests on none" in summary
    assert "7 images of the split 'test'" in summary and "3 images of the split 'validation'" in summary
    summary = read(folder, validation_split="validation", test_split="test").summary
    assert "trains on 20 images of 'train'" in summary and "validates on 3 images of 'validation'" in summary
    assert "tests on 7 images of 'test'" in summary and "not used" not in summary


@pytest.mark.parametrize("kind", ["plain", "classes", "splits", "parquet", "one file"])
def test_every_kind_of_data_says_how_many_images_are_for_what(tmp_path: Path, kind: str) -> None:
    name = {"classes": "a{0}/{1}.png", "splits": "train/{1}.png"}.get(kind, "{1}.png")
    if kind in ("parquet", "one file"):
        parquet_of(tmp_path / "train.parquet", [{"bytes": png(i), "path": None} for i in range(20)])
    else:
        folder_of(tmp_path, *(name.format(i % 2, i) for i in range(20)))
    source = tmp_path / "train.parquet" if kind == "one file" else tmp_path
    for unused in (".hidden.png", "notes.txt"):
        (tmp_path / unused).write_bytes(png(1))
    (tmp_path / "nothing").mkdir()
    said = read(source, test_split="test", test_size=0.1, validation_size=4).summary
    assert "trains on 14 of the 20 images of 'train'" in said
    assert "holds out for validation 4 of the 20" in said and "holds out for the test 2 of the 20" in said
    stream = read(source, streaming=True, validation_size=5, max_train_samples=9).summary
    assert "trains on a stream of 9 of the 20 images of 'train'" in stream and "validation 5 of the 20" in stream
    with pytest.warns(UserWarning, match=naming("--test_split")):
        without = read(source, test_split="test", streaming=True).summary
    assert "trains on a stream of 20 images of 'train'" in without and "tests on none" in without
    if kind != "one file":
        for unused in (".hidden.png", "notes.txt", "nothing/"):
            assert unused in said and unused in stream


def test_what_is_left_of_a_split_by_its_slices_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(10)))
    for train, test, left in (
        ("train[:50%]", "test", ["5 of the 10 images of the split 'train'"]),
        ("train[:5]", "train[8:]", ["3 of the 10 images of the split 'train'", "; 10 images of the split 'test'"]),
        ("train[:6]+test[:3]", "train[5:]", ["7 of the 10 images of the split 'test'"]),
        ("train[:5]", "train[5:]+test", []),
    ):
        summary = read(folder, train_split=train, test_split=test).summary
        assert all(words in summary.replace("not used: ", "; ") for words in left)
        assert summary.count("of the split") == len(left)


def test_images_without_a_row_in_metadata_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "metadata.csv").write_text("file_name,n\n2.png,1\n")
    with pytest.warns(UserWarning, match=r"'1.png', '3.png'.*metadata.csv"):
        assert len(greys(read(tmp_path).train)) == 3


def test_what_load_split_leaves_in_a_folder_is_a_warning_or_said(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, "train/a.png", "test/a.png"))
    said: list[str] = []
    load_split(folder, "test", say=said.append)
    assert "1 images of 'test'" in said[0] and "1 images of the split 'train'" in said[0]
    (tmp_path / "a.txt").write_text("caption")
    with pytest.warns(UserWarning, match=r"a\.txt"):
        load_split(folder, "test")


PARTS = st.sampled_from(["a", "b.png", "train", "test", ".c", "d.txt", "E.JPG", "f g.gif", "metadata.csv", "h.zip"])


@given(st.sets(st.lists(PARTS, min_size=1, max_size=3).map("/".join), min_size=1, max_size=12))
@settings(max_examples=100)
def test_every_file_is_read_or_named(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root, made = Path(temporary), set()
        for name in sorted(names, key=len, reverse=True):
            if not (root / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(b"x")
                made.add(name)
        try:
            layout = read_layout(root)
        except DataError:
            assert not any(Path(name).suffix.casefold() in (".png", ".jpg", ".gif") for name in _seen(made))
            return
        read_ = [path for files in layout.splits.values() for path in files] + list(layout.metadata)
        named = [path for paths in layout.listing.unused.values() for path in paths]
        assert len(read_) == len(set(read_)) and not set(read_) & set(named)
        assert set(read_) | {name for name in named if not name.endswith("/")} | set(filter(_hidden, made)) == made
        for name in filter(_hidden, made):
            assert any(name == path or name.startswith(path) for path in named)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _seen(names: set[str]) -> set[str]:
    return {name for name in names if not _hidden(name)}


@both
def test_links_to_folders_are_followed_and_read_once(tmp_path: Path, streaming: bool) -> None:
    folder_of(tmp_path / "elsewhere" / "cats", "1.png", "deep/2.png")
    folder = folder_of(tmp_path / "data", "dogs/3.png", first=3)
    (folder / "a_cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (folder / "again").symlink_to("dogs")
    (folder / "deep").symlink_to(tmp_path / "elsewhere" / "cats" / "deep")
    (folder / "dogs" / "back").symlink_to(folder)
    (tmp_path / "link").symlink_to(folder)
    data = read(tmp_path / "link", streaming=streaming)
    assert sorted(greys(data.train)) == [0, 1, 3]
    assert "again" in data.summary and "back" in data.summary
    if isinstance(data.train, ImageLevels):
        assert (
            data.train.names == ("a_cats/1.png", "a_cats/deep/2.png", "dogs/3.png") or len(data.train.names or ()) == 3
        )


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / str(i), "x.png", first=i) for i in range(8)]
    for folder in folders:
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    assert sorted(greys(read(tmp_path).train)) == list(range(8))


def test_suffixes_are_read_in_any_case_and_names_are_kept(tmp_path: Path) -> None:
    names = ("A.PNG", "b.JpG", "c/D.jpeg", "c/e.Png")
    data = read(folder_of(tmp_path, *names))
    assert isinstance(data.train, ImageLevels) and data.train.names == names
    assert load_split(str(tmp_path), "train[1:3]").names == names[1:3]
    assert load_split("digits", "test[:2]", num_levels=17).names is None


@pytest.mark.parametrize("what", ["no images", "nothing", "captions alone", "images and Parquet", "a text", "nowhere"])
def test_what_is_no_folder_of_images_is_refused_by_name(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    name = str(folder)
    if what in ("no images", "captions alone"):
        (folder / "a.txt").write_text("caption")
        name = "a.txt"
    elif what == "images and Parquet":
        folder_of(folder, "a.png")
        _one_image(folder / "b.parquet", 1)
        name = "b.parquet"
    elif what == "a text":
        folder.rmdir()
        folder.write_text("text")
    elif what == "nowhere":
        folder.rmdir()
    assert name in refused(read, folder)


def test_names_that_are_no_dataset_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_of(tmp_path, "a.png"))
    for name in (
        "imagefolder",
        "parquet",
        "json",
        "",
        "hf://datasets/a/b",
        "https://example.org/x",
        "a/b/c",
        "x" * 5000,
    ):
        refused(load_split, name, "train")
    for name in ("./none", "~/none-of-these", "none.parquet", "/none", "a.png", "nul\0"):
        refused(load_split, name, "train")
    assert "dataset_config_name" in refused(open_source, str(tmp_path), "a")


def test_a_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path / "b") + b"\xff.png")
    assert "udcff" in refused(read, tmp_path) and "UTF-8" in refused(read, tmp_path, streaming=True)
    os.rename(os.fsencode(tmp_path / "b") + b"\xff.png", os.fsencode(tmp_path / "b") + b"\xff.txt")  # noqa: PTH104
    assert "udcff" in read(tmp_path).summary and len(greys(read(tmp_path).train)) == 1
    (tmp_path / os.fsdecode(b"c\xff")).mkdir()
    shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path) + b"/c\xff/d.png")
    assert "UTF-8" in refused(read, tmp_path)


# --- labels and columns ---------------------------------------------------------------------------------------------


def test_classes_are_the_names_of_the_folders_in_all_splits(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, "train/a/1.png", "train/c/1.png", "test/b/1.png", "test/c/2.png"))
    labels = load_split(folder, "test", label_column="label").labels
    assert labels is not None and labels.tolist() == [1, 2]
    flat = str(folder_of(tmp_path / "flat", "train/1.png", "test/1.png"))
    assert "label" in refused(load_split, flat, "test", label_column="label")


UNEQUAL = {
    "one class deeper": ["a/1.png", "b/c/2.png"],
    "one at the top": ["a/1.png", "b/2.png", "3.png"],
    "within splits": ["train/a/1.png", "train/b/c/2.png", "test/a/1.png"],
    "in one split alone": ["train/a/1.png", "train/b/2.png", "test/1.png"],
}


@both
@pytest.mark.parametrize("what", UNEQUAL)
def test_folders_that_say_no_classes_are_said_to_say_none(tmp_path: Path, what: str, streaming: bool) -> None:
    folder = str(folder_of(tmp_path, *UNEQUAL[what]))
    assert "no classes" in read(folder, streaming=streaming).summary
    message = refused(load_split, folder, "train", label_column="label")
    assert "no classes" in message and "one folder of its name" in message
    with pytest.warns(UserWarning, match="no classes"):
        load_split(folder, "train")


@pytest.mark.parametrize(
    "names", [["cat/2024/1.png", "dog/2024/2.png"], ["cat/a/1.png", "cat/b/2.png", "dog/a/3.png"]]
)
def test_folders_of_one_name_are_said_to_be_one_class(tmp_path: Path, names: list[str]) -> None:
    assert "one class" in read(folder_of(tmp_path, *names)).summary


def test_folders_that_say_their_classes_are_silent(tmp_path: Path) -> None:
    for number, names in enumerate((["a/1.png", "b/1.png"], ["x/a/1.png", "y/b/1.png"], ["1.png"], ["a/1.png"])):
        summary = read(folder_of(tmp_path / str(number), *names)).summary
        assert "class" not in summary and "not used" not in summary


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_classes_of_folders_are_kept_beside_metadata(tmp_path: Path, suffix: str) -> None:
    folder_of(tmp_path, "a/1.png", "b/2.png")
    _write_rows(tmp_path / f"metadata.{suffix}", [{"file_name": f, "text": "x"} for f in ("a/1.png", "b/2.png")])
    labels = load_split(str(tmp_path), "train", label_column="label").labels
    assert labels is not None and labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_names_in_metadata_are_read_however_parquet_holds_them(tmp_path: Path, kind: pa.DataType) -> None:
    folder_of(tmp_path, "1.png", "2.png")
    for names in (["1.png", "2.png"], ["1.png", None]):
        table = pa.table({"file_name": pa.array(names).cast(kind), "digit": [3, 4]})
        pyarrow.parquet.write_table(table, tmp_path / "metadata.parquet")
        if None in names:
            assert "row 1 of 'metadata.parquet' names None" in refused(load_split, str(tmp_path), "train")
        else:
            labels = load_split(str(tmp_path), "train", label_column="digit").labels
            assert labels is not None and labels.tolist() == [3, 4]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_names_in_metadata_that_are_none_are_refused_by_their_row(tmp_path: Path, suffix: str) -> None:
    folder_of(tmp_path, "1.png")
    for name in (None, 1, True):
        _write_rows(tmp_path / f"metadata.{suffix}", [{"file_name": name, "digit": 3}])
        assert "row 0 of " in refused(load_split, str(tmp_path), "train")


def test_metadata_without_a_row_is_refused_as_such(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "metadata.csv").write_text("file_name,digit\n")
    assert "metadata.csv' has no rows" in refused(load_split, str(tmp_path), "train")
    pyarrow.parquet.write_table(pa.table({"file_name": pa.array([], pa.string())}), tmp_path / "metadata.parquet")
    (tmp_path / "metadata.csv").unlink()
    assert "metadata.parquet' has no rows" in refused(load_split, str(tmp_path), "train")


@both
def test_two_columns_of_one_name_are_refused(tmp_path: Path, streaming: bool) -> None:
    folder_of(tmp_path / "images", "1.png")
    (tmp_path / "images" / "metadata.csv").write_text("file_name,n,n\n1.png,1,2\n")
    assert "2 columns 'n'" in refused(read, tmp_path / "images", streaming=streaming)
    for name in ("image", "label"):
        table = pa.table([pa.array([png(1)]), pa.array([1]), pa.array([2])], names=["image", "label", name])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        message = refused(lambda: greys(read(tmp_path / f"{name}.parquet", streaming=streaming).train))  # noqa: B023
        assert f"2 columns '{name}'" in message and f"{name}.parquet" in message


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_gives_columns_by_file_name(tmp_path: Path, suffix: str) -> None:
    folder_of(tmp_path, "x/1.png", "x/2.png", "x/3.png")
    rows = [{"file_name": "x/3.png", "digit": 3}, {"file_name": "x/1.png", "digit": 1}]
    _write_rows(tmp_path / f"metadata.{suffix}", rows)
    images = load_split(str(tmp_path), "train[:1]+train[2:]", label_column="digit")
    assert images.labels is not None and images.labels.tolist() == [1, 3]
    assert len(load_split(str(tmp_path), "train")) == 3
    assert "row 1 " in refused(load_split, str(tmp_path), "train", label_column="digit")


@pytest.mark.parametrize("name", ["../y.png", "/etc/passwd", "hf://datasets/a/b/c.png", "no.png", "x/1.png", None])
def test_metadata_names_no_other_file(tmp_path: Path, name: str | None) -> None:
    folder_of(tmp_path / "data", "x/1.png")
    folder_of(tmp_path, "y.png")
    _write_rows(tmp_path / "data" / "metadata.jsonl", [{"file_name": "x/1.png", "n": 1}, {"file_name": name, "n": 2}])
    assert "row 1 " in refused(read, tmp_path / "data")


def test_a_split_that_names_do_not_make_is_refused_with_how_to_name_it(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, "train/1.png", "test/1.png", "1.png"))
    assert "at the top" in refused(load_split, folder, "test")


@pytest.mark.parametrize(
    "content",
    [b"", b"file_name,image\n1.png,2\n", b"a,b\n1,2\n", b"\xff\xfe\x00", b"file_name\n1\n", b'{"file_name": '],
)
def test_damaged_metadata_is_named(tmp_path: Path, content: bytes) -> None:
    folder_of(tmp_path, "1.png")
    for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        (tmp_path / name).write_bytes(content or b"\n")
        assert name in refused(read, tmp_path)
        (tmp_path / name).unlink()


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))


# --- an output among the data ---------------------------------------------------------------------------------------


def test_an_output_within_the_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_of(tmp_path / "data", "cats/1.png")
    folder_of(tmp_path / "more", "2.png")
    (data / "more").symlink_to(tmp_path / "more")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(data)
    within = [".", "runs/x", data, data / "cats", tmp_path / "link" / "x", tmp_path / "more" / "runs" / "x"]
    for output in map(Path, within):
        for name in (".", str(data), str(tmp_path / "link"), "cats/.."):
            assert "output_dir" in refused(
                check_outputs_apart, DataArguments(train_data_dir=name), {"output_dir": output}
            )
            assert "output_dir" in refused(
                check_outputs_apart, DataArguments(dataset_name=name), {"output_dir": output}
            )
    for output in (tmp_path / "runs" / "x", tmp_path / "data2", tmp_path):
        check_outputs_apart(DataArguments(train_data_dir=str(data)), {"output_dir": output})
    check_outputs_apart(DataArguments(dataset_name="digits"), {"output_dir": Path("runs")})
    check_outputs_apart(DataArguments(dataset_name="owner/name"), {"output_dir": Path("runs")})


def test_slices_of_parquet_files_are_those_of_their_rows(tmp_path: Path) -> None:
    for number, rows in enumerate((range(3), range(3, 4), range(4, 9))):
        parquet_of(tmp_path / f"{number}.parquet", [{"bytes": png(i), "path": None} for i in rows])
    for start in range(9):
        for stop in range(start + 1, 10):
            assert greys(load_split(str(tmp_path), f"train[{start}:{stop}]")) == list(range(start, stop))
    assert "no images" in refused(load_split, str(tmp_path), "train[4:4]")
    (tmp_path / "2.parquet").write_bytes((tmp_path / "2.parquet").read_bytes()[:-300] + bytes(300))
    assert "2.parquet" in refused(load_split, str(tmp_path), "train[:2]")


def test_streams_read_the_same_images_as_memory(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", *(f"{c}/{i}.png" for c in "ab" for i in range(5)))
    for number in range(3):
        parquet_of(
            tmp_path / "parquet" / f"train-{number:05d}-of-00003.parquet",
            [{"bytes": png(number), "path": "0.png"}, {"bytes": png(number + 3), "path": "images/a/0.png"}],
        )
    for folder in ("images", "parquet"):
        one, other = (read(tmp_path / folder, streaming=streaming).train for streaming in (False, True))
        assert greys(one) == greys(other) and len(greys(one)) > 5


def test_a_path_in_a_row_never_replaces_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes the file instead, where a row's path is that of one, as in the current folder."""
    monkeypatch.chdir(folder_of(tmp_path, "0.png", first=200))
    file = parquet_of(tmp_path / "d" / "x.parquet", [{"bytes": png(5), "path": "0.png"}] * 3)
    for streaming in (False, True):
        assert greys(read(file, streaming=streaming).train) == [5, 5, 5]
        data = read(file, streaming=streaming, validation_size=1)
        assert greys(data.validation) == [5]


def test_rgb_folders_keep_their_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    levels = load_data(DataArguments(train_data_dir=str(tmp_path), test_split=None)).train
    assert isinstance(levels, ImageLevels) and np.array_equal(levels.levels, pixels.transpose(0, 3, 1, 2))


OVERLAPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "test is train": ({"test_split": "train"}, ["test"]),
    "a slice": ({"test_split": "train[:2]"}, ["test"]),
    "slices that meet": ({"train_split": "train[:4]", "test_split": "train[3:]"}, ["test"]),
    "beside another split": ({"test_split": "test+train[:1]"}, ["test"]),
    "validation is train": ({"validation_split": "train", "test_split": None}, ["validation"]),
    "both": ({"validation_split": "train[:2]", "test_split": "train[1:]"}, ["validation", "test", "test"]),
    "validation is test": ({"validation_split": "test", "test_split": "test"}, ["test"]),
    "more is held out": ({"validation_size": 2, "test_split": "train[:2]"}, ["test"]),
    "of what a share is held out": (
        {"validation_split": "train[:1]", "test_split": None, "test_size": 2},
        ["validation"],
    ),
    "the first images": ({"max_train_samples": 3, "test_split": "train[2:]"}, ["test"]),
    "as streams": ({"streaming": True, "test_split": "train"}, ["test"]),
    "slices apart": ({"train_split": "train[:4]", "test_split": "train[4:]"}, []),
    "the others": ({"max_train_samples": 3, "test_split": "train[3:]"}, []),
    "splits": ({"test_split": "test", "validation_size": 2}, []),
    "shares": ({"test_split": None, "test_size": 2, "validation_size": 2}, []),
}


@pytest.mark.parametrize("what", OVERLAPS)
def test_images_that_are_trained_on_and_measured_are_said(tmp_path: Path, what: str) -> None:
    folder_of(tmp_path, *(f"train/{i}.png" for i in range(6)), *(f"test/{i}.png" for i in range(3)))
    arguments, expected = OVERLAPS[what]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = read(tmp_path, **arguments)
    found = [str(warning.message) for warning in said if "held-out" in str(warning.message)]
    assert [message.rpartition("--")[2] for message in found] == [f"{name}_split." for name in expected]
    assert len(data.notes) == expected.count("test")


@pytest.mark.parametrize("split", ["train+train", "train[:4]+train[3:]", "test+train+test[:1]"])
def test_a_split_that_has_images_twice_is_refused(tmp_path: Path, split: str) -> None:
    folder_of(tmp_path, *(f"train/{i}.png" for i in range(6)), *(f"test/{i}.png" for i in range(3)))
    for field in ("train_split", "validation_split", "test_split"):
        assert repr(split) in refused(read, tmp_path, **{field: split})
    assert repr(split) in refused(load_split, str(tmp_path), split)
    assert len(load_split(str(tmp_path), "train[4:]+test+train[:4]").levels) == 9


def test_what_is_called_digits_here_is_said_not_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load_split("digits", "test", num_levels=17)) == 360
    folder_of(tmp_path / "digits", "0.png", "1.png")
    with pytest.warns(UserWarning, match=r"\./digits"):
        assert len(load_split("digits", "test", num_levels=17)) == 360
    assert (
        len(load_split("./digits", "train")) == len(load_split("digits/", "train")) == len(read("digits").train) == 2
    )
