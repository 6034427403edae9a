"""The card of a model of texts: how it is called, its tokenizer, how texts are cut, and samples that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from vdm_hub.data.sequences import Cut
from vdm_hub.data.tokenization import MADE
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.tokens import TokenPipeline
from vdm_hub.publishing.contents import Contents
from vdm_hub.publishing.markdown import block, code, markdown, visible

TEMPLATE = "model_card_of_texts.md.jinja"
_STEPS = 128
_PROMPT = 4  # tokens: a part of a drawn text may be half of the word for a token that ends a document
_MADE = {
    "byte": "the 256 bytes",
    "character": "the characters of the training texts",
    "bpe": "byte pairs, learned from the training texts",
}
assert set(_MADE) == set(MADE)


def facts(source: Contents, pipeline: LikelihoodPipeline) -> dict[str, Any]:
    """The values of the template beside those of any card."""
    assert isinstance(pipeline, TokenPipeline)
    recipe, report = source.recipe, source.evaluation
    steps = recipe.get("num_inference_steps", _STEPS)
    dataset = report.get("dataset") or {}
    measured = None
    if "windows" in dataset:
        measured = _cut(Cut(dataset["shape"][0], dataset["window_context"]))
    return {
        "steps_argument": Markup(f", num_inference_steps={steps}"),
        "prompt": Markup(f"drawn.ids[0, :{_PROMPT}].tolist()"),
        "mask": Markup(visible(pipeline.tokenizer.mask_token)),
        "length": pipeline.cut.length,
        "values": f"{pipeline.num_levels:,}",
        "tokenizer": _tokenizer(pipeline, recipe),
        "cut": _cut(pipeline.cut),
        "measured_cut": measured,
        "scored": _scored(report),
        "notes": list(report.get("notes") or ()),
        "has_bytes": report.get("bits_per_byte") is not None,
        "samples": block(source.samples) if source.samples else "",
        "samples_text": f"Drawn with {steps} network evaluations each, not selected.",
        **_of_training(source.run),
    }


def reading_options(source: Contents, pipeline: LikelihoodPipeline, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which texts were read and cut, where the pipeline does not say so itself."""
    assert isinstance(pipeline, TokenPipeline)
    trained = pipeline.config.get("windows") or {}
    own = {"text_column": trained.get("text_column", "text")}
    own |= {"window_length": pipeline.cut.length, "window_context": pipeline.cut.context}
    asked = {
        "text_column": dataset.get("text_column", "text"),
        "window_length": dataset["shape"][0] if "shape" in dataset else own["window_length"],
        "window_context": dataset.get("window_context", own["window_context"]),
    }
    options = {f"--{name}": value for name, value in asked.items() if value != own[name]}
    return options | {"--max_images": dataset.get("max_windows")}


def _tokenizer(pipeline: TokenPipeline, recipe: Mapping[str, Any]) -> Markup:
    """What a token is, and which one is the mask."""
    words, named = pipeline.tokenization, recipe.get("tokenizer")
    kind = _MADE.get(str(named)) or ("" if named is None else code(named))
    of = markdown(" of {}", kind) if kind else Markup("")
    known = markdown(
        "{}{}, {} tokens beside the mask, ", code(type(pipeline.tokenizer).__name__), of, f"{words.num_values:,}"
    )
    return known + markdown("{}", code(pipeline.tokenizer.mask_token))


def _cut(cut: Cut) -> str:
    """How a text is cut, in words.

    >>> _cut(Cut(128, 32))
    'windows of 128 tokens, of which all but the first begin with the last 32 of the one before, which are given'
    """
    given = f", of which all but the first begin with the last {cut.context} of the one before, which are given"
    return f"windows of {cut.length} tokens{given if cut.context else ', one after the other'}"


def _scored(report: Mapping[str, Any]) -> str:
    """How much text a measurement scored."""
    if "tokens" not in report:
        return ""
    size = report.get("bytes")
    return f"{report['tokens']:,} tokens" + ("" if size is None else f" for {size:,} bytes, each counted once")


def _of_training(run: Mapping[str, Any]) -> dict[str, Any]:
    """How many windows it was trained on, of how much text."""
    dataset, shifted = run.get("dataset") or {}, (run.get("augmentation") or {}).get("window_shift")
    sizes = {name: dataset.get(name) for name in ("documents", "characters", "tokens", "bytes")}
    known = [f"{size:,} {name if size != 1 else name[:-1]}" for name, size in sizes.items() if size is not None]
    return {
        "training_windows": dataset.get("windows"),
        "training_size": ", ".join(known),
        "shift": "a random one at each use" if shifted else "fixed",
    }
