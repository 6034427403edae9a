"""Images that can't be decoded, left out where that was asked for."""

from __future__ import annotations

from typing import Any

import datasets

from vdm_hub.data.images import Decoder
from vdm_hub.errors import warn


def without_corrupt(dataset: Any, image_column: str, decoder: Decoder) -> Any:
    """The images that can be decoded, in their order; each of the others is named in a warning.

    Of a stream they are left out where they come by: before shuffling, so that its order stays a function of the seed,
    and a stream that starts again later leaves out the same.

    Args:
        dataset: A `datasets.Dataset` or `datasets.IterableDataset` with the image column not decoded.
        image_column: The column that holds the images.
        decoder: What decodes them.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.filter(
            lambda encoded, index: _is_whole(encoded, decoder, index), with_indices=True, input_columns=[image_column]
        )
    whole = [index for index, row in enumerate(dataset) if _is_whole(row[image_column], decoder, index)]
    return dataset if len(whole) == len(dataset) else dataset.select(whole)


def _is_whole(encoded: Any, decoder: Decoder, index: int) -> bool:
    why = decoder.check(encoded, index)
    if why:
        warn(f"{why}, and is left out.", stacklevel=2)
    return not why
