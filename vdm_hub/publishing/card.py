"""The model card: what the model is, how to use it, how good it is, and how it was made."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.plots import rows_of_choices
from vdm_hub.publishing.contents import Contents
from vdm_hub.publishing.markdown import code, markdown, python, render, visible, words
from vdm_hub.publishing.wording import plugin_packages, wording_of
from vdm_hub.version import HOW_TO_INSTALL, __version__

TASKS = {
    None: "unconditional-image-generation",
    "class": "class-conditional-image-generation",
    "caption": "text-to-image",
}
"""The task of a model by the noun of its condition."""
_NAMED = 100  # classes
_LINE = 100  # characters of a caption
_SHOWN = 4  # images, and so classes, of the examples
_TAGS = ("likelihood", "bits-per-dimension")
_DATASETS = {
    "digits": Markup(
        "the hand-written digits of scikit-learn ([`load_digits`]"
        "(https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html))"
    )
}
_AUGMENTATION = {"random_flip": "left-right flips", "random_crop": "random crops"}
_METHODS = {
    "bound": "the variational bound, estimated by Monte Carlo,",
    "ode": "the likelihood of the probability-flow ODE",
    "importance_weighted": "an importance-weighted likelihood",
}
_PROTOCOL = (
    "condition",
    "standard_error",
    "standard_error_over_images",
    "num_images",
    "replicates",
    "transitions",
    "method",
)
_LAUNCHERS = re.compile(
    r"(python|accelerate launch)( --num_(processes|machines) \d{1,6}| --mixed_precision [a-z0-9]{1,8})*"
)
_TRAINING = " -m vdm_hub.train recipe.yaml"


@dataclass(frozen=True)
class Edition:
    """Where and how the model is published, as far as its card says so.

    Attributes:
        repo_id: The repository.
        revision: The branch that the card lies on.
        license: An identifier that the Hub knows, such as ``apache-2.0``; the author's to choose.
        twin: The revision of the stock twin, where there is one.
        twin_error: What differs between the twin and the exact process.
        no_twin: Why there is none.
        remote_code: The revision that carries the code, where there is one.
        remote_code_branch: Its branch.
    """

    repo_id: str
    revision: str = "main"
    license: str | None = None
    twin: str | None = None
    twin_error: str = ""
    no_twin: str = ""
    remote_code: str | None = None
    remote_code_branch: str = "remote-code"


def render_card(source: Contents, pipeline: LikelihoodPipeline, edition: Edition) -> str:
    """The card's text, metadata included.

    Whatever comes from a file or a name is shown as it is: see `vdm_hub.publishing.markdown`.
    """
    template = resources.files(__package__).joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    metadata = Markup(_metadata(source, pipeline, edition).to_yaml())
    card = render(template, metadata=metadata, **_facts(source, pipeline, edition))
    return re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n"


# ---- metadata ---------------------------------------------------------------------------------------------------


def _metadata(source: Contents, pipeline: LikelihoodPipeline, edition: Edition) -> ModelCardData:
    """The card's metadata; YAML quotes what it must, and no line break or hidden character is left in it."""
    results = _results(source.evaluation, _task(pipeline))
    return ModelCardData(
        license=_line(edition.license),
        library_name="diffusers",
        pipeline_tag=_task(pipeline),
        tags=[
            *wording_of(pipeline).tags,
            *([] if pipeline.condition is None else ["conditional"]),
            *_TAGS,
            *map(visible, plugin_packages(pipeline)),
        ],
        datasets=_hub_datasets(source.recipe),
        model_name=edition.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _task(pipeline: LikelihoodPipeline) -> str:
    return TASKS[None if pipeline.condition is None else pipeline.condition.noun]


def _line(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def _hub_datasets(recipe: Mapping[str, Any]) -> list[str] | None:
    """The dataset, where it is one on the Hub."""
    name = recipe.get("dataset_name")
    return [name] if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) else None


def _results(evaluation: Mapping[str, Any], task: str) -> list[EvalResult]:
    """The bound and its terms, as model-index entries; of a conditional model they are of the image given that."""
    if "bits_per_dim" not in evaluation:
        return []
    dataset = evaluation.get("dataset") or {}
    name = visible(dataset.get("name") or "unknown")
    protocol = {key: _line(evaluation[key]) for key in _PROTOCOL if evaluation.get(key) is not None}
    values = {"bits_per_dim": evaluation["bits_per_dim"]}
    values |= {f"bits_per_dim_{visible(term)}": value for term, value in evaluation.get("terms", {}).items()}

    def result(metric: str, value: float) -> EvalResult:
        return EvalResult(
            task_type=task,
            task_name="Conditional density estimation" if "condition" in evaluation else "Density estimation",
            dataset_type=name,
            dataset_name=name,
            dataset_config=_line(dataset.get("config")),
            dataset_split=_line(dataset.get("split")),
            metric_type=metric,
            metric_name=metric.replace("bits_per_dim", "bits/dim").replace("_", " "),
            metric_value=round(float(value), 6),
            metric_args=protocol if metric == "bits_per_dim" else None,
        )

    return [result(metric, value) for metric, value in values.items()]


# ---- text -------------------------------------------------------------------------------------------------------


def _facts(source: Contents, pipeline: LikelihoodPipeline, edition: Edition) -> dict[str, Any]:
    """The values of the template; text of anyone's is plain here, and escaped there."""
    recipe, run = source.recipe, source.run
    channels, height, width = pipeline.image_shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    on_main = edition.revision == "main"
    steps, wording = recipe.get("num_inference_steps", 250), wording_of(pipeline)
    drawn = f"Drawn with {steps} network evaluations each, not selected." if wording.steps else "Not selected."
    drawn = markdown("{}{}", drawn, _rows_of_samples(pipeline, recipe))
    revision_words = [] if on_main else ["--revision", edition.revision]
    return {
        "name": edition.repo_id.split("/")[-1],
        "version": __version__,
        "how_to_install": Markup(HOW_TO_INSTALL),
        "repo_id": edition.repo_id,
        "revision_argument": Markup("" if on_main else f", revision={python(edition.revision)}"),
        "images": f"{height}x{width} {kind} images",
        "shape_text": f"{height}x{width} pixels, {kind}",
        "levels": pipeline.num_levels,
        "wording": wording,
        "condition": _condition(pipeline),
        "pipeline": type(pipeline).__name__,
        "steps_argument": _steps_argument(pipeline, steps) if wording.steps else "",
        "samples_text": drawn if recipe else "",
        "dataset": _dataset(recipe, run),
        "bound": _bound(source, pipeline, edition),
        "validation": _validation(run),
        "pictures": {
            "samples": "samples.png" in source.pictures,
            "schedule": "schedule.png" in source.pictures,
            "curve": "training_curve.png" in source.pictures,
        },
        "plugins": [f"{package}>={version}" for package, version in plugin_packages(pipeline).items()],
        "recipe": bool(recipe),
        "measuring": _command("vdm-hub", "evaluate", edition.repo_id, "--dataset_name", recipe.get("dataset_name"))
        or f"vdm-hub evaluate {edition.repo_id} --dataset_name ...",
        "made_text": _made(run),
        "download": words(["hf", "download", edition.repo_id, "recipe.yaml", *revision_words, "--local-dir", "."]),
        "command": _training_command(run),
        "versions": ", ".join(f"{package} {version}" for package, version in (run.get("versions") or {}).items()),
        "license": edition.license,
        "twin": edition.twin
        and {
            "revision": edition.twin,
            "error": edition.twin_error,
            "steps_argument": _steps_argument(pipeline, steps, stock=True),
        },
        "no_twin": edition.no_twin,
        "remote_code": edition.remote_code and {"revision": edition.remote_code, "branch": edition.remote_code_branch},
    }


def _condition(pipeline: LikelihoodPipeline) -> dict[str, Any] | None:
    """What the model is told of an image, and how its pipeline is called with that."""
    condition = pipeline.condition
    if condition is None:
        return None
    choices = condition.choices or ("a caption",)
    count = min(_SHOWN, len(choices))
    shown = [choices[place * len(choices) // count] for place in range(count)]
    classes = pipeline.class_condition
    names = [_short(condition.name_of(one)) for one in choices[:_NAMED]]
    if classes is None or classes.names is not None:
        shown = [_short(condition.name_of(one)) for one in shown]
    asked = ", ".join(python(one) if isinstance(one, str) else str(one) for one in shown)
    argument = Markup(f"{condition.argument}=[{asked}]")
    recorded = any(pipeline.config.get(known) for known in ("classes", "captions"))
    return {
        "noun": condition.noun,
        "argument": argument,
        "asking": argument + Markup(", guidance_scale=2" if condition.dropout else ""),
        "count": None if classes is None else classes.count,
        "column": condition.column if recorded else None,
        "template": condition.template,
        "encoder": _encoder(pipeline),
        "names": Markup(", ").join(map(code, names)) + (", ..." if len(choices) > _NAMED else ""),
        "named": classes is None or classes.names is not None,
        "hidden": f"{100 * condition.dropout:g} %" if condition.dropout else "",
    }


def _rows_of_samples(pipeline: LikelihoodPipeline, recipe: Mapping[str, Any]) -> Markup:
    """What the rows of the picture of samples were told, from the top."""
    condition = pipeline.condition
    if condition is None:
        return Markup("")
    numbers, columns = rows_of_choices(len(condition.choices), recipe.get("num_sample_images", 64))
    names = [_short(condition.name_of(condition.choices[number])) for number in numbers[::columns]]
    rows = Markup(", ").join(map(code, names))
    return markdown(" Unguided, a row each of {}.", rows) if names else Markup(" Unguided.")


def _short(name: str) -> str:
    """A caption of a line."""
    return name if len(name) <= _LINE else textwrap.shorten(name, _LINE, placeholder=" ...")


def _encoder(pipeline: Any) -> str | None:
    """The class and the size of a text encoder, where there is one."""
    encoder = getattr(pipeline, "text_encoder", None)
    return None if encoder is None else f"{type(encoder).__name__}, {encoder.num_parameters():,} parameters"


def _steps_argument(pipeline: Any, steps: int, stock: bool = False) -> Markup:
    """The argument for the number of steps; a chain over a table of betas, as of stock samplers, has no more."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is not None and (stock or scheduler.ends_at_data):
        steps = min(steps, len(scheduler))
    return Markup(f", num_inference_steps={steps}")


def _dataset(recipe: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any] | None:
    if not recipe:
        return None
    recorded = run.get("dataset") or {}
    name = recipe.get("dataset_name") or f"the author's own folder {recipe.get('train_data_dir')}"
    config, resolution = recipe.get("dataset_config_name"), recipe.get("resolution")
    crop = "the centre" if recipe.get("center_crop") else "a random place at each use"
    done = run.get("augmentation") or {"random_flip": recipe.get("random_flip")}
    augmentation = [words for key, words in _AUGMENTATION.items() if done.get(key)]
    return {
        "text": markdown("{} ({})" if config else "{}", _DATASETS.get(name, name), config),
        "split": recipe.get("train_split"),
        "images": recorded.get("images"),
        "fingerprint": recorded.get("fingerprint"),
        "augmentation": " and ".join(augmentation) or "none",
        "resizing": "none"
        if resolution is None
        else f"shorter side to {resolution} pixels, cropped at {crop}; figures on resized images are not "
        f"comparable with published figures",
    }


def _bound(source: Contents, pipeline: LikelihoodPipeline, edition: Edition) -> dict[str, Any] | None:
    report = source.evaluation
    if "bits_per_dim" not in report:
        return None
    dataset = dict(report.get("dataset") or {})
    measured = f"{report.get('num_images')} {dataset.get('split') or ''}"
    is_bound = bool(report.get("is_bound", True))
    steps = report.get("transitions")
    latents = (report.get("hierarchy") or {}).get("depth")
    time = "in continuous time (infinitely many transitions)" if steps is None else f"in {steps} transitions"
    if latents is not None:
        time = f"over {latents} latent{'' if latents == 1 else 's'}"
    return {
        "symbol": "at most" if is_bound else "an estimated",
        "is_bound": is_bound,
        "what": f"-log2 p({' | '.join(['x', *filter(None, [report.get('condition')])])}) / dim",
        "total": f"{report['bits_per_dim']:.4f}",
        "error": _error(report.get("standard_error")),
        "error_over_images": _error(report.get("standard_error_over_images")),
        "terms": {term: f"{value:.4f}" for term, value in report.get("terms", {}).items()},
        "protocol": f"Method: {_METHODS.get(report.get('method', 'bound'), report.get('method'))} {time}; "
        f"{report.get('replicates')} replicates, "
        f"{measured} images of {dataset.get('name') or 'an unnamed dataset'}, "
        f"{report.get('network_evaluations') or 0:,} network evaluations in all.",
        "measured": measured,
        "resized": bool(dataset.get("resized", source.recipe.get("resolution") is not None)),
        "command": _evaluation_command(source, pipeline, edition, dataset, report),
    }


def _validation(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last figure of images held out in training, where there is one."""
    measured = run.get("validation")
    if measured is None:
        return None
    images = measured.get("images")
    return {
        "total": f"{measured['bits_per_dim']:.4f}",
        "error": _error(measured.get("standard_error")),
        "images": "the" if images is None else f"{images:,}",
        "step": f"{measured['step']:,}",
    }


def _error(value: float | None) -> str:
    return "not known from one replicate" if value is None else f"{value:.4f}"


def _evaluation_command(
    source: Contents,
    pipeline: LikelihoodPipeline,
    edition: Edition,
    dataset: Mapping[str, Any],
    report: Mapping[str, Any],
) -> Markup | None:
    """The command that repeats the measurement; ``None`` where a part of it is not known."""
    options = {
        "--revision": None if edition.revision == "main" else edition.revision,
        "--dataset_name": dataset.get("name"),
        "--dataset_config_name": dataset.get("config"),
        "--split": dataset.get("split"),
        **_image_options(source, pipeline, dataset),
        "--method": None if report.get("method", "bound") == "bound" else report["method"],
        **{f"--{name}": value for name, value in (report.get("options") or {}).items()},
        "--replicates": report.get("replicates"),
        "--seed": report.get("seed", source.recipe.get("seed")),
    }
    given = [word for option, value in options.items() if value is not None for word in (option, value)]
    if (marginal := report.get("marginal")) is not None:
        given += ["--marginal", "--prior", ",".join(map(repr, marginal["prior"]))]
    return _command("vdm-hub", "evaluate", edition.repo_id, *given) if dataset.get("name") else None


def _image_options(source: Contents, pipeline: LikelihoodPipeline, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which the images were read, where the pipeline does not say so itself."""
    asked = {"resolution": dataset.get("resolution") or source.recipe.get("resolution")}
    asked |= {"color": dataset.get("color", "auto"), "image_column": dataset.get("image_column", "image")}
    trained = {"resolution": None, "color": "auto", "image_column": "image"} | dict(pipeline.preprocessing or {})
    options = {f"--{name}": value for name, value in asked.items() if value != trained[name]}
    return options | {f"--{name}": dataset.get(name) for name in ("label_column", "max_images")}


def _command(*parts: Any) -> Markup | None:
    """A command line; ``None`` where a part can't be written on one, or would be taken for an option."""
    values = [None if part is None else str(part) for part in parts]
    hidden = any(value is None or value != visible(value) for value in values)
    options = any(str(value).startswith("-") and not re.fullmatch(r"--[a-z_]+", str(value)) for value in values)
    return None if hidden or options else words(values)


def _made(run: Mapping[str, Any]) -> str:
    if not run:
        return "Trained with vdm_hub."
    processes = run.get("processes") or 1
    seconds = run.get("training_seconds")
    parts = [
        f"{run['steps']:,} steps" if isinstance(run.get("steps"), int) else "",
        f"of {run['global_batch_size']} images" if run.get("global_batch_size") else "",
        f"in {seconds:,.0f} s" if isinstance(seconds, int | float) else "",
        f"on {processes} process{'es' if processes != 1 else ''} ({run.get('device') or 'device unknown'})",
        f"in {run['mixed_precision']}" if run.get("mixed_precision") not in (None, "no") else "",
    ]
    return f"Trained for {' '.join(part for part in parts if part)}."


def _training_command(run: Mapping[str, Any]) -> Markup:
    """The command that was recorded, where it is one of the forms that training records."""
    command = str(run.get("command"))
    is_ours = command.endswith(_TRAINING) and _LAUNCHERS.fullmatch(command.removesuffix(_TRAINING))
    return words(shlex.split(command if is_ours else f"accelerate launch{_TRAINING}"))
