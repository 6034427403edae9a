"""Make Parquet shards below 64 MiB from images: ``python scripts/gpu/shards.py SOURCE OUTPUT``.

SOURCE is whatever a recipe's ``dataset_name`` may be, such as a folder of images, a folder of Parquet files, or
``uoft-cs/cifar10`` on the Hub. The images are read as a run reads them, at their levels, and written losslessly, as
PNG in the column ``image`` of ``OUTPUT/SPLIT-00000-of-00003.parquet``; labels are left out. A shard is at most half as
large as it may be.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from records import MOST_BYTES, shards_of

from vdm_hub import DataError, ImageLevels, images_from_levels, load_split, report_errors, written_beside


def main() -> int:
    """Write the shards, and say what they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output", type=Path)
    parser.add_argument("--splits", nargs="+", default=["train", "test"], help="(default: train test)")
    parser.add_argument("--image_column", default="image", help="of the source (default: image)")
    parser.add_argument("--num_levels", type=int, default=256, help="(default: 256)")
    parser.add_argument("--shard_mib", type=float, default=32, help="the most of a shard, about (default: 32)")
    arguments = parser.parse_args()
    return report_errors(lambda: make(arguments))


def make(arguments: argparse.Namespace) -> int:
    """Write the shards of each split."""
    if arguments.output.exists():
        raise DataError(f"{arguments.output} is there already: name a new folder.")
    limit = min(arguments.shard_mib * 2**20, MOST_BYTES / 2)
    with written_beside(arguments.output) as beside:
        beside.mkdir()
        for split in arguments.splits:
            images = load_split(
                arguments.source, split, num_levels=arguments.num_levels, image_column=arguments.image_column
            )
            assert isinstance(images, ImageLevels)
            pictures = list(encoded(images))
            parts = -(-sum(map(len, pictures)) // int(limit))
            for part, chosen in enumerate(torch.arange(len(pictures)).tensor_split(parts)):
                rows = [{"bytes": pictures[i], "path": None} for i in chosen.tolist()]
                table = datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Image()}))
                table.to_parquet(str(beside / f"{split}-{part:05d}-of-{parts:05d}.parquet"))
    for shard in shards_of(arguments.output):
        print(f"{shard['name']:<36}{shard['bytes'] / 2**20:>8.1f} MiB  SHA-256 {shard['sha256']}")
    return 0


def encoded(images: ImageLevels) -> Iterator[bytes]:
    """Each image as a PNG: 8 bits a channel, from which its levels are read again."""
    for levels in images.levels:
        file = io.BytesIO()
        images_from_levels(levels[None], images.num_levels, "pil")[0].save(file, "png")
        yield file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
