"""Images as levels: decoded once into memory, or decoded from a stream batch by batch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any, ClassVar, TypeAlias

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from PIL.Image import Image
from torch import Tensor

from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.captions import CAPTIONS, ImageCaptions, StreamCaptions
from vdm_hub.data.colors import Color, check_depth, convert_color, load_pixels
from vdm_hub.data.conditions import CLASS_LABELS, ClassCondition
from vdm_hub.data.examples import Examples
from vdm_hub.data.kinds import IMAGES, Units
from vdm_hub.data.labels import as_labels
from vdm_hub.data.levels import Levels, levels_from_image, nearest_levels
from vdm_hub.data.picture_files import FORMATS, check_one_picture, check_palette, check_size, check_values
from vdm_hub.data.preprocessing import Preprocessing
from vdm_hub.data.sources import Opener, check_memory
from vdm_hub.data.templates import captions_of_classes
from vdm_hub.errors import DataError, in_one_line, shortened, unknown_name, warn

ImageSize: TypeAlias = tuple[int, int]
"""The size of a picture, (W, H), as Pillow has it."""
SizedLevels: TypeAlias = tuple[Levels, ImageSize | None]

_CHUNK = 1024  # images decoded between two reads of the dataset


class CorruptImageError(DataError):
    """The error for a row without an image, or with one that can't be decoded; ``what`` says which, and why."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: replace or remove it; of training images, --skip_corrupt_images leaves such out.")
        self.what = what


@dataclass(frozen=True)
class ImageName:
    """What an image can be found by: its number and its file; else a hash of its bytes, as `sha256sum` prints it.

    >>> print(ImageName({"path": "cat/1.png"}, 7))
    image 7 (cat/1.png)
    """

    encoded: Any
    index: int | None = None

    def __str__(self) -> str:
        """The name as text, made only where it is needed."""
        number = "an image" if self.index is None else f"image {self.index}"
        parts = self.encoded if isinstance(self.encoded, dict) else {"bytes": self.encoded}
        if parts.get("path"):
            return f"{number} ({parts['path']})"
        data = parts.get("bytes")
        if self.index is None and isinstance(data, bytes):
            return f"{number} ({len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()[:16]}...)"
        return number


