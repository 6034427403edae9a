"""Pictures: a grid of samples, and where a schedule spends its bits."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.likelihood.report import LikelihoodReport

_BINS = 40


def save_grid(images: Tensor, path: Path, columns: int | None = None, scale: int | None = None) -> None:
    """Save images in [0, 1], (B, C, H, W), as one picture; small ones are enlarged without smoothing.

    Args:
        images: The images.
        path: Where to write the PNG.
        columns: Images in a row; as square a grid as possible by default.
        scale: Enlargement; to about 64 pixels an image by default.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = scale or max(1, 64 // max(height, width))
    rows = math.ceil(count / columns)
    grid = torch.ones(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for i, image in enumerate(images.cpu()):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        grid[:, top : top + height, left : left + width] = image
    array = (grid.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, format="PNG")


def plot_schedule(process: ForwardProcess, report: LikelihoodReport | None, path: Path) -> None:
    """Gamma and SNR over t, where there is a scalar gamma, and where over t the bits are spent, where measured."""
    scalar = isinstance(process, GaussianProcess) and process.schedule.scalar
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(10, 3) if scalar else (5, 3), layout="constrained")
        axes = figure.subplots(1, 3 if scalar else 1, squeeze=False)[0]
        if isinstance(process, GaussianProcess) and scalar:
            _plot_gamma(process, axes)
        if report is None:
            axes[-1].set(xlabel="t", title="diffusion term: not measured", xticks=[], yticks=[])
        else:
            _plot_bits(report, axes[-1])
        figure.savefig(path, dpi=150, format="png")


def _plot_gamma(process: GaussianProcess, axes: np.ndarray) -> None:
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    with torch.no_grad():
        gamma = process.schedule(t.to(next(process.parameters(), t).device)).cpu()
    axes[0].plot(t, gamma)
    axes[0].set(xlabel="t", ylabel="gamma(t) = -log SNR", title="noise schedule")
    axes[1].semilogy(t, torch.exp(-gamma))
    axes[1].set(xlabel="t", ylabel="SNR(t)", title="signal-to-noise ratio")


def _plot_bits(report: LikelihoodReport, axis: matplotlib.axes.Axes) -> None:
    """The integrand of the diffusion term: its area is the term."""
    times = report.times.flatten().numpy()
    bits = (report.terms_per_image["diffusion"] / (report.dimensions * math.log(2))).flatten().numpy()
    index = np.minimum((times * _BINS).astype(int), _BINS - 1)
    count = np.bincount(index, minlength=_BINS)
    mean = np.bincount(index, bits, minlength=_BINS) / np.maximum(count, 1)
    axis.stairs(mean, np.linspace(0, 1, _BINS + 1), fill=True, alpha=0.6)
    axis.set(
        xlabel="t", ylabel="bits/dim per unit of t", title=f"diffusion term: {report.terms['diffusion']:.3f} bits/dim"
    )
