"""The labels of a dataset: whole numbers of classes, and nothing else."""

from __future__ import annotations

import datasets
import torch
from torch import Tensor

from vdm_hub.errors import DataError

_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def read_labels(dataset: datasets.Dataset, column: str, note: str = "") -> Tensor:
    """The labels of a column of integers or of `datasets.ClassLabel`, int64 of shape (N,).

    Args:
        dataset: Its images need not be decoded.
        column: The column.
        note: What to add where there is no such column.

    Raises:
        DataError: There is no such column, it holds anything else, or a label is missing, negative or no class.

    >>> read_labels(datasets.Dataset.from_dict({"label": [2, 0]}), "label")
    tensor([2, 0])
    """
    if column not in dataset.column_names:
        raise DataError(f"no column {column!r}: the columns are {', '.join(dataset.column_names)}.{note}")
    feature = dataset.features[column]
    is_class = isinstance(feature, datasets.ClassLabel)
    if not holds_labels(feature):
        first = str(dataset[0][column])[:40] if len(dataset) else ""
        raise DataError(
            f"the column {column!r} holds {str(feature)[:200]} (first {first!r}): labels are integers or ClassLabel, "
            f"from 0. Name another column, or number the classes."
        )
    labels = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    count = feature.num_classes if is_class else None
    limit = 2**63 if count is None else count
    wrong = next((row for row, label in enumerate(labels) if label is None or not 0 <= label < limit), None)
    if wrong is not None:
        classes = "0 or more" if count is None else f"0 to {count - 1}, for the column has {count} classes"
        raise DataError(
            f"row {wrong} of the column {column!r} holds {labels[wrong]}, and labels are {classes}: leave out the "
            f"images without a label, or name another column."
        )
    return torch.tensor(labels, dtype=torch.int64)


def holds_labels(feature: object) -> bool:
    """Whether a column of this kind may hold labels: integers, or `datasets.ClassLabel`.

    >>> holds_labels(datasets.Value("uint8")), holds_labels(datasets.Value("bool"))
    (True, False)
    """
    is_integer = isinstance(feature, datasets.Value) and feature.dtype in _INTEGERS
    return is_integer or isinstance(feature, datasets.ClassLabel)
