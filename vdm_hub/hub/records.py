"""The records that a run and a measurement leave: what a card says of a model, and where either goes on, is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from vdm_hub import registry
from vdm_hub.errors import CheckpointError
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.schemas import Like, Within, check_record, fields_of_record

Whole = Annotated[int, Within(0, 2**48)]
Natural = Annotated[int, Within(1, 2**48)]
Text = Annotated[str, Within(0, 10_000)]
Figure = Annotated[float, Within(-1e12, 1e12)]
Positive = Annotated[float, Within(0, 1e12)]
Fraction = Annotated[float, Within(0, 1)]
Fingerprint = Annotated[str, Like("sha256:[0-9a-f]{64}", "sha256: and 64 hexadecimal digits")]
Versions = Annotated[dict[str, Text], Within(1, 1_000)]

_ROUNDING = 1e-6
"""The largest error of a total against its terms, by their sizes: means of the same numbers, in float32 at worst."""
_ERRORS = ("standard_error", "standard_error_over_images")
_CHANCE = 10
"""The standard errors that an estimate may lie below zero: a probability is at most 1, so its bits do not."""


class DatasetRecord(TypedDict):
    """The record of a dataset, as `vdm_hub.evaluation.provenance.describe_images` makes it."""

    name: Text | None
    config: Text | None
    split: Text | None
    images: Natural | None
    shape: Annotated[list[Natural], Within(3, 3)]
    levels: Annotated[int, Within(2, 256)]
    resolution: Natural | None
    resized: bool | None
    fingerprint: Fingerprint | None
    color: NotRequired[Text]
    image_column: NotRequired[Text]
    label_column: NotRequired[Text]
    caption_column: NotRequired[Text]
    caption_template: NotRequired[Text]
    max_images: NotRequired[Natural]


class TextsRecord(TypedDict):
    """The record of a dataset of texts, as `vdm_hub.evaluation.provenance.describe_windows` makes it."""

    name: Text | None
    config: Text | None
    split: Text | None
    windows: Natural | None
    shape: Annotated[list[Natural], Within(1, 1)]
    levels: Annotated[int, Within(2, 2**20)]
    window_context: Whole
    documents: Whole | None
    characters: Whole | None
    unknown_characters: Whole | None
    tokens: Whole | None
    bytes: Whole | None
    fingerprint: Fingerprint | None
    tokenizer: NotRequired[Fingerprint]
    text_column: NotRequired[Text]
    max_windows: NotRequired[Natural]


class _Flow(TypedDict):
    dequantization: Text
    divergence: Text
    probes: Natural
    tolerance: Fraction
    max_steps: Natural
    solver: Text
    steps_mean: Positive
    steps_max: Whole
    evaluations_per_solve: Positive
    dtype: NotRequired[Text]
    numerical_error: NotRequired[Figure]


class _Weights(TypedDict):
    over: Text
    draws: Natural
    effective_sample_size_mean: Positive
    effective_sample_size_min: Positive


class _Estimator(TypedDict):
    stratified: bool
    importance_sampling: bool
    control_variate: bool
    times_per_datum: Natural
    pilot_evaluations: Whole
    defensive: Fraction


class _OfPlugin(TypedDict):
    """What a plugin's likelihood method states of its protocol, by names of its own."""

    stated: dict[str, dict[str, Figure | Text | bool | None]]


class _Target(TypedDict):
    standard_error: Positive
    unit: NotRequired[Text]
    reached: bool
    max_replicates: Natural
    max_evaluations: Whole | None
    ended_by: NotRequired[Text]


class _Latents(TypedDict):
    images: Whole
    information: Positive | list[Positive]
    mean: NotRequired[list[Figure]]
    standard_deviation: NotRequired[list[Positive]]


class _Hierarchy(TypedDict):
    depth: Natural


class _Marginal(TypedDict):
    gain_bits: Figure
    most_bits: Positive
    standard_error: Positive | None
    standard_error_over_images: Positive | None
    monte_carlo_bias: Figure | None
    mixture_bits: Figure
    prior: Annotated[list[Fraction], Within(2, 2**20)]


class _Figures(TypedDict):
    bits_per_dim: Figure
    standard_error: Positive | None
    standard_error_over_images: Positive | None
    terms: dict[str, Figure]
    network_evaluations: Natural


