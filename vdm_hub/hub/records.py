"""The records that a run and a measurement leave: what a card says of a model, and where either goes on, is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from vdm_hub.errors import CheckpointError
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.schemas import Within, check_record

Whole = Annotated[int, Within(0, 2**63)]
Count = Annotated[int, Within(1, 2**63)]
Text = Annotated[str, Within(0, 10_000)]
Figure = Annotated[float, Within(-1e12, 1e12)]
Positive = Annotated[float, Within(0, 1e12)]
Share = Annotated[float, Within(0, 1)]

_ROUNDING = 1e-6
"""How far a total may be from its terms, by their sizes: both are means of the same numbers, in float32 at worst."""
_CHANCE = 10
"""Standard errors below zero that an estimate may lie: a probability of levels is at most 1, so its bits are not."""


class Images(TypedDict):
    """See `vdm_hub.evaluation.provenance.describe_images`."""

    name: Text | None
    config: Text | None
    split: Text | None
    images: Whole | None
    shape: list[Count]
    levels: Count
    resolution: Count | None
    resized: bool | None
    fingerprint: Text | None
    color: NotRequired[Text]
    image_column: NotRequired[Text]
    label_column: NotRequired[Text]
    max_images: NotRequired[Count]


class _Flow(TypedDict):
    dequantization: Text
    divergence: Text
    probes: Count
    tolerance: Share
    max_steps: Count
    solver: Text
    steps_mean: Positive
    steps_max: Whole
    evaluations_per_solve: Positive


class _Weights(TypedDict):
    over: Text
    draws: Count
    effective_sample_size_mean: Positive
    effective_sample_size_min: Positive


class _Estimator(TypedDict):
    stratified: bool
    importance_sampling: bool
    control_variate: bool
    times_per_image: Count
    pilot_evaluations: Whole
    defensive: Share


class _Target(TypedDict):
    standard_error: Positive
    reached: bool
    max_replicates: Count
    max_evaluations: Whole | None
    ended_by: NotRequired[Text]


class _Latents(TypedDict):
    images: Whole
    information: Positive | list[Positive]
    mean: NotRequired[list[Figure]]
    standard_deviation: NotRequired[list[Positive]]


class _Hierarchy(TypedDict):
    depth: Count


class _Figures(TypedDict):
    bits_per_dim: Figure
    standard_error: Positive | None
    standard_error_over_images: Positive | None
    terms: dict[str, Figure]
    network_evaluations: Whole


class Evaluation(_Figures):
    """What ``vdm-hub evaluate --json`` prints."""

    num_images: Count
    replicates: Count
    transitions: Count | None
    is_bound: bool
    method: Literal["bound", "ode", "importance_weighted"]
    dimensions: Count
    weights: Text
    seed: Whole
    processes: Count
    versions: dict[str, Text | None]
    seconds: Positive
    seconds_before: NotRequired[Positive]
    device: NotRequired[Text]
    dtype: NotRequired[Text]
    dataset: NotRequired[Images]
    notes: NotRequired[list[Text]]
    decomposition: NotRequired[Text]
    estimator: NotRequired[_Estimator]
    target: NotRequired[_Target]
    probability_flow: NotRequired[_Flow]
    importance_weights: NotRequired[_Weights]
    hierarchy: NotRequired[_Hierarchy]
    latents: NotRequired[_Latents]
    clipped: NotRequired[_Figures]


class Validation(TypedDict):
    """The last measurement of the images that were held out in training."""

    step: Whole
    bits_per_dim: Figure
    standard_error: Positive | None
    images: Whole | None


class _Git(TypedDict):
    commit: Text
    dirty: bool


class Run(TypedDict):
    """What training writes into ``run.json``."""

    command: Text
    versions: dict[str, Text | None]
    plugins: dict[str, Text | None]
    git: _Git | None
    working_directory_git: NotRequired[_Git | None]
    dataset: Images
    augmentation: dict[str, bool]
    steps: Whole
    training_seconds: Positive
    processes: Count
    gradient_accumulation_steps: Count
    global_batch_size: Count
    device: Text
    mixed_precision: Text | None
    parameters: dict[str, Whole]
    validation: NotRequired[Validation]


class History(TypedDict):
    """What training writes into ``history.json``: columns of one length, each with the step."""

    train: dict[str, list[float]]
    validation: dict[str, list[float]]


def read_evaluation(path: Path) -> dict[str, Any]:
    """A measurement, or empty where there is no such file.

    Raises:
        CheckpointError: It is damaged, not what was written, or contradicts itself.
    """
    record = _read(path, Evaluation)
    for figures in [record, record.get("clipped")] if record else []:
        if figures is not None:
            _refuse(path, _contradictions(figures, exact="probability_flow" not in record))
    _refuse(path, _miscounted(record) if record else iter(()))
    return record


def read_run(path: Path) -> dict[str, Any]:
    """How a run came about, or empty where there is no such file.

    Raises:
        CheckpointError: It is damaged, not what was written, or contradicts itself.
    """
    record = _read(path, Run)
    if "validation" in record:
        _refuse(path, _contradictions(record["validation"]))
    return record


def read_history(path: Path) -> dict[str, Any]:
    """The course of training, or empty where there is no such file.

    Raises:
        CheckpointError: It is damaged, or its columns do not belong together.
    """
    record = _read(path, History)
    for part, columns in record.items():
        _refuse(path, (f"of {part} {what}" for what in _torn(columns)))
    return record


def _read(path: Path, schema: type) -> dict[str, Any]:
    if not path.is_file():
        return {}
    record = read_json(path)
    check_record(schema, record, str(path))
    return record


def _refuse(path: Path, contradictions: Iterator[str]) -> None:
    for what in contradictions:
        raise CheckpointError(f"{path}: {what}: it was changed. Measure again, or remove the file.")


def _contradictions(figures: Mapping[str, Any], exact: bool = True) -> Iterator[str]:
    """What figures say against each other; those of an ODE have a solver's error, which no standard error knows."""
    total, terms = figures["bits_per_dim"], figures.get("terms")
    if terms is not None and not _is_sum(total, terms.values()):
        yield f"bits_per_dim is {total}, and its terms sum to {sum(terms.values())}"
    errors = [figures.get(name) for name in ("standard_error", "standard_error_over_images")]
    if exact and total < -_CHANCE * max((error for error in errors if error is not None), default=math.inf):
        yield f"bits_per_dim is {total}, which no model of levels has"


