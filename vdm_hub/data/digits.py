"""The embedded dataset: scikit-learn's digits, which need no network."""

from __future__ import annotations

import functools

import datasets
import numpy as np

from vdm_hub.data.levels import image_from_levels

NUM_LEVELS = 17
TEST_SIZE = 360


def digits() -> datasets.DatasetDict:
    """1,797 images of 8 x 8 pixels and 17 grey levels, with their labels.

    The split is ``train_test_split(test_size=360, random_state=0)``: 1,437 to train on, 360 to test.

    Returns:
        ``train`` and ``test`` with the columns ``image`` (mode L, level i of 17 stored as ``round(255 i/16)``) and
        ``label``.

    >>> digits()["test"]
    Dataset({
        features: ['image', 'label'],
        num_rows: 360
    })
    """
    return datasets.DatasetDict({split: dataset.with_format(None) for split, dataset in _digits().items()})


@functools.cache
def _digits() -> dict[str, datasets.Dataset]:
    """The splits, which are encoded once in a process."""
    from sklearn.datasets import load_digits  # here, as it takes half a second that other data need not
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    levels, labels = loaded.images.astype(np.uint8), loaded.target
    train, test, train_labels, test_labels = train_test_split(levels, labels, test_size=TEST_SIZE, random_state=0)
    return {"train": _dataset(train, train_labels), "test": _dataset(test, test_labels)}


def _dataset(levels: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    images = [image_from_levels(image[None], NUM_LEVELS) for image in levels]
    return datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
