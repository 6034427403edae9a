"""The images that a pipeline is measured on, read as those that it was trained on unless the user says otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from vdm_hub.data.captions import described_captions
from vdm_hub.data.colors import Color
from vdm_hub.data.held_out import SPLIT, names_held_out
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.labels import UntoldImagesError
from vdm_hub.data.loading import load_split
from vdm_hub.data.preprocessing import HeldOut
from vdm_hub.data.sources import UnknownColumnError, UnknownSplitError
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.evaluation.provenance import describe_images
from vdm_hub.pipelines.base import LikelihoodPipeline

_AS_THEY_ARE: dict[str, Any] = {"resolution": None, "color": "auto", "image_column": "image"}


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
    caption_column: str | None = None,
    max_images: int | None = None,
    say: Callable[[str], None] | None = None,
    must_be_told: bool = True,
) -> tuple[ImageLevels, dict[str, Any], list[str]]:
    """The images of a split as the model's levels.

    Args:
        pipeline: The model; what is not given here is done as it says in its `preprocessing`.
        source: The dataset.
        split: Of the dataset, or ``held_out`` (or a slice of that): what the model's run held out of its training
            split. Not given: ``test``, or ``held_out`` where the dataset has no such split.
        config_name: The configuration of the dataset, where it has several.
        image_column: The column that holds the images.
        color: ``"auto"``, ``"grey"`` or ``"rgb"``.
        resolution: Resize the shorter side and crop the centre.
        label_column: Take the labels from this column; not given, of a class-conditional model from the one that it
            was trained with.
        caption_column: Take the captions from this column; not given, of a model that was trained with captions from
            the column, or by the template, of its training.
        max_images: Take this many images, from the start.
        say: As `vdm_hub.data.loading.load_split` takes it.
        must_be_told: Whether the images must have labels or captions, where no column is named.

    Returns:
        The images; what `vdm_hub.evaluation.provenance.describe_images` says of them; and what the reader of a figure
        must know, one sentence each.

    Raises:
        DataError: There are no such images, or those that were held out can't be chosen again.
    """
    given = {"resolution": resolution, "color": color, "image_column": image_column}
    given = {name: value for name, value in given.items() if value is not None}
    used, notes = _as_trained(pipeline, given)
    told = _told(pipeline, label_column, caption_column)
    load = partial(
        load_split,
        source,
        config_name=config_name,
        num_levels=pipeline.num_levels,
        max_samples=max_images,
        say=say,
        held_out=pipeline.held_out,
    )
    place = (split, used, "image_column" not in given, pipeline.held_out is not None)
    try:
        images, split, column = _load(partial(load, **told), *place)
    except UntoldImagesError as error:
        if must_be_told or label_column is not None or caption_column is not None:
            raise
        images, split, column = _load(load, *place)
        notes.append(f"what the images are is not known, so nor is how often it was found: {error}")
        told = {}
    if column != used["image_column"]:
        notes.append(f"the images were read from the column {column!r}: there is no {used['image_column']!r}")
    description = describe_images(images, source, split, config=config_name, **used | {"image_column": column})
    description |= told
    description |= {} if max_images is None else {"max_images": max_images}
    if pipeline.held_out is not None and split == SPLIT and max_images is None:
        notes += _other_images(pipeline.held_out, description["fingerprint"])
    return images, description, notes


def _told(pipeline: LikelihoodPipeline, label_column: str | None, caption_column: str | None) -> dict[str, Any]:
    """The columns that hold what the model is told of each image: those of its training, unless said otherwise."""
    given = {"label_column": label_column, "caption_column": caption_column}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if pipeline.text_condition is not None:
        if caption_column is not None:
            return {"caption_column": caption_column}
        trained = described_captions(pipeline.config.get("captions"))
        return {name: value for name, value in (trained | asked).items() if value is not None}
    classes = pipeline.config.get("classes")
    return ({"label_column": classes["column"]} if classes else {}) | asked


def images_of(
    arguments: argparse.Namespace,
    pipeline: LikelihoodPipeline,
    say: Callable[[str], None],
    must_be_told: bool = True,
) -> tuple[ImageLevels, dict[str, Any], list[str]]:
    """The images that a command line names; see `load_images`.

    Raises:
        ConfigurationError: It names a column of what the network is not told.
    """
    _check_columns(arguments, pipeline)
    return load_images(
        pipeline,
        arguments.dataset_name,
        arguments.split,
        config_name=arguments.dataset_config_name,
        image_column=arguments.image_column,
        color=arguments.color,
        resolution=arguments.resolution,
        label_column=arguments.label_column,
        caption_column=arguments.caption_column,
        max_images=arguments.max_images,
        say=say,
        must_be_told=must_be_told,
    )


def _check_columns(arguments: argparse.Namespace, pipeline: LikelihoodPipeline) -> None:
    """Refuse a column of what the network is not told."""
    text = pipeline.text_condition
    knows = "is not class-conditional" if text is None else "is conditioned on captions"
    if arguments.label_column is not None and pipeline.num_classes is None and (text is None or text.template is None):
        raise ConfigurationError(
            f"--label_column is {arguments.label_column!r}, and the network {knows}: leave it out."
        )
    if arguments.caption_column is not None and text is None:
        raise ConfigurationError(
            f"--caption_column is {arguments.caption_column!r}, and the network is not conditioned on captions: leave "
            f"it out."
        )


def _as_trained(pipeline: LikelihoodPipeline, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The preprocessing to read the images with, and the fields of it that differ from the model's training."""
    trained: dict[str, Any] = _AS_THEY_ARE | dict(pipeline.preprocessing or {})
    used = {name: given.get(name, trained[name]) for name in _AS_THEY_ARE}
    other = [] if pipeline.preprocessing is None else [name for name in given if given[name] != trained[name]]
    return used, [f"{name} is {given[name]}, and the model was trained with {trained[name]}" for name in other]


def _load(
    load: Callable[..., ImageLevels], split: str | None, used: dict[str, Any], any_column: bool, held_out: bool
) -> tuple[ImageLevels, str, str]:
    """The images, and the names of their split and their column."""
    try:
        return _load_column(load, split or "test", used, any_column)
    except UnknownSplitError as error:
        if split is None and held_out:
            return _load_column(load, SPLIT, used, any_column)
        if not names_held_out(split or ""):
            raise
        remedy = "a run holds images out with test_size, or name a split of the dataset"
        raise DataError(f"the model knows of no images that were held out of its training: {remedy}.") from error


def _load_column(
    load: Callable[..., ImageLevels], split: str, used: dict[str, Any], any_column: bool
) -> tuple[ImageLevels, str, str]:
    """The images of the training data's column; where other data have none of that name, of the usual one."""
    usual, column = _AS_THEY_ARE["image_column"], used["image_column"]
    try:
        return load(split, **used), split, column
    except UnknownColumnError as error:
        if column == usual or not any_column:
            raise
        try:
            return load(split, **used | {"image_column": usual}), split, usual
        except UnknownColumnError:
            raise error from None


def _other_images(held_out: HeldOut, fingerprint: str) -> list[str]:
    if fingerprint == held_out["fingerprint"]:
        return []
    return [
        f"these are not the very images that the run held out and measured (fingerprint {fingerprint[:19]}..., then "
        f"{str(held_out['fingerprint'])[:19]}...): the dataset has changed, or they were read otherwise; if others "
        f"were chosen, the model may have been trained on some of them"
    ]
