"""Pictures: a grid of samples, where a schedule spends its bits, and the course of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vdm_hub.data.picture_files import DRAWN
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.likelihood.profiles import PixelProfile, TransitionProfile
from vdm_hub.likelihood.report import LikelihoodReport

_BINS = 40
_STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}


def save_grid(images: Tensor, path: Path | IO[bytes], columns: int | None = None, scale: int | None = None) -> None:
    """Save images in [0, 1], (B, C, H, W), as one picture; small ones are enlarged without smoothing.

    Args:
        images: The images.
        path: Where to write the PNG, or a file that is open for it.
        columns: Images in a row; as square a grid as possible by default.
        scale: Enlargement; to about 64 pixels an image by default.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = scale or max(1, 64 // max(images.shape[2:]))
    pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
    tiles = [ImageOps.expand(picture, (1, 1, 0, 0), "white") for picture in pictures]
    tiles += [Image.new(tiles[0].mode, tiles[0].size, "white")] * (-len(tiles) % columns)
    grid = make_image_grid(tiles, len(tiles) // columns, columns).convert(tiles[0].mode)
    grid = ImageOps.expand(grid, (0, 0, 1, 1), "white")
    metadata = PngInfo()
    for key, text in DRAWN.items():
        metadata.add_text(key, text)
    ImageOps.scale(grid, scale, Image.Resampling.NEAREST).save(path, format="PNG", pnginfo=metadata)


def rows_of_choices(choices: int | None, count: int) -> tuple[list[int], int | None]:
    """What the images of a grid of about so many are told, by number, a row each, and how many are in a row.

    Of more than ten classes, or captions, at most as many are shown as make a square, evenly apart.

    >>> rows_of_choices(3, 7)
    ([0, 0, 1, 1, 2, 2], 2)
    >>> rows_of_choices(None, 7)
    ([], None)
    """
    if not choices:
        return [], None
    rows = min(choices, max(10, math.isqrt(count)), count)
    columns = count // rows
    return [row * choices // rows for row in range(rows) for _ in range(columns)], columns


def shows_schedule(process: ForwardProcess, report: LikelihoodReport | None) -> bool:
    """Whether `plot_schedule` has anything to draw: a scalar gamma, or bits at times that were measured."""
    return process.diffused.scalar_gamma is not None or (report is not None and report.times is not None)


def plot_schedule(process: ForwardProcess, report: LikelihoodReport | None, path: Path) -> None:
    """Plot gamma and SNR over t, where there is a scalar gamma, and the bits over t, where they were measured."""
    schedule = process.diffused.scalar_gamma
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5, 3) if schedule is None else (10, 3), layout="constrained")
        axes = figure.subplots(1, 1 if schedule is None else 3, squeeze=False)[0]
        if schedule is not None:
            _plot_gamma(schedule, axes)
        if report is None or report.times is None:
            axes[-1].set(xlabel="t", title="diffusion term: not measured", xticks=[], yticks=[])
        else:
            _plot_bits(report, axes[-1])
        figure.savefig(path, dpi=150, format="png", metadata=DRAWN)


def plot_likelihood(report: LikelihoodReport, path: Path) -> None:
    """Plot the bits over t, where the method has times, and their spread over the images, where there are several."""
    has_times, has_spread = report.times is not None, report.times is None or report.num_images > 1
    with matplotlib.rc_context(_STYLE):
        panels = has_times + has_spread
        figure = Figure(figsize=(5 * panels, 3.4), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if has_times:
            _plot_bits(report, axes[0])
        if has_spread:
            _plot_histogram(report, axes[-1])
        figure.savefig(path, dpi=150, format="png", metadata=DRAWN)


def plot_pixel_profile(profile: PixelProfile, images: Tensor, path: Path | IO[bytes]) -> None:
    """Plot where the bits of images lie, a row each: the image, the bits of each of its pixels, and the bits over t.

    All maps are of one scale, and so are all curves; of colours, a pixel's bits are the sum.

    Args:
        profile: Of `vdm_hub.LikelihoodPipeline.pixel_profile`.
        images: Those images in [0, 1], (B, C, H, W).
        path: Where to write the PNG, or a file that is open for it.
    """
    maps, most = profile.bits.sum(1), float(profile.bits.sum(1).max())
    edges = np.linspace(0, 1, min(_BINS, profile.times.shape[1]) + 1)
    place = np.minimum((profile.times.numpy() * (len(edges) - 1)).astype(int), len(edges) - 2)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.6 * len(maps)), layout="constrained")
        axes = figure.subplots(len(maps), 3, squeeze=False, sharey="col", width_ratios=(1, 1.15, 1.6))
        for row, (image, bits, where, over_time) in enumerate(
            zip(images, maps, place, profile.over_time.numpy(), strict=True)
        ):
            picture, heat, curve = axes[row]
            shown = image.cpu().permute(1, 2, 0).squeeze(-1).numpy()
            picture.imshow(shown, cmap="gray", vmin=0, vmax=1)
            drawn = heat.imshow(bits.numpy(), cmap="magma", vmin=min(0.0, float(maps.min())), vmax=most)
            figure.colorbar(drawn, ax=heat, shrink=0.85)
            counts = np.maximum(np.bincount(where, minlength=len(edges) - 1), 1)
            curve.stairs(np.bincount(where, over_time, len(edges) - 1) / counts, edges, fill=True, alpha=0.6)
            picture.set(title="the image")
            heat.set(title="bits of each pixel")
            picture.set_axis_off()
            heat.set_axis_off()
            curve.set(xlabel="t (0: the image, 1: noise)", ylabel="bits/dim per unit of t", title="bits over t")
        figure.savefig(path, dpi=150, format="png", metadata=DRAWN)


