"""Images of two levels from any others: ``python -m vdm_hub_binomial.binarise digits runs/binary-digits``.

A pixel is 1 where it is nearer to white than to black. The folder holds a Parquet file for each split, which
``--train_data_dir`` and ``vdm-hub evaluate`` read, with ``--num_levels 2``. Of other columns it keeps the one that
``--label_column`` names, and says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch

from vdm_hub import VDMHubError, images_from_levels, load_split


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(prog="python -m vdm_hub_binomial.binarise", description=__doc__)
    parser.add_argument("source", help="'digits', a folder of images or Parquet files, or a dataset's name on the Hub")
    parser.add_argument("folder", type=Path, help="where to write <split>.parquet")
    parser.add_argument("--splits", nargs="+", default=["train", "test"], help="or slices such as train[:1000]")
    parser.add_argument("--image_column", default="image", help="default: image")
    parser.add_argument("--label_column", help="keep this column as well; any other is left out")
    given = parser.parse_args(arguments)
    try:
        for path in binarise(given.source, given.folder, given.splits, given.image_column, given.label_column):
            print(f"{path}: {' and '.join(filter(None, (given.image_column, given.label_column)))}, no other column")
    except VDMHubError as error:
        sys.exit(f"error: {error}")


def binarise(
    source: str, folder: Path, splits: list[str], image_column: str = "image", label_column: str | None = None
) -> Iterator[Path]:
    """Write each split with its images in two grey levels, and give its path.

    Raises:
        DataError: There is no such dataset, split or column, or an image is not of 8 bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        path = folder / f"{split.partition('[')[0]}.parquet"
        grey = load_split(source, split, image_column=image_column, color="grey", label_column=label_column)
        columns: dict[str, list[object]] = {
            image_column: images_from_levels((torch.stack([*grey.levels]) > 127).long(), 2, "pil")
        }
        features = datasets.Features({image_column: datasets.Image()})
        if label_column is not None and grey.labels is not None:
            columns[label_column] = grey.labels.tolist()
            features[label_column] = datasets.Value("int64")
        datasets.Dataset.from_dict(columns, features).to_parquet(path)
        yield path


if __name__ == "__main__":
    main()