@dataclass(frozen=True)
class ImageReader:
    """From an encoded image to levels, with the resizing and colour handling of `DataArguments`.

    ``open_file`` opens the files that rows name; without it a row holds its image, and a path in it is never opened.
    """

    num_levels: int = 256
    color: Color = "auto"
    resolution: int | None = None
    center_crop: bool = True
    num_workers: int = 0
    open_file: Opener | None = None

    def decode(self, encoded: Any, index: int | None = None) -> Levels:
        """The levels, uint8 of shape (C, H, W).

        With a resolution and no centre crop only the shorter side has that size: the crop is drawn at each use.

        Args:
            encoded: The bytes of an image file, or a mapping with its ``bytes`` or its ``path``.
            index: The image's number in its dataset, for messages.

        Raises:
            CorruptImageError: There is no image, or it can't be decoded.
            DataError: It has several frames, or `levels_from_image` refuses it.
        """
        return self.fit(encoded, index)[0]

    def fit(self, encoded: Any, index: int | None = None) -> SizedLevels:
        """The result of `decode`, and the image's own size where it is resized, or cropped now or at each use."""
        image, name = self.open(encoded, index), ImageName(encoded, index)
        levels = levels_from_image(image, self.num_levels, color=self.color, name=name)
        if self.resolution is None or levels.shape[1:] == (self.resolution, self.resolution):
            return levels, None
        if min(levels.shape[1:]) != self.resolution:
            resized = _resize(convert_color(image, self.color), self.resolution)
            levels = nearest_levels(resized, self.num_levels)
        return crop(levels, self.resolution, 0.5, 0.5) if self.center_crop else levels, image.size

    def open(self, encoded: Any, index: int | None = None) -> Image:
        """The one image of a file, upright, of 8 bits a channel; it raises as `decode` does."""
        name = ImageName(encoded, index)
        try:
            with self._file(encoded, name) as file:
                image = PIL.Image.open(file, formats=FORMATS)
                check_depth(image, name)
                check_size(image)
                check_one_picture(file, image, name)
                check_values(file, image, name)
                load_pixels(image)
                check_palette(image)
                PIL.ImageOps.exif_transpose(image, in_place=True)
        except DataError:
            raise
        except Exception as error:  # whatever Pillow's readers stumble over
            raise CorruptImageError(f"{name} of the dataset can't be decoded ({why_unreadable(error)})") from error
        return image

    def _file(self, encoded: Any, name: object) -> IO[bytes]:
        parts = encoded if isinstance(encoded, dict) else {"bytes": encoded}
        data, path = parts.get("bytes"), parts.get("path")
        if data is not None:
            return io.BytesIO(data)
        if path is None:
            raise ValueError("the row is null")
        if self.open_file is None:
            raise DataError(
                f"{name} is not in the dataset, which names the path {path!r} instead: what a dataset names is never "
                f"opened. Put the images themselves into it, or give the folder that they are in."
            )
        return self.open_file(path)

    def check(self, encoded: Any, index: int | None = None) -> str:
        """Why an image can't be decoded, of whatever size and mode; nothing where it can."""
        try:
            self.open(encoded, index)
        except CorruptImageError as error:
            return error.what
        except DataError:  # a fault of another kind, which is for whoever decodes it
            pass
        return ""

    def fit_many(self, encoded: Sequence[Any], indices: Sequence[int] | None = None) -> list[SizedLevels]:
        """`fit` for each, in order, on ``num_workers`` threads."""
        numbers = [None] * len(encoded) if indices is None else indices
        if self.num_workers == 0:
            return [self.fit(one, index) for one, index in zip(encoded, numbers, strict=True)]
        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(self.fit, encoded, numbers))

    def output_shape(self, levels: Levels) -> tuple[int, int, int]:
        """The shape (C, H, W) that decoded levels have when they are used."""
        channels, height, width = levels.shape
        return (channels, height, width) if self.resolution is None else (channels, self.resolution, self.resolution)


