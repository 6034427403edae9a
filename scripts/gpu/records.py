"""The files of ``scripts/gpu``: the shards of a data set, JSON written whole or not at all, and how figures add up."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vdm_hub import DataError, MissingFileError, written_beside

MOST_BYTES = 64 * 2**20
"""The size that every shard is below."""


def read(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        MissingFileError: It is not there, or holds no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MissingFileError(f"{path} can't be read ({error}): name a file that is there, and whole.") from error


def write(path: Path, value: Any) -> None:
    """Write a value as JSON beside its place, then rename it; NaN is refused."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=1, allow_nan=False), "utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shards_of(folder: Path) -> list[dict[str, Any]]:
    """The name, size and SHA-256 of each Parquet file of a folder.

    Raises:
        DataError: There are none, or one is not below 64 MiB.
    """
    shards = sorted(folder.rglob("*.parquet")) if folder.is_dir() else []
    if not shards:
        raise DataError(f"{folder} holds no Parquet files: python scripts/gpu/shards.py SOURCE {folder} makes them.")
    for path in shards:
        if (size := path.stat().st_size) >= MOST_BYTES:
            raise DataError(
                f"{path} has {size / 2**20:.1f} MiB, and shards are to be below {MOST_BYTES / 2**20:.0f}: "
                f"python scripts/gpu/shards.py {folder} NEW_FOLDER makes smaller ones."
            )
    return [
        {"name": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in shards
    ]


def fingerprint(levels: Any) -> str:
    """The SHA-256 of images as levels, ``sha256(str(shape) + bytes)``: that of `vdm_hub.evaluate`, computed anew."""
    digest = hashlib.sha256(str(tuple(levels.shape)).encode())
    digest.update(levels.contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def figures(per_image: Mapping[str, Sequence[float]], replicate_means: Sequence[float]) -> dict[str, Any]:
    """The figures of a set of images from those of each, in bits/dim.

    Args:
        per_image: Each term of each image, the mean of its replicates.
        replicate_means: The mean over the images of each replicate.

    Returns:
        ``bits_per_dim``; ``standard_error``, the Monte Carlo error from the replicates (null for one);
        ``standard_error_over_images``, from the spread of the images (null for one); ``terms``.
    """
    totals = [math.fsum(row) for row in zip(*per_image.values(), strict=True)]
    return {
        "bits_per_dim": statistics.fmean(totals),
        "standard_error": error_of_mean(replicate_means),
        "standard_error_over_images": error_of_mean(totals),
        "terms": {name: statistics.fmean(values) for name, values in per_image.items()},
    }


def error_of_mean(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; ``None`` for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
