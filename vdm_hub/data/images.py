"""Images as levels: decoded once into memory, or decoded from a stream batch by batch."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor

from vdm_hub.errors import DataError, in_one_line
from vdm_hub.pixels import Color, Levels, convert_color, levels_from_image, nearest_levels

_CHUNK = 1024  # images decoded between two reads of the dataset
_UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, PIL.Image.DecompressionBombError)


@dataclass(frozen=True)
class Decoder:
    """From an encoded image to levels, with the resizing and colour handling of `DataArguments`."""

    num_levels: int = 256
    color: Color = "auto"
    resolution: int | None = None
    center_crop: bool = True
    num_workers: int = 0

    def decode(self, encoded: Any, index: int | None = None) -> Levels:
        """The levels, uint8 of shape (C, H, W).

        With a resolution and no centre crop only the shorter side has that size: the crop is drawn at each use.

        Args:
            encoded: A row of a `datasets.Image` column with ``decode=False``.
            index: The image's number in its dataset, for messages.

        Raises:
            DataError: The image can't be decoded, or `levels_from_image` refuses it.
        """
        return self.fit(encoded, index)[0]

    def fit(self, encoded: Any, index: int | None = None) -> tuple[Levels, bool]:
        """`decode`, and whether the image is resized, or cropped now or at each use."""
        try:
            image = datasets.Image().decode_example(encoded)
        except _UNREADABLE as error:
            raise DataError(
                f"{name_of_image(encoded, index)} of the dataset can't be decoded ({_why(error)}): replace "
                f"or remove it; of training images, --skip_corrupt_images leaves such out."
            ) from error
        levels = levels_from_image(image, self.num_levels, color=self.color, index=index)
        if self.resolution is None or levels.shape[1:] == (self.resolution, self.resolution):
            return levels, False
        if min(levels.shape[1:]) != self.resolution:
            resized = _resize(convert_color(image, self.color), self.resolution)
            levels = nearest_levels(resized, self.num_levels)
        return crop(levels, self.resolution, 0.5, 0.5) if self.center_crop else levels, True

    def can_decode(self, encoded: Any) -> bool:
        """Whether `decode` finds an image, of whatever size and mode."""
        try:
            datasets.Image().decode_example(encoded)
        except _UNREADABLE:
            return False
        return True

    def fit_many(self, encoded: Sequence[Any], first_index: int | None = None) -> list[tuple[Levels, bool]]:
        """`fit` for each, in order, on ``num_workers`` threads."""
        indices: Iterable[int | None] = (
            [None] * len(encoded) if first_index is None else range(first_index, first_index + len(encoded))
        )
        if self.num_workers == 0:
            return [self.fit(one, index) for one, index in zip(encoded, indices, strict=True)]
        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(self.fit, encoded, indices))

    def output_shape(self, levels: Levels) -> tuple[int, int, int]:
        """The (C, H, W) that decoded levels have when they are used."""
        channels, height, width = levels.shape
        return (channels, height, width) if self.resolution is None else (channels, self.resolution, self.resolution)


@dataclass(frozen=True)
class ImageLevels:
    """Images held in memory as levels.

    Args:
        levels: uint8 of shape (N, C, H, W); or N tensors (C, H', W') that are at least as large as ``image_shape``,
            from which a crop is taken at each use.
        image_shape: (C, H, W).
        num_levels: K.
        labels: int64 of shape (N,), where a label column was asked for.
        resized: Whether any image was resized or cropped, or is to be cropped at each use.
    """

    levels: Tensor | tuple[Tensor, ...]
    image_shape: tuple[int, int, int]
    num_levels: int
    labels: Tensor | None = None
    resized: bool = False

    def __len__(self) -> int:
        """N."""
        return len(self.levels)

    def take(self, indices: Tensor, offsets: Tensor | None = None) -> dict[str, Tensor]:
        """A batch of the images with these indices.

        Args:
            indices: int64 of shape (B,).
            offsets: Where to crop images that are larger: fractions in [0, 1) of shape (B, 2), down and right. The
                centre where not given.

        Returns:
            ``levels``, uint8 of shape (B, C, H, W), and ``class_labels``, (B,), where there are labels.
        """
        if isinstance(self.levels, Tensor):
            levels = self.levels[indices]
        else:
            offsets = torch.full((len(indices), 2), 0.5) if offsets is None else offsets
            size, chosen = self.image_shape[-1], (self.levels[i] for i in indices.tolist())
            crops = [crop(image, size, *uv) for image, uv in zip(chosen, offsets.tolist(), strict=True)]
            levels = torch.stack(crops)
        return {"levels": levels} | ({} if self.labels is None else {"class_labels": self.labels[indices]})


@dataclass(frozen=True)
class ImageStream:
    """Images read as a stream and decoded batch by batch.

    Args:
        dataset: With the image column not decoded.
        image_column: The column that holds the images.
        image_shape: (C, H, W), as found in the first image.
        num_levels: K.
        decoder: What turns a row into levels.
        shuffle_buffer_size: Images in the shuffle buffer of training.
        resized: Whether the first image is resized or cropped.
    """

    dataset: datasets.IterableDataset
    image_column: str
    image_shape: tuple[int, int, int]
    num_levels: int
    decoder: Decoder
    shuffle_buffer_size: int = 1
    resized: bool = False

    def decode(self, rows: Sequence[dict[str, Any]], offsets: Tensor | None = None) -> Tensor:
        """The levels of some rows, uint8 of shape (B, C, H, W); ``offsets`` as in `ImageLevels.take`."""
        decoded = [levels for levels, _ in self.decoder.fit_many([row[self.image_column] for row in rows])]
        for levels in decoded:
            if self.decoder.output_shape(levels) != self.image_shape:
                raise _mixed("the first image", self.image_shape, "another", self.decoder.output_shape(levels))
        places = [(0.5, 0.5)] * len(decoded) if offsets is None else offsets.tolist()
        size = self.decoder.resolution
        if size is not None:
            decoded = [crop(levels, size, *place) for levels, place in zip(decoded, places, strict=True)]
        return torch.from_numpy(np.stack(decoded))


def decode_all(
    dataset: datasets.Dataset, image_column: str, decoder: Decoder, label_column: str | None = None
) -> ImageLevels:
    """Decode a dataset once, into memory.

    Raises:
        DataError: It is empty, does not fit in memory, or its images differ in size or mode.
    """
    if len(dataset) == 0:
        raise DataError("the dataset has no images: name another split or folder.")
    encoded = dataset.cast_column(image_column, datasets.Image(decode=False))
    first = decoder.decode(encoded[0][image_column], 0)
    shape = decoder.output_shape(first)
    _check_memory(len(dataset), shape)
    random_crop = decoder.resolution is not None and not decoder.center_crop
    images: list[Tensor] = []
    resized = False
    levels = np.empty((0 if random_crop else len(dataset), *shape), dtype=np.uint8)
    for index, (one, changed) in enumerate(_decoded(encoded, image_column, decoder)):
        resized |= changed
        if decoder.output_shape(one) != shape:
            raise _mixed("image 0", shape, f"image {index}", decoder.output_shape(one))
        if random_crop:
            images.append(torch.from_numpy(one))
        else:
            levels[index] = one
    labels = None if label_column is None else torch.as_tensor(dataset[label_column][:], dtype=torch.int64)
    if not random_crop:
        return ImageLevels(torch.from_numpy(levels), shape, decoder.num_levels, labels, resized)
    nothing_to_crop = all(image.shape == shape for image in images)
    held = torch.stack(images) if nothing_to_crop else tuple(images)
    return ImageLevels(held, shape, decoder.num_levels, labels, resized)


def warn_if_resized(encoded: Any, decoder: Decoder) -> None:
    """Say so, where the resolution is not the image's own."""
    size = datasets.Image().decode_example(encoded).size
    if decoder.resolution is not None and size != (decoder.resolution, decoder.resolution):
        warnings.warn(
            f"images of {size[0]} x {size[1]} pixels are resized or cropped to resolution {decoder.resolution}: bits "
            "per dimension on them can't be compared with published figures.",
            stacklevel=3,
        )