class Evaluation(_Figures):
    """The record of an evaluation, as ``vdm-hub evaluate --json`` prints it."""

    num_images: Natural
    replicates: Natural
    transitions: Natural | None
    is_bound: bool
    method: Text
    dimensions: Natural | Positive
    bits_per_byte: NotRequired[Figure | None]
    standard_error_per_byte: NotRequired[Positive | None]
    standard_error_over_images_per_byte: NotRequired[Positive | None]
    bits_per_token: NotRequired[Figure]
    perplexity: NotRequired[Positive]
    tokens: NotRequired[Natural]
    bytes: NotRequired[Natural | None]
    weights: Fingerprint
    seed: Annotated[int, Within(0, 2**63)]
    processes: Natural
    versions: Versions
    seconds: Positive
    seconds_before: NotRequired[Positive]
    device: NotRequired[Text]
    dtype: NotRequired[Text]
    dataset: NotRequired[DatasetRecord | TextsRecord]
    condition: NotRequired[Text]
    notes: NotRequired[list[Text]]
    options: NotRequired[dict[str, Figure | Text | bool | None]]
    steps: NotRequired[Text]
    estimator: NotRequired[_Estimator]
    target: NotRequired[_Target]
    probability_flow: NotRequired[_Flow]
    importance_weights: NotRequired[_Weights]
    hierarchy: NotRequired[_Hierarchy]
    marginal: NotRequired[_Marginal]
    latents: NotRequired[_Latents]
    clipped: NotRequired[_Figures]


class ValidationRecord(TypedDict):
    """The record of the last measurement of images that were held out in training."""

    step: Whole
    bits_per_dim: Figure
    bits_per_byte: NotRequired[Figure]
    standard_error: Positive | None
    images: Natural | None


class _Git(TypedDict):
    commit: Text
    dirty: bool


class InitialRecord(TypedDict):
    """The record of the trained model that a run began from.

    Attributes:
        name: Its Hub id, or the last part of a folder's path.
        commit: On the Hub; ``None`` of a folder.
        pipeline: The class that it was saved as.
        weights: The fingerprint of its weights.
    """

    name: Text
    commit: Text | None
    pipeline: Text
    weights: Fingerprint


class RunRecord(TypedDict):
    """The record of a run, as training writes it into ``run.json``."""

    command: Text
    versions: Versions
    plugins: dict[str, Text | None]
    git: _Git | None
    working_directory_git: NotRequired[_Git | None]
    dataset: DatasetRecord | TextsRecord
    augmentation: dict[str, bool]
    text_encodings: NotRequired[Text]
    init_from: NotRequired[InitialRecord]
    steps: Whole
    training_seconds: Positive
    processes: Natural
    gradient_accumulation_steps: Natural
    global_batch_size: Natural
    device: Text
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"]
    parameters: dict[str, Whole]
    validation: NotRequired[ValidationRecord]


class HistoryRecord(TypedDict):
    """The record of a run's course, as ``history.json`` holds it: columns of one length, with the step."""

    train: dict[str, list[float]]
    validation: dict[str, list[float]]


def read_evaluation(path: Path) -> dict[str, Any]:
    """The record of a measurement, or an empty one where there is no such file.

    Raises:
        CheckpointError: It is damaged, not what was written, or contradicts itself.
    """
    record = read_json(path) if path.is_file() else {}
    if record:
        stated = _stated_by_plugin(record)
        check_record(_OfPlugin, {"stated": stated}, str(path))
        check_record(Evaluation, {name: value for name, value in record.items() if name not in stated}, str(path))
    for figures in [record, record.get("clipped")] if record else []:
        if figures is not None:
            refuse(path, _contradictions(figures, exact="probability_flow" not in record))
    refuse(path, _miscounted(record) if record else iter(()))
    refuse(path, _misscaled(record) if record else iter(()))
    refuse(path, _misread(record["dataset"]) if "dataset" in record else iter(()))
    return record


