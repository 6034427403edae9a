"""Levels in 8-bit images: the one convention for how level i of K is stored, and what is refused.

An 8-bit image holds level i as ``round(255 i/(K-1))`` (half to even): for K = 256 the level is the byte, for K = 2 the
bytes are 0 and 255. The spacing of the stored values is at least 1, so the levels come back exactly; any other pixel
value is an error, never rounded to a level.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL.Image import Image
from torch import Tensor

from vdm_hub.errors import DataError

Levels = npt.NDArray[np.uint8]
Color = Literal["auto", "grey", "rgb"]

_MODES = {"grey": "L", "rgb": "RGB"}
# Modes whose conversion to 8 bits a channel loses nothing but what was asked to be lost.
_CONVERTIBLE = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr", "HSV"})


_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SAMPLES_PER_PIXEL = 258, 339, 277  # tags of TIFF


def pixel_values(num_levels: int) -> Levels:
    """The K bytes that stand for the levels 0..K-1, ``round(255 i/(K-1))``, shape (K,).

    >>> pixel_values(5).tolist()
    [0, 64, 128, 191, 255]
    """
    if not 2 <= num_levels <= 256:
        raise DataError(f"num_levels is {num_levels}: 8-bit images hold 2 to 256 levels.")
    values: Levels = np.round(np.arange(num_levels) * 255 / (num_levels - 1)).astype(np.uint8)
    return values


@functools.cache
def _level_of_byte(num_levels: int) -> npt.NDArray[np.int16]:
    """The level of each of 256 bytes; -1 for those that stand for none."""
    table = np.full(256, -1, dtype=np.int16)
    table[pixel_values(num_levels)] = np.arange(num_levels)
    return table


def levels_from_image(image: Image, num_levels: int, *, color: Color = "auto", name: object = "the image") -> Levels:
    """The levels of an image.

    Args:
        image: A PIL image.
        num_levels: K, 2 to 256.
        color: ``"auto"`` takes modes L and RGB as they are and refuses others; ``"grey"`` and ``"rgb"`` convert.
        name: What to call it in messages.

    Returns:
        uint8 of shape (C, H, W), values 0..K-1; C is 1 (grey) or 3 (RGB).

    Raises:
        DataError: A pixel value stands for no level, or the mode is not acceptable.

    >>> levels_from_image(PIL.Image.new("L", (2, 1), 255), num_levels=17).tolist()
    [[[16, 16]]]
    """
    pixels = np.asarray(convert_color(image, color, name))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if num_levels == 256:
        return np.array(pixels, dtype=np.uint8, order="C")  # a copy: PIL's buffer is read-only
    levels = _level_of_byte(num_levels)[pixels]
    if levels.min() < 0:
        c, h, w = np.argwhere(levels < 0)[0]
        known = pixel_values(num_levels).tolist()
        shown = known if len(known) <= 17 else [*known[:4], "...", *known[-2:]]
        raise DataError(
            f"{name} has the pixel value {pixels[c, h, w]} at row {h}, column {w}, which is none of the "
            f"{num_levels} levels ({', '.join(map(str, shown))}): set num_levels (--num_levels) to the number of "
            "levels that the images have (256 for ordinary 8-bit images), or store level i of K as round(255 i/(K-1))."
        )
    return np.asarray(levels, dtype=np.uint8)


def image_from_levels(levels: Levels | Tensor, num_levels: int) -> Image:
    """The 8-bit image that holds the levels; the inverse of `levels_from_image`.

    Args:
        levels: Shape (C, H, W), C = 1 or 3, any integer type, values 0..K-1.
        num_levels: K, 2 to 256.

    Raises:
        DataError: The shape is another, or a level is out of range.

    >>> image_from_levels(np.array([[[0, 16]]]), num_levels=17).getpixel((1, 0))
    255
    """
    array = levels.cpu().numpy() if isinstance(levels, Tensor) else np.asarray(levels)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"levels are integers of shape (1 or 3, H, W); these are {array.dtype} of {array.shape}.")
    if array.size and not 0 <= array.min() <= array.max() < num_levels:
        raise DataError(f"levels from {array.min()} to {array.max()} are not all within 0..{num_levels - 1}.")
    pixels = pixel_values(num_levels)[array]
    return PIL.Image.fromarray(pixels[0] if array.shape[0] == 1 else pixels.transpose(1, 2, 0).copy())


def nearest_levels(image: Image, num_levels: int) -> Levels:
    """The nearest levels of an image whose pixels were interpolated, uint8 of shape (C, H, W)."""
    pixels = np.asarray(image).astype(np.float64)
    levels = np.round(pixels * (num_levels - 1) / 255).astype(np.uint8)
    return levels[None] if levels.ndim == 2 else np.ascontiguousarray(levels.transpose(2, 0, 1))


def convert_color(image: Image, color: Color, name: object = "the image") -> Image:
    """The image in mode L or RGB; only transparency and more than 8 bits are never dropped.

    Raises:
        DataError: ``color`` is ``"auto"`` and the mode is neither L nor RGB; or the image has transparent pixels, or
            more than 8 bits a channel.
    """
    check_depth(image, name)
    load_pixels(image)
    if image.mode == _MODES.get(color, image.mode) and image.mode in ("L", "RGB") and not _is_transparent(image):
        return image
    if color == "auto" and image.mode not in ("L", "RGB"):
        raise DataError(
            f"{name} has mode {image.mode}; grey (L) and RGB are taken as they are. Set color to 'grey' or "
            "'rgb' to convert all images, or convert them yourself."
        )
    if _is_transparent(image):
        raise DataError(
            f"{name} has mode {image.mode} with transparent pixels, which levels can't hold: put the images "
            "on a background of your choice first."
        )
    # Via RGB, since a palette or CMYK has no direct way to grey for every mode.
    image = image if image.mode in ("1", "L", "RGB") else image.convert("RGB")
    return image.convert(_MODES[color])


def check_depth(image: Image, name: object = "the image") -> None:
    """Refuse more than 8 bits a channel, and channels that Pillow would drop, whatever the mode that Pillow gives it.

    Of a file that is not loaded yet all is known: Pillow reads 16-bit colours into mode RGB, and keeps the upper 8.

    Raises:
        DataError: They would be dropped.
    """
    if image.mode not in _CONVERTIBLE or _is_deep(image):
        raise DataError(
            f"{name} is not stored in 8 bits a channel, unsigned (Pillow opens it in mode {image.mode}): convert the "
            "images to 8-bit grey (L) or RGB first, with the scaling that suits them."
        )


def _is_deep(image: Any) -> bool:
    tags = getattr(image, "tag_v2", None)
    if tags is not None:  # TIFF
        depths, formats, channels = (
            tags.get(_BITS_PER_SAMPLE, (1,)),
            tags.get(_SAMPLE_FORMAT, (1,)),
            tags.get(_SAMPLES_PER_PIXEL, 1),
        )
        return max(depths) > 8 or set(formats) != {1} or channels > len(image.getbands())
    if image.format == "PNG":
        return any(";16" in str(tile.args) for tile in image.tile)
    if image.format == "PPM":  # with the largest value, where it is not 255
        return any(isinstance(tile.args, tuple) and tile.args[-1] > 255 for tile in image.tile)
    return False


def load_pixels(image: Any) -> None:
    """Read the pixels of an image that was opened, and scale a colour key with them, which Pillow leaves as it is.

    Of an image that is loaded already nothing tells how many bits it had.
    """
    bits = next((int(mode[2:]) for tile in getattr(image, "tile", ()) if (mode := tile.args) in ("L;2", "L;4")), None)
    image.load()
    if bits is not None and "transparency" in image.info:
        largest = 2**bits - 1
        image.info["transparency"] = (image.info["transparency"] & largest) * 255 // largest


def _is_transparent(image: Image) -> bool:
    if "transparency" not in image.info and image.mode not in ("RGBA", "LA", "PA"):
        return False
    extrema: Any = image.convert("RGBA").getchannel("A").getextrema()
    return bool(extrema[0] < 255)
