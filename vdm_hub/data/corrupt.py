"""Images that can't be decoded, left out where that was asked for."""

from __future__ import annotations

from typing import Any

import datasets

from vdm_hub.data.images import ImageReader
from vdm_hub.errors import warn


def without_corrupt(dataset: Any, image_column: str, reader: ImageReader) -> Any:
    """The images that can be decoded, in their order; each of the others is named in a warning.

    Of a stream they are left out where they come by: before shuffling, so that its order stays a function of the seed,
    and a stream that starts again later leaves out the same.

    Args:
        dataset: A `datasets.Dataset` or `datasets.IterableDataset` with the image column not decoded.
        image_column: The column that holds the images.
        reader: What reads them.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.filter(
            lambda encoded, index: _is_whole(encoded, reader, index), with_indices=True, input_columns=[image_column]
        )
    whole = [index for index, row in enumerate(dataset) if _is_whole(row[image_column], reader, index)]
    return dataset if len(whole) == len(dataset) else dataset.select(whole)


def _is_whole(encoded: Any, reader: ImageReader, index: int) -> bool:
    why = reader.check(encoded, index)
    if why:
        warn(f"{why}, and is left out.", stacklevel=2)
    return not why
