"""How the files of a folder become splits, with labels and columns: by names that leave no file out, else as one."""

from __future__ import annotations

import io
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from vdm_hub.data.files import IMAGE_SUFFIXES, METADATA_NAMES, Listing, describe_unused, list_folder, names_and_count
from vdm_hub.errors import DataError, explained, shortened, warn

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
        metadata: The paths of files with columns for the images.
        classes: The class of each image by the name of its folder; empty where those say none.
        note: What to say where names look like splits or classes and are not taken as such.
    """

    listing: Listing
    splits: Mapping[str, Sequence[str]]
    is_parquet: bool
    metadata: Sequence[str] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def read_layout(root: Path) -> Layout:
    """The layout of a folder of images or of Parquet files.

    Top-level folders ``train``, ``validation`` and ``test`` (or ``val``, ``dev``, ``eval``, ...) are splits where all
    images lie in such; Parquet files are also divided by names such as ``train-00000-of-00003.parquet``. Where a
    name would leave out a single file, all of them are the split ``train``.

    Raises:
        DataError: There are no images, or images and Parquet files; a Parquet file of several is missing; or a name is
            not in UTF-8.
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
        there = describe_unused(listing.unused) or "nothing"
        raise DataError(
            f"the folder {str(root)!r} holds neither images nor Parquet files: it has {there}. Name another, or "
            f"unpack what is packed."
        )
    files = images or parquet
    _check_names([*files, *metadata])
    _check_shards(parquet)
    splits = splits_by_name(files) if parquet else splits_by_folder(files)
    notes = [] if splits else [_note(files)]
    classes, note = _classes(images, is_divided=splits is not None)
    note = "; ".join(filter(None, [*notes, note]))
    return Layout(listing, splits or {"train": files}, bool(parquet), metadata, classes, note)


def splits_by_folder(files: Iterable[str]) -> dict[str, list[str]] | None:
    """The files by the split that the folder at the top names; ``None`` where one of them has none.

    >>> splits_by_folder(["train/a.txt", "val/b.txt"]), splits_by_folder(["train/a.txt", "b.txt"])
    ({'train': ['train/a.txt'], 'validation': ['val/b.txt']}, None)
    """
    return _splits(files, _top_folder)


def splits_by_name(files: Iterable[str]) -> dict[str, list[str]] | None:
    """The files by the split that the folder at the top, or their own names say; ``None`` where one has none.

    >>> splits_by_name(["train.csv", "test.csv"]), splits_by_name(["a.csv", "test.csv"])
    ({'train': ['train.csv'], 'test': ['test.csv']}, None)
    """
    known = list(files)
    return splits_by_folder(known) or _splits(known, _file_name)


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


def _check_names(paths: Iterable[str]) -> None:
    for path in paths:
        if not path.isascii() and any("\udc80" <= character <= "\udcff" for character in path):
            raise DataError(f"the name of the file {shortened(path)} is not UTF-8: give it another name.")


def _check_shards(files: Iterable[str]) -> None:
    """Refuse Parquet files that are fewer than their names say."""
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


def _classes(images: Iterable[str], *, is_divided: bool) -> tuple[dict[str, str], str]:
    """The images' classes by the names of their folders, as for `datasets`; and what to say where they drop any.

    None where all images lie in one folder, or not all equally deep.
    """
    folders = {path: posixpath.dirname(path) for path in images}
    if is_divided:  # the split's own folder is no class
        folders = {path: folder.partition("/")[2] for path, folder in folders.items()}
    depths = {(folder.count("/"), bool(folder)): path for path, folder in folders.items()}
    if len(depths) > 1:
        unlike = " and ".join(map(shortened, [*depths.values()][:2]))
        return {}, (
            f"the folders say no classes, as images do not lie equally deep (such as {unlike}): for labels, put all "
            f"images of a class into one folder of its name"
        )
    classes = {path: posixpath.basename(folder) for path, folder in folders.items()}
    count, places = len(set(classes.values())), len(set(folders.values()))
    if places == count:
        return classes if count > 1 else {}, ""
    return classes if count > 1 else {}, (
        f"the {places} folders of images have {count} names, and those of one name are one class: for other labels, "
        f"put all images of a class into one folder of its name"
    )


def metadata_columns(layout: Layout, images: Sequence[str]) -> pa.Table | None:
    """The columns that metadata files give for these images, null where they say nothing of one.

    Raises:
        DataError: A file is damaged, or names an image that is not there, or one twice.
    """
    tables, rows = list[pa.Table](), dict[str, int]()
    known = {path for files in layout.splits.values() for path in files}
    for path in layout.metadata:
        table = _read_metadata(layout.listing.root / path)
        for number, name in enumerate(table["file_name"].to_pylist()):
            image = posixpath.normpath(posixpath.join(posixpath.dirname(path), str(name)))
            if image not in known or image in rows or not isinstance(name, str):
                what = "a second time" if image in rows else "which is none of the folder's images"
                raise DataError(f"row {number} of {path!r} names {name!r}, {what}: mend that row, or remove it.")
            rows[image] = len(rows)
        tables.append(table.drop_columns("file_name"))
    if not tables:
        return None
    remedy = "give them the same columns, of the same kinds"
    with explained(f"{names_and_count(layout.metadata)} can't be read together", remedy, DataError):
        whole = pa.concat_tables(tables, promote_options="default")
    if silent := [image for image in images if image not in rows]:
        about = names_and_count(layout.metadata)
        warn(f"{names_and_count(silent)} images have no row in {about}: their columns are empty.", stacklevel=2)
    return whole.take(pa.array([rows.get(image) for image in images], pa.int64()))


def _read_metadata(path: Path) -> pa.Table:
    readers: dict[str, Callable[[io.BytesIO], pa.Table]] = {
        ".csv": lambda data: pa.csv.read_csv(data, parse_options=pa.csv.ParseOptions(newlines_in_values=True)),
        ".jsonl": pa.json.read_json,
        ".parquet": pa.parquet.read_table,
    }
    with explained(f"{str(path)!r} can't be read", "mend or rename it", DataError):
        table = readers[path.suffix](io.BytesIO(path.read_bytes()))
    refuse_doubled(table.column_names, path)
    if "image" in table.column_names:
        raise DataError(f"{str(path)!r} has a column image, as the images' own is called: rename that column.")
    if "file_name" not in table.column_names:
        raise DataError(
            f"{str(path)!r} has no column file_name with the names of images, but {', '.join(table.column_names)}: "
            f"add it, or give the file another name."
        )
    if not len(table):
        raise DataError(f"{str(path)!r} has no rows below the names of its columns: add them, or remove the file.")
    return table


def refuse_doubled(columns: Sequence[str], path: Path) -> None:
    """Refuse a table that has two columns of one name, of which one would be lost.

    Raises:
        DataError: With the name and the file's.
    """
    if doubled := next((name for name in columns if columns.count(name) > 1), None):
        raise DataError(
            f"{str(path)!r} has {columns.count(doubled)} columns {doubled!r}: give each a name of its own."
        )
