"""What a picture's file holds that Pillow would pass over: pixels it has no value for, opacities, a second picture."""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from typing import IO, Any

import PIL.Image
from PIL.Image import Image

from vdm_hub.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that Pillow may read: none that calls other programs, and none whose depth is not known here."""

DRAWN = {"Software": "vdm_hub"}
"""The metadata of PNG files that this package draws, samples and plots, which are no images of any data."""

_BEGINNINGS = re.compile(  # of files of these formats
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP|BM.{4}\0{4}.{4}[\x0c-\x7c]\0{3}|GIF8[79]a|II\*\0|MM\0\*"
    rb"|P[1-6]\s+\d+\s+\d+",
    re.DOTALL,
)
_TRIED = 100  # places behind a picture where another may begin


def check_one_picture(file: IO[bytes], image: Any, name: object) -> None:
    """Refuse a file of several pictures: frames or pages, or one behind the other, where Pillow stops after the first.

    Raises:
        DataError: It holds more than the image that was opened; or that is one of this package's own pictures.
    """
    if DRAWN.items() <= image.info.items():
        raise DataError(
            f"{name} is a grid of samples or a plot that vdm_hub has drawn, and no image: move it elsewhere."
        )
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise DataError(f"{name} holds {frames} frames or pages: give each one as an image of its own.")
    if (image.format == "PPM" and _goes_on(file, image)) or _holds_another(file):
        raise DataError(f"{name} goes on after its first image: give each one as a file of its own.")


def check_values(file: IO[bytes], image: Any, name: object) -> None:
    """Refuse pixels beyond what the file says is their largest value, and a fourth channel that may be an opacity.

    Args:
        file: The file, at any place.
        image: What Pillow has opened of it, and not loaded.
        name: What to call it in messages.

    Raises:
        ValueError: A pixel has no value.
        DataError: The fourth bytes of the pixels are not all 0 or all 255.
    """
    (tile, *_) = image.tile or [None]
    if image.format == "PPM" and tile.codec_name == "ppm":
        rows, largest = _rows(file, tile.offset, len(image.getbands()), image), tile.args[-1]
        if rows and max(rows) > largest:
            raise ValueError(f"a pixel is {max(rows)}, and the largest value of the file is {largest}")
    raw = tile.args[0] if tile is not None and image.format == "BMP" and isinstance(tile.args, tuple) else ""
    if "X" in raw:
        fourth = set(_rows(file, tile.offset, len(raw), image)[raw.index("X") :: len(raw)])
        if fourth not in ({0}, {255}, set()):
            raise DataError(
                f"{name} has a fourth channel, which may say that pixels are transparent, and levels can't hold that: "
                f"put the images on a background of your choice, and save them without that channel."
            )


def check_palette(image: Image) -> None:
    """Refuse pixels that the palette has no colour for, which Pillow shows black.

    Raises:
        ValueError: There is one.
    """
    if image.mode not in ("P", "PA"):
        return
    colours = 0 if image.palette is None else len(image.palette.tobytes()) // len(image.palette.mode)
    last: Any = image.getchannel(0).getextrema()[1]
    if last >= colours:
        raise ValueError(f"a pixel has the colour {last} of its palette, which has {colours} colours")


def check_size(image: Image) -> None:
    """Refuse more pixels than Pillow warns of.

    Raises:
        ValueError: There are more.
    """
    limit = PIL.Image.MAX_IMAGE_PIXELS  # Pillow itself refuses twice as many, and warns of what is between
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"it has {image.width:,} x {image.height:,} pixels, and at most {limit:,} are read, against files that "
            f"would fill the memory: cut it into parts, or scale it down"
        )


def _rows(file: IO[bytes], offset: int, channels: int, image: Image) -> bytes:
    file.seek(offset)
    return file.read(image.width * image.height * channels)


def _goes_on(file: IO[bytes], image: Any) -> bool:
    """Whether a netpbm file holds anything after its first image."""
    tile = image.tile[0]
    file.seek(tile.offset)
    if tile.codec_name == "ppm_plain":  # numbers and comments
        return b"P" in re.sub(rb"#[^\r\n]*", b"", file.read())
    row = (image.width + 7) // 8 if image.mode == "1" else image.width * len(image.getbands())
    file.seek(row * image.height, io.SEEK_CUR)
    return bool(file.read(1024).strip())


def _holds_another(file: IO[bytes]) -> bool:
    """Whether a picture begins somewhere in a file, and what is before it is a whole one.

    So that of a preview, which lies within the picture that it belongs to, is none.
    """
    file.seek(0)
    content = file.read()
    places = [found.start() for found in _BEGINNINGS.finditer(content, 1)]
    end = bisect_left(places, True, key=lambda place: _opens(content[:place], whole=True))
    return any(_opens(content[place:], whole=False) for place in places[end : end + _TRIED])


def _opens(content: bytes, *, whole: bool) -> bool:
    try:
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if whole:
                image.load()
    except Exception:  # whatever Pillow's readers stumble over
        return False
    return True
