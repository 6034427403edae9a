"""Measure a pipeline's likelihood on a dataset, in bits per dimension."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vdm_hub.commands.images import load_images
from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.outputs import check_apart_from_training, check_output
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.loading import check_outputs_apart
from vdm_hub.errors import ConfigurationError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.evaluation.journal import check_evaluation_journal
from vdm_hub.evaluation.processes import Processes
from vdm_hub.evaluation.tables import write_per_image
from vdm_hub.fields import MAX_SEED, within
from vdm_hub.files import written_beside
from vdm_hub.likelihood.decompositions import FORMS
from vdm_hub.likelihood.dequantization import DEQUANTIZATIONS
from vdm_hub.likelihood.lockstep import SOLVERS
from vdm_hub.likelihood.methods import METHODS
from vdm_hub.likelihood.probability_flow import DTYPES, ProbabilityFlow
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood_pipeline import LikelihoodPipeline
from vdm_hub.plots import plot_likelihood

NOT_REACHED = 3
"""Exit status where the standard error that was asked for was not reached within the budget."""

_DIVERGENCES = {"hutchinson": "rademacher", "rademacher": "rademacher", "gaussian": "gaussian", "exact": "exact"}
_OVERRIDES = {
    "prediction_type": "what the network predicts: epsilon, sample, v_prediction, score, or a plugin's",
    "variance_type": "of the reverse steps: fixed_small, fixed_large, learned_range, ...",
    "data_scaling": "where the levels lie: full, from -1 to 1, or bin_centers",
    "decoder": "from z_0 to the levels: ddpm or factorised",
}
_RANGES = {
    (1, 10**6): ("replicates", "max_replicates", "batch_size", "times_per_image", "draws", "probes", "max_steps"),
    (1, 10**7): ("transitions",),
    (1, 10**12): ("max_images", "max_evaluations"),
    (1, 16_384): ("resolution",),
    (0, 10**9): ("pilot_evaluations",),
    (0, MAX_SEED): ("seed",),
    (2, 256): ("num_levels",),
}
_EPILOG = (
    "Exit status: 0; 2 for an error; 3 where --target_standard_error was not reached within the budget (the report is "
    "printed and written all the same). Under `accelerate launch`, or torchrun, the processes share the images."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vdm-hub evaluate``."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "pipeline", help="a run's folder, a pipeline's, or a Hub id; of a VDM, or of diffusers' DDPM family"
    )
    parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
    _add_checkpoint(parser.add_argument_group("a checkpoint of diffusers whose config is wrong"))
    _add_images(parser.add_argument_group("images"))
    _add_method(parser.add_argument_group("method"))
    _add_effort(parser.add_argument_group("effort"))
    _add_output(parser.add_argument_group("output"))


def _add_checkpoint(group: argparse._ArgumentGroup) -> None:
    for name, what in _OVERRIDES.items():
        group.add_argument(f"--{name}", help=what)


def _add_images(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset_name", required=True, help="'digits', a folder, a Parquet file, or a Hub dataset")
    group.add_argument("--dataset_config_name", help="the configuration of the dataset, where it has several")
    group.add_argument(
        "--split",
        help="the split, such as test or 'test[:1000]'; held_out is what the model's run held out of its training "
        "split (default: test, or held_out where there is no test split)",
    )
    trained = "(default: as the model was trained"
    group.add_argument("--image_column", help=f"the column that holds the images {trained}, else image)")
    group.add_argument("--label_column", help="the column of the classes, for a class-conditional network")
    group.add_argument(
        "--num_levels", type=int, help="K, the images' levels, for a checkpoint of diffusers (default: 256)"
    )
    group.add_argument(
        "--color", choices=("auto", "grey", "rgb"), help=f"convert the images first {trained}, else auto)"
    )
    group.add_argument(
        "--resolution",
        type=int,
        help=f"resize first; such figures can't be compared with published ones {trained}, else as they are)",
    )
    group.add_argument("--max_images", type=int, help="evaluate only the first so many images")


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method",
        default="bound",
        choices=METHODS,
        help="the variational bound; the probability-flow ODE; or importance weights, over chains where there are "
        "--transitions, else over dequantised draws of the ODE (default: bound)",
    )
    group.add_argument("--transitions", type=int, help="T, the number of transitions; without it, continuous time")
    group.add_argument(
        "--decomposition",
        choices=FORMS,
        help="the form of the bound, where the model's has several; of one expectation and other variance",
    )
    group.add_argument("--draws", type=int, default=16, help="importance weights: K, draws an image (default: 16)")
    flow = ProbabilityFlow()
    group.add_argument(
        "--dequantization",
        default=flow.dequantization,
        choices=sorted(DEQUANTIZATIONS),
        help=f"ODE: from levels to z_0 (default: {flow.dequantization})",
    )
    group.add_argument(
        "--divergence",
        default="hutchinson",
        choices=_DIVERGENCES,
        help="ODE: by random probes (hutchinson is rademacher), or exact, one backward pass a dimension "
        "(default: hutchinson)",
    )
    group.add_argument(
        "--probes", type=int, default=flow.probes, help=f"ODE: probes averaged (default: {flow.probes})"
    )
    group.add_argument(
        "--tolerance", type=float, default=flow.tolerance, help=f"ODE: of a step's error (default: {flow.tolerance:g})"
    )
    group.add_argument(
        "--max_steps", type=int, default=flow.max_steps, help=f"ODE: the most steps (default: {flow.max_steps})"
    )
    group.add_argument(
        "--solver", default=flow.solver, choices=SOLVERS, help=f"ODE: an adaptive method (default: {flow.solver})"
    )
    group.add_argument(
        "--dtype", default=flow.dtype, choices=DTYPES, help=f"ODE: the network's arithmetic (default: {flow.dtype})"
    )


def _add_effort(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--replicates", type=int, default=8, help="independent passes, behind the error (default: 8)")
    group.add_argument(
        "--target_standard_error",
        type=float,
        help="add replicates until the Monte Carlo error is at most this, in bits/dim",
    )
    group.add_argument("--max_replicates", type=int, help="with a target: the most replicates (default: 256)")
    group.add_argument("--max_evaluations", type=int, help="with a target: the most network evaluations")
    group.add_argument(
        "--times_per_image",
        type=int,
        default=1,
        help="the bound: evaluations of each image in each replicate, at stratified times (default: 1)",
    )
    group.add_argument(
        "--pilot_evaluations",
        type=int,
        help="the bound: draws, in no figure, that say where times are best drawn; 0 for none (default: twice the "
        "images, from 256 to 4,096)",
    )
    group.add_argument("--batch_size", type=int, default=256, help="images at once; changes no figure (default: 256)")
    group.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    group.add_argument(
        "--journal",
        type=Path,
        help="a folder that keeps each finished image: the same command with the same folder goes on after a kill",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("--per_image", type=Path, help="write a Parquet file with a row for each image")
    group.add_argument("--plot", type=Path, help="write a PNG: bits over t, and the histogram of the images' bits")
    group.add_argument("--overwrite", action="store_true", help="replace those files, where there are any")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    _check(arguments)
    processes = Processes.launched()
    with processes.main_speaks():
        pipeline, images, told, notes = processes.together(lambda: _load(arguments, processes))
        report = _evaluate(arguments, pipeline, images, told, processes).with_notes(notes)
        if processes.is_main:
            print(json.dumps(report.to_dict()) if arguments.json else report, flush=True)
            _write(arguments, report, images)
    return 0 if report.reached else NOT_REACHED


def _check(arguments: argparse.Namespace) -> None:
    for (minimum, maximum), names in _RANGES.items():
        within(minimum, maximum, arguments, *names)
    if arguments.target_standard_error is None:
        for name in ("max_replicates", "max_evaluations"):
            if getattr(arguments, name) is not None:
                raise ConfigurationError(f"--{name} acts only with --target_standard_error: add it, or leave it out.")
    for name, suffix in (("per_image", ".parquet"), ("plot", ".png")):
        if (path := getattr(arguments, name)) is not None:
            check_output(path, name, suffix, overwrite=arguments.overwrite)
    if arguments.journal is not None:
        check_evaluation_journal(arguments.journal)
    outputs = {
        name: path for name in ("per_image", "plot", "journal") if (path := getattr(arguments, name)) is not None
    }
    check_outputs_apart(DataArguments(dataset_name=arguments.dataset_name), outputs)
    check_apart_from_training(arguments.pipeline, outputs)


def _load(
    arguments: argparse.Namespace, processes: Processes
) -> tuple[LikelihoodPipeline, ImageLevels, dict[str, Any], list[str]]:
    overrides = {name: value for name in _OVERRIDES if (value := getattr(arguments, name)) is not None}
    pipeline = load_pipeline(arguments.pipeline, arguments.num_levels, arguments.revision, overrides)
    if arguments.label_column is not None and pipeline.num_classes is None:
        raise ConfigurationError(
            f"--label_column is {arguments.label_column!r}, and the network is not class-conditional: leave it out."
        )
    images, told, notes = load_images(
        pipeline,
        arguments.dataset_name,
        arguments.split,
        config_name=arguments.dataset_config_name,
        image_column=arguments.image_column,
        color=arguments.color,
        resolution=arguments.resolution,
        label_column=arguments.label_column,
        say=lambda said: print(said, file=sys.stderr) if processes.is_main else None,
        max_images=arguments.max_images,
    )
    return pipeline, images, told, notes


def _evaluate(
    arguments: argparse.Namespace,
    pipeline: LikelihoodPipeline,
    images: ImageLevels,
    told: dict[str, Any],
    processes: Processes,
) -> LikelihoodReport:
    flow = ProbabilityFlow(
        arguments.dequantization,
        _DIVERGENCES[arguments.divergence],
        arguments.probes,
        arguments.tolerance,
        arguments.max_steps,
        arguments.solver,
        arguments.dtype,
    )
    return evaluate(
        pipeline,
        images,
        arguments.transitions,
        arguments.replicates,
        arguments.batch_size,
        arguments.seed,
        dataset=told,
        method=arguments.method,
        flow=flow,
        draws=arguments.draws,
        decomposition=arguments.decomposition,
        times_per_image=arguments.times_per_image,
        pilot_evaluations=arguments.pilot_evaluations,
        target_standard_error=arguments.target_standard_error,
        max_replicates=arguments.max_replicates,
        max_evaluations=arguments.max_evaluations,
        journal=arguments.journal,
        processes=processes,
    )


def _write(arguments: argparse.Namespace, report: LikelihoodReport, images: ImageLevels) -> None:
    if arguments.per_image is not None:
        write_per_image(report, arguments.per_image, images)
    if arguments.plot is not None:
        with written_beside(arguments.plot) as beside:
            plot_likelihood(report, beside)
