"""The model card: what the model is, how to use it, how good it is, and how it was made."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from vdm_hub import registry
from vdm_hub.data.kinds import IMAGES, TOKENS, DataKind, Figure
from vdm_hub.errors import VDMHubError
from vdm_hub.likelihood.methods import KIND, method_of
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.publishing import card_of_images, card_of_texts
from vdm_hub.publishing.contents import Contents
from vdm_hub.publishing.markdown import markdown, python, render, template_text, visible, words
from vdm_hub.publishing.wording import plugin_packages, wording_of
from vdm_hub.version import HOW_TO_INSTALL, __version__

CONDITIONAL_TASKS = {"class": "class-conditional-image-generation", "caption": "text-to-image"}
"""The task of a model that is told something, by the noun of its condition."""
_DATASETS = {
    "digits": Markup(
        "the hand-written digits of scikit-learn ([`load_digits`]"
        "(https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html))"
    )
}
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
    "tokens",
    "bytes",
    "replicates",
    "transitions",
    "method",
)
_OF_DATA = {"standard_error_over_images": "standard_error_over_{}", "num_images": "num_{}"}
_LAUNCHERS = re.compile(
    r"(python|accelerate launch)( --num_(processes|machines) \d{1,6}| --mixed_precision [a-z0-9]{1,8})*"
)
_TRAINING = " -m vdm_hub.train recipe.yaml"
_GAPS = re.compile(r"(?P<block>^(?P<fence>`{3,}).*?^(?P=fence)$)|\n{3,}", re.DOTALL | re.MULTILINE)
"""A fenced block, which stays as it is, or more than one empty line."""
_FACES: dict[str, Any] = {IMAGES.name: card_of_images, TOKENS.name: card_of_texts}
"""The modules that know the rest of a card, by the kind of the data."""


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
    face = _FACES[pipeline.kind.name]
    metadata = Markup(_metadata(source, pipeline, edition).to_yaml())
    facts = _facts(source, pipeline, edition) | face.facts(source, pipeline)
    card = render(template_text(face.TEMPLATE), metadata=metadata, **facts)
    return _GAPS.sub(lambda found: found["block"] or "\n\n", card).rstrip() + "\n"


# ---- metadata ---------------------------------------------------------------------------------------------------


def _metadata(source: Contents, pipeline: LikelihoodPipeline, edition: Edition) -> ModelCardData:
    """The card's metadata; YAML quotes what it must, and no line break or hidden character is left in it."""
    results = _results(source.evaluation, _task(pipeline), pipeline.kind)
    return ModelCardData(
        license=_line(edition.license),
        library_name="diffusers",
        pipeline_tag=_task(pipeline),
        tags=[
            *wording_of(pipeline).tags,
            *([] if pipeline.condition is None else ["conditional"]),
            "likelihood",
            pipeline.kind.tag,
            *map(visible, plugin_packages(pipeline)),
        ],
        datasets=_hub_datasets(source.recipe),
        base_model=_base_model(source.run),
        model_name=edition.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _base_model(run: Mapping[str, Any]) -> str | None:
    """The model on the Hub that the run began from, where it did from one."""
    origin = run.get("init_from") or {}
    return visible(origin["name"]) if origin.get("commit") else None


def _task(pipeline: LikelihoodPipeline) -> str:
    return pipeline.kind.task if pipeline.condition is None else CONDITIONAL_TASKS[pipeline.condition.noun]


def _line(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def _hub_datasets(recipe: Mapping[str, Any]) -> list[str] | None:
    """The dataset, where it is one on the Hub."""
    name = recipe.get("dataset_name")
    return [name] if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) else None


def _results(evaluation: Mapping[str, Any], task: str, kind: DataKind) -> list[EvalResult]:
    """The figures and the terms of the first, as model-index entries; of a conditional model they are given that."""
    if "bits_per_dim" not in evaluation:
        return []
    dataset = evaluation.get("dataset") or {}
    name = visible(dataset.get("name") or "unknown")
    result = partial(
        EvalResult,
        task_type=task,
        task_name="Conditional density estimation" if "condition" in evaluation else "Density estimation",
        dataset_type=name,
        dataset_name=name,
        dataset_config=_line(dataset.get("config")),
        dataset_split=_line(dataset.get("split")),
    )
    figures = kind.figures(evaluation)
    leading, *others = (
        result(
            metric_type=figure.metric,
            metric_name=figure.unit,
            metric_value=round(float(figure.value), 6),
            metric_args=_protocol(evaluation, figure, kind),
        )
        for figure in figures
    )
    terms = [
        result(
            metric_type=f"{figures[0].metric}_{visible(term)}",
            metric_name=f"{figures[0].unit} {visible(term).replace('_', ' ')}",
            metric_value=round(float(value), 6),
        )
        for term, value in figures[0].terms.items()
    ]
    return [leading, *terms, *others]


def _protocol(evaluation: Mapping[str, Any], figure: Figure, kind: DataKind) -> dict[str, Any]:
    """How a figure was measured, and its errors, in its own unit."""
    own = dict(evaluation) | {
        "standard_error": figure.standard_error,
        "standard_error_over_images": figure.standard_error_over_data,
    }
    return {_OF_DATA.get(key, key).format(kind.data): _line(own[key]) for key in _PROTOCOL if own.get(key) is not None}


# ---- text -------------------------------------------------------------------------------------------------------


def _facts(source: Contents, pipeline: LikelihoodPipeline, edition: Edition) -> dict[str, Any]:
    """The values of any card's template; text of anyone's is plain here, and escaped there."""
    recipe, run, kind = source.recipe, source.run, pipeline.kind
    on_main = edition.revision == "main"
    revision_words = [] if on_main else ["--revision", edition.revision]
    return {
        "name": edition.repo_id.split("/")[-1],
        "version": __version__,
        "how_to_install": Markup(HOW_TO_INSTALL),
        "repo_id": edition.repo_id,
        "revision_argument": Markup("" if on_main else f", revision={python(edition.revision)}"),
        "kind": kind,
        "unit": kind.unit,
        "wording": wording_of(pipeline),
        "pipeline": type(pipeline).__name__,
        "dataset": _dataset(recipe, run),
        "bound": _bound(source, pipeline, edition),
        "validation": _validation(run, kind),
        "pictures": {
            "samples": "samples.png" in source.pictures,
            "schedule": "schedule.png" in source.pictures,
            "curve": "training_curve.png" in source.pictures,
        },
        "plugins": [f"{package}>={version}" for package, version in plugin_packages(pipeline).items()],
        "recipe": bool(recipe),
        "measuring": _command("vdm-hub", "evaluate", edition.repo_id, "--dataset_name", recipe.get("dataset_name"))
        or f"vdm-hub evaluate {edition.repo_id} --dataset_name ...",
        "made_text": _made(run, kind),
        "download": words(["hf", "download", edition.repo_id, "recipe.yaml", *revision_words, "--local-dir", "."]),
        "command": _training_command(run),
        "versions": ", ".join(f"{package} {version}" for package, version in (run.get("versions") or {}).items()),
        "license": edition.license,
        "twin": edition.twin and {"revision": edition.twin, "error": edition.twin_error},
        "no_twin": edition.no_twin,
        "remote_code": edition.remote_code and {"revision": edition.remote_code, "branch": edition.remote_code_branch},
    }


def _dataset(recipe: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The training data's name, split and fingerprint, where there is a recipe."""
    if not recipe:
        return None
    name = recipe.get("dataset_name") or f"the author's own folder {recipe.get('train_data_dir')}"
    config = recipe.get("dataset_config_name")
    return {
        "text": markdown("{} ({})" if config else "{}", _DATASETS.get(name, name), config),
        "split": recipe.get("train_split"),
        "fingerprint": (run.get("dataset") or {}).get("fingerprint"),
    }


def _bound(source: Contents, pipeline: LikelihoodPipeline, edition: Edition) -> dict[str, Any] | None:
    report, kind = source.evaluation, pipeline.kind
    if "bits_per_dim" not in report:
        return None
    dataset = dict(report.get("dataset") or {})
    measured = f"{report.get('num_images')} {dataset.get('split') or ''}"
    is_bound = bool(report.get("is_bound", True))
    steps = report.get("transitions")
    latents = (report.get("hierarchy") or {}).get("depth")
    time = "in continuous time (infinitely many transitions)" if steps is None else f"in {steps} transitions"
    if "steps" in report:
        time = f"in {report['steps']}"
    if latents is not None:
        time = f"over {latents} latent{'' if latents == 1 else 's'}"
    figures = kind.figures(report)
    leading = figures[0]
    by = leading.unit.removeprefix("bits/")
    return {
        "symbol": "at most" if is_bound else "an estimated",
        "is_bound": is_bound,
        "what": f"-log2 p({' | '.join(['x', *filter(None, [report.get('condition')])])}) / {by}",
        "unit": leading.unit,
        "total": f"{leading.value:.4f}",
        "error": _error(leading.standard_error),
        "figures": [_shown(figure) for figure in figures],
        "terms": {name: [f"{one.terms[name]:.4f}" if one.terms else "" for one in figures] for name in leading.terms},
        "protocol": f"Method: {_METHODS.get(report.get('method', 'bound'), report.get('method'))} {time}; "
        f"{report.get('replicates')} replicates, "
        f"{measured} {kind.data} of {dataset.get('name') or 'an unnamed dataset'}, "
        f"{report.get('network_evaluations') or 0:,} network evaluations in all.",
        "measured": measured,
        "resized": bool(dataset.get("resized", source.recipe.get("resolution") is not None)),
        "command": _evaluation_command(source, pipeline, edition, dataset, report),
    }


def _shown(figure: Figure) -> dict[str, str]:
    """A figure as a column of the table has it."""
    return {
        "unit": figure.unit,
        "value": f"{figure.value:.4f}",
        "error": _error(figure.standard_error),
        "error_over_data": _error(figure.standard_error_over_data),
    }


def _validation(run: Mapping[str, Any], kind: DataKind) -> dict[str, Any] | None:
    """The last figure of data held out in training, where there is one."""
    measured = run.get("validation")
    if measured is None:
        return None
    count, leading = measured.get("images"), kind.figures(measured)[0]
    return {
        "total": f"{leading.value:.4f}",
        "unit": leading.unit,
        "error": _error(leading.standard_error),
        "images": "the" if count is None else f"{count:,}",
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
    if (method := _method_options(pipeline, report)) is None:
        return None
    options = {
        "--revision": None if edition.revision == "main" else edition.revision,
        "--dataset_name": dataset.get("name"),
        "--dataset_config_name": dataset.get("config"),
        "--split": dataset.get("split"),
        **_FACES[pipeline.kind.name].reading_options(source, pipeline, dataset),
        **method,
        "--replicates": report.get("replicates"),
        "--seed": report.get("seed", source.recipe.get("seed")),
    }
    given = [word for option, value in options.items() if value is not None for word in (option, value)]
    if (marginal := report.get("marginal")) is not None:
        given += ["--marginal", "--prior", ",".join(map(repr, marginal["prior"]))]
    return _command("vdm-hub", "evaluate", edition.repo_id, *given) if dataset.get("name") else None


def _method_options(pipeline: LikelihoodPipeline, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options that choose the method of a report; ``None`` where no command line can."""
    name, chosen = report.get("method", "bound"), report.get("options") or {}
    if name in registry.BUILT_INS[KIND]:
        is_usual = name == "bound" == method_of(pipeline.default_method).name
        return {"--method": None if is_usual else name} | {f"--{option}": value for option, value in chosen.items()}
    if not chosen:
        return {"--method": name}
    try:  # a plugin's options are its constructor's, of a class that only its package knows
        method: Any = registry.resolve_class(KIND, name)[0]
        config = registry.serialise(KIND, method.from_options(chosen))
    except VDMHubError:
        return None
    form = {"name": name, "config": config["config"] if isinstance(config, dict) else {}}
    return {"--method": json.dumps(form, separators=(",", ":"))}


def _command(*parts: Any) -> Markup | None:
    """A command line; ``None`` where a part can't be written on one, or would be taken for an option."""
    values = [None if part is None else str(part) for part in parts]
    hidden = any(value is None or value != visible(value) for value in values)
    options = any(str(value).startswith("-") and not re.fullmatch(r"--[a-z_]+", str(value)) for value in values)
    return None if hidden or options else words(values)


def _made(run: Mapping[str, Any], kind: DataKind) -> str:
    if not run:
        return "Trained with vdm_hub."
    processes = run.get("processes") or 1
    seconds = run.get("training_seconds")
    parts = [
        f"{run['steps']:,} steps" if isinstance(run.get("steps"), int) else "",
        f"of {run['global_batch_size']} {kind.data}" if run.get("global_batch_size") else "",
        f"in {seconds:,.0f} s" if isinstance(seconds, int | float) else "",
        f"on {processes} process{'es' if processes != 1 else ''} ({run.get('device') or 'device unknown'})",
        f"in {run['mixed_precision']}" if run.get("mixed_precision") not in (None, "no") else "",
    ]
    return f"Trained for {' '.join(part for part in parts if part)}{_origin(run)}."


def _origin(run: Mapping[str, Any]) -> str:
    """Words for the trained model that the run began from."""
    if (origin := run.get("init_from")) is None:
        return ""
    at = f" at commit {origin['commit']}" if origin["commit"] else ""
    return f", from the weights of {origin['name']}{at} (a {origin['pipeline']}, {origin['weights']})"


def _training_command(run: Mapping[str, Any]) -> Markup:
    """The command that was recorded, where it is one of the forms that training records."""
    command = str(run.get("command"))
    is_ours = command.endswith(_TRAINING) and _LAUNCHERS.fullmatch(command.removesuffix(_TRAINING))
    return words(shlex.split(command if is_ours else f"accelerate launch{_TRAINING}"))
