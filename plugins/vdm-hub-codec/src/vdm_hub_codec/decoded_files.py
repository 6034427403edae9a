"""What was decoded as files: images in a folder or a Parquet file, texts likewise, and one text as a .txt file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from vdm_hub import (
    ConfigurationError,
    LikelihoodPipeline,
    OutputError,
    check_output,
    check_writable,
    images_from_levels,
    written_beside,
)
from vdm_hub_codec.codec import Decoded
from vdm_hub_codec.container import Container
from vdm_hub_codec.documents import are_several

_ROWS, _TEXT = ".parquet", ".txt"


@contextmanager
def written(place: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which takes its place when all is written.

    Raises:
        OutputError: It can't be written, as on a full disk; nothing of it is left.
    """
    try:
        with written_beside(place) as beside:
            yield beside
    except OSError as error:
        raise OutputError(
            f"{place} can't be written ({error.strerror or error}), and nothing of it is left: make room, or name "
            f"another place."
        ) from error


def check_place(output: Path, *, overwrite: bool, container: Container | None = None) -> None:
    """Refuse a place for what a file keeps.

    Args:
        output: A folder, a .parquet or a .txt file.
        overwrite: Whether a file that is there is replaced.
        container: The file, where that is known.

    Raises:
        ConfigurationError: It is there, or can't hold what the file keeps.
        OutputError: Nothing can be written there.
    """
    if output.suffix in (_ROWS, _TEXT):
        check_output(output, "output", output.suffix, overwrite=overwrite)
    elif output.suffix and not output.is_dir():
        raise ConfigurationError(
            f"--output is {output}, and no file ending in {output.suffix} is made: name a folder without an ending, a "
            f".parquet file, or for one text a .txt file."
        )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output {output} is there, and not an empty folder: name another.")
    check_writable(output)
    if container is None or output.suffix != _TEXT:
        return
    is_text = container.coder["kind"] in ("order", "values")
    if not is_text or are_several(container.coder):
        raise ConfigurationError(
            f"--output is {output}, and the file keeps {'several texts' if is_text else 'images'}: name a folder or a "
            f".parquet file."
        )


def write(found: Decoded, pipeline: LikelihoodPipeline, beside: Path, suffix: str) -> str:
    """Write what was decoded; returns what it is, in words.

    Args:
        found: Images or texts.
        pipeline: The model, whose columns they get.
        beside: Where to.
        suffix: Of the place: ``.parquet``, ``.txt``, or that of a folder.
    """
    if found.texts is not None:
        column = (pipeline.config.get("windows") or {}).get("text_column", "text")
        _write_texts(found.texts, column, beside, suffix)
        return "a text" if len(found.texts) == 1 else f"{len(found.texts):,} texts"
    assert found.levels is not None
    _write_images(found.levels, found.labels, pipeline, beside, suffix)
    return f"{len(found.levels):,} images" + ("" if found.labels is None else " and their classes")


def _write_texts(texts: list[str], column: str, beside: Path, suffix: str) -> None:
    if suffix == _TEXT:
        beside.write_bytes(texts[0].encode())
    elif suffix == _ROWS:
        datasets.Dataset.from_dict({column: texts}).to_parquet(beside)
    else:
        beside.mkdir()
        for name, text in zip(_names(len(texts)), texts, strict=True):
            (beside / f"{name}.txt").write_bytes(text.encode())


def _write_images(
    levels: Tensor, labels: Tensor | None, pipeline: LikelihoodPipeline, beside: Path, suffix: str
) -> None:
    images, classes = images_from_levels(levels, pipeline.num_levels, "pil"), pipeline.class_condition
    columns, features = {}, {}
    if labels is not None and classes is not None:
        names = None if classes.names is None else list(classes.names)
        columns = {classes.column: labels.tolist()}
        features = {classes.column: datasets.ClassLabel(num_classes=classes.count, names=names)}
    if suffix == _ROWS:
        whole = datasets.Features({"image": datasets.Image(), **features})
        datasets.Dataset.from_dict({"image": images, **columns}, features=whole).to_parquet(beside)
        return
    beside.mkdir()
    files = [f"{name}.png" for name in _names(len(images))]
    for name, image in zip(files, images, strict=True):
        image.save(beside / name)
    if labels is not None and classes is not None:
        told: dict[str, list[Any]] = {"file_name": files, **columns}
        if classes.names is not None:
            told[f"{classes.column}_name"] = [classes.name_of(one) for one in labels.tolist()]
        with (beside / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(told), *zip(*told.values(), strict=True)])


def _names(count: int) -> list[str]:
    """Numbers of files, as long as each other."""
    digits = len(str(count - 1))
    return [f"{number:0{digits}}" for number in range(count)]
