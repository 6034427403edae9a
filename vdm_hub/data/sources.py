"""Where images come from: scikit-learn's digits, a folder, a Parquet file or the Hub, all divided into splits."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeAlias

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.utils.file_utils import xopen
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from vdm_hub.data.digits import digits
from vdm_hub.data.layouts import Layout, metadata_columns, read_layout, refuse_doubled
from vdm_hub.errors import DataError, explained, in_one_line, warn

AnyDataset: TypeAlias = Any  # datasets.Dataset | datasets.IterableDataset: the library has no type information
Opener: TypeAlias = Callable[[str], IO[bytes]]

_ROWS = 256  # read at once of a Parquet file that is streamed


class UnknownSplitError(DataError):
    """The error for a split that the dataset does not have."""


class UnknownColumnError(DataError):
    """The error for a column of images that the dataset does not have."""


def warn_of_no_test(error: UnknownSplitError, split: str, test_size: float, *, stacklevel: int = 2) -> None:
    """Say that there will be no evaluation at the end, where nothing is held out for it either.

    Raises:
        UnknownSplitError: The split was asked for by another name than the usual one.
    """
    if split != "test":
        raise error
    if not test_size:
        remedy = "Name it with --test_split, or hold out a share with --test_size 0.1."
        warn(f"there will be no evaluation at the end: {error} {remedy}", stacklevel=stacklevel + 1)


class Source(ABC):
    """A dataset with its splits.

    Attributes:
        name: As it was given.
        layout: What lies in it, where it is a folder.
        open_file: Opens what the rows name by a path; ``None`` where rows hold the images themselves, and a path in
            them is nothing that may be opened.
        remedy: What to do where the data can't be read.
        is_remote: Whether it is counted only by a download.
        has_names: Whether those paths are names in a folder, which say something to whoever reads them.
    """

    open_file: Opener | None = None
    has_names = is_remote = False
    remedy = "look whether it is whole"

    def __init__(self, name: str, layout: Layout | None = None) -> None:
        self.name, self.layout = name, layout

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """The number of images of each split, by its name."""

    @abstractmethod
    def _whole(self, split: str) -> datasets.Dataset:
        """One split, as a dataset in memory or in the cache."""

    @abstractmethod
    def _stream(self, split: str) -> datasets.IterableDataset:
        """One split, as a stream."""

    def read(self, split: str, *, streaming: bool = False) -> AnyDataset:
        """A split, or a part of splits such as ``train[:90%]`` or ``train+test``.

        Args:
            split: The name, or an expression that `datasets.ReadInstruction` understands.
            streaming: Read a stream; of whole splits only.

        Raises:
            UnknownSplitError: There are other splits; the message names them.
            DataError: The data can't be read.
        """
        with self.explained():
            if streaming:
                if split not in self.sizes:
                    raise self._unknown(split, self.sizes)
                return self._stream(split)
            parts = [
                self._part(one.splitname, one.from_ or 0, self.sizes[one.splitname] if one.to is None else one.to)
                for one in self.parts(split)
            ]
            return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)

    def parts(self, split: str) -> Sequence[Any]:
        """What a split, or an expression of several, is made of: ``splitname``, and ``from_`` and ``to`` of its rows.

        Raises:
            UnknownSplitError: There are other splits.
            DataError: A row is named twice.
        """
        try:
            parts = list(datasets.ReadInstruction.from_spec(split).to_absolute(dict(self.sizes)))
        except (ValueError, AssertionError) as error:
            if isinstance(error, DataError):
                raise
            why = "" if "Unknown split" in str(error) else f" ({in_one_line(error)})"
            raise self._unknown(split, self.sizes, why) from error
        numbers = {name: np.zeros(size, dtype=np.int64) for name, size in self.sizes.items()}
        for part in parts:
            numbers[part.splitname][part.from_ : part.to] += 1
        if twice := sum(int((number > 1).sum()) for number in numbers.values()):
            raise DataError(
                f"the split {split!r} names {twice:,} images of {self.name!r} more than once, and each counts once: "
                f"leave one of its parts out."
            )
        return parts

    def _part(self, split: str, start: int, stop: int) -> datasets.Dataset:
        whole = self._whole(split)
        return whole if (start, stop) == (0, len(whole)) else whole.select(list(range(start, stop)))

    def _unknown(self, split: str, known: Iterable[str], why: str = "") -> UnknownSplitError:
        return UnknownSplitError(
            f"the dataset {self.name!r} has no split {split!r}{why}: it has {', '.join(known)}; slices are written "
            f"like 'train[:90%]', and only of datasets that are not streamed.{self.note}"
        )

    @property
    def note(self) -> str:
        """The layout's note, as a sentence that follows another one."""
        return f" {self.layout.note}." if self.layout is not None and self.layout.note else ""

    def explained(self) -> AbstractContextManager[None]:
        """Within it, whatever `datasets` and the libraries below it raise becomes one paragraph."""
        return explained(f"the dataset {self.name!r} can't be read", self.remedy, DataError)


