"""The records that lie beside a pipeline, checked: what the card says of a model comes from them."""

# No `from __future__ import annotations`: the checks read the types themselves.
import json
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import yaml
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError

from vdm_hub.errors import CheckpointError

Number = int | float


class Images(TypedDict, total=False):
    """See `vdm_hub.evaluation.provenance.describe_images`."""

    name: str | None
    config: str | None
    split: str | None
    images: int | None
    resolution: int | None
    color: str
    image_column: str
    label_column: str
    max_images: int
    resized: bool | None
    fingerprint: str | None


class Evaluation(TypedDict, total=False):
    """What ``vdm-hub evaluate --json`` prints, as far as a card repeats it."""

    bits_per_dim: Number
    standard_error: Number | None
    standard_error_over_images: Number | None
    terms: dict[str, Number]
    num_images: int
    network_evaluations: int
    replicates: int
    transitions: int | None
    is_bound: bool
    method: str
    probability_flow: dict[str, Any]
    importance_weights: dict[str, Any]
    clipped: dict[str, Any]
    seed: int | None
    weights: str
    dataset: dict[str, Any] | None


class Validation(TypedDict):
    """The last measurement of the images that were held out in training."""

    step: int
    bits_per_dim: Number
    standard_error: Number | None
    images: int | None


class Run(TypedDict, total=False):
    """What training writes into ``run.json``, as far as a card repeats it."""

    command: str
    versions: dict[str, str]
    steps: int
    processes: int
    global_batch_size: int
    training_seconds: Number
    device: str
    mixed_precision: str | None
    validation: dict[str, Any]
    dataset: dict[str, Any]
    augmentation: dict[str, Any]


class Recipe(TypedDict, total=False):
    """What a run was asked to do, as far as a card repeats it."""

    dataset_name: str | None
    dataset_config_name: str | None
    train_data_dir: str | None
    train_split: str | None
    resolution: int | None
    center_crop: bool | None
    random_flip: bool | None
    num_inference_steps: int
    seed: int | None


def read_evaluation(path: Path) -> dict[str, Any]:
    """A measurement, or empty where there is none.

    Raises:
        CheckpointError: It is damaged, or does not say which weights it measured.
    """
    record = _checked(path, Evaluation)
    if record:
        _checked_part(path, record, "dataset", Images)
        missing = [key for key in ("bits_per_dim", "terms", "weights") if key not in record]
        if missing:
            raise CheckpointError(
                f"{path} says nothing of {', '.join(missing)}: measure the model again, by `vdm-hub evaluate --json`."
            )
    return record


def read_run(path: Path) -> dict[str, Any]:
    """How a run came about, or empty where that is not known.

    Raises:
        CheckpointError: It is damaged.
    """
    record = _checked(path, Run)
    _checked_part(path, record, "dataset", Images)
    _checked_part(path, record, "validation", Validation)
    return record


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or empty where there is no such file.

    Raises:
        CheckpointError: It is damaged: no JSON, no object, or with numbers that are not finite.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no fields")
    _check(path, content, Recipe)
    return content


def _checked(path: Path, schema: type) -> dict[str, Any]:
    record = read_object(path)
    _check(path, record, schema)
    return record


def _checked_part(path: Path, record: dict[str, Any], key: str, schema: type) -> None:
    if record.get(key) is not None:
        _check(path, record[key], schema)


def _check(path: Path, record: dict[str, Any], schema: type) -> None:
    known = {key: value for key, value in record.items() if key in schema.__annotations__}
    try:
        validate_typed_dict(schema, known)
    except StrictDataclassError as error:
        raise _damaged(path, error) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({' '.join(str(why).split())}): make it again, or remove it.")
