"""What ``pip install`` of a plugin leaves behind, as far as entry points are read."""

from __future__ import annotations

from pathlib import Path


def write_metadata(folder: Path, package: str, version: str, entry_points: str) -> Path:
    """The metadata of a distribution; ``entry_points`` as its file holds them."""
    information = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (information / "entry_points.txt").write_text(entry_points)
    return folder


def write_pixelwise(folder: Path) -> Path:
    """A distribution ``fakes`` with schedules of `plugin_of_law_7`, which have a gamma per pixel."""
    names = "pixelwise = plugin_of_law_7:PixelwiseSchedule\ncontextual = plugin_of_law_7:ContextSchedule\n"
    return write_metadata(folder, "fakes", "1", f"[vdm_hub.noise_schedules]\n{names}")
