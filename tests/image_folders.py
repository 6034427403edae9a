"""Small folders of images, each image told from the others by its grey."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from naming import paragraph
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.batches import evaluation_batches
from vdm_hub.data.images import ImageLevels, ImageStream
from vdm_hub.data.loading import RunData, load_data
from vdm_hub.errors import DataError

refused = partial(paragraph, DataError)
"""The one paragraph with which a call is refused."""


def picture(grey: int) -> Image.Image:
    return Image.new("L", (4, 4), grey)


def png(grey: int) -> bytes:
    """A PNG file of one grey."""
    file = io.BytesIO()
    picture(grey).save(file, "PNG")
    return file.getvalue()


def folder_of(root: Path, *names: str, first: int = 0) -> Path:
    """A folder with these image files, of greys first, first + 1, ..."""
    for grey, name in enumerate(names, first):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(grey).save(path, "JPEG" if path.suffix.casefold() in (".jpg", ".jpeg") else "PNG")
    return root


def parquet_of(path: Path, rows: list[Any], **columns: list[Any]) -> Path:
    """A Parquet file whose image column holds these rows, as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    others = datasets.Dataset.from_dict(columns).features if columns else {}
    features = datasets.Features({"image": datasets.Image(), **others})
    pq.write_table(pa.table({"image": rows, **columns}, schema=features.arrow_schema), file := io.BytesIO())
    path.write_bytes(file.getvalue())
    return path


def read(folder: Path | str, **arguments: Any) -> RunData:
    return load_data(DataArguments(train_data_dir=str(folder), **{"test_split": None} | arguments))


def greys(images: ImageLevels | ImageStream | None) -> list[int]:
    """The images that were read, each by its grey, in order."""
    assert images is not None
    if isinstance(images, ImageLevels):
        assert not isinstance(images.levels, tuple)
        return images.levels[:, 0, 0, 0].tolist()
    return [int(number) for batch in evaluation_batches(images, 2) for number in batch["levels"][:, 0, 0, 0]]
