"""The records that a run and a measurement leave: what a card says of a model, and where either goes on, is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from vdm_hub.errors import CheckpointError
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.schemas import Within, check_record

Whole = Annotated[int, Within(0, 2**63)]
Text = Annotated[str, Within(0, 10_000)]
Figure = Annotated[float, Within(-1e9, 1e9)]
Positive = Annotated[float, Within(0, 1e12)]


class Images(TypedDict, total=False):
    """See `vdm_hub.evaluation.provenance.describe_images`."""

    name: Text | None
    config: Text | None
    split: Text | None
    images: Whole | None
    shape: list[Whole]
    levels: Whole
    resolution: Whole | None
    color: Text
    image_column: Text
    label_column: Text
    max_images: Whole
    resized: bool | None
    fingerprint: Text | None


class Evaluation(TypedDict):
    """What ``vdm-hub evaluate --json`` prints."""

    bits_per_dim: Figure
    standard_error: Positive | None
    standard_error_over_images: Positive | None
    terms: dict[str, Figure]
    num_images: Whole
    network_evaluations: Whole
    replicates: Whole
    transitions: Whole | None
    is_bound: bool
    method: Text
    dimensions: Whole
    weights: Text
    seed: NotRequired[Whole | None]
    dataset: NotRequired[Images | None]
    notes: NotRequired[list[Text]]
    versions: NotRequired[dict[str, Text | None]]
    probability_flow: NotRequired[dict[str, Any]]
    importance_weights: NotRequired[dict[str, Any]]
    clipped: NotRequired[dict[str, Any]]
    hierarchy: NotRequired[dict[str, Any]]


class Validation(TypedDict):
    """The last measurement of the images that were held out in training."""

    step: Whole
    bits_per_dim: Figure
    standard_error: Positive | None
    images: Whole | None


class Run(TypedDict, total=False):
    """What training writes into ``run.json``."""

    command: Text
    versions: dict[str, Text | None]
    plugins: dict[str, Text | None]
    git: dict[str, Any] | None
    dataset: Images
    augmentation: dict[str, bool]
    steps: Whole
    training_seconds: Positive
    processes: Whole
    gradient_accumulation_steps: Whole
    global_batch_size: Whole
    device: Text
    mixed_precision: Text | None
    parameters: dict[str, Whole]
    validation: Validation


class History(TypedDict, total=False):
    """What training writes into ``history.json``: columns of one length, each with the step."""

    train: dict[str, list[Figure]]
    validation: dict[str, list[Figure]]


def read_record(path: Path, schema: type) -> dict[str, Any]:
    """A record, or empty where there is no such file.

    Args:
        path: The JSON file.
        schema: Such as `Evaluation`.

    Raises:
        CheckpointError: It is damaged, or not what was written.
    """
    if not path.is_file():
        return {}
    record = read_json(path)
    check_record(schema, record, str(path))
    return record


def read_history(path: Path) -> dict[str, Any]:
    """The course of training, or empty where there is no such file.

    Raises:
        CheckpointError: It is damaged, or its columns differ in length.
    """
    record = read_record(path, History)
    for part in record.keys() & History.__annotations__.keys():
        columns = record[part]
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1 or not {"step", "bits_per_dim"} <= columns.keys():
            raise CheckpointError(f"{path}: the columns of {part} do not belong together: it was changed; remove it.")
    return record
