"""Publish a pipeline to the Hugging Face Hub, with its model card."""

from __future__ import annotations

import argparse

from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from vdm_hub.commands.outputs import check_apart_from_training
from vdm_hub.errors import ConfigurationError
from vdm_hub.files import expanded
from vdm_hub.hub.json_files import read_json
from vdm_hub.publishing.dry_run import LIST, write_publication
from vdm_hub.publishing.eval_results import published_results
from vdm_hub.publishing.publishing import publish


def run(arguments: argparse.Namespace) -> None:
    """Publish the pipeline, and print the addresses of all that was published."""
    for name in ("folder", "evaluation", "output_dir"):
        if (given := getattr(arguments, name)) is not None:
            setattr(arguments, name, expanded(given))
    if arguments.evaluation is not None and not arguments.evaluation.is_file():
        raise ConfigurationError(f"--evaluation {arguments.evaluation} is no file.")
    if arguments.dry_run:
        _dry_run(arguments)
        return
    for option, given in (("--output_dir", arguments.output_dir is not None), ("--overwrite", arguments.overwrite)):
        if given:
            raise ConfigurationError(f"{option} acts only with --dry_run: add it, or leave {option} out.")
    publication = publish(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        remote_code=arguments.remote_code,
        license=arguments.license,
        evaluation=arguments.evaluation,
    )
    lines = {"published": publication.url, "commit": publication.commit}
    lines |= {"stock twin": publication.twin, "carried code": publication.remote_code}
    print("\n".join(f"{name:<14}{value}" for name, value in lines.items() if value))
    _say_no_results(publication.no_results)


def _say_no_results(why: str) -> None:
    if why:
        print(f"no figure in {EVAL_RESULTS_FOLDER}, where the Hub reads results: {why}.")


def _dry_run(arguments: argparse.Namespace) -> None:
    if arguments.private or arguments.create_pr:
        raise ConfigurationError("--dry_run sends nothing, so leave out --private and --create_pr.")
    folder = arguments.folder
    beside = folder.parent if (folder / "model_index.json").is_file() else folder
    output = arguments.output_dir or beside / "publication"
    check_apart_from_training(folder, {"output_dir": output})
    files = write_publication(
        folder,
        arguments.repo_id,
        output,
        revision=arguments.revision,
        remote_code=arguments.remote_code,
        license=arguments.license,
        evaluation=arguments.evaluation,
        overwrite=arguments.overwrite,
    )
    print(f"would be sent to {arguments.repo_id}, by branch; written to {output}:")
    for path in files:
        print(f"{(output / path).stat().st_size:>12,}  {path}")
    record = output / arguments.revision / "evaluation.json"
    _say_no_results(published_results(read_json(record) if record.is_file() else {}, "")[1])
    print(f"{LIST} there lists them, so that --overwrite may replace them.")
