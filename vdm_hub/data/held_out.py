"""The images that are held out of a training split: chosen by a fixed seed, spread over the classes, found again."""

from __future__ import annotations

import datasets
import numpy as np
import numpy.typing as npt

from vdm_hub.data.labels import holds_labels, read_labels
from vdm_hub.data.preprocessing import HeldOut
from vdm_hub.errors import DataError, in_one_line, warn

SPLIT = "held_out"
"""The name of the held-out images, where a split is named."""

SEED = 0
"""The seed of the choice: a constant, so that runs of different seeds are tested on the same images."""

_LABELS = ("label", "labels", "class", "target")  # of columns of integers; a ClassLabel may have any name


def number_to_hold_out(size: float, images: int) -> int:
    """How many of so many images a share, or a number, is: at least one.

    >>> number_to_hold_out(0.1, 42), number_to_hold_out(7, 42)
    (4, 7)
    """
    return int(size) if size >= 1 else max(1, round(size * images))


def hold_out(
    dataset: datasets.Dataset, split: str, size: float, *, skip_corrupt: bool = False
) -> tuple[datasets.Dataset, datasets.Dataset, HeldOut]:
    """A training split without the images that are held out, those images, and how to choose them again.

    Args:
        dataset: The training split.
        split: Its name.
        size: A share below 1, or how many.
        skip_corrupt: To be noted: whether the images that can't be decoded will be left out of both.

    Raises:
        DataError: Nothing would be left to train on.
    """
    rows, number = len(dataset), number_to_hold_out(size, len(dataset))
    if number >= rows:
        raise DataError(f"test_size is {size}, and {split!r} has {rows} images: hold out fewer with --test_size.")
    column, why = label_column(dataset), "they can't be spread so thinly."
    kept, held = list[int](), None
    try:
        labels = None if column is None else read_labels(dataset, column).numpy()
        kept, held = _choose(rows, number, SEED, labels)
    except DataError as error:
        why = str(error)
    if held is None:
        warn(
            f"{number} of {rows} images are held out by the seed alone, and not spread over the classes of the column "
            f"{column!r}: {why}",
            stacklevel=2,
        )
        column = None
        kept, held = _choose(rows, number, SEED, None)
    assert held is not None
    record: HeldOut = {
        "split": split,
        "images": rows,
        "size": number,
        "seed": SEED,
        "label_column": column,
        "skip_corrupt": skip_corrupt,
        "fingerprint": None,
    }
    return dataset.select(kept), dataset.select(held), record


def choose_again(dataset: datasets.Dataset, source: str, record: HeldOut, split: str = SPLIT) -> datasets.Dataset:
    """The images that a run held out, out of the split that it trained on.

    Args:
        dataset: That split.
        source: The dataset's name, for messages.
        record: How they were chosen.
        split: ``held_out``, or a slice of it, such as ``held_out[:100]``.

    Raises:
        DataError: The split has not as many images as it had, or not those labels: the same can't be chosen.
    """
    rows, column, held, why = len(dataset), record["label_column"], None, ""
    if rows == record["images"]:
        try:
            labels = None if column is None else read_labels(dataset, column).numpy()
            _, held = _choose(rows, record["size"], record["seed"], labels)
        except DataError as error:
            why = f" ({in_one_line(error)})"
    if held is None:
        raise DataError(
            f"the images that the run held out can't be chosen again: its split {record['split']!r} had "
            f"{record['images']} images{'' if column is None else f' with the column {column!r}'}, and {source!r} has "
            f"{rows} there{'' if rows != record['images'] else f', with other labels{why}'}. Some of another choice "
            f"would have been trained on: give the dataset as it was, or name a split with --split."
        )
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({SPLIT: len(held)})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"split is {split!r}, and {len(held)} images were held out ({in_one_line(error)}): write a part of them "
            f"like 'held_out[:{len(held)}]'."
        ) from error
    return dataset.select(held[part.from_ or 0 : part.to])


def names_held_out(split: str) -> bool:
    """Whether a split is that of the held-out images, or a slice of it.

    >>> names_held_out("held_out[:10]"), names_held_out("test")
    (True, False)
    """
    return split.partition("[")[0] == SPLIT


def label_column(dataset: datasets.Dataset) -> str | None:
    """The column that says an image's class: a ClassLabel, or integers of a usual name; ``None`` where none does.

    Where columns of a usual name hold something else, the first of them, which `read_labels` refuses with the reason.
    """
    features = dict(dataset.features or {})
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in _LABELS if name in features]
    named = [name for name in usual if name in classes]
    integers = [name for name in usual if holds_labels(features[name])]
    return next(iter([*named, *classes, *integers, *usual]), None)


def _choose(
    rows: int, number: int, seed: int, labels: npt.NDArray[np.int64] | None
) -> tuple[list[int], list[int] | None]:
    """The rows that are kept and those held out, each in their order; none where classes can't be spread so thinly."""
    from sklearn.model_selection import train_test_split  # here, as it takes half a second that other data need not

    candidates, classes = np.arange(rows), None
    if labels is not None:  # the only image of a class is one to train on
        _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        candidates = candidates[sizes[place] > 1]
        classes = labels[candidates]
    try:
        _, held = train_test_split(candidates, test_size=number, random_state=seed, stratify=classes)
    except ValueError:  # fewer images than classes, on one side or the other
        return [], None
    return sorted(set(range(rows)) - set(held.tolist())), sorted(held.tolist())
