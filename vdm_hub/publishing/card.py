"""The model card: what the model is, how to use it, how good it is, and how it was made."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vdm_hub.likelihood.decompositions import FORMS
from vdm_hub.likelihood_pipeline import LikelihoodPipeline
from vdm_hub.publishing.contents import Source
from vdm_hub.publishing.rungs import plugin_packages, rung_of, word
from vdm_hub.version import __version__

TASK = "unconditional-image-generation"
_TAGS = ("likelihood", "bits-per-dimension")
_COMMANDS_WORD = re.compile(r"[\w./:\[\]%+-]+")
_DATASETS = {
    "digits": "the hand-written digits of scikit-learn ([`load_digits`]"
    "(https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html))"
}
_AUGMENTATION = {"random_flip": "left-right flips", "random_crop": "random crops"}
_METHODS = {
    "bound": "the variational bound, estimated by Monte Carlo,",
    "ode": "the likelihood of the probability-flow ODE",
    "importance_weighted": "an importance-weighted likelihood",
}
_PROTOCOL = ("standard_error", "standard_error_over_images", "num_images", "replicates", "transitions", "method")


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


def render_card(source: Source, pipeline: LikelihoodPipeline, edition: Edition) -> str:
    """The card's text, metadata included.

    Whatever comes from a file or a name is made harmless: no HTML, no Markdown of its own, one line each.
    """
    template = resources.files(__package__).joinpath("model_card.md.jinja").read_text()
    card = ModelCard.from_template(
        card_data=_metadata(source, pipeline, edition), template_str=template, **_facts(source, pipeline, edition)
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def plain(text: Any) -> str:
    r"""Text that Markdown and browsers show as it is, on one line.

    >>> print(plain("<script>alert(1)</script> | [x](y)"))
    &lt;script&gt;alert(1)&lt;/script&gt; \| \[x\](y)
    """
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escaped)


# ---- metadata ---------------------------------------------------------------------------------------------------


def _metadata(source: Source, pipeline: LikelihoodPipeline, edition: Edition) -> ModelCardData:
    results = _results(source.evaluation)
    return ModelCardData(
        license=edition.license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=[*rung_of(pipeline).tags, *_TAGS, *(f"{package}" for package in plugin_packages(pipeline))],
        datasets=_hub_datasets(source.recipe),
        model_name=edition.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _hub_datasets(recipe: Mapping[str, Any]) -> list[str] | None:
    """The dataset, where it is one on the Hub."""
    name = recipe.get("dataset_name")
    return [name] if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The bound and its terms, as model-index entries."""
    if "bits_per_dim" not in evaluation:
        return []
    dataset = evaluation.get("dataset") or {}
    name = str(dataset.get("name") or "unknown")
    protocol = {
        key: evaluation[key]
        for key in (
            "standard_error",
            "standard_error_over_images",
            "num_images",
            "replicates",
            "transitions",
            "method",
        )
        if evaluation.get(key) is not None
    }
    values = {"bits_per_dim": evaluation["bits_per_dim"]}
    values |= {f"bits_per_dim_{term}": value for term, value in evaluation.get("terms", {}).items()}

    def result(metric: str, value: float) -> EvalResult:
        return EvalResult(
            task_type=TASK,
            task_name="Density estimation",
            dataset_type=name,
            dataset_name=name,
            dataset_config=dataset.get("config"),
            dataset_split=dataset.get("split"),
            metric_type=metric,
            metric_name=metric.replace("bits_per_dim", "bits/dim").replace("_", " "),
            metric_value=round(float(value), 6),
            metric_args=protocol if metric == "bits_per_dim" else None,
        )

    return [result(metric, value) for metric, value in values.items()]


# ---- text -------------------------------------------------------------------------------------------------------


def _facts(source: Source, pipeline: LikelihoodPipeline, edition: Edition) -> dict[str, Any]:
    recipe, run = source.recipe, source.run
    channels, height, width = pipeline.image_shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    on_main = edition.revision == "main"
    steps = int(recipe.get("num_inference_steps", 250))
    rung = rung_of(pipeline)
    drawn = f"Drawn with {steps} network evaluations each, not selected." if rung.steps else "Not selected."
    return {
        "name": edition.repo_id.split("/")[-1],
        "version": __version__,
        "repo_id": edition.repo_id,
        "revision_argument": "" if on_main else f", revision={json.dumps(edition.revision)}",
        "revision_option": "" if on_main else f" --revision {shlex.quote(edition.revision)}",
        "images": f"{height}x{width} {kind} images",
        "shape_text": f"{height}x{width} pixels, {kind}",
        "levels": pipeline.num_levels,
        "rung": rung,
        "pipeline": type(pipeline).__name__,
        "steps_argument": f", num_inference_steps={steps}" if rung.steps else "",
        "samples_text": drawn if recipe else "",
        "dataset": _dataset(recipe, run),
        "bound": _bound(source, edition),
        "pictures": {
            "samples": "samples.png" in source.pictures,
            "schedule": "schedule.png" in source.pictures,
            "curve": "training_curve.png" in source.pictures,
        },
        "plugins": plugin_packages(pipeline),
        "recipe": bool(recipe),
        "own_dataset": _option(recipe.get("dataset_name") or "..."),
        "made_text": _made(run),
        "command": _training_command(run),
        "versions": ", ".join(f"{plain(k)} {plain(v)}" for k, v in (run.get("versions") or {}).items()),
        "licence_text": _licence(edition.license),
        "twin": edition.twin and {"revision": edition.twin, "error": plain(edition.twin_error)},
        "no_twin": plain(edition.no_twin),
        "remote_code": edition.remote_code and {"revision": edition.remote_code, "branch": edition.remote_code_branch},
    }


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
        "text": _DATASETS.get(name, plain(name)) + (f" ({plain(config)})" if config else ""),
        "split": plain(recipe.get("train_split") or ""),
        "images": recorded.get("images"),
        "fingerprint": recorded.get("fingerprint"),
        "augmentation": " and ".join(augmentation) or "none",
        "resizing": "none"
        if resolution is None
        else f"shorter side to {int(resolution)} pixels, cropped at {crop}; figures on resized images are not "
        f"comparable with published figures",
    }


