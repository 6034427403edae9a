"""The card of a model of images: how it is called, what it is told, and what its images are."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sized
from typing import Any

from markupsafe import Markup

from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.plots import rows_of_choices
from vdm_hub.publishing.contents import Contents
from vdm_hub.publishing.markdown import code, markdown, python
from vdm_hub.publishing.wording import wording_of

TEMPLATE = "model_card_of_images.md.jinja"
_NAMED = 100  # classes
_LINE = 100  # characters of a caption
_SHOWN = 4  # images, and so classes, of the examples
_AUGMENTATION = {"random_flip": "left-right flips", "random_crop": "random crops"}


def facts(source: Contents, pipeline: LikelihoodPipeline) -> dict[str, Any]:
    """The values of the template beside those of any card."""
    recipe = source.recipe
    channels, height, width = pipeline.image_shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    steps, wording = recipe.get("num_inference_steps", 250), wording_of(pipeline)
    drawn = f"Drawn with {steps} network evaluations each, not selected." if wording.steps else "Not selected."
    drawn = markdown("{}{}", drawn, _rows_of_samples(pipeline, recipe))
    return {
        "images": f"{height}x{width} {kind} images",
        "shape_text": f"{height}x{width} pixels, {kind}",
        "levels": pipeline.num_levels,
        "condition": _condition(pipeline),
        "steps_argument": _steps_argument(pipeline, steps) if wording.steps else "",
        "stock_steps_argument": _steps_argument(pipeline, steps, stock=True),
        "samples_text": drawn if recipe else "",
        **_of_training(recipe, source.run),
    }


def reading_options(source: Contents, pipeline: LikelihoodPipeline, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which the images were read, where the pipeline does not say so itself."""
    asked = {"resolution": dataset.get("resolution") or source.recipe.get("resolution")}
    asked |= {"color": dataset.get("color", "auto"), "image_column": dataset.get("image_column", "image")}
    trained = {"resolution": None, "color": "auto", "image_column": "image"} | dict(pipeline.preprocessing or {})
    options = {f"--{name}": value for name, value in asked.items() if value != trained[name]}
    return options | {f"--{name}": dataset.get(name) for name in ("label_column", "max_images")}


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
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if isinstance(scheduler, Sized) and (stock or getattr(scheduler, "ends_at_data", True)):
        steps = min(steps, len(scheduler))
    return Markup(f", num_inference_steps={steps}")


def _of_training(recipe: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """How many images it was trained on, and what was done to them."""
    resolution = recipe.get("resolution")
    crop = "the centre" if recipe.get("center_crop") else "a random place at each use"
    done = run.get("augmentation") or {"random_flip": recipe.get("random_flip")}
    augmentation = [words for key, words in _AUGMENTATION.items() if done.get(key)]
    return {
        "training_images": (run.get("dataset") or {}).get("images"),
        "augmentation": " and ".join(augmentation) or "none",
        "resizing": "none"
        if resolution is None
        else f"shorter side to {resolution} pixels, cropped at {crop}; figures on resized images are not "
        f"comparable with published figures",
    }