def plot_decompositions(profiles: Mapping[str, TransitionProfile], path: Path) -> None:
    """Plot the forms of one bound, by name: the bits of each over t, and how much one evaluation scatters there."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        bits, spread = figure.subplots(1, 2)
        for name, profile in profiles.items():
            label = f"{name.replace('_', ' ')}: {float(profile.bits_per_dim.mean()):.3f} bits/dim"
            edges = [0.0, *profile.times.tolist()]
            bits.stairs(profile.bits_per_dim, edges, baseline=None, label=label)
            label = f"{name.replace('_', ' ')}: {float(profile.spread.square().mean().sqrt()):.3g}, root mean square"
            spread.stairs(profile.spread, edges, baseline=None, label=label)
        bits.set(xlabel="t", ylabel="bits/dim per unit of t", title="the term of the transitions")
        spread.set(xlabel="t", ylabel="bits/dim", yscale="log", title="standard deviation of one evaluation")
        for axis in (bits, spread):
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150, format="png", metadata=DRAWN)


def plot_confusion(confusion: Tensor, names: Sequence[str], path: Path) -> None:
    """Plot how many images of each class (rows) were found to be of each (columns); shades are shares of a row."""
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(3.0, 0.45 * len(names) + 1.5), 30.0)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(side, side), layout="constrained")
        axis = figure.subplots()
        axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        places = range(len(names))
        axis.set(xticks=places, yticks=places, xticklabels=names, yticklabels=names, xlabel="found", ylabel="is")
        axis.tick_params(axis="x", rotation=90 if max(map(len, names)) > 3 else 0)
        for row, column in confusion.nonzero().tolist():
            shade = "white" if shares[row, column] > 0.5 else "black"
            text = str(int(confusion[row, column]))
            axis.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
        right, count = int(confusion.diagonal().sum()), int(confusion.sum())
        axis.set_title(f"{right} of {count} found")
        figure.savefig(path, dpi=150, format="png", metadata=DRAWN)


def _plot_histogram(report: LikelihoodReport, axis: matplotlib.axes.Axes) -> None:
    """Draw the histogram of the images' estimates, which the Monte Carlo error widens; the mean is marked."""
    bits = report.per_image.numpy()
    axis.hist(bits, bins=min(_BINS, max(5, math.isqrt(len(bits)))), alpha=0.6)
    axis.axvline(report.bits_per_dim, color="black", linewidth=1)
    sign = "at most" if report.is_bound else "estimated"
    kind = report.units.kind
    title = f"{len(bits)} {kind.data}, mean {report.bits_per_dim:.3f}"
    axis.set(xlabel=f"{kind.unit}, {sign}", ylabel=kind.data, title=title)


