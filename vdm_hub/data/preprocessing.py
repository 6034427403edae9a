"""How a model's images become levels, and which of them it never saw: two mappings that travel with its pipeline."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypedDict

from vdm_hub.hub.schemas import Like, Record, Within


class Preprocessing(TypedDict):
    """What is done to images before they are a model's levels.

    Attributes:
        resolution: The shorter side is resized to so many pixels, and a square is cropped; ``None`` resizes nothing.
        center_crop: Whether training cropped the centre, too, and no random square; what is measured always is.
        color: ``auto`` takes grey and RGB as they are; ``grey`` and ``rgb`` convert.
        num_levels: K.
        image_column: The column of the training dataset that held the images.
    """

    resolution: Annotated[int | None, Within(1, 65_536)]
    center_crop: bool
    color: Literal["auto", "grey", "rgb"]
    num_levels: Annotated[int, Within(2, 256)]
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
    images: Annotated[int, Within(2, 2**40)]
    size: Annotated[int, Within(1, 2**40)]
    seed: Annotated[int, Within(0, 2**32 - 1)]
    label_column: str | None
    skip_corrupt: bool
    fingerprint: Annotated[str, Like("sha256:[0-9a-f]{64}", "sha256: and 64 hexadecimal digits")] | None


PreprocessingMapping: TypeAlias = Annotated[dict[str, Any], Record(Preprocessing)]
HeldOutMapping: TypeAlias = Annotated[dict[str, Any], Record(HeldOut)]
