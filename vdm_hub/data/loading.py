"""From the name of a dataset to images as levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor

from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.caption_columns import holds_captions, no_captions, read_captions
from vdm_hub.data.captions import ImageCaptions, StreamCaptions
from vdm_hub.data.colors import Color
from vdm_hub.data.conditions import MOST_CLASSES, ClassCondition
from vdm_hub.data.corrupt import without_corrupt
from vdm_hub.data.examples import RunData as RunData
from vdm_hub.data.files import lies_in, list_folder
from vdm_hub.data.held_out import choose_again, hold_out, names_held_out, number_to_hold_out
from vdm_hub.data.images import (
    ImageLevels,
    ImageReader,
    ImageStream,
    captioned,
    decode_all,
    labelled_as,
    names_for_captions,
)
from vdm_hub.data.kinds import TOKENS
from vdm_hub.data.labels import (
    holds_labels,
    names_of_classes,
    no_labels,
    no_such_column,
    number_of_classes,
    read_labels,
)
from vdm_hub.data.overlaps import overlaps
from vdm_hub.data.preprocessing import HeldOut
from vdm_hub.data.sources import (
    AnyDataset,
    Source,
    UnknownColumnError,
    UnknownSplitError,
    is_local,
    local_path,
    open_folder,
    open_source,
    warn_of_no_test,
)
from vdm_hub.data.summaries import Use, summary_of
from vdm_hub.data.templates import captions_of_classes
from vdm_hub.data.text_loading import load_texts
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.errors import DataError, shortened, warn

Images: TypeAlias = ImageLevels | ImageStream

_ENCODED = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


def load_data(arguments: DataArguments, tokenization: Tokenization | None = None) -> RunData:
    """Load the splits that the arguments name: images, decoded, or texts, as windows of tokens.

    Args:
        arguments: Of the recipe.
        tokenization: Of texts, what makes tokens of them in place of the ``tokenizer`` of the arguments.

    Raises:
        DataError: A dataset, split or column is not there, or the data are not what the arguments say.

    >>> data = load_data(DataArguments(dataset_name="digits", num_levels=17, validation_size=200))
    >>> len(data.train), len(data.validation), len(data.test), data.shape
    (1237, 200, 360, (1, 8, 8))
    """
    return load_texts(arguments, tokenization) if arguments.kind is TOKENS else _load_images(arguments)


def as_classes(data: RunData, classes: ClassCondition) -> RunData:
    """The data of a run with their labels as the numbers of a model's classes: by name, where both have names.

    Raises:
        DataError: An image is of a class that the model does not know.
    """
    if data.classes is not None and data.classes.count > classes.count:
        raise DataError(
            f"the images are of {data.classes.count} classes, and the model knows {classes.count}: train on images of "
            f"its classes."
        )
    train, validation, test = (_of_classes(images, classes) for images in (data.train, data.validation, data.test))
    return replace(data, train=train, validation=validation, test=test, classes=classes)


def _load_images(arguments: DataArguments) -> RunData:
    """Load and decode the splits that the arguments name.

    Raises:
        DataError: A dataset, split or column is not there, or the images are not alike or not on the levels.
    """
    source = _source(arguments)
    test, chosen = _evaluation_split(source, arguments, arguments.test_split), None
    dataset = _training_rows(source, arguments)
    if arguments.test_size and test is None:
        dataset, test, chosen = _held_out_test(source, dataset, arguments)
    elif arguments.test_size:
        split, remedy = arguments.test_split, "to hold out a share all the same, set --test_split none"
        warn(f"the split {split!r} is there to be tested on, so test_size takes nothing: {remedy}.", stacklevel=2)
    train, held_out = _training_split(source, dataset, arguments)
    validation = _evaluation_split(source, arguments, arguments.validation_split) if held_out is None else held_out
    for name, images in (("validation", validation), ("test", test)):
        if images is not None and images.image_shape != train.image_shape:
            raise DataError(
                f"the {name} images have the shape {images.image_shape} (C, H, W) and the training images "
                f"{train.image_shape}: set resolution and color so that they agree."
            )
    classes = _classes_of(train, arguments)
    if classes is not None:
        held_out, validation, test = (_of_classes(images, classes) for images in (held_out, validation, test))
    if (template := arguments.caption_template) is not None:
        train, held_out, validation, test = (_captioned(one, template) for one in (train, held_out, validation, test))
        classes = None
    _warn_if_resized(train, validation, test)
    uses: list[Use] = [("trains on", train, arguments.train_split)]
    if held_out is None:
        uses.append(("validates on", validation, arguments.validation_split))
    else:
        uses.append(("holds out for validation", held_out, arguments.train_split))
    if chosen is None:
        uses.append(("tests on", test, arguments.test_split))
    else:
        uses.append(("holds out for the test", test, arguments.train_split))
    summary = summary_of(source, uses, streaming=arguments.streaming)
    sizes = (0 if held_out is None else len(held_out), 0 if chosen is None else chosen["size"])
    notes = _warn_of_overlaps(source, arguments, sum(sizes), test is not None and chosen is None)
    return RunData(train, validation, test, sum(sizes), summary, chosen, notes, classes)


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
    caption_column: str | None = None,
    caption_template: str | None = None,
    num_workers: int = 0,
    say: Callable[[str], None] | None = None,
    held_out: HeldOut | None = None,
) -> ImageLevels:
    """Load one split into memory, to evaluate on.

    Args:
        source: ``"digits"``, a folder of images or Parquet files, a Parquet file, or a dataset's name on the Hub.
        split: The split's name; slices such as ``"test[:100]"`` are understood. ``"held_out"`` is what a run held out
            of its training split, where ``held_out`` says how.
        config_name: The configuration of the dataset, where it has several.
        image_column: The column that holds the images.
        num_levels: K.
        color: ``"auto"``, ``"grey"`` or ``"rgb"``.
        resolution: Resize the shorter side and crop the centre.
        max_samples: Take this many images, from the start.
        label_column: Also take the labels from this column.
        caption_column: Also take the captions from this column.
        caption_template: Make captions of the labels by this template, in their place.
        num_workers: Threads that decode; 0 decodes in the main thread.
        say: Is called with what was read, and what lies in the folder and was not; without it the latter is a warning.
        held_out: How a run chose its test images: a pipeline's `held_out`.

    Raises:
        DataError: As for `load_data`; or the images that a run held out can't be chosen again.

    >>> load_split("digits", "test", num_levels=17).levels.shape
    torch.Size([360, 1, 8, 8])
    """
    opened = open_source(source, config_name)
    reader = ImageReader(num_levels, color, resolution, num_workers=num_workers, open_file=opened.open_file)
    chosen = held_out if names_held_out(split) else None
    whole = split if chosen is None else chosen["split"]
    dataset = opened.read(whole)
    if chosen is not None:
        dataset = choose_again(undecoded(opened, dataset, image_column, whole), source, chosen, split)
        dataset = without_corrupt(dataset, image_column, reader) if chosen["skip_corrupt"] else dataset
    dataset = dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))
    images = _in_memory(opened, dataset, image_column, reader, split, (label_column, caption_column))
    images = images if caption_template is None else captioned(images, caption_template)
    _warn_if_resized(images)
    summary = summary_of(opened, [("reads" if chosen is None else "reads what a run held out,", images, whole)])
    if say is not None:
        say(summary)
    elif opened.note or (opened.layout is not None and opened.layout.listing.unused):
        warn(summary, stacklevel=2)
    return images


def check_outputs_apart(arguments: DataArguments, outputs: Mapping[str, Path]) -> None:
    """Refuse to write into the folder that is read, or into one that a link in it leads to.

    Args:
        arguments: What is read.
        outputs: The places, by the options that named them.

    Raises:
        DataError: An output would be among the images of this or another run.
    """
    name = arguments.source
    if not outputs or (name == arguments.dataset_name and not is_local(name)):
        return
    folder = local_path(name)
    if not folder.is_dir():
        return
    listing = list_folder(folder)
    for option, path in outputs.items():
        if lies_in(path, listing):
            raise DataError(
                f"{option} {str(path)!r} lies in the folder of images {name!r}, and what is written would be among "
                f"them: give an --{option} elsewhere, or name the folder of the images alone."
            )


def _told(arguments: DataArguments) -> tuple[str | None, str | None]:
    """The columns of what a network is told of each image: its class, and its caption."""
    return arguments.label_column, arguments.caption_column


def _source(arguments: DataArguments) -> Source:
    if arguments.train_data_dir is not None:
        return open_folder(arguments.train_data_dir, arguments.dataset_config_name)
    return open_source(str(arguments.dataset_name), arguments.dataset_config_name)


def _reader(source: Source, arguments: DataArguments, *, center_crop: bool = True) -> ImageReader:
    return ImageReader(
        arguments.num_levels,
        arguments.color,
        arguments.resolution,
        center_crop,
        arguments.num_workers,
        source.open_file,
    )


def undecoded(source: Source, dataset: AnyDataset, column: str, split: str) -> AnyDataset:
    """A dataset with its image column as the images' files, not decoded; the other columns as they are.

    Raises:
        UnknownColumnError: There is no such column; the message names the others.
        DataError: It holds something else.
    """
    with source.explained():
        names = dataset.column_names if dataset.column_names is not None else list(next(iter(dataset), {}))
    if column not in names:
        raise UnknownColumnError(
            f"the split {split!r} has no column {column!r}: it has {', '.join(names)}. Name the one that holds the "
            "images with --image_column."
        )
    feature = (dataset.features or {}).get(column)
    if isinstance(feature, datasets.Image):
        # In a stream Image(decode=False) would drop a row's bytes, where its path is by chance that of a file here.
        rows_hold_bytes = isinstance(dataset, datasets.IterableDataset) and source.open_file is None
        return dataset.cast_column(column, _ENCODED if rows_hold_bytes else datasets.Image(decode=False))
    # Parquet written without `datasets` holds images as {"bytes", "path"}, or as bytes alone.
    plain = isinstance(feature, dict) and ("bytes" in feature or source.open_file is not None)
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if feature is not None and not (plain or binary):
        raise DataError(
            f"the column {column!r} of the split {split!r} holds {feature}, not images. The columns are "
            f"{', '.join(names)}: name another with --image_column, or cast it to datasets.Image."
        )
    return dataset


def _training_rows(source: Source, arguments: DataArguments) -> AnyDataset:
    """The whole training split, or a stream of it, its images not decoded."""
    name = arguments.train_split
    rows = undecoded(source, source.read(name, streaming=arguments.streaming), arguments.image_column, name)
    if isinstance(rows, datasets.Dataset) and not arguments.skip_corrupt_images:
        _read_told(source, rows, name, _told(arguments))  # while a row has the number that a message says
    return rows


def _held_out_test(
    source: Source, dataset: AnyDataset, arguments: DataArguments
) -> tuple[datasets.Dataset, Images, HeldOut]:
    """The training split without the test images that are held out of it, those images, and how they were chosen."""
    split, column, reader = arguments.train_split, arguments.image_column, _reader(source, arguments)
    if isinstance(dataset, datasets.IterableDataset):
        raise DataError(
            f"test_size is {arguments.test_size}, and {split!r} is read as a stream, which has no length to take a "
            f"share of: name a split with --test_split, leave --streaming out, or set --test_size 0."
        )
    kept, held, chosen = hold_out(dataset, split, arguments.test_size, skip_corrupt=arguments.skip_corrupt_images)
    held = without_corrupt(held, column, reader) if arguments.skip_corrupt_images else held
    return kept, _in_memory(source, held, column, reader, split, _told(arguments)), chosen


def _training_split(
    source: Source, dataset: AnyDataset, arguments: DataArguments
) -> tuple[Images, ImageLevels | None]:
    """The training images, and those held out of them for validation."""
    name, column = arguments.train_split, arguments.image_column
    if arguments.skip_corrupt_images:
        dataset = without_corrupt(dataset, column, _reader(source, arguments))
    if isinstance(dataset, datasets.IterableDataset):
        return _training_stream(source, dataset, arguments)
    size = number_to_hold_out(arguments.validation_size, len(dataset)) if arguments.validation_size else 0
    if size >= max(len(dataset), 1):
        raise DataError(
            f"validation_size is {arguments.validation_size}, and {name!r} has {len(dataset)} images: hold out fewer."
        )
    # Seeded by a constant, so that runs with different seeds are validated on the same images.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist() if size else []
    held = dataset.select(sorted(order[:size]))
    train = dataset.select(sorted(order[size:])) if size else dataset
    if arguments.max_train_samples is not None:
        train = train.select(range(min(arguments.max_train_samples, len(train))))
    reader = _reader(source, arguments, center_crop=arguments.center_crop)
    told = _told(arguments)
    images = _in_memory(source, train, column, reader, name, told)
    held_out = _in_memory(source, held, column, _reader(source, arguments), name, told) if size else None
    return images, held_out


def _training_stream(
    source: Source, dataset: datasets.IterableDataset, arguments: DataArguments
) -> tuple[Images, ImageLevels | None]:
    """The training stream, and the images at its start that are held out, in memory."""
    limit, name = arguments.max_train_samples, arguments.train_split
    if 0 < arguments.validation_size < 1:
        raise DataError(
            f"validation_size is {arguments.validation_size}, and {name!r} is read as a stream, which has no length "
            f"to take a share of: give a number of images, such as --validation_size 256."
        )
    size, held_out = int(arguments.validation_size), None
    if size:
        with source.explained():
            rows = datasets.Dataset.from_list(list(dataset.take(size)), features=dataset.features)
        reader = _reader(source, arguments)
        held_out = _in_memory(source, rows, arguments.image_column, reader, name, _told(arguments))
        dataset = dataset.skip(size)
    dataset = dataset if limit is None else dataset.take(limit)
    stream = _stream(source, dataset, arguments, name, center_crop=arguments.center_crop)
    if stream.size is not None:
        left = stream.size - size
        stream = replace(stream, size=left if limit is None else min(left, limit))
    return stream, held_out


def _evaluation_split(source: Source, arguments: DataArguments, split: str | None) -> Images | None:
    if split is None:
        return None
    try:
        dataset = source.read(split, streaming=arguments.streaming)
    except UnknownSplitError as error:
        warn_of_no_test(error, split, arguments.test_size, stacklevel=3)
        return None
    column = arguments.image_column
    if isinstance(dataset, datasets.IterableDataset):
        return _stream(source, undecoded(source, dataset, column, split), arguments, split, center_crop=True)
    return _in_memory(source, dataset, column, _reader(source, arguments), split, _told(arguments))


def _read_told(
    source: Source, dataset: datasets.Dataset, split: str, told: tuple[str | None, str | None]
) -> tuple[Tensor | None, ImageCaptions | None]:
    """The labels and the captions of all rows, where their columns are named."""
    label_column, caption_column = told
    try:
        labels = None if label_column is None else read_labels(dataset, label_column, source.note)
        captions = None if caption_column is None else read_captions(dataset, caption_column, source.note)
    except DataError as error:
        raise type(error)(f"in the split {split!r}, {error}") from error
    return labels, captions


def _in_memory(
    source: Source,
    dataset: datasets.Dataset,
    column: str,
    reader: ImageReader,
    split: str,
    told: tuple[str | None, str | None] = (None, None),
) -> ImageLevels:
    label_column = told[0]
    if len(dataset) == 0:
        raise DataError(f"the split {split!r} has no images: name another one.")
    encoded = undecoded(source, dataset, column, split)
    labels, captions = _read_told(source, encoded, split, told)
    try:
        images = replace(decode_all(encoded, column, reader, labels), captions=captions)
    except DataError as error:
        raise type(error)(f"in the split {split!r}, {error}") from error
    if labels is not None:
        images = replace(images, class_names=names_of_classes(encoded.features[label_column]))
    if source.has_names:
        names = (row["path"] for row in encoded.select_columns([column])[:][column])
        images = replace(images, names=tuple(names))
    return images


def _warn_of_overlaps(source: Source, arguments: DataArguments, held_out: int, has_test: bool) -> tuple[str, ...]:
    """Warn of images that are both trained on and measured; returns the notes for the figure at the end."""
    splits = {"train": arguments.train_split}
    splits |= {} if arguments.validation_split is None else {"validation": arguments.validation_split}
    splits |= {"test": str(arguments.test_split)} if has_test else {}
    limit = arguments.max_train_samples
    limit = None if limit is None else limit + held_out
    found = overlaps(source, splits, limit, streaming=arguments.streaming)
    for note in found.values():
        warn(note, stacklevel=3)
    return tuple(note for (_, measured), note in found.items() if measured == "test")


def _warn_if_resized(*splits: Images | None) -> None:
    found = [(images.resized_from, images.image_shape) for images in splits if images is not None]
    for size, shape in [(size, shape) for size, shape in found if size is not None][:1]:
        warn(
            f"images of {size[0]} x {size[1]} pixels are resized or cropped to resolution {shape[-1]}: bits per "
            f"dimension on them can't be compared with published figures.",
            stacklevel=3,
        )


def _stream(
    source: Source, encoded: datasets.IterableDataset, arguments: DataArguments, split: str, *, center_crop: bool
) -> ImageStream:
    column, reader = arguments.image_column, _reader(source, arguments, center_crop=center_crop)
    with source.explained():
        first = next(iter(encoded), None)
    if first is None:
        raise DataError(f"the split {split!r} has no images: name another one.")
    levels, resized = reader.fit(first[column], 0)
    shape, buffer = reader.output_shape(levels), arguments.shuffle_buffer_size
    size = None if source.is_remote else source.sizes[split]
    stream = ImageStream(encoded, column, shape, reader.num_levels, reader, buffer, resized, size)
    if arguments.caption_column is not None:
        return _with_captions(stream, first, source, arguments.caption_column)
    return stream if arguments.label_column is None else _with_labels(stream, first, arguments, source.note)


def _with_captions(stream: ImageStream, first: Mapping[str, Any], source: Source, column: str) -> ImageStream:
    """A stream whose captions are known: all of it is read once, its images not decoded."""
    if column not in first:
        raise no_such_column(column, first, source.note)
    feature = (stream.dataset.features or {}).get(column)
    if feature is not None and not holds_captions(feature):
        raise no_captions(column, feature)
    with source.explained():
        texts = (row[column] for row in stream.dataset.select_columns([column]))
        return replace(stream, captions=StreamCaptions.of_texts(column, texts))


def _with_labels(stream: ImageStream, first: Mapping[str, Any], arguments: DataArguments, note: str) -> ImageStream:
    """A stream whose batches hold the classes of their images, too."""
    column = str(arguments.label_column)
    if column not in first:
        raise no_such_column(column, first, note)
    feature = (stream.dataset.features or {}).get(column)
    if feature is not None and not holds_labels(feature):
        raise no_labels(column, feature, str(first[column])[:40])
    count = number_of_classes(feature) or arguments.num_classes
    return replace(stream, label_column=column, num_classes=count, class_names=names_of_classes(feature))


def _classes_of(train: Images, arguments: DataArguments) -> ClassCondition | None:
    """The classes of the training images, where they are to be told.

    Raises:
        DataError: A stream does not say how many there are, or they are more than are said.
    """
    if (column := arguments.label_column) is None:
        return None
    given, names = arguments.num_classes, train.class_names
    if isinstance(train, ImageStream) and train.num_classes is None:
        raise DataError(
            f"the column {column!r} holds integers, and a stream does not know how many classes there are: give "
            f"--num_classes, or leave --streaming out."
        )
    if isinstance(train, ImageLevels):
        assert train.labels is not None
        found = len(names) if names is not None else int(train.labels.max()) + 1
    else:
        found = int(train.num_classes or 0)
    if found > MOST_CLASSES:
        raise DataError(
            f"the column {column!r} holds {found - 1}, and labels are whole numbers from 0, of at most {MOST_CLASSES} "
            f"classes: name another column, or number the classes."
        )
    if given is not None and (given < found or (names is not None and given != found)):
        raise DataError(
            f"num_classes is {given}, and the column {column!r} holds {found} classes: give {found}, or leave it out."
        )
    if isinstance(train, ImageLevels) and train.labels is not None:
        unseen = sorted(set(range(given or found)) - set(train.labels.unique().tolist()))
        if unseen:
            known = [names[number] if names else number for number in unseen]
            warn(
                f"no training image is of {len(unseen)} of the classes of {column!r}: {shortened(known, 300)}. The "
                f"model will know nothing of them.",
                stacklevel=3,
            )
    return ClassCondition(given or found, names, column=column)


def _of_classes(images: Any, classes: ClassCondition) -> Any:
    """Images whose labels are the numbers of these classes, in whatever order their own column has them.

    Raises:
        DataError: They have another class.
    """
    if images is None:
        return None
    if isinstance(images, ImageStream):
        if (images.class_names, images.num_classes) not in ((classes.names, classes.count), (None, None)):
            raise DataError(
                f"the stream's column {images.label_column!r} has the classes {shortened(images.class_names)}, and "
                f"the training images' {shortened(classes.names)}: give both splits the same, in one order."
            )
        return replace(images, num_classes=classes.count)
    return labelled_as(images, classes)


def _captioned(images: Any, template: str) -> Any:
    """Images, or a stream of them, with captions made from the names of their classes."""
    if images is None:
        return None
    if isinstance(images, ImageLevels):
        return captioned(images, template)
    captions = captions_of_classes(template, names_for_captions(images.class_names))
    return replace(images, captions=StreamCaptions.of_classes(str(images.label_column), captions))
