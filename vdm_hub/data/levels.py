"""Levels and pictures: one convention for how level i of K is stored, and what is refused.

An 8-bit picture holds level i as ``round(255 i/(K-1))`` (half to even): for K = 256 the level is the byte, for K = 2
the bytes are 0 and 255. The spacing of the stored values is at least 1, so the levels come back exactly. As a number
in [0, 1] it is ``i / (K-1)``. Whatever lies between levels is refused, never rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor

from vdm_hub.data.colors import Color, convert_color
from vdm_hub.errors import DataError

Levels = npt.NDArray[np.uint8]


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
            f"{num_levels} levels ({', '.join(map(str, shown))}): where it can be chosen, set num_levels "
            "(--num_levels) to the number of levels that the images have (256 for ordinary 8-bit images); or store "
            "level i of K as round(255 i/(K-1))."
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


def images_from_levels(levels: Tensor, num_levels: int, output_type: str = "pt") -> Any:
    """Levels (B, C, H, W) as ``pt`` (B, C, H, W) or ``np`` (B, H, W, C) in [0, 1], or as a list of ``pil`` images.

    >>> images_from_levels(torch.tensor([[[[0, 16]]]]), num_levels=17)
    tensor([[[[0., 1.]]]])
    """
    if output_type == "pil":
        return [image_from_levels(image, num_levels) for image in levels]
    images = levels.float() / (num_levels - 1)
    return images if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()


def levels_from_images(images: Any, num_levels: int) -> Tensor:
    """The inverse of `images_from_levels`; integer tensors are levels already.

    Raises:
        DataError: Something is not an image, images differ in size or mode, or a value is none of the levels.

    >>> levels_from_images(torch.tensor([[[[0.0, 0.5]]]]), num_levels=17)
    tensor([[[[0, 8]]]])
    """
    if isinstance(images, Image):
        images = [images]
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise DataError(f"an array of images has shape {images.shape}: give (B, H, W, C).")
        images = list(images) if images.dtype == np.uint8 else torch.from_numpy(images).permute(0, 3, 1, 2)
    if isinstance(images, Tensor):
        return _checked(images, num_levels)
    if not isinstance(images, Sequence) or len(images) == 0:
        raise DataError(f"images are {images!r:.80}: give PIL images, or an array or tensor with a batch dimension.")
    pictures = [image if isinstance(image, Image) else _picture(image) for image in images]
    shapes = {(picture.mode, picture.size) for picture in pictures}
    if len(shapes) > 1:
        raise DataError(f"images of mixed mode or size: {sorted(shapes)[:4]}. Convert or resize them alike.")
    levels = [levels_from_image(picture, num_levels, name=f"image {i}") for i, picture in enumerate(pictures)]
    return torch.from_numpy(np.stack(levels)).long().contiguous()


def _picture(image: Any) -> Image:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        raise DataError(
            f"an image is {array.dtype} of shape {array.shape}: give uint8 of (H, W), (H, W, 1) or (H, W, 3), or a "
            f"PIL image."
        )
    return PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 and array.ndim == 3 else array)


def _checked(images: Tensor, num_levels: int) -> Tensor:
    """Levels of a tensor (B, C, H, W): integers are levels already, floats are intensities in [0, 1]."""
    if images.ndim != 4:
        raise DataError(f"images have shape {tuple(images.shape)}: give (B, C, H, W).")
    scaled = images.double() * (num_levels - 1) if images.is_floating_point() else images.double()
    levels = scaled.round()
    # float32 intensities of 256 levels are off by 1e-5 of a level; half precision is refused where it can't tell them.
    wrong = ~((levels >= 0) & (levels < num_levels) & ((scaled - levels).abs() <= 0.01))
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise DataError(
            f"image {where[0]} holds {images[where].item():.6g} at (channel, row, column) {where[1:]}, which is none "
            f"of the model's {num_levels} levels: give intensities i/{num_levels - 1} in [0, 1], or integers 0 to "
            f"{num_levels - 1}."
        )
    # Contiguous: another layout in memory is another order of sums in the network.
    return levels.long().contiguous()
