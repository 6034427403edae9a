"""Pictures in grey or RGB, of 8 bits a channel: converted where nothing else is lost, refused where it would be."""

from __future__ import annotations

from typing import Any, Literal

from PIL.Image import Image

from vdm_hub.errors import DataError

Color = Literal["auto", "grey", "rgb"]

_MODES = {"grey": "L", "rgb": "RGB"}
# Modes whose conversion to 8 bits a channel loses nothing but what was asked to be lost.
_CONVERTIBLE = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr", "HSV"})
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SAMPLES_PER_PIXEL = 258, 339, 277  # tags of TIFF


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
