"""Pictures: every sample in its place, and the area of the diffusion plot is the diffusion term."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tiny import tiny_pipeline
from tiny_tokens import MaskingProcess
from vdm_hub import VariationalBound
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.likelihood.profiles import transition_profile
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.decompositions import decompositions
from vdm_hub.plots import (
    _plot_bits,
    _plot_course,
    _plot_histogram,
    _plot_late_course,
    plot_confusion,
    plot_decompositions,
    plot_likelihood,
    plot_schedule,
    plot_training_curve,
    save_grid,
    shows_schedule,
)


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


def course(steps: int, every: int, measured: tuple[int, ...] = ()) -> dict[str, Any]:
    """Of a run that begins near 100 bits/dim and ends near 1.7."""
    noise = np.random.default_rng(3)
    step = np.arange(every, steps + 1, every)
    diffusion = 1.68 + 100 / (1 + step / 5) ** 1.3 + noise.normal(0, 0.03, len(step))
    train = {"step": step, "bits_per_dim": diffusion + 0.0213, "reconstruction": 0.02 + 0 * step}
    train |= {"prior": 0.0013 + 0 * step, "diffusion": diffusion, "learning_rate": 1e-3 + 0 * step}
    held_out = [1.72 + 100 / (1 + step / 5) ** 1.3 for step in measured]
    validation = {"step": list(measured), "bits_per_dim": held_out}
    validation |= {"standard_error": [0.01] * len(measured)} if measured else {}
    return {"train": {name: values.tolist() for name, values in train.items()}, "validation": validation}


def drawn(axis: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The lines of an axis by their labels."""
    lines = {line.get_label(): line for line in axis.get_lines()}
    lines |= {bars.get_label(): bars.lines[0] for bars in axis.containers}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in lines.items()}


def test_the_whole_course_is_drawn_with_every_term() -> None:
    history, axis = course(1700, 50, (600, 1200)), Figure().subplots()
    _plot_course(history, axis)
    lines, train = drawn(axis), history["train"]
    for name in ("reconstruction", "prior", "diffusion"):
        assert lines[name] == (train["step"], train[name])
    assert lines["training, total"] == (train["step"], train["bits_per_dim"])
    assert lines["held-out"] == (history["validation"]["step"], history["validation"]["bits_per_dim"])
    assert "learning_rate" not in lines
    low, high = axis.get_ylim()
    assert low < 0.0013 and high > max(train["bits_per_dim"]), "all of it is seen"
    assert {text.get_text() for text in axis.get_legend().get_texts()} == set(lines)


def test_the_last_tenths_of_a_bit_are_seen_though_it_began_at_a_hundred() -> None:
    history, axis = course(1700, 5, (10, 600, 1200, 1700)), Figure().subplots()
    _plot_late_course(history, axis)
    lines = drawn(axis)
    steps, smooth = lines["training, mean of nearby batches"]
    assert min(steps) >= 1700 / 3 and max(steps) == 1700
    assert lines["held-out, 2 standard errors"][0] == [600, 1200, 1700]
    low, high = axis.get_ylim()
    assert low < 1.7 < high and high - low < 1
    late = np.array(history["train"]["bits_per_dim"])[-len(steps) :]
    assert abs(np.mean(smooth) - late.mean()) < 0.01, "the mean is no lower than the batches are"
    assert np.diff(smooth).std() < 0.3 * np.diff(late).std()


@pytest.mark.parametrize(
    "history", [course(1700, 50), course(3, 3), course(6, 1, (6,)), course(0, 1), course(0, 1, (2,))]
)
def test_a_course_is_drawn_however_little_was_logged(history: dict[str, Any], tmp_path: Path) -> None:
    plot_training_curve(history, tmp_path / "training_curve.png")
    picture = np.asarray(Image.open(tmp_path / "training_curve.png").convert("L"))
    assert all((part < 160).mean() > 1e-3 for part in np.array_split(picture, 2, axis=1)), "two panels, each with ink"


