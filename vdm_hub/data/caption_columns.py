"""The captions of a dataset's column: texts, and nothing else."""

from __future__ import annotations

import datasets

from vdm_hub.data.captions import ImageCaptions, no_caption
from vdm_hub.data.labels import no_such_column
from vdm_hub.errors import DataError


def read_captions(dataset: datasets.Dataset, column: str, note: str = "") -> ImageCaptions:
    """The captions of a column of text.

    Args:
        dataset: Its images need not be decoded.
        column: The column.
        note: What to add where there is no such column.

    Raises:
        UntoldImagesError: There is no such column.
        DataError: It holds anything else, or a caption is missing.

    >>> read_captions(datasets.Dataset.from_dict({"text": ["a cat", "a dog"]}), "text").numbers
    tensor([1, 2])
    """
    if column not in dataset.column_names:
        raise no_such_column(column, dataset.column_names, note)
    feature = dataset.features[column]
    if not holds_captions(feature):
        raise no_captions(column, feature)
    captions = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    for row, one in enumerate(captions):
        if one is None:
            raise no_caption(row, column, one)
    return ImageCaptions.of(captions)


def no_captions(column: str, feature: object) -> DataError:
    """The error for a column of another kind."""
    return DataError(
        f"the column {column!r} holds {str(feature)[:200]}, and captions are texts, one for each image: name another "
        f"with --caption_column, or make captions from classes with --label_column and --caption_template."
    )


def holds_captions(feature: object) -> bool:
    """Whether a column of this kind holds texts.

    >>> holds_captions(datasets.Value("string")), holds_captions(datasets.List(datasets.Value("string")))
    (True, False)
    """
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
