"""Images of two levels from any others: ``python -m vdm_hub_binomial.binarise digits runs/binary-digits``.

A pixel is 1 where it is nearer to white than to black. The folder holds a Parquet file for each split, which
``--train_data_dir`` and ``vdm-hub evaluate`` read, with ``--num_levels 2``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from vdm_hub.data.images import Decoder
from vdm_hub.data.loading import undecoded
from vdm_hub.data.sources import open_source
from vdm_hub.errors import VDMHubError
from vdm_hub.pixels import convert_color, image_from_levels, nearest_levels


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(prog="python -m vdm_hub_binomial.binarise", description=__doc__)
    parser.add_argument("source", help="'digits', a folder of images or Parquet files, or a dataset's name on the Hub")
    parser.add_argument("folder", type=Path, help="where to write <split>.parquet")
    parser.add_argument("--splits", nargs="+", default=["train", "test"], help="or slices such as train[:1000]")
    parser.add_argument("--image_column", default="image", help="default: image")
    given = parser.parse_args(arguments)
    try:
        for path in binarise(given.source, given.folder, given.splits, given.image_column):
            print(path)
    except VDMHubError as error:
        sys.exit(f"error: {error}")


def binarise(source: str, folder: Path, splits: list[str], image_column: str = "image") -> Iterator[Path]:
    """Write each split with its images in two grey levels, and give its path.

    Raises:
        DataError: There is no such dataset, split or column, or an image is not of 8 bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        path = folder / f"{split.partition('[')[0]}.parquet"
        opened = open_source(source)
        encoded = undecoded(opened, opened.read(split), image_column, split)
        features = datasets.Features(encoded.features | {image_column: datasets.Image()})
        told = {"column": image_column, "decoder": Decoder(open_file=opened.open_file)}
        images = encoded.map(
            _in_two_levels, with_indices=True, features=features, fn_kwargs=told, load_from_cache_file=False
        )
        images.to_parquet(path)
        yield path


def _in_two_levels(row: dict[str, Any], index: int, column: str, decoder: Decoder) -> dict[str, Any]:
    grey = convert_color(decoder.open(row[column], index), "grey")
    return {column: image_from_levels(nearest_levels(grey, 2), 2)}


if __name__ == "__main__":
    main()