class _Images(Examples):
    """What images in memory and those of a stream have in common."""

    kind = IMAGES
    image_shape: tuple[int, int, int]
    resized_from: ImageSize | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image, (C, H, W)."""
        return self.image_shape

    @property
    def resized(self) -> bool:
        """Whether any image was resized or cropped, or is to be cropped at each use; of a stream the first answers."""
        return self.resized_from is not None

    def mirrored(self, batch: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
        """The batch with the images mirrored left to right whose draw, (B,), lies below 1/2."""
        levels = batch["levels"]
        return batch | {"levels": torch.where((draws < 0.5)[:, None, None, None], levels.flip(-1), levels)}

    def units(self, count: int) -> Units:
        """Bits are counted by dimension: by each level of each channel."""
        return Units(IMAGES, int(np.prod(self.image_shape)))

    def augmentation(self, arguments: DataArguments) -> dict[str, bool]:
        """Whether images are mirrored, and cropped at random."""
        return {
            "random_flip": arguments.random_flip,
            "random_crop": self.resized and not arguments.center_crop,
        }

    def pipeline_arguments(self, arguments: DataArguments) -> dict[str, Any]:
        """How images became levels."""
        preprocessing: Preprocessing = {
            "resolution": arguments.resolution,
            "center_crop": arguments.center_crop,
            "color": arguments.color,
            "num_levels": arguments.num_levels,
            "image_column": arguments.image_column,
        }
        return {"preprocessing": preprocessing}


@dataclass(frozen=True)
class ImageLevels(_Images):
    """Images held in memory as levels.

    Args:
        levels: uint8 of shape (N, C, H, W); or N tensors (C, H', W') that are at least as large as ``image_shape``,
            from which a crop is taken at each use.
        image_shape: (C, H, W).
        num_levels: K.
        labels: int64 of shape (N,), where a label column was asked for.
        class_names: The names of their classes, where the column has any.
        captions: Their captions, where those were asked for.
        resized_from: The size of the first image that was resized or cropped, or is to be cropped at each use.
        names: The file of each image by its path in the folder, where they come from one.
    """

    levels: Tensor | tuple[Tensor, ...]
    image_shape: tuple[int, int, int]
    num_levels: int
    labels: Tensor | None = None
    resized_from: ImageSize | None = None
    names: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    captions: ImageCaptions | None = None
    is_stream: ClassVar[bool] = False

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.levels)

    @property
    def count(self) -> int:
        """The number of images, N."""
        return len(self.levels)

    def take(self, indices: Tensor, offsets: Tensor | None = None) -> dict[str, Tensor]:
        """A batch of the images with these indices.

        Args:
            indices: int64 of shape (B,).
            offsets: Where to crop images that are larger: fractions in [0, 1) of shape (B, 2), down and right. The
                centre where not given.

        Returns:
            ``levels``, uint8 of shape (B, C, H, W); ``class_labels``, (B,), where there are labels; ``captions``,
            (B,), their numbers, where there are some.
        """
        if isinstance(self.levels, Tensor):
            levels = self.levels[indices]
        else:
            offsets = torch.full((len(indices), 2), 0.5) if offsets is None else offsets
            size, chosen = self.image_shape[-1], (self.levels[i] for i in indices.tolist())
            crops = [crop(image, size, *uv) for image, uv in zip(chosen, offsets.tolist(), strict=True)]
            levels = torch.stack(crops)
        told = {} if self.labels is None else {CLASS_LABELS: self.labels[indices]}
        told |= {} if self.captions is None else {CAPTIONS: self.captions.numbers[indices]}
        return {"levels": levels} | told


@dataclass(frozen=True)
class ImageStream(_Images):
    """Images read as a stream and decoded batch by batch.

    Args:
        dataset: With the image column not decoded.
        image_column: The column that holds the images.
        image_shape: (C, H, W), as found in the first image.
        num_levels: K.
        reader: What turns a row into levels.
        shuffle_buffer_size: Images in the shuffle buffer of training.
        resized_from: The size of the first image, where it is resized or cropped.
        size: How many images it has, with those that can't be decoded; ``None`` where only a download would tell.
        label_column: The column that holds their classes, where they are asked for.
        num_classes: How many classes there are, where that is known.
        class_names: The names of their classes, where the column has any.
        captions: Their captions, where those were asked for.
    """

    dataset: datasets.IterableDataset
    image_column: str
    image_shape: tuple[int, int, int]
    num_levels: int
    reader: ImageReader
    shuffle_buffer_size: int = 1
    resized_from: ImageSize | None = None
    size: int | None = None
    label_column: str | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    captions: StreamCaptions | None = None
    is_stream: ClassVar[bool] = True

    @property
    def count(self) -> int | None:
        """How many images it has, where that is known."""
        return self.size

    @property
    def num_workers(self) -> int:
        """The threads that decode, one of which reads ahead where there are any."""
        return self.reader.num_workers

    def take(
        self, rows: Sequence[dict[str, Any]], offsets: Tensor | None = None, indices: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """A batch of some rows, as `ImageLevels.take` gives it; the arguments are those of `decode`."""
        batch = {"levels": self.decode(rows, offsets, indices)}
        if self.label_column is None:
            return batch if self.captions is None else batch | {CAPTIONS: self.captions.of_rows(rows)}
        values = [row[self.label_column] for row in rows]
        places = [None] * len(rows) if indices is None else indices  # a shuffled stream has no numbers
        labels = as_labels(values, self.label_column, self.num_classes, places)
        return batch | (
            {CLASS_LABELS: labels} if self.captions is None else {CAPTIONS: self.captions.of_labels(labels)}
        )

    def decode(
        self, rows: Sequence[dict[str, Any]], offsets: Tensor | None = None, indices: Sequence[int] | None = None
    ) -> Tensor:
        """The levels of some rows, uint8 of shape (B, C, H, W); ``offsets`` as in `ImageLevels.take`.

        ``indices`` are their numbers in the dataset, for messages.
        """
        decoded = [levels for levels, _ in self.reader.fit_many([row[self.image_column] for row in rows], indices)]
        for levels in decoded:
            if self.reader.output_shape(levels) != self.image_shape:
                raise _mixed("the first image", self.image_shape, "another", self.reader.output_shape(levels))
        places = [(0.5, 0.5)] * len(decoded) if offsets is None else offsets.tolist()
        size = self.reader.resolution
        if size is not None:
            decoded = [crop(levels, size, *place) for levels, place in zip(decoded, places, strict=True)]
        return torch.from_numpy(np.stack(decoded))


def decode_all(
    dataset: datasets.Dataset, image_column: str, reader: ImageReader, labels: Tensor | None = None
) -> ImageLevels:
    """Decode a dataset once, into memory.

    Args:
        dataset: With the image column not decoded.
        image_column: The column that holds the images.
        reader: What reads them.
        labels: The images' labels.

    Raises:
        DataError: It is empty, does not fit in memory, or its images differ in size or mode.
    """
    if len(dataset) == 0:
        raise DataError("the dataset has no images: name another split or folder.")
    first = dataset[0][image_column]
    shape = reader.output_shape(reader.decode(first, 0))
    _check_memory(len(dataset), shape)
    random_crop = reader.resolution is not None and not reader.center_crop
    images: list[Tensor] = []
    resized: ImageSize | None = None
    levels = np.empty((0 if random_crop else len(dataset), *shape), dtype=np.uint8)
    for index, (one, changed) in enumerate(_decoded(dataset, image_column, reader)):
        resized = resized or changed
        if reader.output_shape(one) != shape:
            other = ImageName(dataset[index][image_column], index)
            raise _mixed(ImageName(first, 0), shape, other, reader.output_shape(one))
        if random_crop:
            images.append(torch.from_numpy(one))
        else:
            levels[index] = one
    held: Tensor | tuple[Tensor, ...] = torch.from_numpy(levels)
    if random_crop:
        nothing_to_crop = all(image.shape == shape for image in images)
        held = torch.stack(images) if nothing_to_crop else tuple(images)
    return ImageLevels(held, shape, reader.num_levels, labels, resized)


def labelled_as(images: ImageLevels, classes: ClassCondition) -> ImageLevels:
    """The images with the labels that `labels_as` gives."""
    labels = labels_as(images.labels, images.class_names, classes)
    return replace(images, labels=labels, class_names=classes.names or images.class_names)


def labels_as(labels: Tensor | None, names: tuple[str, ...] | None, classes: ClassCondition) -> Tensor:
    """Labels by the numbers of a model's classes: a dataset may have the same names in another order.

    Args:
        labels: By the dataset's own numbers, (N,).
        names: Of the dataset's classes, in its order, where it has any.
        classes: The model's.

    Raises:
        DataError: There are no labels, or one is of a class that the model does not know.

    Warns:
        UserWarning: One side has no names, so that labels are taken by number.

    >>> labels_as(torch.tensor([0, 1, 1]), ("cat", "dog"), ClassCondition(2, ("dog", "cat")))
    tensor([1, 0, 0])
    """
    if labels is None:
        raise DataError(
            f"the network is conditioned on {classes.count} classes, and the images have no labels: name the column "
            f"that holds them with --label_column."
        )
    if (names is None) != (classes.names is None):
        named, other = ("images'", "model's") if names is not None else ("model's", "images'")
        warn(
            f"the {named} classes have names and the {other} have none, so they are taken by number: "
            f"{shortened(list(names or classes.names or ()), 200)} are 0, 1, ...; look whether they are the same.",
            stacklevel=3,
        )
    if names is not None and classes.names is not None and names != classes.names:
        for number in labels.unique().tolist():
            if names[number] not in classes.names:
                unknown = unknown_name("class", names[number], classes.names)
                raise DataError(f"the images have a class that the model was not trained on: {unknown}")
        labels = torch.tensor([classes.names.index(one) if one in classes.names else -1 for one in names])[labels]
    if int(labels.min()) < 0 or int(labels.max()) >= classes.count:
        raise DataError(
            f"the labels run from {int(labels.min())} to {int(labels.max())}, and the model knows classes 0 to "
            f"{classes.count - 1}: name the column of its classes with --label_column; of integers training takes as "
            f"many as its images have, or --num_classes."
        )
    return labels


def captioned(images: ImageLevels, template: str) -> ImageLevels:
    """Images with captions, made from the names of their classes, in place of their labels.

    Raises:
        DataError: The classes have no names.
    """
    assert images.labels is not None
    captions = captions_of_classes(template, names_for_captions(images.class_names))
    known = ImageCaptions.of(captions)
    return replace(
        images,
        labels=None,
        class_names=None,
        captions=ImageCaptions(known.texts, known.numbers[images.labels]),
    )


def names_for_captions(names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of classes that captions are to be made from.

    Raises:
        DataError: There are none.
    """
    if names is None:
        raise DataError(
            "caption_template makes captions from the names of classes, and the label column holds integers without "
            "names: cast it to datasets.ClassLabel, or leave the template out and train on classes."
        )
    return names


