"""How a model's images become levels, and which of them it never saw: two mappings that travel with its pipeline."""

# No `from __future__ import annotations`: the check reads the types themselves.
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError

from vdm_hub.errors import ConfigurationError


def _from(least: float, most: float = float("inf")) -> Callable[[Any], None]:
    """A check of a number's range; what is no number is the type's affair."""

    def check(value: Any) -> None:
        if isinstance(value, int | float) and not least <= value <= most:
            raise ValueError(f"it must be a number from {least} to {most}")

    return check


class Preprocessing(TypedDict, total=False):
    """What is done to images before they are a model's levels. What is not said is not done.

    Attributes:
        resolution: The shorter side is resized to so many pixels, and a square is cropped; ``None`` resizes nothing.
        center_crop: Whether training cropped the centre, too, and no random square; what is measured always is.
        color: ``auto`` takes grey and RGB as they are; ``grey`` and ``rgb`` convert.
        num_levels: K.
        image_column: The column of the training dataset that held the images.
    """

    resolution: Annotated[int | None, _from(1)]
    center_crop: bool
    color: Literal["auto", "grey", "rgb"]
    num_levels: Annotated[int, _from(2, 256)]
    image_column: str


class HeldOut(TypedDict):
    """How the test images were held out of the training split, so that the same ones can be chosen again.

    Attributes:
        split: The training split.
        images: How many images it had.
        size: How many of them are held out.
        seed: Of the choice.
        label_column: The column of the classes over which they are spread; ``None`` for a choice by the seed alone.
        skip_corrupt: Whether those that can't be decoded were left out, after the choice.
        fingerprint: Of the held-out images as levels, where they were decoded:
            `vdm_hub.evaluation.provenance.fingerprint`.
    """

    split: str
    images: Annotated[int, _from(2)]
    size: Annotated[int, _from(1)]
    seed: Annotated[int, _from(0, 2**32 - 1)]
    label_column: str | None
    skip_corrupt: bool
    fingerprint: str | None


M = TypeVar("M", Preprocessing, HeldOut)


def check_mapping(schema: Callable[..., M], name: str, value: Any) -> M | None:
    """The mapping itself, a copy; ``None`` where there is none.

    Raises:
        ConfigurationError: A key is unknown or missing, or a value has another type or range.

    >>> check_mapping(Preprocessing, "preprocessing", {"resolution": "large"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    vdm_hub.errors.ConfigurationError: preprocessing is {'resolution': 'large'}: ...
    """
    if value is None:
        return None
    typed: Any = schema
    known, needed = set(typed.__annotations__), typed.__required_keys__
    remedy = f"give a mapping of {', '.join(sorted(known))}, or leave it out"
    if not isinstance(value, Mapping) or not needed <= set(value) <= known:
        raise ConfigurationError(f"{name} is {value!r:.300}: {remedy}.")
    mapping: Any = dict(value)
    try:
        validate_typed_dict(typed, mapping)
    except StrictDataclassError as error:
        why = " ".join(str(error).split())
        raise ConfigurationError(f"{name} is {value!r:.300}: {remedy} ({why:.300}).") from error
    found: M = mapping
    return found