def crop(levels: Any, size: int, down: float, right: float) -> Any:
    """The (C, size, size) part of an array or tensor whose corner lies at these fractions of the room there is."""
    top, left = (int(u * (room - size + 1)) for u, room in zip((down, right), levels.shape[1:], strict=True))
    return levels[:, top : top + size, left : left + size]


def _decoded(encoded: datasets.Dataset, image_column: str, decoder: Decoder) -> Iterator[tuple[Levels, bool]]:
    for start in range(0, len(encoded), _CHUNK):
        yield from decoder.fit_many(encoded[start : start + _CHUNK][image_column], start)


def _resize(image: Image, resolution: int) -> Image:
    """The shorter side to ``resolution``, antialiased bilinear, as diffusers' examples do."""
    short = min(image.size)
    width, height = (max(resolution, round(side * resolution / short)) for side in image.size)
    return image.resize((width, height), PIL.Image.Resampling.BILINEAR)


def _why(error: Exception) -> str:
    # Pillow shows the buffer's address, which tells nobody anything.
    return "no known image format" if isinstance(error, PIL.UnidentifiedImageError) else in_one_line(error)


def name_of_image(encoded: Any, index: int | None) -> str:
    """What an image can be found by: its number and its file; else a hash of its bytes, as `sha256sum` prints it."""
    number = "an image" if index is None else f"image {index}"
    parts = encoded if isinstance(encoded, dict) else {"bytes": encoded}
    if parts.get("path"):
        return f"{number} ({parts['path']})"
    data = parts.get("bytes")
    if index is None and isinstance(data, bytes):
        return f"{number} ({len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()[:16]}...)"
    return number


def _mixed(name: str, shape: tuple[int, ...], other_name: str, other: tuple[int, ...]) -> DataError:
    if shape[0] != other[0]:
        remedy = "set color to 'grey' or 'rgb' to convert them all"
    else:
        remedy = "set resolution to resize and crop them all, or give images of one size"
    return DataError(f"{name} is {_words(shape)} and {other_name} is {_words(other)}: {remedy}.")


def _words(shape: tuple[int, ...]) -> str:
    return f"{'grey' if shape[0] == 1 else 'RGB'}, {shape[2]} x {shape[1]}"


def _check_memory(count: int, shape: tuple[int, int, int]) -> None:
    needed = count * int(np.prod(shape))
    try:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every platform
        return
    if needed > present / 2:
        raise DataError(
            f"{count} images of {_words(shape)} need {needed / 2**30:.1f} GiB, more than half of this machine's "
            f"memory: read them as a stream with --streaming, or fewer with --max_train_samples."
        )
