"""Where texts come from: a file, a folder of files, or the column of a dataset; their splits, and what is refused."""

from __future__ import annotations

import codecs
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from vdm_hub.data.files import Listing, describe_unused, list_folder, names_and_count
from vdm_hub.data.layouts import splits_by_folder, splits_by_name
from vdm_hub.data.row_files import ROW_SUFFIXES, RowFiles
from vdm_hub.data.sources import Source, UnknownColumnError, is_local, is_saved, local_path, open_folder, open_source
from vdm_hub.errors import DataError, shortened

_SUFFIXES = "txt text md rst tex json html xml py pyi c h cc cpp hpp rs go java js ts sh sql"
TEXT_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""The suffixes of files that are read as texts."""

_ABOUT = frozenset(("readme", "license", "licence", "meta", "metadata", "dataset_info", "dataset_infos"))
_ABOUT_SUFFIXES = frozenset((".md", ".txt", ".rst", ".json", ".jsonl", ".csv"))

COLUMN = "text"
"""The column of texts that are files."""

_SHARE = 10
"""One part in so many, by place, is the test split, and the one before it the validation split."""


class TextFiles(Source):
    """Text files, each a document.

    Folders ``train/``, ``validation/`` and ``test/`` are splits where they hold all of the files. Else the files are
    divided by place, in the order of their names: the last tenth of them is ``test``, and the one before it
    ``validation``; of one file the last tenth of its characters, and the one before it. Nothing is shuffled. What is
    about the folder at its top (README, LICENSE, metadata) is none of them.
    """

    has_names = True

    def __init__(self, name: str, root: Path, files: Sequence[str], listing: Listing | None = None) -> None:
        super().__init__(name)
        self._root, self._files, self.listing = root, files, listing
        self._by_folder = None if len(files) == 1 else splits_by_folder(files)

    @property
    def note(self) -> str:
        """How the texts are divided, and what in the folder is not read."""
        what = "characters" if len(self._files) == 1 else "files, in the order of their names,"
        by_place = (
            f" The splits are made by place: the last tenth of the {what} is 'test', and the one before it "
            f"'validation'."
        )
        unused = "" if self.listing is None or not self.listing.unused else describe_unused(self.listing.unused)
        return (by_place if self._by_folder is None else "") + (f" Not used: {unused}." if unused else "")

    @cached_property
    def _documents(self) -> Mapping[str, Sequence[str]]:
        """The names of the documents of each split; those of one file are its parts."""
        if self._by_folder is not None:
            return self._by_folder
        if len(self._files) == 1:
            return {split: [split] for split in ("train", "validation", "test")}
        train, validation, test = _by_place(self._files)
        return (
            {"train": train, "validation": validation, "test": test}
            if validation
            else {
                "train": train,
                "test": test,
            }
        )

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of documents of each split, by its name."""
        return {split: len(names) for split, names in self._documents.items()}

    def _texts(self, split: str) -> Iterator[str]:
        names = self._documents[split]
        if len(self._files) > 1:
            yield from (read_text(self._root / name) for name in names)
            return
        text = read_text(self._root / self._files[0])
        parts = dict(zip(("train", "validation", "test"), _by_place(text), strict=True))
        if not parts[split]:
            raise DataError(
                f"{self.name!r} has {len(text)} characters, of which none is left for the split {split!r}: give a "
                f"longer text."
            )
        yield parts[split]

    def _whole(self, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({COLUMN: list(self._texts(split))})

    def _stream(self, split: str) -> datasets.IterableDataset:
        features = datasets.Features({COLUMN: datasets.Value("string")})
        return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs={"part": (self, split)})


def _rows(part: tuple[TextFiles, str]) -> Iterator[dict[str, str]]:
    source, split = part
    return ({COLUMN: text} for text in source._texts(split))