def _stated_by_plugin(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a likelihood method of a plugin has written in its own form; none of a method of the core."""
    if record.get("method", "bound") in registry.BUILT_INS["likelihood_methods"]:
        return {}
    forms = fields_of_record(Evaluation).keys() - {"estimator", "importance_weights"}
    return {name: value for name, value in record.items() if name not in forms}


def read_run(
    path: Path, recipe: Mapping[str, Any] | None = None, history: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The record of how a run came about, or an empty one where there is no such file.

    Args:
        path: The file.
        recipe: Of the run, as far as it is known.
        history: Of the run, as far as it is known.

    Raises:
        CheckpointError: It is damaged, not what was written, or contradicts itself, the recipe or the history.
    """
    record = _read(path, RunRecord)
    if record:
        check_run(record, path, recipe or {})
    if record and history:
        check_history(history, path, record["steps"])
    return record


def check_run(record: Mapping[str, Any], path: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse a run that contradicts itself or its recipe.

    Raises:
        CheckpointError: It does.
    """
    refuse(path, _contradictions(record["validation"]) if "validation" in record else iter(()))
    refuse(path, _misread(record["dataset"]))
    refuse(path, _mistaken(record, recipe))


def read_history(path: Path) -> dict[str, Any]:
    """The record of a run's course, or an empty one where there is no such file.

    Raises:
        CheckpointError: It is damaged, or its columns do not belong together.
    """
    record = _read(path, HistoryRecord)
    check_history(record, path)
    return record


def check_history(record: Mapping[str, Any], path: Path, steps: int | None = None) -> None:
    """Refuse a course of training whose columns do not belong together, or that goes on after so many steps.

    Raises:
        CheckpointError: It is such.
    """
    for part, columns in record.items():
        refuse(path, (f"of {part} {what}" for what in _torn(columns)))
        if steps is not None and max(columns["step"], default=0) > steps:
            refuse(path, iter([f"of {part} the last step is {columns['step'][-1]}, and the run has taken {steps}"]))


def _read(path: Path, schema: type) -> dict[str, Any]:
    if not path.is_file():
        return {}
    record = read_json(path)
    check_record(schema, record, str(path))
    return record


def refuse(path: Path, contradictions: Iterator[str]) -> None:
    """Raise a `CheckpointError` with the first of some contradictions, where there is one."""
    for what in contradictions:
        raise CheckpointError(f"{path}: {what}: it was changed. Measure again, or remove the file.")


def _contradictions(figures: Mapping[str, Any], exact: bool = True) -> Iterator[str]:
    """The contradictions between figures; those of an ODE have a solver's error, which no standard error knows."""
    total, terms = figures["bits_per_dim"], figures.get("terms")
    if terms is not None and not _is_sum(total, terms.values()):
        yield f"bits_per_dim is {total}, and its terms sum to {sum(terms.values())}"
    errors = [figures.get(name) for name in ("standard_error", "standard_error_over_images")]
    if exact and total < -_CHANCE * max((error for error in errors if error is not None), default=math.inf):
        yield f"bits_per_dim is {total}, which no model of levels has"


def _miscounted(record: Mapping[str, Any]) -> Iterator[str]:
    is_ours = record["method"] in ("bound", "ode", "importance_weighted")
    for error, of in (("standard_error", "replicates"), ("standard_error_over_images", "num_images")):
        draws_nothing = not is_ours and error == "standard_error" and record[error] == 0
        if (record[error] is None) != (record[of] < 2) and not draws_nothing:
            yield f"{error} is {record[error]}, and {of} is {record[of]}"
    by_flow, shown = "probability_flow" in record, record["replicates"] * record["num_images"]
    if record["method"] not in {one.name for one in registry.registrations("likelihood_methods")}:
        yield f"method is {record['method']!r}, and no method of that name is installed here"
    of_flow = {"bound": False, "ode": True}.get(record["method"], by_flow)
    if is_ours and record.get("options", {}).get("transitions") != record["transitions"]:
        yield f"transitions is {record['transitions']}, and its options are {record.get('options', {})}"
    if is_ours and (by_flow, record["is_bound"]) != (of_flow, not of_flow):
        yield f"is_bound is {record['is_bound']}, which no figure of the method {record['method']} is"
    if is_ours and record["standard_error"] == 0 and not by_flow:  # a plugin's may draw nothing
        yield "standard_error is 0, and the replicates are drawn independently"
    for figures in filter(None, [record, record.get("clipped")]):
        if "hierarchy" not in record and figures["network_evaluations"] < shown:
            yield f"network_evaluations is {figures['network_evaluations']}, and each of {shown} estimates takes one"
    marginal, dataset = record.get("marginal"), record.get("dataset")
    if marginal is not None and marginal["gain_bits"] > marginal["most_bits"] + _ROUNDING:
        yield f"the gain by a label is {marginal['gain_bits']} bits, and none is above {marginal['most_bits']}"
    if dataset is not None and _count(dataset) not in (None, record["num_images"]):
        yield f"num_images is {record['num_images']}, and the dataset's images are {_count(dataset)}"
    whole = None if dataset is None else math.prod(dataset["shape"])
    some = dataset is not None and "windows" in dataset  # of the tokens of a window those that are scored
    if whole is not None and (record["dimensions"] > whole if some else record["dimensions"] != whole):
        assert dataset is not None
        yield f"dimensions is {record['dimensions']}, and the dataset's shape is {dataset['shape']}"


def _misscaled(record: Mapping[str, Any]) -> Iterator[str]:
    """The contradictions between the figures of texts by token and by byte, which images have none of."""
    of_texts = {"bits_per_byte", "bits_per_token", "perplexity", "tokens", "bytes"}
    of_texts |= {f"{name}_per_byte" for name in _ERRORS}
    if missing := sorted(of_texts - record.keys()):
        if of_texts & record.keys():
            yield f"{missing[0]} is not said, and other figures of texts are"
        return
    total, by_byte, size = record["bits_per_dim"], record["bits_per_byte"], record["bytes"]
    if "dataset" in record and "windows" not in record["dataset"]:
        yield f"perplexity is {record['perplexity']}, and the dataset is one of images"
    if not math.isclose(record["bits_per_token"], total, rel_tol=_ROUNDING):
        yield f"bits_per_token is {record['bits_per_token']}, and bits_per_dim {total}"
    if not math.isclose(math.log2(max(record["perplexity"], 1e-300)), total, abs_tol=_ROUNDING, rel_tol=_ROUNDING):
        yield f"perplexity is {record['perplexity']}, which is not 2 to the {total} bits of a token"
    if (by_byte is None) != (size is None):
        yield f"bits_per_byte is {by_byte}, and bytes is {size}"
    elif size is not None:
        scaled = {name: (record[f"{name}_per_byte"], record[name]) for name in _ERRORS}
        for name, (each, of_token) in ({"bits": (by_byte, total)} | scaled).items():
            known = None if of_token is None else of_token * record["tokens"] / size
            if (each is None) != (known is None) or not math.isclose(each or 0, known or 0, rel_tol=1e-3):
                yield f"the {name} of a byte is {each}, and of a token {of_token}, with {record['tokens']} for {size}"


def _count(dataset: Mapping[str, Any]) -> int | None:
    """How many images, or windows of texts, a dataset has."""
    return dataset["windows"] if "windows" in dataset else dataset["images"]


def _misread(images: Mapping[str, Any]) -> Iterator[str]:
    if "windows" in images:
        if (images["windows"] is None) != (images["fingerprint"] is None):
            yield f"the dataset's windows are {images['windows']}, and its fingerprint {images['fingerprint']}"
        return
    side, shape = images["resolution"], images["shape"]
    if side is not None and shape[1:] != [side, side]:
        yield f"the dataset's resolution is {side}, and its shape {shape}"
    if side is None and images["resized"]:
        yield "the dataset is resized, and has no resolution"
    if (images["images"] is None) != (images["fingerprint"] is None):
        yield f"the dataset's images are {images['images']}, and its fingerprint {images['fingerprint']}"


def _mistaken(run: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The contradictions between a run's record and its recipe, as far as that is known."""
    batches, whole = run["processes"] * run["gradient_accumulation_steps"], run["global_batch_size"]
    each = recipe.get("train_batch_size", whole // batches)
    if whole != each * batches:
        yield (
            f"global_batch_size is {whole}, with {run['processes']} processes, "
            f"{run['gradient_accumulation_steps']} gradient_accumulation_steps and a train_batch_size of {each}"
        )
    most = recipe.get("max_train_steps")
    if most is not None and run["steps"] > most:
        yield f"steps is {run['steps']}, and max_train_steps is {most}"


def _torn(columns: Mapping[str, list[float]]) -> Iterator[str]:
    if len({len(values) for values in columns.values()}) > 1 or not {"step", "bits_per_dim"} <= columns.keys():
        yield "the columns do not belong together"
        return
    steps = columns["step"]
    if not all(isinstance(step, int) and step >= 0 for step in steps) or any(b <= a for a, b in pairwise(steps)):
        yield "the steps do not rise"
    terms = columns.keys() - {"step", "bits_per_dim", "bits_per_byte", "standard_error", "learning_rate"}
    for row, total in enumerate(columns["bits_per_dim"]):
        if terms and not _is_sum(total, [columns[term][row] for term in terms]):
            yield f"bits_per_dim at step {steps[row]} is {total}, which is not the sum of its terms"
    for name in columns.keys() & {"standard_error", "learning_rate"}:
        if min(columns[name], default=0) < 0:
            yield f"{name} is {min(columns[name])}"


def _is_sum(total: float, terms: Any) -> bool:
    values = list(terms)
    return math.isclose(total, math.fsum(values), abs_tol=_ROUNDING * (1 + sum(map(abs, values))), rel_tol=0)