class SourceInMemory(Source):
    """A source whose splits are datasets that are there."""

    @property
    @abstractmethod
    def _splits(self) -> Mapping[str, datasets.Dataset]:
        """The splits by name."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of images of each split, by its name."""
        return {name: len(split) for name, split in self._splits.items()}

    def _whole(self, split: str) -> datasets.Dataset:
        return self._splits[split]

    def _stream(self, split: str) -> datasets.IterableDataset:
        return self._splits[split].to_iterable_dataset()


class Digits(SourceInMemory):
    """The source of scikit-learn's digits."""

    @cached_property
    def _splits(self) -> Mapping[str, datasets.Dataset]:
        return digits()


class ImageFiles(Source):
    """The image files of a folder, with labels by the names of folders, or columns of metadata files."""

    has_names = True

    layout: Layout

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of images of each split, by its name."""
        return {split: len(files) for split, files in self.layout.splits.items()}

    def open_file(self, path: str) -> IO[bytes]:
        """Open one of the files that were listed."""
        return (self.layout.listing.root / path).open("rb")

    def _whole(self, split: str) -> datasets.Dataset:
        files = self.layout.splits[split]
        image = pa.StructArray.from_arrays([pa.array(files, pa.string())], ["path"])
        metadata, classes = metadata_columns(self.layout, files), self.layout.classes
        table = pa.table({"image": image}) if metadata is None else metadata.append_column("image", image)
        if not classes or "label" in table.column_names:
            return datasets.Dataset(table)
        label = datasets.ClassLabel(names=sorted(set(classes.values())))
        table = table.append_column("label", pa.array([label.str2int(classes[path]) for path in files], pa.int64()))
        features = datasets.Features.from_arrow_schema(table.schema) | {"label": label}
        return datasets.Dataset(table, datasets.DatasetInfo(features=datasets.Features(features)))

    def _stream(self, split: str) -> datasets.IterableDataset:
        return self._whole(split).to_iterable_dataset()


class ParquetFiles(Source):
    """Parquet files, each opened by its own name."""

    def __init__(self, name: str, splits: Mapping[str, Sequence[Path]], layout: Layout | None = None) -> None:
        super().__init__(name, layout)
        self._splits = splits

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The number of rows of each split, by its name."""
        return {split: sum(map(_count_rows, files)) for split, files in self._splits.items()}

    def _whole(self, split: str) -> datasets.Dataset:
        return self._part(split, 0, self.sizes[split])

    def _part(self, split: str, start: int, stop: int) -> datasets.Dataset:
        """The rows with these numbers, from no more files than hold them."""
        parts, first = dict[Path, range](), 0
        for path in self._splits[split]:
            count = _count_rows(path)
            parts[path] = range(max(start - first, 0), min(stop - first, count))
            first += count
        needed = [path for path, rows in parts.items() if rows] or self._splits[split][:1]
        remedy = f"read a part, such as {split}[:1000], or all as a stream with --streaming"
        check_memory(sum(path.stat().st_size for path in needed), f"the Parquet files of {split!r}", remedy)
        read = [datasets.Dataset(_read_table(path)).select(list(parts[path])) for path in needed]
        return datasets.concatenate_datasets(read)

    def _stream(self, split: str) -> datasets.IterableDataset:
        files = self._splits[split]
        features = datasets.concatenate_datasets([datasets.Dataset(_no_rows(path)) for path in files]).features
        return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs={"files": files})


class SavedDataset(SourceInMemory):
    """A dataset, or several as splits, that ``save_to_disk`` of datasets wrote."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self._path = path

    @cached_property
    def _splits(self) -> Mapping[str, datasets.Dataset]:
        with self.explained():
            found = datasets.load_from_disk(str(self._path))
        return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


class HubDataset(Source):
    """A dataset on the Hugging Face Hub, or what the cache holds of it."""

    is_remote = True
    remedy = (
        "there is no such folder here, so it was looked for on the Hub: check its name, its configuration "
        "(--dataset_config_name) and the network, log in by `hf auth login` where it is not public, or give a local "
        "folder with --train_data_dir"
    )

    def __init__(self, name: str, config_name: str | None) -> None:
        super().__init__(name)
        with self.explained():
            self._builder = datasets.load_dataset_builder(name, config_name)
        if isinstance(self._builder, ImageFolder):  # which makes its paths itself, of the repository's own files
            self.open_file = _open_on_the_hub

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The number of rows of each split, by its name."""
        self._builder.download_and_prepare()
        return {split: info.num_examples for split, info in self._builder.info.splits.items()}

    def _whole(self, split: str) -> datasets.Dataset:
        return self._builder.as_dataset(split)

    def read(self, split: str, *, streaming: bool = False) -> AnyDataset:
        """The split, as from all sources; a stream needs no download before it."""
        if not streaming:
            return super().read(split)
        with self.explained():
            streams = self._builder.as_streaming_dataset()
        if split not in streams:
            raise self._unknown(split, streams)
        return streams[split]

    def _stream(self, split: str) -> datasets.IterableDataset:
        raise NotImplementedError("`read` reads streams")