def _miscounted(record: Mapping[str, Any]) -> Iterator[str]:
    for error, of in (("standard_error", "replicates"), ("standard_error_over_images", "num_images")):
        if (record[error] is None) != (record[of] < 2):
            yield f"{error} is {record[error]}, and {of} is {record[of]}"
    told = record.get("dataset")
    if told is not None and told["images"] not in (None, record["num_images"]):
        yield f"num_images is {record['num_images']}, and the dataset's images are {told['images']}"


def _torn(columns: Mapping[str, list[float]]) -> Iterator[str]:
    if len({len(values) for values in columns.values()}) > 1 or not {"step", "bits_per_dim"} <= columns.keys():
        yield "the columns do not belong together"
        return
    steps = columns["step"]
    if not all(isinstance(step, int) and step >= 0 for step in steps) or any(b <= a for a, b in pairwise(steps)):
        yield "the steps do not rise"
    terms = columns.keys() - {"step", "bits_per_dim", "standard_error", "learning_rate"}
    for row, total in enumerate(columns["bits_per_dim"]):
        if terms and not _is_sum(total, [columns[term][row] for term in terms]):
            yield f"bits_per_dim at step {steps[row]} is {total}, which is not the sum of its terms"
    for name in columns.keys() & {"standard_error", "learning_rate"}:
        if min(columns[name], default=0) < 0:
            yield f"{name} is {min(columns[name])}"


def _is_sum(total: float, terms: Any) -> bool:
    values = list(terms)
    return math.isclose(total, math.fsum(values), abs_tol=_ROUNDING * (1 + sum(map(abs, values))), rel_tol=0)
