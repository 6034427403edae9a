"""Pictures: every sample in its place, and the area of the diffusion plot is the diffusion term."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.plots import _plot_bits, plot_schedule, save_grid


@pytest.mark.parametrize(("count", "channels", "columns"), [(1, 1, None), (4, 1, None), (5, 3, None), (6, 3, 6)])
def test_every_image_is_in_its_place_pixel_for_pixel(
    count: int, channels: int, columns: int | None, tmp_path: Path
) -> None:
    levels = torch.randint(0, 256, (count, channels, 5, 7), generator=torch.Generator().manual_seed(0))
    save_grid(levels / 255, tmp_path / "grid.png", columns=columns, scale=2)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == ("L" if channels == 1 else "RGB")
    across = columns or math.ceil(math.sqrt(count))
    assert picture.size == (2 * (across * 8 + 1), 2 * (math.ceil(count / across) * 6 + 1))
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    assert (pixels[::2, ::2] == pixels[1::2, 1::2]).all(), "enlarged without smoothing"
    for i, image in enumerate(levels.permute(0, 2, 3, 1).numpy()):
        top, left = 1 + 6 * (i // across), 1 + 8 * (i % across)
        assert (pixels[::2, ::2][top : top + 5, left : left + 7] == image).all(), i


def test_small_images_are_enlarged_and_large_ones_are_not(tmp_path: Path) -> None:
    for size, expected in ((8, 10 * 8), (200, 202)):
        save_grid(torch.zeros(1, 1, size, size), tmp_path / "grid.png")
        assert Image.open(tmp_path / "grid.png").size == (expected, expected)


def report(times: torch.Tensor, nats: torch.Tensor) -> LikelihoodReport:
    rest = torch.zeros_like(nats)
    return LikelihoodReport({"reconstruction": rest, "prior": rest, "diffusion": nats}, times, dimensions=10)


def test_the_area_under_the_bits_is_the_diffusion_term() -> None:
    times = torch.rand(8, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = report(times, 30 * times**2)
    axis = Figure().subplots()
    _plot_bits(measured, axis)
    (stairs,) = axis.patches
    values, edges, _ = stairs.get_data()
    assert float((values * np.diff(edges)).sum()) == pytest.approx(measured.terms["diffusion"], rel=0.01)
    middle = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(values, 3 * middle**2 / math.log(2), atol=0.03)
    assert f"{measured.terms['diffusion']:.3f} bits/dim" in axis.get_title()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "learned_monotone"])
def test_a_schedule_is_drawn(schedule: str, tmp_path: Path) -> None:
    process = GaussianProcess.from_fields({"noise_schedule": schedule, "num_levels": 17})
    times = torch.rand(2, 100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plot_schedule(process, report(times, times), tmp_path / "schedule.png")
    picture = np.asarray(Image.open(tmp_path / "schedule.png").convert("L"))
    thirds = np.array_split(picture, 3, axis=1)
    assert all((part < 128).mean() > 1e-3 for part in thirds), "three panels, each with ink"
