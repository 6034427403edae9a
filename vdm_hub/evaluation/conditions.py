"""What a network is told of the images of a dataset: the class or the caption of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_hub.data.captions import CAPTIONS, EMPTY
from vdm_hub.data.conditions import CLASS_LABELS, Candidates, Condition
from vdm_hub.data.images import ImageLevels, ImageStream, labels_as
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.models.text_conditions import TextCondition
from vdm_hub.pipelines.base import LikelihoodPipeline

Images = ImageLevels | ImageStream
MOST_CAPTIONS = 1000
"""The most captions that each image is measured or classified under, where nobody names them."""


@dataclass(frozen=True, eq=False)
class Told:
    """What the network is told of some images.

    Args:
        condition: Of the model; of captions with their encodings.
        entries: The condition's entry of each image, int64, (N,).
        texts: Of captions, by their numbers.
    """

    condition: Condition
    entries: Tensor
    texts: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The SHA-256 of all of it."""
        return self.condition.key(self.entries)

    def mixture(self) -> Candidates:
        """The model's classes, or the captions of the images' dataset.

        Raises:
            ConfigurationError: They are fewer than two, or the captions very many.
        """
        if not self.texts:
            return self.condition.choose()
        names = different(self.texts, self.entries)
        return Candidates(self.condition, torch.tensor([self.texts.index(one) for one in names]), names)


def told_of(pipeline: LikelihoodPipeline, images: Any, known: Mapping[str, Tensor]) -> Told | None:
    """What a pipeline's network is to be told of images; ``None`` of an unconditional one.

    Args:
        pipeline: The model.
        images: The images.
        known: What else than their levels is known of each, as `read_images` gives it.

    Raises:
        DataError: They have no labels or no captions, or one is of no class of the model's.
    """
    condition = pipeline.condition
    if isinstance(condition, TextCondition):
        told = condition.of_images(images.captions)
        assert images.captions is not None
        return Told(told, known[CAPTIONS], images.captions.texts)
    classes = pipeline.class_condition
    if classes is None:
        return None
    return Told(classes, labels_as(known.get(CLASS_LABELS), images.class_names, classes))


def names_of(pipeline: LikelihoodPipeline, images: Images, known: Mapping[str, Tensor]) -> list[str] | None:
    """The name of the class, or the caption, of each image; ``None`` where that is not known. See `told_of`."""
    if pipeline.text_condition is not None:
        if images.captions is None:
            return None
        return [images.captions.texts[number] for number in known[CAPTIONS].tolist()]
    classes, labels = pipeline.class_condition, known.get(CLASS_LABELS)
    if classes is None or labels is None:
        return None
    return [classes.name_of(number) for number in labels_as(labels, images.class_names, classes).tolist()]


def different(texts: Sequence[str], numbers: Tensor) -> tuple[str, ...]:
    """The different captions of a dataset, in the order of their numbers; the empty one where an image has it.

    Raises:
        ConfigurationError: They are fewer than two, or very many.
    """
    found = tuple(text for number, text in enumerate(texts) if text != EMPTY or bool((numbers == number).any()))
    if not 2 <= len(found) <= MOST_CAPTIONS:
        raise ConfigurationError(
            f"the images have {len(found)} different captions, the first is {shortened(found[0], 200)}, and the "
            f"network is to be told each: take images of 2 to {MOST_CAPTIONS}, or name candidates to classify."
        )
    return found