# ---- a likelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", ["uniform", "mostly late"])
def test_the_bits_over_t_are_the_same_wherever_the_times_were_drawn(density: str) -> None:
    """Late times are drawn from 2 t, and weighted by 1 / (2 t); the area and the shape do not change."""
    uniform = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 80_000
    times = uniform if density == "uniform" else uniform.sqrt()
    weight = torch.ones_like(times) if density == "uniform" else 1 / (2 * times)
    weighted = (weight * 30 * times**2).view(8, -1)
    measured = report(times.view(8, -1), weighted + 5)  # a control variate moves the term, not the integrand
    measured.integrand = weighted
    axis = Figure().subplots()
    _plot_bits(measured, axis)
    (stairs,) = axis.patches
    values, edges, _ = stairs.get_data()
    middle = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(values, 3 * middle**2 / math.log(2), atol=0.01)


def test_several_times_an_image_are_all_drawn() -> None:
    times = torch.rand(4, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = LikelihoodReport({"diffusion": times.mean(2)}, times, dimensions=10, integrand=times)
    axis = Figure().subplots()
    _plot_bits(measured, axis)
    values, edges, _ = axis.patches[0].get_data()
    expected = float(times.mean()) / (10 * math.log(2))
    assert float((values * np.diff(edges)).sum()) == pytest.approx(expected)


def test_a_likelihood_is_drawn_with_times_and_without(tmp_path: Path) -> None:
    times = torch.rand(4, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plot_likelihood(report(times, times), tmp_path / "bound.png")
    ode = LikelihoodReport({"base_density": times}, None, dimensions=10, is_bound=False, method="ode")
    plot_likelihood(ode, tmp_path / "ode.png")
    bound, alone = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("bound.png", "ode.png"))
    assert bound.shape[1] == 2 * alone.shape[1]
    assert all((part < 200).mean() > 1e-2 for part in (*np.array_split(bound, 2, axis=1), alone))


def test_every_image_is_in_the_histogram() -> None:
    bits = torch.rand(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = report(bits, bits)
    axis = Figure().subplots()
    _plot_histogram(measured, axis)
    assert sum(bar.get_height() for bar in axis.patches) == 200
    assert list(axis.get_lines()[0].get_xdata()) == [measured.bits_per_dim] * 2


def test_both_forms_are_drawn_over_t_and_each_has_bits_over_t_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), write(self, *a, **k)))
    pipe, levels = tiny_pipeline(), torch.zeros(2, 1, 8, 8, dtype=torch.long)
    forms = decompositions(pipe.objective(5))
    profiles = {name: transition_profile(form, {"levels": levels}, 3) for name, form in forms.items()}
    plot_decompositions(profiles, tmp_path / "forms.png")
    for axis, field in zip(figures[0].axes, ("bits_per_dim", "spread"), strict=True):
        for drawn, profile in zip(axis.patches, profiles.values(), strict=True):
            assert drawn.get_data().values.tolist() == getattr(profile, field).tolist()
            assert drawn.get_data().edges.tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for name in forms:
        report = pipe.bits_per_dim(levels, method=VariationalBound(5, decomposition=name), replicates=2)
        plot_likelihood(report, tmp_path / "bits.png")
        assert len(figures[-1].axes) == 2, "bits over t, and the histogram"
    assert "consistency term" in figures[-1].axes[0].get_title()


def test_a_confusion_matrix_shows_every_number_and_the_shares_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    plot_confusion(torch.tensor([[3, 1, 0], [0, 5, 0], [0, 0, 0]]), ("cat", "dog", "eel"), tmp_path / "confusion.png")
    (axis,) = figures[0].axes
    assert {(*one.get_position(), one.get_text()) for one in axis.texts} == {(0, 0, "3"), (1, 0, "1"), (1, 1, "5")}
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert "8 of 9" in axis.get_title() and [one.get_text() for one in axis.get_yticklabels()] == ["cat", "dog", "eel"]


def test_there_is_no_picture_of_a_schedule_where_nothing_is_to_be_seen() -> None:
    times = torch.rand(2, 3)
    measured, untimed = report(times, times), report(times, times)
    untimed.times = None
    gaussian, masking = tiny_pipeline().process, MaskingProcess()
    assert all(shows_schedule(gaussian, one) for one in (None, measured, untimed))
    assert [shows_schedule(masking, one) for one in (None, measured, untimed)] == [False, True, False]
