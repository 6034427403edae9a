"""Pictures and levels: what a pipeline returns is what its likelihood takes, for every K and every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from naming import naming
from vdm_hub.data.levels import images_from_levels, levels_from_images
from vdm_hub.errors import DataError


def some_levels(num_levels: int, channels: int = 1) -> Tensor:
    """A batch that holds every level."""
    return torch.arange(2 * channels * 16 * 16).reshape(2, channels, 16, 16) % num_levels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_levels_survive_every_number_of_levels(output_type: str, channels: int) -> None:
    for num_levels in range(2, 257):
        levels = some_levels(num_levels, channels)
        back = levels_from_images(images_from_levels(levels, num_levels, output_type), num_levels)
        assert torch.equal(back, levels), num_levels


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"), [("np", np.ndarray, (2, 4, 5, 3)), ("pt", Tensor, (2, 3, 4, 5))]
)
def test_arrays_and_tensors_lie_in_the_unit_interval(output_type: str, kind: type, shape: tuple[int, ...]) -> None:
    images = images_from_levels(torch.tensor([0, 16]).repeat(60).reshape(2, 3, 4, 5), 17, output_type)
    assert isinstance(images, kind) and images.shape == shape
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert str(images.dtype).endswith("float32")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pictures_have_the_mode_and_size_of_the_data(channels: int, mode: str) -> None:
    levels = torch.zeros(2, channels, 4, 6, dtype=torch.long)
    levels[1] = 255
    black, white = images_from_levels(levels, 256, "pil")
    assert (black.mode, black.size) == (mode, (6, 4)) == (white.mode, white.size)
    assert np.asarray(black).max() == 0 and np.asarray(white).min() == 255


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_tensors_are_levels_already(dtype: torch.dtype) -> None:
    levels = some_levels(17)
    assert torch.equal(levels_from_images(levels.to(dtype), 17), levels)


def test_one_picture_is_a_batch_of_one_and_bytes_are_pictures() -> None:
    levels = some_levels(17)
    pictures = images_from_levels(levels, 17, "pil")
    assert torch.equal(levels_from_images(pictures[0], 17), levels[:1])
    grey = np.stack([np.asarray(picture) for picture in pictures])
    assert torch.equal(levels_from_images(grey[..., None], 17), levels)
    assert torch.equal(levels_from_images(list(grey), 17), levels)


GREY = Image.new("L", (4, 4))
REFUSED: dict[str, tuple[Any, str]] = {
    "an intensity between levels": (torch.full((1, 1, 4, 4), 0.51), "none of the model's 17 levels"),
    "an intensity above one": (torch.full((1, 1, 4, 4), 1.0625), "none of the model's 17 levels"),
    "a negative intensity": (torch.full((1, 1, 4, 4), -0.0625), "none of the model's 17 levels"),
    "data in [-1, 1]": (torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4), "none of the model's 17 levels"),
    "NaN": (torch.full((1, 1, 4, 4), torch.nan), "nan"),
    "a level too many": (torch.full((1, 1, 4, 4), 17), "none of the model's 17 levels"),
    "a negative level": (torch.full((1, 1, 4, 4), -1), "none of the model's 17 levels"),
    "a byte between levels": (Image.new("L", (4, 4), 100), "pixel value 100"),
    "a tensor without a batch": (torch.zeros(1, 4, 4), "give \\(B, C, H, W\\)"),
    "an array without a batch": (np.zeros((4, 4, 1), dtype=np.float32), "give \\(B, H, W, C\\)"),
    "bytes without a batch": (np.zeros((4, 4), dtype=np.uint8), "give \\(B, H, W, C\\)"),
    "five channels": ([np.zeros((4, 4, 5), dtype=np.uint8)], "\\(4, 4, 5\\)"),
    "a list of floats": ([np.zeros((4, 4))], "float64"),
    "mixed sizes": ([GREY, Image.new("L", (5, 4))], "mixed mode or size"),
    "mixed modes": ([GREY, Image.new("RGB", (4, 4))], "mixed mode or size"),
    "transparency": (Image.new("RGBA", (4, 4)), "mode RGBA"),
    "no image": ([], "give PIL images"),
    "a number": (3.5, "give PIL images"),
    "a path": ("image.png", "an image is"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_image_of_the_levels_is_refused(what: str) -> None:
    images, message = REFUSED[what]
    with pytest.raises(DataError, match=message):
        levels_from_images(images, 17)


def test_the_message_says_where() -> None:
    images = torch.zeros(3, 1, 4, 4)
    images[2, 0, 1, 3] = 0.3
    with pytest.raises(DataError, match=naming("image 2", "0.3", "(0, 1, 3)")):
        levels_from_images(images, 17)
    pictures = [GREY, GREY, Image.new("L", (4, 4), 100)]
    with pytest.raises(DataError, match=naming("image 2", "row 0", "column 0")):
        levels_from_images(pictures, 17)


def test_half_precision_is_refused_where_it_cannot_tell_levels_apart() -> None:
    with pytest.raises(DataError, match="256 levels"):
        levels_from_images(images_from_levels(some_levels(256), 256).half(), 256)
