"""What others make of the same data: lossless formats of images, and compressors of text."""

from __future__ import annotations

import bz2
import io
import lzma
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vdm_hub import images_from_levels

_FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WEBP": {"lossless": True, "quality": 100, "method": 6},
    "JXL": {"lossless": True, "effort": 9},
}
_TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: zlib.compress(text, 9),
    "bzip2": lambda text: bz2.compress(text, 9),
    "xz": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def image_formats(levels: Tensor, num_levels: int) -> tuple[dict[str, float], list[str]]:
    """The bits/dim of lossless formats, each image by itself and all as one sheet; and what could not be tried."""
    images = images_from_levels(levels, num_levels, "pil")
    sheet, found, notes = _sheet(images), {}, []
    for name, options in _FORMATS.items():
        try:
            if name == "JXL":
                import pillow_jxl  # noqa: F401 - it teaches Pillow the format
            alone = sum(_size(image, name, options) for image in images)
            found[f"{name}, each"] = 8 * alone / levels.numel()
            found[f"{name}, a sheet"] = 8 * _size(sheet, name, options) / levels.numel()
        except (ImportError, KeyError) as error:
            notes.append(f"{name} was not tried ({error}): pip install 'vdm-hub-codec[compare]' brings it")
        except (OSError, ValueError) as error:  # such as a sheet that is wider than the format can be
            notes.append(f"{name} can't hold these images, or all as one sheet ({error})")
    return found, notes


def text_compressors(text: bytes, tokens: int) -> dict[str, float]:
    """The bits/token of general compressors."""
    return {name: 8 * len(compress(text)) / tokens for name, compress in _TEXTS.items()}


def _sheet(images: list[Image.Image]) -> Image.Image:
    """All images as one, as square as can be."""
    arrays = [np.asarray(image) for image in images]
    columns = math.ceil(math.sqrt(len(arrays)))
    arrays += [np.zeros_like(arrays[0])] * (-len(arrays) % columns)
    rows = [np.concatenate(arrays[i : i + columns], 1) for i in range(0, len(arrays), columns)]
    return Image.fromarray(np.concatenate(rows, 0))


def _size(image: Image.Image, name: str, options: dict[str, Any]) -> int:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return len(buffer.getvalue())
