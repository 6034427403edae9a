"""What holds of every kind of source: rows as they are written, paths that are not opened, errors in one paragraph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from image_folders import folder_of, greys, parquet_of, png, read, refused
from vdm_hub.data.digits import digits
from vdm_hub.data.images import ImageReader
from vdm_hub.data.loading import load_split, undecoded
from vdm_hub.data.sources import HubDataset, Source, UnknownSplitError

both = pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
COLUMNS: dict[str, tuple[Any, Callable[[bytes], Any]]] = {
    "bytes and path": (STRUCT, lambda data: {"bytes": data, "path": "x.png"}),
    "path and bytes": (
        pa.struct({"path": pa.string(), "bytes": pa.binary()}),
        lambda data: {"bytes": data, "path": ""},
    ),
    "bytes in a struct": (pa.struct({"bytes": pa.binary()}), lambda data: {"bytes": data}),
    "bytes alone": (pa.binary(), lambda data: data),
    "large bytes": (pa.large_binary(), lambda data: data),
}


def test_what_save_to_disk_wrote_is_read_as_what_it_was(tmp_path: Path) -> None:
    saved = digits()
    saved.save_to_disk(tmp_path / "all")
    saved["train"].save_to_disk(tmp_path / "one")
    expected = load_split("digits", "train", num_levels=17)
    for folder in ("all", "one"):
        found = load_split(str(tmp_path / folder), "train", num_levels=17)
        assert torch.equal(torch.as_tensor(found.levels), torch.as_tensor(expected.levels))
    with pytest.raises(UnknownSplitError, match="train"):
        load_split(str(tmp_path / "one"), "test", num_levels=17)


@both
@pytest.mark.parametrize("what", COLUMNS)
def test_images_are_read_however_parquet_holds_them(tmp_path: Path, what: str, streaming: bool) -> None:
    kind, row = COLUMNS[what]
    for number in range(2):
        images = pa.array([row(png(2 * number)), row(png(2 * number + 1))], kind)
        pq.write_table(pa.table({"image": images, "other": [1, 2]}), tmp_path / f"{number}.parquet")
    assert greys(read(tmp_path, streaming=streaming).train) == [0, 1, 2, 3]


@both
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.list_(pa.binary()), pa.int64(), pa.struct({"path": pa.string()}), pa.list_(STRUCT)]
)
def test_a_column_that_holds_no_images_is_refused_with_what_it_holds(
    tmp_path: Path, kind: pa.DataType, streaming: bool
) -> None:
    pq.write_table(pa.table({"image": pa.nulls(3, kind), "label": [1, 2, 3]}), tmp_path / "a.parquet")
    assert "'image'" in refused(lambda: greys(read(tmp_path, streaming=streaming).train))


@both
def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path: Path, streaming: bool) -> None:
    folder_of(tmp_path / "folder", "a/1.png", "b/1.png")
    parquet_of(tmp_path / "parquet" / "a.parquet", [{"bytes": png(1), "path": None}], label=[3])
    for folder in ("folder", "parquet"):
        message = refused(read, tmp_path / folder, image_column="img", streaming=streaming)
        assert "'img'" in message and "image, label" in message


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty of content": lambda data: b"PAR1PAR1",
    "cut": lambda data: data[:-20],
    "cut at the start": lambda data: data[20:],
    "text": lambda data: b"no Parquet",
    "zeros": lambda data: bytes(len(data)),
    "wrong length of the footer": lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
    "damaged pages": lambda data: data[:4] + bytes(200) + data[204:],
}


@both
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_parquet_file_is_named(tmp_path: Path, what: str, streaming: bool) -> None:
    files = [
        parquet_of(tmp_path / f"{number}.parquet", [{"bytes": png(i), "path": None} for i in range(20)])
        for number in range(2)
    ]
    files[1].write_bytes(DAMAGE[what](files[1].read_bytes()))
    assert "1.parquet" in refused(lambda: greys(read(tmp_path, streaming=streaming).train))


def test_parquet_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    parquet_of(tmp_path / "0.parquet", [{"bytes": png(0), "path": None}], label=[1])
    parquet_of(tmp_path / "1.parquet", [{"bytes": png(0), "path": None}], label=["a"])
    assert str(tmp_path) in refused(load_split, str(tmp_path), "train")


# `datasets`' own reading, as of the Hub, tried on folders, which need no network.


def images_of(source: Source, split: str, streaming: bool) -> list[int]:
    dataset = undecoded(source, source.read(split, streaming=streaming), "image", split)
    reader = ImageReader(open_file=source.open_file)
    return [int(reader.decode(row["image"])[0, 0, 0]) for row in dataset]


@both
def test_image_folders_of_the_hub_are_read(tmp_path: Path, streaming: bool) -> None:
    folder_of(tmp_path, "train/a/1.png", "train/b/1.png", "test/b/2.png")
    source = HubDataset(str(tmp_path), None)
    assert images_of(source, "train", streaming) == [0, 1] and images_of(source, "test", streaming) == [2]
    with pytest.raises(UnknownSplitError, match=r"'tset'.*train, test"):
        source.read("tset", streaming=streaming)
    if not streaming:
        assert images_of(source, "train[1:]+test", False) == [1, 2]


@both
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "metadata"])
def test_a_path_in_a_dataset_of_the_hub_is_never_opened(
    tmp_path: Path, kind: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = folder_of(tmp_path, "secret.png") / "secret.png"
    data = tmp_path / "data"
    if kind == "parquet":
        features = datasets.Features({"image": datasets.Image(decode=False)})
        rows = pa.table({"image": [{"bytes": None, "path": str(secret)}]}, schema=features.arrow_schema)
        data.mkdir()
        pq.write_table(rows, data / "a.parquet")
    elif kind == "jsonl":
        data.mkdir()
        (data / "a.jsonl").write_text(f'{{"image": {{"bytes": null, "path": "{secret}"}}}}\n')
    else:
        folder_of(data, "a.png")
        (data / "metadata.jsonl").write_text('{"file_name": "../secret.png"}\n')

    def images() -> list[int]:
        with (source := HubDataset(str(data), None)).explained():
            return images_of(source, "train", streaming)

    assert "secret.png" in refused(images) or kind == "metadata"
