"""One picture of a person's own, read for a model: as it is, or converted in ways that are said."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.ImageOps
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from vdm_hub.data.colors import Color, convert_color
from vdm_hub.data.images import CorruptImageError, ImageReader, why_unreadable
from vdm_hub.data.levels import Levels, levels_from_image, nearest_levels, pixel_values
from vdm_hub.errors import DataError

PictureFile: TypeAlias = bytes | str | Path

_COLORS: dict[int, tuple[Color, str]] = {1: ("grey", "L"), 3: ("rgb", "RGB")}
_WORDS = {"L": "grey", "RGB": "RGB"}


def read_picture(
    file: PictureFile, shape: tuple[int, int, int], num_levels: int, *, fit: bool = False
) -> tuple[Tensor, list[str]]:
    """The levels of one image file, as a model takes them, and what was done to it.

    Args:
        file: Its path, or its bytes.
        shape: Of the model's images, (C, H, W): ``pipe.image_shape``.
        num_levels: K: ``pipe.num_levels``.
        fit: Convert a picture of another kind: its colours, its size (the shorter side, then the middle), its
            values to the nearest of the K levels. Each is said. Without it such a picture is refused.

    Returns:
        The levels, int64, (1, C, H, W), and sentences on what was converted; none where nothing was.

    Raises:
        DataError: It is no image that can be read, one of several frames, of more than 8 bits a channel, or with
            transparent pixels; or, without ``fit``, of another size, colour or number of levels.

    Example:
        >>> import io
        >>> import PIL.Image
        >>> file = io.BytesIO()
        >>> PIL.Image.new("RGB", (20, 10), "white").save(file, "PNG")
        >>> levels, notes = read_picture(file.getvalue(), (1, 8, 8), num_levels=17, fit=True)
        >>> levels.shape, notes
        (torch.Size([1, 1, 8, 8]), ['converted from RGB to grey', 'resized from 20x10 to 8x8, of its middle'])
    """
    levels, notes = _levels_of(file, shape, num_levels, fit)
    return torch.from_numpy(levels).long()[None], notes


def _levels_of(file: PictureFile, shape: tuple[int, int, int], num_levels: int, fit: bool) -> tuple[Levels, list[str]]:
    if shape[0] not in _COLORS:
        raise DataError(f"the model's images have {shape[0]} channels, and no picture holds so many: give a tensor.")
    picture, (color, mode), size = _opened(file), _COLORS[shape[0]], (shape[2], shape[1])
    if not fit:
        if picture.size != size or picture.mode != mode:
            raise DataError(
                f"the picture is {picture.width}x{picture.height} pixels in mode {picture.mode}, and the model's are "
                f"{size[0]}x{size[1]} in mode {mode} ({_WORDS[mode]}): give such a one, or let it be converted."
            )
        return _as_it_is(picture, num_levels), []
    was = _WORDS.get(picture.mode, picture.mode)
    notes = [] if picture.mode == mode else [f"converted from {was} to {_WORDS[mode]}"]
    picture = convert_color(picture, color, "the picture")
    if picture.size != size:
        is_cut = picture.width * size[1] != picture.height * size[0]
        notes.append(
            f"resized from {picture.width}x{picture.height} to {size[0]}x{size[1]}{', of its middle' * is_cut}"
        )
        picture = PIL.ImageOps.fit(picture, size, Resampling.BILINEAR)
    levels = nearest_levels(picture, num_levels)
    if moved := _moved(picture, levels, num_levels):
        notes.append(f"{moved:.0%} of its values taken to the nearest of {num_levels} levels")
    return levels, notes


def _opened(file: PictureFile) -> Image:
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        return ImageReader().open(content)
    except CorruptImageError as error:
        why = why_unreadable(error.__cause__ or error)
        raise DataError(f"the file is no picture that can be read ({why}): give a PNG, JPEG or WebP file.") from error
    except OSError as error:
        raise DataError(f"{file!r:.200} can't be read ({error.strerror}): give the path of an image file.") from error


def _as_it_is(picture: Image, num_levels: int) -> Levels:
    try:
        return levels_from_image(picture, num_levels, name="the picture")
    except DataError as error:
        raise DataError(f"{str(error).rstrip('.')}; or let it be converted.") from error


def _moved(picture: Image, levels: Levels, num_levels: int) -> float:
    """The share of a picture's values that are none of the levels."""
    pixels = np.asarray(picture)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return float((pixel_values(num_levels)[levels] != pixels).mean())
