"""Draw samples from a pipeline into one picture, or one file of texts."""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.options import given_overrides
from vdm_hub.commands.outputs import check_apart_from_training, check_output
from vdm_hub.commands.texts import OF_TEXT_SAMPLES, draw_texts, refuse_options
from vdm_hub.data.kinds import IMAGES, TOKENS
from vdm_hub.diffusion.samplers import ANCESTRAL, build_sampler
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.fields import MAX_SEED, within
from vdm_hub.files import written_beside
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.guidance import build_guider
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.plots import rows_of_choices, save_grid


def run(arguments: argparse.Namespace) -> None:
    """Draw samples, and save them as one picture, or as texts."""
    within(1, 10**6, arguments, "num_images", "num_inference_steps", "batch_size")
    within(0, MAX_SEED - arguments.num_images, arguments, "seed")
    given: Path | None = arguments.output
    if given is not None:
        suffix = ".txt" if given.suffix.casefold() == ".txt" else ".png"
        check_output(given, "output", suffix, overwrite=arguments.overwrite)
        check_apart_from_training(arguments.pipeline, {"output": given})
    build_sampler(arguments.sampler)  # an unknown name is said before anything is loaded
    overrides = given_overrides(arguments)
    pipeline = load_pipeline(arguments.pipeline, arguments.num_levels, arguments.revision, overrides)
    default, draw = _DRAWN_BY[pipeline.kind.name]
    output = given or Path(default)
    check_output(output, "output", Path(default).suffix, overwrite=arguments.overwrite)
    check_apart_from_training(arguments.pipeline, {"output": output})
    print(draw(arguments, pipeline, output))


def _draw_images(arguments: argparse.Namespace, pipeline: Any, output: Path) -> str:
    """Draw images into one picture, and say so."""
    refuse_options(arguments, OF_TEXT_SAMPLES, "images")
    chosen = _chosen(arguments, pipeline)
    told, columns = _told(arguments, pipeline)
    count = len(told) or arguments.num_images
    parts = []
    for start in range(0, count, arguments.batch_size):
        seeds = range(arguments.seed + start, arguments.seed + min(start + arguments.batch_size, count))
        condition = pipeline.condition
        part = {} if condition is None or not told else {condition.argument: told[start : start + len(seeds)]}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        parts.append(pipeline.sample(len(seeds), generators, arguments.num_inference_steps, **part, **chosen))
    with written_beside(output) as beside:
        save_grid(torch.cat(parts), beside, columns)
    other = "" if count == arguments.num_images else f" of {arguments.num_images}, as all rows are equally long"
    return f"{count} samples{other}{_rows(told, columns, pipeline)}: {output}"


_DRAWN_BY: dict[str, tuple[str, Callable[[argparse.Namespace, Any, Path], str]]] = {
    IMAGES.name: ("grid.png", _draw_images),
    TOKENS.name: ("samples.txt", draw_texts),
}


def _chosen(arguments: argparse.Namespace, pipeline: LikelihoodPipeline) -> dict[str, Any]:
    """What is chosen of a diffusion's sampling."""
    chosen = {} if arguments.sampler == ANCESTRAL else {"sampler": arguments.sampler}
    build_guider(arguments.guider, arguments.guidance_scale)  # it refuses before anything is drawn
    if arguments.guidance_scale != 1:
        chosen |= {"guidance_scale": arguments.guidance_scale, "guider": arguments.guider}
    if arguments.negative_prompt is not None:
        chosen |= {"negative_prompt": arguments.negative_prompt}
    if chosen and not isinstance(pipeline, VDMPipeline):
        name, value = next(iter(chosen.items()))
        raise ConfigurationError(
            f"{name} is {value!r}, and a {type(pipeline).__name__} has no diffusion: leave it out."
        )
    return chosen


def _words(text: str) -> list[str]:
    """The words between commas; a word in quotes may hold some, as in CSV.

    >>> _words('3, "red, green"')
    ['3', 'red, green']
    """
    return next(csv.reader([text], skipinitialspace=True), [])


def _told(arguments: argparse.Namespace, pipeline: LikelihoodPipeline) -> tuple[list[int | str], int | None]:
    """The classes or captions of about so many samples, those of one in a row, and how many are in a row."""
    count, condition = arguments.num_images, pipeline.condition
    for name in ("class_labels", "prompt"):
        if (given := getattr(arguments, name)) is not None and (condition is None or condition.argument != name):
            knows = "nothing of an image" if condition is None else f"a {condition.noun}"
            remedy = "leave it out" if condition is None else f"give --{condition.argument}"
            raise ConfigurationError(f"--{name} is {shortened(given)}, and the model is told {knows}: {remedy}.")
    asked: list[int | str] = list(arguments.prompt or ())
    if arguments.class_labels is not None and (classes := pipeline.class_condition) is not None:
        asked = classes.numbers(classes.choices_of(_words(arguments.class_labels))).tolist()
    if asked:
        columns = max(1, count // len(asked))
        return [one for one in asked for _ in range(columns)], columns
    if condition is None:
        return [], None
    rows, shown = rows_of_choices(len(condition.choices), count)
    if not rows:
        raise ConfigurationError("the model is told a caption, and its config has no examples: give --prompt.")
    return [condition.choices[row] for row in rows], shown


def _rows(told: list[int | str], columns: int | None, pipeline: LikelihoodPipeline) -> str:
    if not told:
        return ""
    names = [pipeline.known_condition.name_of(one) for one in told[::columns]]
    return f", a row each of {textwrap.shorten(', '.join(names), 1000, placeholder=' ...')}"
