"""How ``scripts/gpu/cifar10.py`` shows its results: a table for the shell, and a picture of the training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from vdm_hub import written_beside

NAMES = {"train": "vdm_hub", "addtt": "addtt's VDM"}
ROWS, POINTS = 12, 60


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the bits/dim of both trainings over their steps, of one batch size."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for phase, name in NAMES.items():
        if (curve := results[phase].get("curve")) and curve["step"]:
            axis.plot(*zip(*some(curve, POINTS), strict=True), marker=".", label=name)
    axis.set(xlabel="step", ylabel="bits/dim of a training batch", yscale="log", title=str(results["device"] or ""))
    for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatted(FuncFormatter(lambda value, _: f"{value:.3g}"))
    if axis.lines:
        axis.legend()
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def table(results: dict[str, Any]) -> str:
    """The curves at some steps, then the figures; what is blank with its reason."""
    lines = ["", f"{'':<14}{'step':>8}{'bits/dim of a training batch':>32}"]
    for phase, name in NAMES.items():
        curve = results[phase].get("curve")
        if curve is None:
            lines.append(f"{name:<14}{'blank: ' + results[phase]['blank']}")
            continue
        rows = list(zip(curve["step"], curve["bits_per_dim"], strict=True))
        shown = (
            [rows[round(i * (len(rows) - 1) / max(ROWS - 1, 1))] for i in range(ROWS)] if len(rows) > ROWS else rows
        )
        lines += [f"{name:<14}{step:>8,}{value:>32.4f}" for step, value in shown]
    return "\n".join([*lines, "", *(figure_of(results, phase) for phase in ("measure", "addtt")), ratio(results), ""])


def some(curve: dict[str, list[float]], count: int) -> list[tuple[float, float]]:
    """So many ``(step, bits/dim)`` of a curve at most, at even places from the first to the last.

    >>> some({"step": [1, 2, 3, 4, 5], "bits_per_dim": [9, 8, 7, 6, 5]}, 3)
    [(1, 9), (3, 7), (5, 5)]
    """
    rows = list(zip(curve["step"], curve["bits_per_dim"], strict=True))
    return rows if len(rows) <= count else [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def figure_of(results: dict[str, Any], phase: str) -> str:
    """The line of a model's figure on the test images."""
    part, name = results[phase], NAMES["addtt" if phase == "addtt" else "train"]
    if "blank" in part:
        return f"{name:<14}blank: {part['blank']}"
    trained = results["train"] if phase == "measure" else part
    error = "unknown, of one pass" if part["standard_error"] is None else f"{part['standard_error']:.4f}"
    passes = part.get("replicates") or part["passes"]
    return (
        f"{name:<14}{part['bits_per_dim']:.4f} bits/dim   standard error {error} (Monte Carlo) of "
        f"{part['num_images']:,} test images, {passes} passes; {trained['steps']:,} steps in "
        f"{trained['training_seconds']:.0f} s"
    )


def ratio(results: dict[str, Any]) -> str:
    """The line of the training step over the bare network's."""
    part = results["step"]
    if "blank" in part:
        return f"{'step':<14}blank: {part['blank']}"
    times = f"{1e3 * part['step_seconds']:.1f} ms, bare network {1e3 * part['bare_seconds']:.1f} ms"
    return f"{'step':<14}{times}, ratio {part['ratio']:.3f}; {part['images_per_second']:,.0f} images/s"
