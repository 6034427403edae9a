"""Measure a pipeline's likelihood on a dataset, in bits per dimension."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdm_hub.commands.images import images_of
from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.options import given_overrides
from vdm_hub.commands.outputs import check_apart_from_training, check_output
from vdm_hub.commands.submission import Submission, check_options
from vdm_hub.commands.texts import OF_TEXTS, refuse_options, windows_of
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.examples import Examples
from vdm_hub.data.kinds import IMAGES, TOKENS
from vdm_hub.data.loading import check_outputs_apart
from vdm_hub.errors import ConfigurationError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.evaluation.journal import check_evaluation_journal
from vdm_hub.evaluation.measuring import ReplicateStages
from vdm_hub.evaluation.processes import Processes
from vdm_hub.evaluation.tables import write_table
from vdm_hub.fields import MAX_SEED, within
from vdm_hub.files import written_beside
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.latent_vdm import LatentVDMPipeline
from vdm_hub.plots import plot_likelihood

NOT_REACHED = 3
"""Exit status where the standard error that was asked for was not reached within the budget."""

_RANGES = {
    (1, 10**6): ("replicates", "max_replicates", "batch_size"),
    (1, 10**12): ("max_images", "max_evaluations"),
    (1, 16_384): ("resolution",),
    (0, MAX_SEED): ("seed",),
    (2, 256): ("num_levels",),
    (2, 2**20): ("window_length",),
    (0, 2**20): ("window_context",),
}


def run(arguments: argparse.Namespace) -> int:
    """Measure the pipeline on the images, and print the report."""
    _check(arguments)
    processes = Processes.launched()
    submission = Submission(arguments, processes)
    with processes.main_speaks():
        submission.open()
        pipeline, images, description, notes = processes.together(lambda: _load(arguments, processes))
        submission.check(pipeline, images, description)
        report = _evaluate(arguments, pipeline, images, description, processes).with_notes(notes)
        if processes.is_main:
            print(json.dumps(report.to_dict()) if arguments.json else report, flush=True)
            _write(arguments, report, images)
            submission.finish(report)
    return 0 if report.reached else NOT_REACHED


def _check(arguments: argparse.Namespace) -> None:
    check_options(arguments)
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
) -> tuple[LikelihoodPipeline, Examples, dict[str, Any], list[str]]:
    overrides = given_overrides(arguments)
    pipeline = load_pipeline(arguments.pipeline, arguments.num_levels, arguments.revision, overrides)
    read = _READ_BY[pipeline.kind.name]
    return pipeline, *read(
        arguments, pipeline, lambda said: print(said, file=sys.stderr) if processes.is_main else None
    )


def _images_of(arguments: argparse.Namespace, pipeline: Any, say: Callable[[str], None]) -> Any:
    refuse_options(arguments, OF_TEXTS, "images")
    fitted = None if arguments.fit_split is None else _fit(arguments, pipeline, say)
    images, description, notes = images_of(arguments, pipeline, say)
    if fitted is not None:
        shared = {one.numpy().tobytes() for one in fitted} & {one.numpy().tobytes() for one in images.levels}
        if shared:
            raise ConfigurationError(
                f"{len(shared)} of the images of --fit_split {arguments.fit_split!r} are among those that are "
                f"measured, so that their figure would be fitted to them: name others, such as 'train[:256]'."
            )
        notes = [*notes, f"the autoencoder's scale was fitted on {len(fitted):,} images of {arguments.fit_split!r}"]
    return images, description, notes


def _fit(arguments: argparse.Namespace, pipeline: Any, say: Callable[[str], None]) -> Tensor:
    """Fit the first stage of a latent checkpoint of diffusers on images of their own, and give those."""
    if not isinstance(pipeline, LatentVDMPipeline):
        raise ConfigurationError(
            f"--fit_split is {arguments.fit_split!r}, and a {type(pipeline).__name__} has no autoencoder whose scale "
            f"could be fitted: leave it out."
        )
    given = {**vars(arguments), "split": arguments.fit_split, "max_images": None}
    images, _, notes = images_of(argparse.Namespace(**given), pipeline, say)
    pipeline.fit_first_stage(images.levels, arguments.seed)
    for note in notes:
        say(note)
    return torch.as_tensor(images.levels)


_READ_BY: dict[str, Callable[..., Any]] = {IMAGES.name: _images_of, TOKENS.name: windows_of}


def _evaluate(
    arguments: argparse.Namespace,
    pipeline: LikelihoodPipeline,
    images: Examples,
    description: dict[str, Any],
    processes: Processes,
) -> LikelihoodReport:
    target, most = arguments.target_standard_error, arguments.max_replicates
    stages = ReplicateStages(
        arguments.replicates, target, most or max(256, arguments.replicates), arguments.max_evaluations
    )
    return evaluate(
        pipeline,
        images,
        arguments.method,
        stages,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        dataset=description,
        journal=arguments.journal,
        processes=processes,
        marginal=arguments.marginal,
        prior=arguments.prior,
    )


def _write(arguments: argparse.Namespace, report: LikelihoodReport, images: Any) -> None:
    if arguments.per_image is not None:
        write_table(report, arguments.per_image, images)
    if arguments.plot is not None:
        with written_beside(arguments.plot) as beside:
            plot_likelihood(report, beside)