def _by_place(whole: Any) -> tuple[Any, Any, Any]:
    """The parts of a text, or of a list: all before the last two tenths, the first of these, and the other.

    >>> _by_place("abcdefghijkl")
    ('abcdefghij', 'k', 'l')
    >>> _by_place(["a", "b"])
    (['a'], [], ['b'])
    """
    size = len(whole)
    test = max(1, size // _SHARE)
    validation = test if size > 2 else 0
    return whole[: size - test - validation], whole[size - test - validation : size - test], whole[size - test :]


def read_text(path: Path) -> str:
    """The text of a file, as it is: no line end is changed.

    Raises:
        DataError: It can't be read, is empty, is not UTF-8, or has zeros, as one in UTF-16 has.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the text {str(path)!r} can't be read ({error}): look whether it is there.") from error
    if not data:
        raise DataError(f"the text {str(path)!r} is empty: give one with something in it.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = f"is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})"
    else:
        if "\0" not in text:
            return text
        wrong = f"has a zero as byte {data.index(0)}, which no text has"
    encoding = _encoding_of(data)
    remedy = "name another, or take it out"
    if encoding is not None:
        remedy = f"convert it, such as by `iconv -f {encoding} -t utf-8`"
    if encoding == "latin1":  # any bytes without a zero are some Latin-1
        remedy = f"find out which encoding it has, and {remedy} if that is Latin-1"
    raise DataError(f"the text {str(path)!r} {wrong}: {remedy}, as bits are counted by UTF-8 bytes.")


def _encoding_of(data: bytes) -> str | None:
    r"""What bytes that are no UTF-8 may be the text of: latin1 without a zero, else UTF-16 or UTF-32, or nothing.

    >>> [_encoding_of("to be".encode(name)) for name in ("utf-16", "utf-16-be", "utf-32-le")]
    ['utf-16', 'utf-16be', 'utf-32le']
    >>> _encoding_of(b"caf\xe9"), _encoding_of(b"\x7fELF\0\0\0\1")
    ('latin1', None)
    """
    marks = {
        "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
        "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    }
    for name, starts in marks.items():
        if data.startswith(starts) and _decoded(data, name) is not None:
            return name
    if 0 not in data:
        return "latin1"
    plain = {
        name: sum(one < "\x80" for one in text) / len(text)
        for name in ("utf-32le", "utf-32be", "utf-16le", "utf-16be")
        if (text := _decoded(data, name))
    }
    found = max(plain, key=lambda name: plain[name], default=None)
    # What is UTF-8 but for zeros is UTF-16 only if all of it is ASCII; else it would become other characters.
    return found if found is not None and (plain[found] == 1 or not _is_utf8(data)) else None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decoded(data: bytes, encoding: str) -> str | None:
    """Bytes as text without a zero, or nothing."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def open_texts(name: str, config_name: str | None = None) -> Source:
    """The texts of a name, or rows with a column of texts.

    A text file; JSON Lines or a CSV file; a Parquet file; a folder of text files or of one of these kinds of rows; one
    that ``save_to_disk`` of datasets wrote; or a Hub dataset. A folder of texts and rows is refused.

    Raises:
        DataError: There are none, or they can't be read.
    """
    if name == "digits" or not (is_local(name) or Path(name).suffix.casefold() in TEXT_SUFFIXES | ROW_SUFFIXES):
        return open_source(name, config_name)
    path = local_path(name, "a text file, a file of rows, or a folder of such")
    suffix = path.suffix.casefold()
    if path.is_file() and suffix in ROW_SUFFIXES:
        return RowFiles(name, {"train": [path]})
    if path.is_file() and suffix != ".parquet":
        return TextFiles(name, path.parent, [path.name])
    if path.is_dir() and not is_saved(path):
        return _open_folder(name, path, config_name)
    return open_folder(name, config_name)


def _open_folder(name: str, path: Path, config_name: str | None) -> Source:
    """The texts of a folder: of one kind of files, as what another holds would be left out."""
    listing, kinds = list_folder(path), {"texts": list[str](), "rows": list[str](), "Parquet": list[str]()}
    suffixes = {"texts": TEXT_SUFFIXES, "rows": ROW_SUFFIXES, "Parquet": frozenset((".parquet",))}
    about = [file for file in listing.files if _is_about(file)]
    others: list[str] = []
    for file in (one for one in listing.files if one not in about):
        suffix = posixpath.splitext(file)[1].casefold()
        kind = next((kind for kind, known in suffixes.items() if suffix in known), None)
        (others if kind is None else kinds[kind]).append(file)
    listing.leave_out("about the folder, which is no text of it", *about)
    listing.leave_out("files of other kinds", *others)
    there = {kind: files for kind, files in kinds.items() if files}
    if not there:
        unused = describe_unused(listing.unused) or "nothing"
        raise DataError(
            f"the folder {name!r} holds no texts: it has {unused}. Name another, or a file by its own name."
        )
    if len(there) > 1:
        both = " and ".join(f"{kind}: {names_and_count(files)}" for kind, files in there.items())
        raise DataError(f"the folder {name!r} holds {both}, and one kind is read: name the folder, or file, of one.")
    if "texts" in there:
        return TextFiles(name, path, there["texts"], listing)
    if "rows" in there:
        splits = splits_by_name(there["rows"]) or {"train": there["rows"]}
        return RowFiles(name, {split: [path / file for file in files] for split, files in splits.items()}, listing)
    return open_folder(name, config_name)


def _is_about(file: str) -> bool:
    """Whether a file at the top of a folder says what the folder is.

    >>> _is_about("README.md"), _is_about("meta.json"), _is_about("readme.py"), _is_about("docs/README.md")
    (True, True, False, False)
    """
    stem, suffix = posixpath.splitext(file.casefold())
    return stem in _ABOUT and suffix in _ABOUT_SUFFIXES


def texts_of(rows: Iterable[Mapping[str, Any]], column: str, split: str) -> Iterator[str]:
    """The texts of a column, row by row; empty ones are left out.

    Raises:
        UnknownColumnError: There is no such column; the message names the others.
        DataError: A row holds something else.
    """
    for number, row in enumerate(rows):
        if column not in row:
            raise UnknownColumnError(
                f"the split {split!r} has no column {column!r}: it has {', '.join(row)}. Name the one that holds the "
                f"texts with --text_column."
            )
        text = row[column]
        if not isinstance(text, str):
            raise DataError(
                f"row {number} of the column {column!r} of {split!r} holds {shortened(text)}, no text: name another "
                f"with --text_column, or take that row out."
            )
        if text:
            yield text