def plot_training_curve(history: Mapping[str, Mapping[str, list[float]]], path: Path, unit: str = "bits/dim") -> None:
    """Plot the bound over the steps of a run: all of it with its terms, and the later part enlarged.

    Args:
        history: What is in a run's ``history.json``.
        path: Where to write the PNG.
        unit: Of its figures.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        whole, late = figure.subplots(1, 2)
        if history["train"]["step"] or history["validation"]["step"]:
            _plot_course(history, whole, unit)
            _plot_late_course(history, late, unit)
        else:
            for axis in (whole, late):
                axis.set(xlabel="step", title=f"{unit}: nothing was logged", xticks=[], yticks=[])
        figure.savefig(path, dpi=150, format="png", metadata=DRAWN)


def _plot_course(history: Mapping[str, Any], axis: matplotlib.axes.Axes, unit: str = "bits/dim") -> None:
    """Draw the whole course, logarithmic both ways: its terms differ by orders of magnitude."""
    train, validation = history["train"], history["validation"]
    marker = "." if len(train["step"]) == 1 else None  # one point makes no line
    terms = [name for name in train if name not in ("step", "bits_per_dim", "learning_rate")]
    # The total is wide and pale, so that the one term which is nearly all of it is seen too.
    axis.plot(train["step"], train["bits_per_dim"], color="0.7", linewidth=4, marker=marker, label="training, total")
    for name in terms:
        axis.plot(train["step"], train[name], linewidth=1, marker=marker, label=name)
    axis.plot(validation["step"], validation["bits_per_dim"], "o", color="tab:red", markersize=3, label="held-out")
    totals = [value for part in (train, validation) for value in part["bits_per_dim"] if value > 0]
    shown = [value for name in terms for value in train[name] if value > min(totals, default=1) * 1e-4]
    axis.set(xscale="log", yscale="log", xlabel="step", ylabel=unit, title="the whole course")
    axis.set_ylim(min([*totals, *shown], default=0.1) / 1.5, max(totals, default=10) * 1.5)
    for one, subdivisions in ((axis.xaxis, (1, 3)), (axis.yaxis, (1, 2, 5))):
        one.set_major_locator(LogLocator(subs=subdivisions))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        one.set_minor_formatter(NullFormatter())
    _legend(axis)


def _plot_late_course(history: Mapping[str, Any], axis: matplotlib.axes.Axes, unit: str = "bits/dim") -> None:
    """Draw the later course; each logged value is that of one batch, so their running mean is drawn too."""
    last = max(step for part in history.values() for step in part["step"])
    train, validation = (_from_step(last / 3, history[part]) for part in ("train", "validation"))
    axis.plot(train["step"], train["bits_per_dim"], ".", color="black", markersize=3, alpha=0.25)
    axis.plot(train["step"], _smooth(train["bits_per_dim"]), color="black", label="training, mean of nearby batches")
    errors = validation.get("standard_error", np.zeros(0))
    axis.errorbar(
        validation["step"],
        validation["bits_per_dim"],
        yerr=2 * errors if len(errors) else None,
        fmt="o-",
        color="tab:red",
        markersize=3,
        linewidth=1,
        label="held-out, 2 standard errors",
    )
    every = np.concatenate([train["bits_per_dim"], validation["bits_per_dim"]])
    low, high = np.quantile(every, [0.01, 0.95])
    room = max(0.1 * (high - low), 0.02 * abs(high))
    axis.set(xlabel="step", ylabel=unit, title="after the first third, enlarged", ylim=(low - room, high + room))
    _legend(axis)


def _from_step(first: float, columns: Mapping[str, list[float]]) -> dict[str, np.ndarray]:
    kept = np.asarray(columns["step"], dtype=float) >= first
    return {name: np.asarray(values, dtype=float)[kept] for name, values in columns.items()}


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a sixth of the values, over fewer at the ends."""
    if len(values) == 0:
        return values
    window = np.ones(1 + 2 * (len(values) // 12))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _legend(axis: matplotlib.axes.Axes) -> None:
    """Add a legend of those lines that have any points."""
    handles, labels = axis.get_legend_handles_labels()
    drawn = [(handle, label) for handle, label in zip(handles, labels, strict=True) if _points(handle)]
    axis.legend(*zip(*drawn, strict=True), frameon=False, fontsize=8)


def _points(handle: Any) -> int:
    return len((handle if hasattr(handle, "get_xdata") else handle.lines[0]).get_xdata())


def _plot_gamma(schedule: NoiseSchedule, axes: np.ndarray) -> None:
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    with torch.no_grad():
        gamma = schedule(t.to(next(schedule.parameters(), t).device)).cpu()
    axes[0].plot(t, gamma)
    axes[0].set(xlabel="t", ylabel="gamma(t) = -log SNR", title="noise schedule")
    axes[1].semilogy(t, torch.exp(-gamma))
    axes[1].set(xlabel="t", ylabel="SNR(t)", title="signal-to-noise ratio")


def _plot_bits(report: LikelihoodReport, axis: matplotlib.axes.Axes) -> None:
    """Draw the integrand of the diffusion term: its area is the term, whatever density the times were drawn from."""
    name = next(name for name in ("diffusion", "consistency") if name in report.terms)
    values = report.terms_per_image[name] if report.integrand is None else report.integrand
    assert report.times is not None
    times, bits = report.times.flatten().numpy(), (values / (report.dimensions * math.log(2))).flatten().numpy()
    index = np.minimum((times * _BINS).astype(int), _BINS - 1)
    # Weighted by one over their density, times count equally often wherever they were drawn.
    weighted = report.integrand is not None
    count = np.full(_BINS, len(times) / _BINS) if weighted else np.maximum(np.bincount(index, minlength=_BINS), 1)
    mean = np.bincount(index, bits, minlength=_BINS) / count
    axis.stairs(mean, np.linspace(0, 1, _BINS + 1), fill=True, alpha=0.6)
    unit = report.units.kind.unit
    title = f"{name} term: {report.terms[name]:.3f} {unit}"
    axis.set(xlabel="t", ylabel=f"{unit} per unit of t", title=title)
