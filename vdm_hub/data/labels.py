"""The labels of a dataset: whole numbers of classes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from vdm_hub.errors import DataError, shortened

_INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


class UntoldImagesError(DataError):
    """The error for a dataset without the column that holds what a network is told of each image."""


def read_labels(dataset: datasets.Dataset, column: str, note: str = "") -> Tensor:
    """The labels of a column of integers or of `datasets.ClassLabel`, int64 of shape (N,).

    Args:
        dataset: Its images need not be decoded.
        column: The column.
        note: What to add where there is no such column.

    Raises:
        UntoldImagesError: There is no such column.
        DataError: It holds anything else, or a label is missing, negative or no class.

    >>> read_labels(datasets.Dataset.from_dict({"label": [2, 0]}), "label")
    tensor([2, 0])
    """
    if column not in dataset.column_names:
        raise no_such_column(column, dataset.column_names, note)
    feature = dataset.features[column]
    if not holds_labels(feature):
        raise no_labels(column, feature, str(dataset[0][column])[:40] if len(dataset) else "")
    labels = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return as_labels(labels, column, number_of_classes(feature))


def as_labels(
    values: Sequence[Any], column: str, classes: int | None = None, rows: Sequence[int | None] | None = None
) -> Tensor:
    """The values of a column as labels, int64 of shape (N,).

    Args:
        values: As the dataset has them.
        column: Their column, for messages.
        classes: How many classes the column has, where it says so.
        rows: Their numbers in the dataset, for messages; from 0 where not given, and ``None`` where it has none.

    Raises:
        DataError: One is missing, negative, no class, or no whole number.
    """
    limit = 2**63 if classes is None else classes
    for place, label in enumerate(values):
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < limit:
            continue
        number = place if rows is None else rows[place]
        known = "0 or more" if classes is None else f"0 to {classes - 1}, as there are {classes} classes"
        raise DataError(
            f"{'a row' if number is None else f'row {number}'} of the column {column!r} holds {shortened(label)}, and "
            f"labels are {known}: leave out the images without a label, or name another column."
        )
    return torch.tensor(values, dtype=torch.int64)


def no_such_column(column: str, columns: Iterable[str], note: str = "") -> UntoldImagesError:
    """The error for a column that is not there."""
    return UntoldImagesError(f"no column {column!r}: the columns are {', '.join(columns)}.{note}")


def no_labels(column: str, feature: object, first: str) -> DataError:
    """The error for a column of another kind."""
    return DataError(
        f"the column {column!r} holds {str(feature)[:200]} (first {first!r}): labels are integers or ClassLabel, "
        f"from 0. Name another column, or number the classes."
    )


def number_of_classes(feature: object) -> int | None:
    """How many classes a column has, where it says so.

    >>> number_of_classes(datasets.ClassLabel(names=["cat", "dog"])), number_of_classes(datasets.Value("uint8"))
    (2, None)
    """
    return feature.num_classes if isinstance(feature, datasets.ClassLabel) else None


def names_of_classes(feature: object) -> tuple[str, ...] | None:
    """The names of a column's classes, in their order, where it has any."""
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else None


def holds_labels(feature: object) -> bool:
    """Whether a column of this kind may hold labels: integers, or `datasets.ClassLabel`.

    >>> holds_labels(datasets.Value("uint8")), holds_labels(datasets.Value("bool"))
    (True, False)
    """
    is_integer = isinstance(feature, datasets.Value) and feature.dtype in _INTEGERS
    return is_integer or isinstance(feature, datasets.ClassLabel)
