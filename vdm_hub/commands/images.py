"""The images that a pipeline is measured on, read as those that it was trained on unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vdm_hub.data.held_out import SPLIT, names_held_out
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.loading import load_split
from vdm_hub.data.sources import UnknownSplitError
from vdm_hub.errors import DataError
from vdm_hub.evaluation.provenance import describe_images
from vdm_hub.likelihood_pipeline import LikelihoodPipeline
from vdm_hub.pixels import Color
from vdm_hub.preprocessing import HeldOut, Preprocessing

_AS_THEY_ARE: Preprocessing = {"resolution": None, "color": "auto", "image_column": "image"}


def load_images(
    pipeline: LikelihoodPipeline,
    source: str,
    split: str | None = None,
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    color: Color | None = None,
    resolution: int | None = None,
    label_column: str | None = None,
    max_images: int | None = None,
    say: Callable[[str], None] | None = None,
    default_split: str = "test",
) -> tuple[ImageLevels, dict[str, Any], list[str]]:
    """The images of a split as the model's levels.

    Args:
        pipeline: The model; what is not given here is done as it says in its `preprocessing`.
        source: The dataset.
        split: Of the dataset, or ``held_out`` (or a slice of that): what the model's run held out of its training
            split. Not given: ``default_split``, or ``held_out`` where the dataset has no such split.
        config_name: The configuration of the dataset, where it has several.
        image_column: The column that holds the images.
        color: ``"auto"``, ``"grey"`` or ``"rgb"``.
        resolution: Resize the shorter side and crop the centre.
        label_column: Also take the labels from this column.
        max_images: Take this many images, from the start.
        say: As `vdm_hub.data.loading.load_split` takes it.
        default_split: Instead of a split.

    Returns:
        The images; what `vdm_hub.evaluation.provenance.describe_images` says of them; and what the reader of a figure
        must know, one sentence each.

    Raises:
        DataError: There are no such images, or those that were held out can't be chosen again.
    """
    given = {"resolution": resolution, "color": color, "image_column": image_column}
    given = {name: value for name, value in given.items() if value is not None}
    trained = {**_AS_THEY_ARE, **(pipeline.preprocessing or {})}
    used: Any = {name: given.get(name, trained[name]) for name in _AS_THEY_ARE}
    held_out = pipeline.held_out

    def load(split: str) -> ImageLevels:
        chosen: dict[str, Any] = {
            "config_name": config_name,
            "label_column": label_column,
            "max_samples": max_images,
            "say": say,
        }
        return load_split(source, split, num_levels=pipeline.num_levels, held_out=held_out, **chosen, **used)

    split = split or default_split
    try:
        images = load(split)
    except UnknownSplitError as error:
        if names_held_out(split):
            remedy = "a run holds images out with test_size, or name a split of the dataset"
            raise DataError(f"the model knows of no images that were held out of its training: {remedy}.") from error
        if split != default_split or held_out is None:
            raise
        split = split.replace(split.partition("[")[0], SPLIT, 1)
        images = load(split)
    told = describe_images(images, source, split, config=config_name, **used)
    told |= {} if label_column is None else {"label_column": label_column}
    told |= {} if max_images is None else {"max_images": max_images}
    notes = _other_options(pipeline.preprocessing, given)
    if held_out is not None and split == SPLIT and max_images is None:
        notes += _other_images(held_out, told["fingerprint"])
    return images, told, notes


def _other_options(trained: Preprocessing | None, given: dict[str, Any]) -> list[str]:
    """What was given and is not as the model was trained."""
    known: dict[str, Any] = dict(trained or {})
    other = [name for name, value in given.items() if name in known and known[name] != value]
    return [f"{name} is {given[name]}, and the model was trained with {known[name]}" for name in other]


def _other_images(held_out: HeldOut, fingerprint: str) -> list[str]:
    if fingerprint == held_out["fingerprint"]:
        return []
    return [
        f"these are not the very images that the run held out and measured (fingerprint {fingerprint[:19]}..., then "
        f"{str(held_out['fingerprint'])[:19]}...): the dataset has changed, or they were read otherwise; if others "
        f"were chosen, the model may have been trained on some of them"
    ]
