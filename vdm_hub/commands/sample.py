"""Draw samples from a pipeline into one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.outputs import check_apart_from_training, check_output
from vdm_hub.diffusion.samplers import ANCESTRAL, SAMPLERS
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import MAX_SEED, within
from vdm_hub.files import written_beside
from vdm_hub.pipeline_vdm import VDMPipeline
from vdm_hub.plots import save_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vdm-hub sample``."""
    parser.add_argument(
        "pipeline", help="a run's folder, a pipeline's, or a Hub id; of a VDM, or of diffusers' DDPM family"
    )
    parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
    parser.add_argument("--num_images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="the PNG to write (default: grid.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output, where there is one")
    parser.add_argument("--num_inference_steps", type=int, default=250, help="network evaluations (default: 250)")
    parser.add_argument(
        "--sampler",
        default=ANCESTRAL,
        choices=(ANCESTRAL, *SAMPLERS),
        help="of a diffusion: the reverse step of its bound, or one by the score (default: ancestral)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Sample and save."""
    within(1, 10**6, arguments, "num_images", "num_inference_steps", "batch_size")
    within(0, MAX_SEED - arguments.num_images, arguments, "seed")
    check_output(arguments.output, "output", ".png", overwrite=arguments.overwrite)
    check_apart_from_training(arguments.pipeline, {"output": arguments.output})
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