def crop(levels: Any, size: int, down: float, right: float) -> Any:
    """The (C, size, size) part of an array or tensor whose corner lies at these fractions of the room there is."""
    top, left = (int(u * (room - size + 1)) for u, room in zip((down, right), levels.shape[1:], strict=True))
    return levels[:, top : top + size, left : left + size]


def _decoded(encoded: datasets.Dataset, image_column: str, reader: ImageReader) -> Iterator[SizedLevels]:
    for start in range(0, len(encoded), _CHUNK):
        part = encoded[start : start + _CHUNK][image_column]
        yield from reader.fit_many(part, range(start, start + len(part)))


def _resize(image: Image, resolution: int) -> Image:
    """The picture with its shorter side at ``resolution``, antialiased and bilinear, as in diffusers' examples."""
    short = min(image.size)
    width, height = (max(resolution, round(side * resolution / short)) for side in image.size)
    return image.resize((width, height), PIL.Image.Resampling.BILINEAR)


def why_unreadable(error: BaseException) -> str:
    """Why a picture can't be read, by the error of whatever tried."""
    # Pillow shows the buffer's address, which tells nobody anything.
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    message = in_one_line(error)
    return message if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {message}"


def _mixed(name: object, shape: tuple[int, ...], other_name: object, other: tuple[int, ...]) -> DataError:
    if shape[0] != other[0]:
        remedy = "set color to 'grey' or 'rgb' to convert them all"
    else:
        remedy = "set resolution to resize and crop them all, or give images of one size"
    return DataError(f"{name} is {_words(shape)} and {other_name} is {_words(other)}: {remedy}.")


def _words(shape: tuple[int, ...]) -> str:
    return f"{'grey' if shape[0] == 1 else 'RGB'}, {shape[2]} x {shape[1]}"


def _check_memory(count: int, shape: tuple[int, int, int]) -> None:
    remedy = "read them as a stream with --streaming, or fewer with --max_train_samples"
    check_memory(count * int(np.prod(shape)), f"{count} images of {_words(shape)}", remedy)
