"""The difference of two models' bits per dimension on the same images, image by image.

``python scripts/bench/paired.py A.parquet B.parquet`` reads what ``vdm-hub evaluate --per_image`` wrote for each, and
prints the mean of A - B with two errors: over the replicates (Monte Carlo), and over images of the same population,
where what makes an image easy or hard for both cancels.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch


def main() -> None:
    """Read both files, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    (first, of_first), (second, of_second) = read(arguments.first), read(arguments.second)
    if of_first["dataset"]["fingerprint"] != of_second["dataset"]["fingerprint"]:
        raise SystemExit("error: the two files are of other images: measure both models on the same.")
    difference = first["bits_per_dim"] - second["bits_per_dim"]
    error = math.hypot(of_first["standard_error"], of_second["standard_error"])
    print(
        f"{float(first['bits_per_dim'].mean()):.4f} - {float(second['bits_per_dim'].mean()):.4f} = "
        f"{float(difference.mean()):+.4f} bits/dim, Monte Carlo error {error:.4f}, "
        f"error over images {float(difference.std()) / math.sqrt(len(difference)):.4f}, {len(difference)} images"
    )


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The columns of figures of a file, and its report."""
    table = pq.read_table(path)
    columns = {name: torch.tensor(table[name].to_pylist(), dtype=torch.float64) for name in ("bits_per_dim",)}
    return columns, json.loads(table.schema.metadata[b"vdm_hub"])


if __name__ == "__main__":
    main()
