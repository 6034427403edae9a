"""Draw samples from a pipeline into one picture."""

from __future__ import annotations

import argparse

import torch

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.outputs import check_apart_from_training, check_output
from vdm_hub.diffusion.samplers import ANCESTRAL, build_sampler
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import MAX_SEED, within
from vdm_hub.files import written_beside
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.plots import save_grid


def run(arguments: argparse.Namespace) -> None:
    """Draw samples, and save them as one picture."""
    within(1, 10**6, arguments, "num_images", "num_inference_steps", "batch_size")
    within(0, MAX_SEED - arguments.num_images, arguments, "seed")
    check_output(arguments.output, "output", ".png", overwrite=arguments.overwrite)
    check_apart_from_training(arguments.pipeline, {"output": arguments.output})
    build_sampler(arguments.sampler)  # an unknown name is said before anything is loaded
    pipeline = load_pipeline(arguments.pipeline, revision=arguments.revision)
    chosen = {} if arguments.sampler == ANCESTRAL else {"sampler": arguments.sampler}
    if chosen and not isinstance(pipeline, VDMPipeline):
        raise ConfigurationError(
            f"sampler is {arguments.sampler!r}, and a {type(pipeline).__name__} has no diffusion: leave it out."
        )
    seeds = range(arguments.seed, arguments.seed + arguments.num_images)
    parts = []
    for start in range(0, arguments.num_images, arguments.batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + arguments.batch_size]]
        parts.append(pipeline.sample(len(generators), generators, arguments.num_inference_steps, **chosen))
    with written_beside(arguments.output) as beside:
        save_grid(torch.cat(parts), beside)
    print(f"{arguments.num_images} samples: {arguments.output}")
