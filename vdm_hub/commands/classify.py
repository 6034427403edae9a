"""Find the class of each image by a class-conditional pipeline's bound."""

from __future__ import annotations

import argparse
import json
import sys

from vdm_hub.commands.images import images_of
from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.options import given_overrides
from vdm_hub.commands.outputs import check_apart_from_training, check_output
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.loading import check_outputs_apart
from vdm_hub.evaluation.classify import classify_images
from vdm_hub.evaluation.tables import write_posterior
from vdm_hub.fields import MAX_SEED, within
from vdm_hub.files import written_beside
from vdm_hub.likelihood.classification_report import ClassificationReport
from vdm_hub.plots import plot_confusion

_FILES = {"classification.json": ".json", "posterior.parquet": ".parquet", "confusion.png": ".png"}


def run(arguments: argparse.Namespace) -> None:
    """Classify the images, and print the report."""
    _check(arguments)
    overrides = given_overrides(arguments)
    pipeline = load_pipeline(arguments.pipeline, arguments.num_levels, arguments.revision, overrides)
    words = arguments.candidates
    candidates = None if words is None else pipeline.known_condition.choices_of(words)
    if candidates is not None or pipeline.text_condition is None:
        chosen = pipeline.known_condition.choose(candidates)  # before images are read
        chosen.prior(arguments.prior)
        arguments.effort.budget_for(len(chosen.names))
    images, description, notes = images_of(
        arguments, pipeline, lambda said: print(said, file=sys.stderr), must_be_told=False
    )
    report = classify_images(
        pipeline,
        images,
        arguments.effort,
        candidates=candidates,
        prior=arguments.prior,
        transitions=arguments.transitions,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        dataset=description,
        must_be_candidates=arguments.label_column is not None or arguments.caption_column is not None,
    )
    if notes := [*notes, *report.details.get("notes", ())]:
        report.details["notes"] = notes
    text = json.dumps(report.to_dict())
    print(text if arguments.json else "\n".join([str(report), *(f"  note: {note}" for note in notes)]), flush=True)
    if arguments.output_dir is not None:
        _write(arguments, report, images, text)


def _check(arguments: argparse.Namespace) -> None:
    within(1, 10**6, arguments, "batch_size")
    within(1, 10**7, arguments, "transitions")
    within(1, 10**12, arguments, "max_images")
    within(1, 16_384, arguments, "resolution")
    within(0, MAX_SEED, arguments, "seed")
    within(2, 256, arguments, "num_levels")
    if arguments.output_dir is None:
        return
    for name, suffix in _FILES.items():
        check_output(arguments.output_dir / name, "output_dir", suffix, overwrite=arguments.overwrite)
    outputs = {"output_dir": arguments.output_dir}
    check_outputs_apart(DataArguments(dataset_name=arguments.dataset_name), outputs)
    check_apart_from_training(arguments.pipeline, outputs)


def _write(arguments: argparse.Namespace, report: ClassificationReport, images: ImageLevels, text: str) -> None:
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / "classification.json") as beside:
        beside.write_text(text + "\n")
    write_posterior(report, images, folder / "posterior.parquet")
    if report.labels is not None:
        with written_beside(folder / "confusion.png") as beside:
            plot_confusion(report.confusion, report.names, beside)
