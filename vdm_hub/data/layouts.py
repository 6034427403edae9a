"""How the files of a folder become splits, with labels and columns: by names that leave no file out, else as one."""

from __future__ import annotations

import io
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from vdm_hub.data.files import IMAGE_SUFFIXES, METADATA_NAMES, Listing, list_folder, names_and_count, said_of
from vdm_hub.errors import DataError, explained

_SPLITS = {
    name: split
    for split, names in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for name in names
}
_SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?")
_LIKE_A_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """The files of a folder by their splits.

    Args:
        listing: What lies in the folder; `Listing.unused` says what is not read.
        splits: The paths of images or of Parquet files, by split.
        is_parquet: Whether they are Parquet files.
        is_divided: Whether the splits are folders or names, and not all files together.
        metadata: The paths of files with columns for the images.
        note: What to say where names look like splits and are not taken as such.
    """

    listing: Listing
    splits: Mapping[str, Sequence[str]]
    is_parquet: bool
    is_divided: bool
    metadata: Sequence[str] = ()
    note: str = ""


def read_layout(root: Path) -> Layout:
    """How a folder of images or of Parquet files is divided.

    Top-level folders ``train``, ``validation`` and ``test`` (or ``val``, ``dev``, ``eval``, ...) are splits where all
    images lie in such; Parquet files are also divided by names such as ``train-00000-of-00003.parquet``. Where a
    name would leave out a single file, all of them are the split ``train``.

    Raises:
        DataError: There are no images, or images and Parquet files; or a Parquet file of several is missing.
    """
    listing = list_folder(root)
    images: list[str] = []
    parquet: list[str] = []
    metadata: list[str] = []
    others: list[str] = []
    for path in listing.files:
        name, suffix = posixpath.basename(path), posixpath.splitext(path)[1].casefold()
        if name in METADATA_NAMES:
            metadata.append(path)
        else:
            (images if suffix in IMAGE_SUFFIXES else parquet if suffix == ".parquet" else others).append(path)
    listing.leave_out("files of other kinds", *others)
    if not images:
        listing.leave_out("files of other kinds", *metadata)
        metadata = []
    if images and parquet:
        raise DataError(
            f"the folder {str(root)!r} holds {names_and_count(images)} images and {names_and_count(parquet)} Parquet "
            f"files: name the folder of one of the two."
        )
    if not images and not parquet:
        there = said_of(listing.unused) or "nothing"
        raise DataError(
            f"the folder {str(root)!r} holds neither images nor Parquet files: it has {there}. Name another, or "
            f"unpack what is packed."
        )
    _check_shards(parquet)
    files = images or parquet
    splits = _splits(files, _top_folder) or (_splits(files, _file_name) if parquet else None)
    note = "" if splits else _note(files)
    return Layout(listing, splits or {"train": files}, bool(parquet), splits is not None, metadata, note)


def _splits(files: Iterable[str], name: Callable[[str], str | None]) -> dict[str, list[str]] | None:
    """The files by split; ``None`` where one of them has none."""
    found = defaultdict(list)
    for path in files:
        split = name(path)
        if split is None:
            return None
        found[split].append(path)
    return dict(found)


def _top_folder(path: str) -> str | None:
    folder, slash, _ = path.partition("/")
    return _SPLITS.get(folder.casefold()) if slash else None


def _file_name(path: str) -> str | None:
    stem = posixpath.splitext(posixpath.basename(path))[0]
    shard = _SHARD.fullmatch(stem)
    return _SPLITS.get(shard["split"], shard["split"]) if shard else _SPLITS.get(stem.casefold())


def _note(files: Iterable[str]) -> str:
    alike = [path for path in files if _LIKE_A_SPLIT.search(path)]
    if not alike:
        return ""
    return (
        f"{names_and_count(alike)} files have names like those of splits, but not all do, so that all are the split "
        f"'train': for splits, put every image into a folder train/, validation/ or test/ at the top"
    )


def _check_shards(files: Iterable[str]) -> None:
    """Parquet files that say how many they are must be so many."""
    found: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for path in files:
        folder, name = posixpath.split(path)
        if shard := _SHARD.fullmatch(posixpath.splitext(name)[0]):
            found[folder, shard["split"], int(shard["count"])].add(int(shard["number"]))
    for (folder, split, count), numbers in found.items():
        if missing := sorted(set(range(count)) - numbers):
            lost = posixpath.join(folder, f"{split}-{missing[0]:05d}-of-{count:05d}")
            raise DataError(
                f"{len(missing)} of the {count} Parquet files of the split {split!r} are missing, the first is "
                f"{lost!r}: put them back, or give the others other names."
            )


def classes_of_folders(layout: Layout) -> tuple[list[str], dict[str, int]]:
    """The classes by the names of the images' folders, in order, and the number of each image's.

    Empty where all images lie in one folder, or not all equally deep, as for `datasets`.
    """
    folders = {path: posixpath.dirname(path) for files in layout.splits.values() for path in files}
    if layout.is_divided:  # the split's own folder is no class
        folders = {path: folder.partition("/")[2] for path, folder in folders.items()}
    classes = sorted({posixpath.basename(folder) for folder in folders.values()})
    if len(classes) < 2 or "" in classes or len({folder.count("/") for folder in folders.values()}) > 1:
        return [], {}
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, {path: numbers[posixpath.basename(folder)] for path, folder in folders.items()}


def metadata_columns(layout: Layout, images: Sequence[str]) -> pa.Table | None:
    """The columns that metadata files give for these images, null where they say nothing of one.

    Raises:
        DataError: A file is damaged, or names an image that is not there, or one twice.
    """
    tables, rows = [], dict[str, int]()
    known = {path for files in layout.splits.values() for path in files}
    for path in layout.metadata:
        table = _read_metadata(layout.listing.root / path)
        for number, name in enumerate(table["file_name"].to_pylist()):
            image = posixpath.normpath(posixpath.join(posixpath.dirname(path), name or ""))
            if image not in known or image in rows:
                what = "a second time" if image in rows else "which is none of the folder's images"
                raise DataError(f"row {number} of {path!r} names {name!r}, {what}: mend that row, or remove it.")
            rows[image] = len(rows)
        tables.append(table.drop_columns("file_name"))
    if not tables:
        return None
    remedy = "give them the same columns, of the same kinds"
    with explained(f"{names_and_count(layout.metadata)} can't be read together", remedy, DataError):
        whole = pa.concat_tables(tables, promote_options="default")
    return whole.take(pa.array([rows.get(image) for image in images], pa.int64()))


def _read_metadata(path: Path) -> pa.Table:
    readers: dict[str, Callable[[io.BytesIO], pa.Table]] = {
        ".csv": lambda data: pa.csv.read_csv(data, parse_options=pa.csv.ParseOptions(newlines_in_values=True)),
        ".jsonl": pa.json.read_json,
        ".parquet": pa.parquet.read_table,
    }
    with explained(f"{str(path)!r} can't be read", "mend or rename it", DataError):
        table = readers[path.suffix](io.BytesIO(path.read_bytes()))
    if "image" in table.column_names:
        raise DataError(f"{str(path)!r} has a column image, as the images' own is called: rename that column.")
    if "file_name" not in table.column_names or not pa.types.is_string(table["file_name"].type):
        raise DataError(
            f"{str(path)!r} has no column file_name with the names of images, but {', '.join(table.column_names)}: "
            f"add it, or give the file another name."
        )
    return table
