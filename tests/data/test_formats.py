"""Every file is one image of 8 bits a channel, or refused by its name, in one paragraph whatever its bytes are."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_folders import folder_of, greys, parquet_of, picture, read, refused
from naming import naming
from vdm_hub.data.images import ImageReader
from vdm_hub.data.levels import levels_from_images
from vdm_hub.data.loading import load_split
from vdm_hub.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
RGB, GREY = Image.fromarray(NOISE), Image.fromarray(NOISE[..., 0])


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file, of any depth, of which Pillow writes few."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)


def tiff(bits: tuple[int, ...], data: bytes, sample_format: int = 1, extra: int | None = None) -> bytes:
    """A little-endian TIFF of one pixel."""
    samples = len(bits)
    tags: list[tuple[int, int, list[int]]] = [
        (256, 3, [1]),
        (257, 3, [1]),
        (258, 3, list(bits)),
        (259, 3, [1]),
        (262, 3, [2 if samples >= 3 else 1]),
        (273, 4, [1000]),
        (277, 3, [samples]),
        (278, 3, [1]),
        (279, 4, [len(data)]),
        (339, 3, [sample_format] * samples),
    ]
    if extra is not None:
        tags.insert(-1, (338, 3, [extra]))
    entries, beyond = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, beyond = struct.pack("<I", 500 + len(beyond)), beyond + packed
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4
    return (start.ljust(500, b"\0") + beyond).ljust(1000, b"\0") + data


def frames(file_format: str, **options: object) -> bytes:
    return encoded(RGB, file_format, save_all=True, append_images=[RGB.rotate(90, expand=False)], **options)


TRANSPARENT = Image.new("RGBA", (4, 4), (9, 9, 9, 128))
READ: dict[str, Callable[[], bytes]] = {
    "a.png": lambda: encoded(RGB, "PNG"),
    "a.webp": lambda: encoded(RGB, "WEBP", lossless=True),
    "a.bmp": lambda: encoded(RGB, "BMP"),
    "a.tif": lambda: encoded(RGB, "TIFF"),
    "a.TIFF": lambda: encoded(RGB, "TIFF", compression="tiff_lzw"),
    "a.ppm": lambda: encoded(RGB, "PPM"),
    "other.jpg": lambda: encoded(RGB, "PNG"),  # by content, whatever the suffix
}
DEEP: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: png(1, 1, 16, 2, b"\0" + bytes(range(6))),
    "rgba.png": lambda: png(1, 1, 16, 6, b"\0" + bytes(range(8))),
    "grey.png": lambda: png(1, 1, 16, 0, b"\0\1\2"),
    "grey_alpha.png": lambda: png(1, 1, 16, 4, b"\0\1\2\xff\xff"),
    "interlaced.png": lambda: png(2, 1, 16, 2, b"\0" + bytes(range(12))),
    "grey.tif": lambda: encoded(Image.new("I;16", (2, 2), 300), "TIFF"),
    "float.tif": lambda: encoded(Image.new("F", (2, 2), 0.3), "TIFF"),
    "int.tif": lambda: encoded(Image.new("I", (2, 2), 70000), "TIFF"),
    "rgb.tif": lambda: tiff((16, 16, 16), bytes(range(6))),
    "signed.tif": lambda: tiff((8,), b"\xff", sample_format=2),
    "unnamed_alpha.tif": lambda: tiff((8, 8, 8, 8), b"\1\2\3\4", extra=0),
    "grey.pgm": lambda: b"P5 2 1 65535\n\1\2\3\4",
    "ten_bits.pgm": lambda: b"P5 2 1 1023\n\1\2\3\4",
    "rgb.ppm": lambda: b"P6 1 1 65535\n" + bytes(range(6)),
    "plain.ppm": lambda: b"P3 1 1 1023\n1000 2 3\n",
    "float.pfm": lambda: encoded(Image.new("F", (2, 2), 0.3), "PPM"),
}
KEYED: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: encoded(RGB, "PNG", transparency=tuple(NOISE[0, 0].tolist())),
    "grey.png": lambda: encoded(GREY, "PNG", transparency=int(NOISE[0, 0, 0])),
    "palette.png": lambda: encoded(RGB.quantize(4), "PNG", transparency=0),
    "alpha.png": lambda: encoded(TRANSPARENT, "PNG"),
    "alpha.webp": lambda: encoded(TRANSPARENT, "WEBP", lossless=True),
    "alpha.tif": lambda: encoded(TRANSPARENT, "TIFF"),
    "key.gif": lambda: encoded(RGB.quantize(4), "GIF", transparency=0),
}
FRAMES: dict[str, Callable[[], bytes]] = {
    "a.gif": lambda: frames("GIF"),
    "a.webp": lambda: frames("WEBP"),
    "a.png": lambda: frames("PNG"),
    "a.tif": lambda: frames("TIFF"),
    "a.mpo": lambda: frames("MPO"),
    "a.jpg": lambda: frames("MPO"),
}
PIXELS = NOISE[:2, :1].tobytes()
GO_ON: dict[str, bytes] = {
    "a.pgm": b"P5 2 1 255\n\1\2",
    "sixteen_levels.pgm": b"P5\n# a comment\n2 1\n15\n\1\2",
    "a.pbm": b"P4 9 1\n\xff\x80",
    "a.ppm": b"P6 1 2 255\n" + PIXELS,
    "named.png": b"P6 1 2 255\n" + PIXELS,
    "plain.pbm": b"P1 2 1\n10\n",
    "plain.pgm": b"P2 2 1 255\n1 2 # the second\n",
    "plain.ppm": b"P3 1 1 255\n1 2 3\n",
}


def bitmap(colours: bytes, *pixels: int) -> bytes:
    """A BMP file of one row with a palette."""
    rows, start = bytes(pixels).ljust(4, b"\0"), 54 + len(colours)
    header = struct.pack("<IiiHHIIiiII", 40, len(pixels), 1, 1, 8, 0, 4, 0, 0, len(colours) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + 4, 0, 0, start) + header + colours + rows


def short_gif() -> bytes:
    """A GIF file whose table was cut from four colours to two."""
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 1, 2, 3, 7, 6, 5, 200, 3, 1])
    image.putdata([0, 3])
    content = bytearray(encoded(image, "GIF", optimize=False))
    content[10:] = bytes([content[10] & 0xF8]) + content[11:19] + content[13 + (6 << (content[10] & 7)) :]
    return bytes(content)


TWO_COLOURS = chunk(b"PLTE", bytes([9, 8, 7, 6, 5, 4]))
COLOURLESS: dict[str, Callable[[], bytes]] = {
    "no_palette.png": lambda: png(2, 1, 8, 3, b"\0\0\1"),
    "short_palette.png": lambda: png(2, 1, 8, 3, b"\0\1\2", TWO_COLOURS),
    "two_bits.png": lambda: png(2, 1, 2, 3, b"\0\xb0", TWO_COLOURS),
    "with_opacities.png": lambda: png(2, 1, 8, 3, b"\0\1\2", TWO_COLOURS, chunk(b"tRNS", b"\xff\xff")),
    "a.bmp": lambda: bitmap(bytes([1, 2, 3, 0, 4, 5, 6, 0]), 0, 1, 7),
    "a.gif": short_gif,
}
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
UNKNOWN: dict[str, Callable[[], bytes]] = {
    "a.avif": lambda: encoded(RGB, "AVIF"),
    "a.dds": lambda: encoded(RGB, "DDS"),
    "a.spider": lambda: encoded(Image.new("F", (4, 4)), "SPIDER"),
    "a.eps": lambda: _EPS,
    "eps.png": lambda: _EPS,
    "a.jp2": lambda: encoded(RGB, "JPEG2000"),
    "a.ico": lambda: encoded(RGB, "ICO"),
    "tga.png": lambda: encoded(RGB, "TGA"),
    "im.png": lambda: encoded(RGB, "IM"),
    "a.heic": lambda: b"\0\0\0\x18ftypheic" + bytes(100),
    "text.png": lambda: b"no image",
    "truncated.png": lambda: encoded(RGB, "PNG")[:-40],
    "truncated.jpg": lambda: encoded(RGB.resize((64, 64)), "JPEG")[:400],
    "zero.png": lambda: png(0, 0, 8, 2, b""),
    "huge.png": lambda: png(2**31 - 1, 2**31 - 1, 8, 2, b"\0"),
    "bomb.png": lambda: png(20_000, 20_000, 8, 0, b"\0"),
    "huge.bmp": lambda: encoded(RGB, "BMP")[:18] + struct.pack("<ii", 10**9, 10**9) + bytes(100),
    "twelve_bits.jpg": lambda: encoded(RGB, "JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
}


def folder_with(root: Path, name: str, content: bytes) -> Path:
    folder_of(root, "0.png")
    (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("name", READ)
def test_lossless_formats_give_back_their_pixels(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(READ[name]())
    assert np.array_equal(load_split(str(tmp_path), "train").levels[0], NOISE.transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(6, 5), (5, 6)])
def test_images_are_upright_as_exif_says(tmp_path: Path, width: int, height: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = RGB.resize((width, height))
    image.save(tmp_path / "a.png", exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).transpose(2, 0, 1)
    assert np.array_equal(load_split(str(tmp_path), "train").levels[0], expected)


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_fewer_bits_are_levels(tmp_path: Path, levels: int) -> None:
    depth = levels.bit_length() - 1
    values = np.arange(levels).astype(np.uint8)
    packed = np.packbits(np.unpackbits(values[:, None], axis=1)[:, -depth:].reshape(-1)).tobytes()
    (tmp_path / "a.png").write_bytes(png(levels, 1, depth, 0, b"\0" + packed))
    assert load_split(str(tmp_path), "train", num_levels=levels, color="grey").levels.flatten().tolist() == list(
        values
    )
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.pgm").write_bytes(b"P5 %d 1 %d\n" % (levels, levels - 1) + values.tobytes())
    assert load_split(str(tmp_path), "train", num_levels=levels).levels.flatten().tolist() == list(values)


@pytest.mark.parametrize("color", ["auto", "grey", "rgb"])
@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused_in_any_mode(tmp_path: Path, name: str, color: str) -> None:
    message = refused(load_split, str(folder_with(tmp_path, name, DEEP[name]())), "train", color=color)
    assert name in message and "8 bits" in message
    with pytest.raises(DataError, match="8 bits"):
        levels_from_images(Image.open(tmp_path / name), 256)


@pytest.mark.parametrize("color", ["grey", "rgb"])
@pytest.mark.parametrize("name", KEYED)
def test_transparent_pixels_are_refused_whatever_makes_them_so(tmp_path: Path, name: str, color: str) -> None:
    message = refused(load_split, str(folder_with(tmp_path, name, KEYED[name]())), "train", color=color)
    assert name in message and "transparent" in message
    assert name in refused(load_split, str(tmp_path), "train")


def test_a_colour_key_that_no_pixel_has_changes_nothing(tmp_path: Path) -> None:
    pixels = np.full((4, 4), 7, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=8)
    assert np.array_equal(load_split(str(tmp_path), "train").levels[0, 0], pixels)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_colour_key_is_of_the_file_s_own_bits(tmp_path: Path, depth: int) -> None:
    """Every key of few bits, in files that have it and in files that have all values but this one."""
    values = np.arange(2**depth, dtype=np.uint8)
    for key in values.tolist() if depth < 8 else (0, 1, 17, 255):
        for pixels in (values, np.where(values == key, (key + 1) % 2**depth, values).astype(np.uint8)):
            bits = np.unpackbits(pixels[:, None], axis=1)[:, -depth:].reshape(-1)
            rows, told = b"\0" + np.packbits(bits).tobytes(), chunk(b"tRNS", struct.pack(">H", key))
            file = tmp_path / f"{key}" / "a.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(png(len(pixels), 1, depth, 0, rows, told))
            if key in pixels:
                assert "transparent" in refused(load_split, str(file.parent), "train", color="grey")
                with pytest.raises(DataError, match=r"transparent|mode 1"):
                    levels_from_images(Image.open(file), 256)
            else:
                read_back = load_split(str(file.parent), "train", color="grey", num_levels=2**depth).levels
                assert read_back.flatten().tolist() == pixels.tolist()


@pytest.mark.parametrize("name", FRAMES)
def test_several_frames_are_refused_by_name(tmp_path: Path, name: str) -> None:
    message = refused(load_split, str(folder_with(tmp_path, name, FRAMES[name]())), "train", color="rgb")
    assert name in message and "2 frames" in message


@pytest.mark.parametrize("name", GO_ON)
def test_a_second_image_in_a_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GO_ON[name])
    alone = load_split(str(tmp_path), "train", color="rgb", num_levels=16 if "sixteen" in name else 256).levels
    assert len(alone) == 1
    for space in (b"", b"\n"):
        (tmp_path / name).write_bytes(GO_ON[name] + space + GO_ON[name])
        message = refused(load_split, str(tmp_path), "train", color="rgb")
        assert name in message and "each one as a file of its own" in message


FOLLOWED = {f"a.{kind}": encoded(RGB, file_format) for kind, file_format in {
    "png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF"
}.items()}  # fmt: skip


@pytest.mark.parametrize("behind", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tif"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_picture_behind_another_in_its_file_is_refused_by_name(tmp_path: Path, name: str, behind: str) -> None:
    (tmp_path / name).write_bytes(FOLLOWED[name] + b"what is no picture: GIF89a, \xff\xd8\xff")
    assert len(load_split(str(tmp_path), "train", color="rgb").levels) == 1
    (tmp_path / name).write_bytes(FOLLOWED[name] + b"\0\n" + FOLLOWED[behind])
    message = refused(load_split, str(tmp_path), "train", color="rgb")
    assert name in message and "each one as a file of its own" in message


def test_a_preview_within_a_picture_is_none_of_its_own(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x9286] = FOLLOWED["a.jpg"] + FOLLOWED["a.png"]
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        RGB.save(tmp_path / f"a.{kind.lower()}", exif=exif)
        assert FOLLOWED["a.jpg"] in (tmp_path / f"a.{kind.lower()}").read_bytes()
    assert len(load_split(str(tmp_path), "train", color="rgb").levels) == 4


@pytest.mark.parametrize("maximum", [1, 15, 100, 254])
def test_a_pixel_beyond_the_largest_value_is_refused_by_name(tmp_path: Path, maximum: int) -> None:
    for name, pixels in (("a.pgm", b"P5 2 1 %d\n"), ("b.ppm", b"P6 1 1 %d\n\0"), ("plain.pgm", b"P2 2 1 %d\n")):
        plain = name.startswith("plain")
        for last in (maximum, maximum + 1):
            (tmp_path / name).write_bytes(pixels % maximum + (b"0 %d\n" % last if plain else bytes([0, last])))
            if last > maximum:
                assert name in refused(load_split, str(tmp_path), "train", color="grey")
            else:
                assert load_split(str(tmp_path), "train", color="grey").levels.max() <= 255
        (tmp_path / name).unlink()


def test_the_fourth_channel_of_a_bitmap_is_no_opacity_where_it_is_always_0_or_always_255(tmp_path: Path) -> None:
    for name, opacities in (("a", [0] * 4), ("b", [255] * 4), ("c", [40] * 4), ("d", [0, 255, 255, 255])):
        pixels = np.full((2, 2, 4), 9, dtype=np.uint8)
        pixels[..., 3] = np.reshape(opacities, (2, 2))
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "x.bmp")
        if name in "ab":
            assert load_split(str(tmp_path / name), "train").levels.unique().tolist() == [9]
        else:
            message = refused(load_split, str(tmp_path / name), "train")
            assert "x.bmp" in message and "transparent" in message


@pytest.mark.parametrize("name", COLOURLESS)
def test_a_pixel_beyond_its_palette_is_refused_by_name(tmp_path: Path, name: str) -> None:
    message = refused(load_split, str(folder_with(tmp_path, name, COLOURLESS[name]())), "train", color="rgb")
    assert name in message and "palette" in message
    with pytest.warns(UserWarning, match=name):
        assert greys(read(tmp_path, skip_corrupt_images=True, color="grey").train) == [0]


def test_a_palette_that_is_just_long_enough_is_read() -> None:
    whole = {
        "a.png": png(2, 1, 8, 3, b"\0\0\1", TWO_COLOURS),
        "b.png": png(2, 1, 1, 3, b"\0\x40", TWO_COLOURS, chunk(b"tRNS", b"\xff\xff")),
        "a.bmp": bitmap(bytes([7, 8, 9, 0, 4, 5, 6, 0]), 0, 1),
    }
    for content in whole.values():
        assert ImageReader(color="rgb").decode(content).tolist() == [[[9, 6]], [[8, 5]], [[7, 4]]]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_are_read_are_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=naming("image 3", "12,000 x 12,000", "89,478,485")):
        ImageReader().decode(png(12_000, 12_000, 1, 0, bytes(12_000 * 1_501)), 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 29)
    for name in ("a.png", "a.bmp", "a.ppm"):
        with pytest.raises(DataError, match="6 pixels"):
            ImageReader().decode(READ[name]())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert ImageReader().decode(READ["a.png"]()).shape == (3, 6, 5)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_image_of_a_known_format_is_named_or_left_out(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, name, UNKNOWN[name]())
    assert name in refused(load_split, str(folder), "train") and name in refused(
        lambda: greys(read(folder, streaming=True).train)
    )
    for streaming in (False, True):
        with pytest.warns(UserWarning, match=name):
            assert greys(read(folder, skip_corrupt_images=True, streaming=streaming).train) == [0]


def test_no_bytes_start_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    for name in ("gs", "gswin64c", "djpeg"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {ran}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = folder_with(tmp_path / "data", "a.png", _EPS)
    refused(load_split, str(folder), "train")
    assert not ran.exists()


# --- rows of Parquet files ------------------------------------------------------------------------------------------

PNG = encoded(picture(3), "PNG")
NULLS = {"a null row": None, "null bytes": {"bytes": None, "path": None}, "no bytes": {"bytes": b"", "path": None}}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("what", NULLS)
def test_a_null_row_is_refused_by_its_number_or_left_out(tmp_path: Path, what: str, streaming: bool) -> None:
    whole = {"bytes": PNG, "path": None}
    file = parquet_of(tmp_path / "a.parquet", [whole, whole, NULLS[what]])
    message = refused(lambda: greys(read(file, streaming=streaming).train))
    assert "--skip_corrupt_images" in message and "image 2 " in message
    with pytest.warns(UserWarning, match=naming("image 2")):
        assert greys(read(file, skip_corrupt_images=True, streaming=streaming).train) == [3, 3]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "{here}/secret.png", "../secret.png", "hf://datasets/a/b/c.png", "http://127.0.0.1:1/x.png"],
)
def test_a_path_in_a_row_is_never_opened(
    tmp_path: Path, path: str, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, "secret.png")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    path = path.format(here=tmp_path)
    file = parquet_of(tmp_path / "data" / "a.parquet", [{"bytes": None, "path": path}] * 2)
    for streaming in (False, True):
        assert path in refused(read, file, streaming=streaming, skip_corrupt_images=skip)
    assert path in refused(load_split, str(file), "train")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from([*READ, "jpeg", "gif"]), st.data())
@settings(max_examples=200)
def test_any_bytes_are_an_image_or_one_paragraph(name: str, data: st.DataObject) -> None:
    options = {"jpeg": lambda: encoded(RGB, "JPEG"), "gif": lambda: encoded(RGB, "GIF")} | READ
    content = bytearray(options[name]())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    try:
        levels = ImageReader(color="rgb").decode(bytes(content[:cut]), 7)
    except DataError as error:
        assert "image 7" in str(error) and "\n" not in str(error) and len(str(error)) <= 1000
    else:
        assert levels.dtype == np.uint8 and levels.ndim == 3 and levels.size
