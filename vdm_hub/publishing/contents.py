"""The contents of a publication: the pipeline's own files and its run's records, cleaned of what is private."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vdm_hub.data.kinds import IMAGES, TOKENS
from vdm_hub.errors import CheckpointError, warn
from vdm_hub.evaluation.provenance import public_name
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.places import INDEX, RECIPE, pipeline_folder, run_folder
from vdm_hub.hub.records import read_evaluation, read_history, read_run
from vdm_hub.hub.text_files import TEXT_FILE, TOKENIZER_CONFIG
from vdm_hub.publishing.eval_results import OWN_RESULTS
from vdm_hub.recipes import plain_yaml
from vdm_hub.recipes.arguments import read_recipe

_COMPONENT_FILE = re.compile(r"(scheduler_)?config\.json|diffusion_pytorch_model[\w.-]*\.(json|safetensors)")
RECORDS = ("evaluation.json", "history.json", "run.json")
PICTURES = (IMAGES.samples, "schedule.png", "training_curve.png")
_MOST_TEXT = 2**20  # bytes of samples

# Of a recipe, what says where this run lay and what it sent, rather than what it did.
_OWN_AFFAIRS = ("recipe", "output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo")


@dataclass(frozen=True)
class Contents:
    """A pipeline on disk, and what is known of it.

    Attributes:
        pipeline: The folder that a pipeline's `save_pretrained` wrote.
        recipe: The fields of the run, or empty.
        evaluation: What ``vdm-hub evaluate --json`` printed, or empty.
        history: The course of training, or empty.
        run: Versions, data and cost of the run, or empty.
        pictures: Those that there are, by file name.
        samples: Those of texts, as the run shows them, or empty.
    """

    pipeline: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    samples: str = ""


def read_contents(folder: Path, evaluation: Path | None = None) -> Contents:
    """The contents of a run's folder, or of the folder of a pipeline, in a run or alone.

    Args:
        folder: ``runs/digits`` or ``runs/digits/pipeline``.
        evaluation: A file with what ``vdm-hub evaluate --json`` printed, instead of the run's own.

    Raises:
        CheckpointError: There is no pipeline, or a file is damaged.
        ConfigurationError: The run's recipe says what no recipe may.
    """
    pipeline = pipeline_folder(folder)
    if not (pipeline / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds no pipeline (no {INDEX}): give a run's folder such as runs/digits, or its pipeline."
        )
    run = run_folder(pipeline)
    if run is None:
        return Contents(pipeline, evaluation=read_evaluation(evaluation) if evaluation else {})
    recipe, history = published_recipe(read_recipe(run / RECIPE)), read_history(run / "history.json")
    return Contents(
        pipeline,
        recipe=recipe,
        evaluation=read_evaluation(evaluation or run / "evaluation.json"),
        history=history,
        run=read_run(run / "run.json", recipe, history),
        pictures={name: run / name for name in PICTURES if (run / name).is_file()},
        samples=_text(run / TOKENS.samples),
    )


def _text(path: Path) -> str:
    """The text of a file, of its beginning where it is very long; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_MOST_TEXT).decode("utf-8", errors="replace")


def published_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what concerns this run's place alone; of local data folders the last name remains.

    >>> published_recipe({"train_data_dir": "/home/ada/birds", "output_dir": "runs/birds", "seed": 1})
    {'train_data_dir': 'birds', 'seed': 1}
    """
    kept = {key: value for key, value in recipe.items() if key not in _OWN_AFFAIRS}
    places = ("train_data_dir", "dataset_name", "first_stage_from", "text_encoder", "tokenizer", "network_from")
    for key in (*places, "init_from"):
        if isinstance(kept.get(key), str):
            kept[key] = public_name(kept[key])
    return kept


def copy_pipeline(pipeline: Path, destination: Path) -> None:
    """Copy the index, configs and weights of a pipeline; a warning names what else lies there."""
    index = read_json(pipeline / INDEX)
    components = {name: value[0] for name, value in index.items() if isinstance(value, list) and value}
    destination.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(pipeline / INDEX, destination / INDEX)
    for component, library in components.items():
        for path in sorted((pipeline / component).glob("*")):
            known = TEXT_FILE if library == "transformers" else _COMPONENT_FILE
            if path.is_file() and known.fullmatch(path.name):
                (destination / component).mkdir(exist_ok=True)
                shutil.copyfile(path, destination / component / path.name)
    names = sorted(path.relative_to(pipeline).as_posix() for path in pipeline.rglob("*") if path.is_file())
    if left_out := [name for name in names if not (destination / name).is_file()]:
        more = f" and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        warn(f"{pipeline} also holds {', '.join(left_out[:4])}{more}: no part of a pipeline, and not published.")


def copy_records(source: Contents, destination: Path) -> None:
    """Copy the recipe, the measurements, and the samples as pictures or as texts."""
    if source.recipe:
        (destination / RECIPE).write_text(plain_yaml.dump(source.recipe))
    for name in RECORDS:
        if record := getattr(source, Path(name).stem):
            (destination / name).write_text(json.dumps(record, indent=1))
    if source.samples:
        (destination / TOKENS.samples).write_text(source.samples, "utf-8")
    if source.pictures:
        (destination / "images").mkdir()
    for name, path in source.pictures.items():
        shutil.copyfile(path, destination / "images" / name)


def is_managed(path: str, components: set[str]) -> bool:
    """Whether a file on the Hub is one that a publication may remove: what it writes, or what diffusers would run."""
    top, _, rest = path.partition("/")
    if not rest:
        return top in (*RECORDS, TOKENS.samples, RECIPE, INDEX, "pipeline.py")
    return path == OWN_RESULTS or top in components or (top == "images" and rest in PICTURES)


def components_of(paths: set[str]) -> set[str]:
    """The folders of a repository that hold a component of a pipeline."""
    configs = ("/config.json", "/scheduler_config.json", f"/{TOKENIZER_CONFIG}")
    return {path.split("/")[0] for path in paths if path.count("/") == 1 and path.endswith(configs)}
