"""An image by itself as a lossless WebP: what a block starts with is shorter so than with all levels alike."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from vdm_hub_codec.decisions import Integers

_CHANNELS = (1, 3)
_MOST_PIXELS = 1 << 14  # so that no picture has 65536 bytes, whatever it shows


def picture_of(levels: Integers) -> bytes:
    """The bytes of an image's levels, (C, H, W), of one channel or three.

    >>> levels = np.arange(12).reshape(3, 2, 2)
    >>> bool((levels_of(picture_of(levels), (3, 2, 2)) == levels).all())
    True
    """
    rows = np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0).astype(np.uint8)
    found = io.BytesIO()
    Image.fromarray(rows).save(found, "WEBP", lossless=True, quality=100, method=6)
    return found.getvalue()


def levels_of(picture: bytes, shape: tuple[int, ...]) -> Integers:
    """The levels of a picture, of shape (C, H, W).

    Raises:
        ValueError: It is none, or of another shape.
    """
    try:
        with Image.open(io.BytesIO(picture), formats=["WEBP"]) as found:
            if found.size != (shape[2], shape[1]):
                raise ValueError(f"a picture of {found.size}")
            rows = np.asarray(found.convert("RGB"))
    except OSError as error:
        raise ValueError(f"no picture ({error})") from error
    levels: Integers = rows.transpose(2, 0, 1).astype(np.int64)
    return levels[: shape[0]]


def is_shorter(levels: Integers, num_levels: int) -> bool:
    """Whether an image, (C, H, W), is shorter as a picture than by levels that are all alike."""
    if levels.ndim != 3 or len(levels) not in _CHANNELS or num_levels > 256 or levels[0].size > _MOST_PIXELS:
        return False
    return 8 * len(picture_of(levels)) + 16 < levels.size * math.log2(num_levels)
