"""Measure a pipeline's bound on a dataset, in bits per dimension."""

from __future__ import annotations

import argparse
import json

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.data.loading import load_split
from vdm_hub.diffusers_checkpoints import notes_on_bound
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.evaluation.provenance import describe_images
from vdm_hub.fields import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vdm-hub evaluate``."""
    parser.add_argument("pipeline", help="a folder, or a Hub id; of a VDM, or of diffusers' DDPM family")
    parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
    parser.add_argument("--dataset_name", required=True, help="'digits', a folder, a Parquet file, or a Hub dataset")
    parser.add_argument("--dataset_config_name", help="the configuration of the dataset, where it has several")
    parser.add_argument("--split", default="test", help="the split, such as test or 'test[:1000]' (default: test)")
    parser.add_argument("--image_column", default="image", help="the column that holds the images (default: image)")
    parser.add_argument(
        "--num_levels", type=int, help="K, the images' levels (default: the model's; 256 for a diffusers checkpoint)"
    )
    parser.add_argument("--color", default="auto", choices=("auto", "grey", "rgb"), help="convert the images first")
    parser.add_argument(
        "--resolution", type=int, help="resize first; such figures can't be compared with published ones"
    )
    parser.add_argument("--max_images", type=int, help="evaluate only the first so many images")
    parser.add_argument("--transitions", type=int, help="T, the number of transitions; without it, continuous time")
    parser.add_argument("--replicates", type=int, default=8, help="independent passes, behind the error (default: 8)")
    parser.add_argument("--batch_size", type=int, default=256, help="images at once; changes no figure (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print."""
    at_least(1, arguments, "resolution", "max_images", "transitions", "replicates", "batch_size")
    at_least(0, arguments, "seed")
    at_least(2, arguments, "num_levels")
    pipeline = load_pipeline(arguments.pipeline, arguments.num_levels, arguments.revision)
    images = load_split(
        arguments.dataset_name,
        arguments.split,
        config_name=arguments.dataset_config_name,
        image_column=arguments.image_column,
        num_levels=pipeline.process.num_levels,
        color=arguments.color,
        resolution=arguments.resolution,
        max_samples=arguments.max_images,
    )
    report = evaluate(
        pipeline,
        images,
        arguments.transitions,
        arguments.replicates,
        arguments.batch_size,
        arguments.seed,
        dataset=describe_images(
            images,
            arguments.dataset_name,
            arguments.split,
            config=arguments.dataset_config_name,
            resolution=arguments.resolution,
        ),
    )
    report = report.with_notes(notes_on_bound(pipeline.scheduler.config))
    print(json.dumps(report.to_dict()) if arguments.json else report)
