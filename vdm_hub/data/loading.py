"""From the name of a dataset to images as levels, ready for `vdm_hub.data.batches`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from warnings import warn

import datasets
import torch
from datasets.exceptions import DatasetsError

from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.corrupt import without_corrupt
from vdm_hub.data.digits import digits
from vdm_hub.data.images import Decoder, ImageLevels, ImageStream, decode_all, warn_if_resized
from vdm_hub.errors import DataError
from vdm_hub.pixels import Color

AnyDataset: TypeAlias = Any  # datasets.Dataset | datasets.IterableDataset: the library has no type information
Images: TypeAlias = ImageLevels | ImageStream


@dataclass(frozen=True)
class Data:
    """The splits of a run; ``image_shape`` is (C, H, W), the same for all."""

    train: Images
    validation: Images | None
    test: Images | None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.image_shape

    @property
    def num_levels(self) -> int:
        """K."""
        return self.train.num_levels


class UnknownSplitError(DataError):
    """The dataset has no such split."""


def load_data(arguments: DataArguments) -> Data:
    """Load and decode the splits that the arguments name.

    Raises:
        DataError: A dataset, split or column is not there, or the images are not alike or not on the levels.

    >>> data = load_data(DataArguments(dataset_name="digits", num_levels=17, validation_size=200))
    >>> len(data.train), len(data.validation), len(data.test), data.image_shape
    (1237, 200, 360, (1, 8, 8))
    """
    train, held_out = _training_split(arguments)
    validation = _evaluation_split(arguments, arguments.validation_split) if held_out is None else held_out
    test = _evaluation_split(arguments, arguments.test_split)
    for name, images in (("validation", validation), ("test", test)):
        if images is not None and images.image_shape != train.image_shape:
            raise DataError(
                f"the {name} images have the shape {images.image_shape} (C, H, W) and the training images "
                f"{train.image_shape}: set resolution and color so that they agree."
            )
    return Data(train, validation, test)


def load_split(
    source: str,
    split: str,
    *,
    config_name: str | None = None,
    image_column: str = "image",
    num_levels: int = 256,
    color: Color = "auto",
    resolution: int | None = None,
    max_samples: int | None = None,
    label_column: str | None = None,
    num_workers: int = 0,
) -> ImageLevels:
    """Load one split into memory, to evaluate on.

    Args:
        source: ``"digits"``, a folder of images or Parquet files, a Parquet file, or a dataset's name on the Hub.
        split: The split's name; slices such as ``"test[:100]"`` are understood.
        config_name: The configuration of the dataset, where it has several.
        image_column: The column that holds the images.
        num_levels: K.
        color: ``"auto"``, ``"grey"`` or ``"rgb"``.
        resolution: Resize the shorter side and crop the centre.
        max_samples: Take this many images, from the start.
        label_column: Also take the labels from this column.
        num_workers: Threads that decode; 0 decodes in the main thread.

    Raises:
        DataError: As for `load_data`.

    >>> load_split("digits", "test", num_levels=17).levels.shape
    torch.Size([360, 1, 8, 8])
    """
    dataset = read_split(source, split, config_name)
    decoder = Decoder(num_levels, color, resolution, num_workers=num_workers)
    dataset = dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))
    return _in_memory(dataset, image_column, decoder, split, label_column)


def read_split(source: str, split: str, config_name: str | None = None, *, streaming: bool = False) -> AnyDataset:
    """One split as a `datasets` dataset.

    Raises:
        UnknownSplitError: The dataset has other splits; the message names them.
        DataError: There is no such dataset, or it can't be read.
    """
    if source == "digits":
        return _digits_split(split, streaming)
    path, files = ("parquet", source) if source.endswith(".parquet") else (source, None)
    if (files or source.startswith((".", "/", "~"))) and not Path(source).expanduser().exists():
        raise DataError(f"there is nothing at {source}: give a folder of images or of Parquet files.")
    try:
        return datasets.load_dataset(path, config_name, data_files=files, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _unreadable(source, path, split, config_name, error) from error


def _digits_split(split: str, streaming: bool) -> AnyDataset:
    loaded = digits()
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({k: len(v) for k, v in loaded.items()})
    except (ValueError, AssertionError) as error:
        raise _unknown_split("digits", split, list(loaded)) from error
    whole = loaded[part.splitname]
    dataset = whole.select(range(part.from_ or 0, len(whole) if part.to is None else part.to))
    return dataset.to_iterable_dataset() if streaming else dataset


def _unreadable(source: str, path: str, split: str, config_name: str | None, error: Exception) -> DataError:
    """What to say when `datasets` could not load."""
    if isinstance(error, ValueError) and "split" in str(error).lower():
        known = re.findall(r"'([^']+)'", str(error).partition("[")[2])
        return _unknown_split(source, split, known)
    cause = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConnectionError):
        remedy = "check its name and the network, or give a local folder with --train_data_dir"
    elif isinstance(error, FileNotFoundError):
        remedy = "check its name, or give a folder of images or of Parquet files with --train_data_dir"
    else:
        remedy = "check its name and its configuration (--dataset_config_name)"
    return DataError(f"the dataset {source!r} can't be loaded ({cause}): {remedy}.")


def _unknown_split(source: str, split: str, known: Sequence[str]) -> UnknownSplitError:
    return UnknownSplitError(
        f"the dataset {source!r} has no split {split!r}: it has {', '.join(known) or 'others'}; slices are written "
        "like 'train[:90%]', and only of datasets that are not streamed."
    )


def _source(arguments: DataArguments) -> str:
    if arguments.dataset_name is not None:
        return arguments.dataset_name
    folder = Path(str(arguments.train_data_dir)).expanduser().absolute()
    if not folder.exists():
        raise DataError(f"there is nothing at {folder}: give a folder of images or of Parquet files.")
    return str(folder)


def _decoder(arguments: DataArguments, *, center_crop: bool) -> Decoder:
    return Decoder(arguments.num_levels, arguments.color, arguments.resolution, center_crop, arguments.num_workers)


def _training_split(arguments: DataArguments) -> tuple[Images, Images | None]:
    """The training images, and those held out of them."""
    dataset = read_split(
        _source(arguments), arguments.train_split, arguments.dataset_config_name, streaming=arguments.streaming
    )
    if arguments.skip_corrupt_images:
        undecoded = _undecoded(dataset, arguments.image_column, arguments.train_split)
        dataset = without_corrupt(undecoded, arguments.image_column, _decoder(arguments, center_crop=True))
    if isinstance(dataset, datasets.IterableDataset):
        return _training_stream(dataset, arguments)
    size, name, column = arguments.validation_size, arguments.train_split, arguments.image_column
    if size >= max(len(dataset), 1):
        raise DataError(f"validation_size is {size}, and {name!r} has {len(dataset)} images: hold out fewer.")
    # Seeded by a constant, so that runs with different seeds are validated on the same images.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist() if size else []
    held = dataset.select(sorted(order[:size]))
    train = dataset.select(sorted(order[size:])) if size else dataset
    if arguments.max_train_samples is not None:
        train = train.select(range(min(arguments.max_train_samples, len(train))))
    images = _in_memory(train, column, _decoder(arguments, center_crop=arguments.center_crop), name)
    held_out = _in_memory(held, column, _decoder(arguments, center_crop=True), name) if size else None
    return images, held_out


def _training_stream(dataset: datasets.IterableDataset, arguments: DataArguments) -> tuple[Images, Images | None]:
    """The training stream, and the images at its start that are held out, in memory."""
    size, limit, name = arguments.validation_size, arguments.max_train_samples, arguments.train_split
    held_out = None
    if size:
        rows = datasets.Dataset.from_list(list(_undecoded(dataset, arguments.image_column, name).take(size)))
        held_out = _in_memory(
            rows.cast_column(arguments.image_column, datasets.Image()),
            arguments.image_column,
            _decoder(arguments, center_crop=True),
            name,
        )
        dataset = dataset.skip(size)
    dataset = dataset if limit is None else dataset.take(limit)
    return _stream(dataset, arguments, name, center_crop=arguments.center_crop), held_out


def _evaluation_split(arguments: DataArguments, split: str | None) -> Images | None:
    if split is None:
        return None
    try:
        dataset = read_split(_source(arguments), split, arguments.dataset_config_name, streaming=arguments.streaming)
    except UnknownSplitError as error:
        if split != "test":  # asked for by name
            raise
        warn(f"there will be no evaluation at the end: {error} Name it with --test_split.", stacklevel=3)
        return None
    if isinstance(dataset, datasets.IterableDataset):
        return _stream(dataset, arguments, split, center_crop=True)
    return _in_memory(dataset, arguments.image_column, _decoder(arguments, center_crop=True), split)


def _in_memory(
    dataset: datasets.Dataset, column: str, decoder: Decoder, split: str, label_column: str | None = None
) -> ImageLevels:
    if len(dataset) == 0:
        raise DataError(f"the split {split!r} has no images: name another one.")
    encoded = _undecoded(dataset, column, split)
    if label_column is not None and label_column not in dataset.column_names:
        raise DataError(f"no column {label_column!r}: the columns are {', '.join(dataset.column_names)}.")
    try:
        images = decode_all(encoded, column, decoder, label_column)
    except DataError as error:
        raise DataError(f"in the split {split!r}, {error}") from error
    warn_if_resized(encoded[0][column], decoder)
    return images


def _stream(
    dataset: datasets.IterableDataset,
    arguments: DataArguments,
    split: str,
    *,
    center_crop: bool,
) -> ImageStream:
    column, decoder = arguments.image_column, _decoder(arguments, center_crop=center_crop)
    encoded = _undecoded(dataset, column, split)
    first = next(iter(encoded), None)
    if first is None:
        raise DataError(f"the split {split!r} has no images: name another one.")
    levels, resized = decoder.fit(first[column], 0)
    shape, buffer = decoder.output_shape(levels), arguments.shuffle_buffer_size
    warn_if_resized(first[column], decoder)
    return ImageStream(encoded, column, shape, decoder.num_levels, decoder, buffer, resized)


def _undecoded(dataset: Any, column: str, split: str) -> Any:
    """The dataset with its image column as encoded bytes."""
    names = dataset.column_names if dataset.column_names is not None else list(next(iter(dataset), {}))
    if column not in names:
        raise DataError(
            f"the split {split!r} has no column {column!r}: it has {', '.join(names)}. Name the one that holds the "
            "images with --image_column."
        )
    feature = (dataset.features or {}).get(column)
    # Parquet written without `datasets` holds images as {"bytes", "path"}, or as bytes alone.
    plain = isinstance(feature, dict) and "bytes" in feature
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if feature is not None and not (isinstance(feature, datasets.Image) or plain or binary):
        raise DataError(
            f"the column {column!r} of the split {split!r} holds {feature}, not images. The columns are "
            f"{', '.join(names)}: name another with --image_column, or cast it to datasets.Image."
        )
    return dataset.cast_column(column, datasets.Image(decode=False))