def _bound(source: Source, edition: Edition) -> dict[str, Any] | None:
    report = source.evaluation
    if "bits_per_dim" not in report:
        return None
    dataset = dict(report.get("dataset") or {})
    measured = plain(f"{report.get('num_images')} {dataset.get('split') or ''}")
    is_bound = bool(report.get("is_bound", True))
    steps = report.get("transitions")
    latents = (report.get("hierarchy") or {}).get("depth")
    time = "in continuous time (infinitely many transitions)" if steps is None else f"in {steps} transitions"
    if latents is not None:
        time = f"over {plain(latents)} latent{'' if latents == 1 else 's'}"
    return {
        "symbol": "at most" if is_bound else "an estimated",
        "is_bound": is_bound,
        "total": f"{report['bits_per_dim']:.4f}",
        "error": _error(report.get("standard_error")),
        "error_over_images": _error(report.get("standard_error_over_images")),
        "terms": {plain(term): f"{value:.4f}" for term, value in report.get("terms", {}).items()},
        "meaning": "An upper bound on the negative log-likelihood, `-log2 p(x) / dim`."
        if is_bound
        else "An estimate of the negative log-likelihood, `-log2 p(x) / dim`; no bound.",
        "protocol": f"Method: {plain(_METHODS.get(report.get('method', 'bound'), report.get('method')))} {time}; "
        f"{report.get('replicates')} replicates, "
        f"{measured} images of {plain(dataset.get('name') or 'an unnamed dataset')}, "
        f"{report.get('network_evaluations') or 0:,} network evaluations in all.",
        "measured": measured,
        "resized": bool(dataset.get("resized", source.recipe.get("resolution") is not None)),
        "command": _evaluation_command(source, edition, dataset, report),
    }


def _option(value: Any) -> str:
    """A word of a command line, or an ellipsis where it would not be one."""
    return str(value) if _COMMANDS_WORD.fullmatch(str(value)) else "..."


def _error(value: float | None) -> str:
    return "not known from one replicate" if value is None else f"{value:.4f}"


def _evaluation_command(
    source: Source, edition: Edition, dataset: Mapping[str, Any], report: Mapping[str, Any]
) -> str | None:
    """The command that repeats the measurement; ``None`` where a part of it is no plain word."""
    options = {
        "--revision": None if edition.revision == "main" else edition.revision,
        "--dataset_name": dataset.get("name"),
        "--dataset_config_name": dataset.get("config"),
        "--split": dataset.get("split"),
        "--resolution": dataset.get("resolution") or source.recipe.get("resolution"),
        **_method_options(report),
        "--transitions": report.get("transitions"),
        "--replicates": report.get("replicates"),
        "--seed": report.get("seed", source.recipe.get("seed")),
    }
    words = [f"vdm-hub evaluate {edition.repo_id}"]
    for option, value in options.items():
        if value is None:
            continue
        if not _COMMANDS_WORD.fullmatch(str(value)):
            return None
        words.append(f"{option} {shlex.quote(str(value))}")
    return " ".join(words) if dataset.get("name") else None


def _method_options(report: Mapping[str, Any]) -> dict[str, Any]:
    """The options of another method than the bound, as its protocol has them."""
    method = report.get("method", "bound")
    flow, weights = report.get("probability_flow") or {}, report.get("importance_weights") or {}
    options = {f"--{name}": flow.get(name) for name in ("dequantization", "divergence", "probes", "tolerance")}
    form = report.get("decomposition")
    options |= {"--decomposition": form if form in FORMS else None}
    return {"--method": None if method == "bound" else method, "--draws": weights.get("draws")} | options


def _made(run: Mapping[str, Any]) -> str:
    if not run:
        return "Trained with vdm_hub."
    processes = run.get("processes") or 1
    seconds = run.get("training_seconds")
    parts = [
        f"{run['steps']:,} steps" if isinstance(run.get("steps"), int) else "",
        f"of {run['global_batch_size']} images" if run.get("global_batch_size") else "",
        f"in {seconds:,.0f} s" if isinstance(seconds, int | float) else "",
        f"on {processes} process{'es' if processes != 1 else ''} ({plain(run.get('device') or 'device unknown')})",
        f"in {plain(run['mixed_precision'])}" if run.get("mixed_precision") not in (None, "no") else "",
    ]
    return f"Trained for {' '.join(part for part in parts if part)}."


def _training_command(run: Mapping[str, Any]) -> str:
    command = str(run.get("command"))
    plain_words = all(_COMMANDS_WORD.fullmatch(word) for word in command.split())
    is_ours = command.startswith("accelerate launch ") and command.endswith(" -m vdm_hub.train recipe.yaml")
    return command if is_ours and plain_words else "accelerate launch -m vdm_hub.train recipe.yaml"


def _licence(identifier: str | None) -> str:
    if identifier is None:
        return "The author has stated no licence for the weights: ask before you use them further."
    return f"`{word(identifier)}`. The code that trains and runs it, vdm_hub, is Apache-2.0."
