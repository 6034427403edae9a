"""Draw samples from a pipeline into one picture."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.outputs import check_apart_from_training, check_output
from vdm_hub.diffusion.samplers import ANCESTRAL, build_sampler
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import MAX_SEED, within
from vdm_hub.files import written_beside
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.plots import rows_of_classes, save_grid


def run(arguments: argparse.Namespace) -> None:
    """Draw samples, and save them as one picture."""
    within(1, 10**6, arguments, "num_images", "num_inference_steps", "batch_size")
    within(0, MAX_SEED - arguments.num_images, arguments, "seed")
    check_output(arguments.output, "output", ".png", overwrite=arguments.overwrite)
    check_apart_from_training(arguments.pipeline, {"output": arguments.output})
    build_sampler(arguments.sampler)  # an unknown name is said before anything is loaded
    pipeline = load_pipeline(arguments.pipeline, revision=arguments.revision)
    chosen = _chosen(arguments, pipeline)
    labels, columns = _labels(arguments.class_labels, pipeline, arguments.num_images)
    count = arguments.num_images if labels is None else len(labels)
    parts = []
    for start in range(0, count, arguments.batch_size):
        seeds = range(arguments.seed + start, arguments.seed + min(start + arguments.batch_size, count))
        told = {} if labels is None else {"class_labels": labels[start : start + len(seeds)]}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        parts.append(pipeline.sample(len(seeds), generators, arguments.num_inference_steps, **told, **chosen))
    with written_beside(arguments.output) as beside:
        save_grid(torch.cat(parts), beside, columns)
    print(f"{count} samples{_rows(labels, columns, pipeline)}: {arguments.output}")


def _chosen(arguments: argparse.Namespace, pipeline: LikelihoodPipeline) -> dict[str, Any]:
    """What is chosen of a diffusion's sampling."""
    chosen = {} if arguments.sampler == ANCESTRAL else {"sampler": arguments.sampler}
    if arguments.guidance_scale != 1:
        chosen |= {"guidance_scale": arguments.guidance_scale, "guider": arguments.guider}
    if chosen and not isinstance(pipeline, VDMPipeline):
        name, value = next(iter(chosen.items()))
        raise ConfigurationError(
            f"{name} is {value!r}, and a {type(pipeline).__name__} has no diffusion: leave it out."
        )
    return chosen


def _labels(text: str | None, pipeline: LikelihoodPipeline, count: int) -> tuple[list[int] | None, int | None]:
    """The classes of about so many samples, those of a class in a row, and how many are in a row."""
    condition = pipeline.condition
    if text is None:
        told, columns = rows_of_classes(pipeline.num_classes, count)
        return told.get("class_labels"), columns
    if condition is None:
        raise ConfigurationError(f"class_labels are {text!r}, and the model knows no classes: leave them out.")
    names = condition.names or ()
    asked = [word.strip() for word in text.split(",")]
    words: list[str | int] = [word if word in names or not word.isdigit() else int(word) for word in asked]
    numbers, columns = condition.numbers(words).tolist(), max(1, count // len(words))
    return [number for number in numbers for _ in range(columns)], columns


def _rows(labels: list[int] | None, columns: int | None, pipeline: LikelihoodPipeline) -> str:
    if labels is None or pipeline.condition is None:
        return ""
    return f", a row each of {', '.join(pipeline.condition.name_of(number) for number in labels[::columns])}"
