"""One picture of a person's own: read as it is, or converted in ways that are said; else refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny import LEVELS, tiny_pipeline
from vdm_hub import DataError, images_from_levels
from vdm_hub.data.one_picture import read_picture

GREY = (1, 8, 8)


def stored(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def digit(size: tuple[int, int] = (8, 8)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, LEVELS, size[::-1])
    return Image.fromarray(np.round(255 * levels / (LEVELS - 1)).astype(np.uint8))


def test_a_picture_of_the_models_own_kind_is_taken_as_it_is(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    levels, notes = read_picture(stored(digit()), pipe.image_shape, pipe.num_levels)
    (tmp_path / "digit.png").write_bytes(stored(digit()))
    assert (
        levels == read_picture(str(tmp_path / "digit.png"), pipe.image_shape, pipe.num_levels, fit=True)[0]
    ).all() and not notes
    assert images_from_levels(levels, LEVELS, "pil")[0].tobytes() == digit().tobytes()
    assert read_picture(tmp_path / "digit.png", pipe.image_shape, pipe.num_levels, fit=True)[1] == []


REFUSED: list[tuple[bytes, str]] = [
    (stored(digit((9, 8))), "9x8"),
    (stored(digit().convert("RGB")), "RGB"),
    (stored(digit().convert("P")), "mode P"),
    (stored(Image.new("L", (8, 8), 100)), "100"),
    (stored(Image.new("I;16", (8, 8))), "I;16"),
    (stored(Image.new("L", (8, 8)), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 255)]), "2 frames"),
    (b"no picture", "PNG"),
    (stored(digit())[:60], "can be read"),
]


@pytest.mark.parametrize(("content", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_another_is_refused_with_what_it_is(content: bytes, named: str) -> None:
    with pytest.raises(DataError, match=named):
        read_picture(content, GREY, LEVELS)


def test_a_file_that_is_not_there_is_said() -> None:
    with pytest.raises(DataError, match="nowhere"):
        read_picture("nowhere.png", GREY, LEVELS)


CONVERTED: list[tuple[Image.Image, tuple[int, int, int], list[str]]] = [
    (digit((16, 8)), GREY, ["16x8 to 8x8, of its middle"]),
    (digit((24, 24)), GREY, ["24x24 to 8x8"]),
    (digit().convert("RGB"), GREY, ["from RGB to grey"]),
    (digit(), (3, 8, 8), ["from grey to RGB"]),
    (digit().convert("P"), GREY, ["from P to grey"]),
    (Image.new("L", (8, 8), 100), GREY, ["100% of its values"]),
    (Image.new("RGB", (30, 20), (10, 20, 30)), (1, 4, 6), ["from RGB", "30x20 to 6x4", "values"]),
]


@pytest.mark.parametrize(("image", "shape", "said"), CONVERTED, ids=[str(said) for *_, said in CONVERTED])
def test_whatever_is_converted_is_said(image: Image.Image, shape: tuple[int, int, int], said: list[str]) -> None:
    levels, notes = read_picture(stored(image), shape, LEVELS, fit=True)
    assert levels.shape == (1, *shape) and levels.max() < LEVELS
    words = [note for note in notes if "values" not in note or "values" in "".join(said)]
    assert len(words) == len(said)
    assert all(part in note for part, note in zip(said, words, strict=True))


@pytest.mark.parametrize(
    "image", [Image.new("I;16", (8, 8)), Image.new("RGBA", (8, 8), (1, 2, 3, 100))], ids=["16 bits", "transparent"]
)
def test_what_a_conversion_would_lose_unsaid_is_refused_then_too(image: Image.Image) -> None:
    with pytest.raises(DataError):
        read_picture(stored(image), GREY, LEVELS, fit=True)


def test_a_model_of_other_channels_has_no_pictures() -> None:
    with pytest.raises(DataError, match="4 channels"):
        read_picture(stored(digit()), (4, 8, 8), LEVELS)