def open_source(name: str, config_name: str | None = None) -> Source:
    """The dataset of a name: ``"digits"``, a folder of images or Parquet files, a Parquet file, or a name on the Hub.

    Raises:
        DataError: There is no such dataset, or it can't be read.
    """
    if name == "digits":
        if os.path.lexists(name):
            warn(
                "'digits' is scikit-learn's dataset, and what is here under that name is not read: name it './digits'."
            )
        return Digits(name)
    if is_local(name):
        return open_folder(name, config_name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DataError(
            f"{name!r} is neither a folder or a Parquet file that is there, nor a dataset's name on the Hub "
            f"(owner/name): correct it."
        ) from error
    if name in _PACKAGED_DATASETS_MODULES:  # `datasets` would read the current folder
        raise DataError(
            f"{name!r} is a kind of files for `datasets`, not a dataset: name the folder or the file itself."
        )
    return HubDataset(name, config_name)


def open_folder(name: str, config_name: str | None = None) -> Source:
    """The dataset in a folder, or in a Parquet file. The name is that of one path, whatever characters it has.

    Raises:
        DataError: There is nothing, or no images; or a configuration is asked for, which only the Hub's datasets have.
    """
    path = local_path(name)
    if config_name is not None:
        raise DataError(
            f"dataset_config_name is {config_name!r}, and the dataset is the folder {name!r}: only datasets on the "
            f"Hub have configurations, so name the folder of the one that you mean."
        )
    if is_saved(path):
        return SavedDataset(name, path)
    if path.is_dir():
        layout = read_layout(path)
        if layout.is_parquet:
            splits = {split: [path / file for file in files] for split, files in layout.splits.items()}
            return ParquetFiles(name, splits, layout)
        return ImageFiles(name, layout)
    if path.suffix.casefold() != ".parquet" or not path.is_file():
        raise DataError(f"{name!r} is no folder and no Parquet file: give a folder of images or of Parquet files.")
    return ParquetFiles(name, {"train": [path]})


def is_local(name: str) -> bool:
    """Whether a name is that of a path; what is there comes before what the Hub has of the same name.

    >>> is_local("digits"), is_local("./digits"), is_local("somewhere/birds.parquet")
    (False, True, True)
    """
    if name == "digits":
        return False
    looks = name.startswith((".", "/", "~")) or name.casefold().endswith(".parquet")
    return looks or os.path.exists(name)  # noqa: PTH110 - of any string, too long ones too


def is_saved(path: Path) -> bool:
    """Whether a folder is one that ``save_to_disk`` of datasets wrote."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def local_path(name: str, wanted: str = "a folder of images or of Parquet files") -> Path:
    """The path of a name: as it is where that is there, else with ``~`` for the home folder.

    Args:
        name: The name.
        wanted: What to give where there is nothing.

    Raises:
        DataError: There is nothing.
    """
    for path in (name, os.path.expanduser(name)):  # noqa: PTH111 - that of pathlib raises for unknown users
        if name and os.path.exists(path):  # noqa: PTH110
            return Path(path).absolute()
    raise DataError(f"there is nothing at {name!r}: give {wanted}.")


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse to hold more than half of the machine's memory.

    Raises:
        DataError: It would be more.
    """
    if needed > psutil.virtual_memory().total / 2:
        raise DataError(f"{what} need {needed / 2**30:.1f} GiB, more than half of this machine's memory: {remedy}.")


def _open_on_the_hub(path: str) -> IO[bytes]:
    opened: IO[bytes] = xopen(path, "rb")
    return opened


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; whatever goes wrong within the block is an error that names it."""
    what, remedy = f"the Parquet file {str(path)!r} can't be read", "put it back as it was"
    with (
        explained(what, remedy, DataError),
        pa.OSFile(str(path)) as source,
        pq.ParquetFile(source, page_checksum_verification=True) as file,
    ):
        refuse_doubled(file.schema_arrow.names, path)
        yield file


def _count_rows(path: Path) -> int:
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def _no_rows(path: Path) -> pa.Table:
    with _opened(path) as file:
        return file.schema_arrow.empty_table()


def _read_table(path: Path) -> pa.Table:
    with _opened(path) as file:
        return file.read()


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in files:
        with _opened(path) as file:
            for batch in file.iter_batches(_ROWS):
                yield from batch.to_pylist()
