"""Pixels and levels: one convention everywhere.

A picture holds level i of K as the intensity ``i / (K-1)``: in 8 bits, ``round(255 i / (K-1))``. With 256 levels that
is the pixel itself; with 2, black and white. Whatever lies between levels is refused, never rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vdm_hub.data.pixels import image_from_levels, levels_from_image
from vdm_hub.errors import DataError


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
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise DataError(f"an array of images has shape {images.shape}: give (B, H, W, C).")
        images = list(images) if images.dtype == np.uint8 else torch.from_numpy(images).permute(0, 3, 1, 2)
    if isinstance(images, Tensor):
        return _checked(images, num_levels)
    if not isinstance(images, Sequence) or len(images) == 0:
        raise DataError(f"images are {images!r:.80}: give PIL images, or an array or tensor with a batch dimension.")
    pictures = [image if isinstance(image, Image.Image) else _picture(image) for image in images]
    shapes = {(picture.mode, picture.size) for picture in pictures}
    if len(shapes) > 1:
        raise DataError(f"images of mixed mode or size: {sorted(shapes)[:4]}. Convert or resize them alike.")
    levels = [levels_from_image(picture, num_levels, name=f"image {i}") for i, picture in enumerate(pictures)]
    return torch.from_numpy(np.stack(levels)).long().contiguous()


def _picture(image: Any) -> Image.Image:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        raise DataError(
            f"an image is {array.dtype} of shape {array.shape}: give uint8 of (H, W), (H, W, 1) or (H, W, 3), or a "
            f"PIL image."
        )
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 and array.ndim == 3 else array)


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
