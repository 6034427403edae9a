"""Publish a pipeline to the Hugging Face Hub, with its model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from vdm_hub.commands.outputs import check_apart_from_training
from vdm_hub.errors import ConfigurationError
from vdm_hub.files import expanded
from vdm_hub.publishing.dry_run import LIST, write_publication
from vdm_hub.publishing.publishing import publish

_TOKEN_HELP = "The token is the one of `hf auth login`, or HF_TOKEN; it is never an argument."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vdm-hub publish``."""
    parser.epilog = _TOKEN_HELP
    parser.add_argument("folder", type=Path, help="a run's folder, or a pipeline's, such as runs/digits/pipeline")
    parser.add_argument("repo_id", help="the repository on the Hub, such as me/vdm-digits")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", default="main", help="the branch to publish on (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument(
        "--remote_code", action="store_true", help="also publish the code, for readers who trust it without vdm_hub"
    )
    parser.add_argument("--license", help="licence of the weights, as the Hub names it, such as apache-2.0")
    parser.add_argument("--evaluation", type=Path, help="a file that `vdm-hub evaluate --json` wrote, for the card")
    parser.add_argument(
        "--dry_run", action="store_true", help="write what would be sent into a folder, print it, and send nothing"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="with --dry_run: where to (default: publication/ beside the pipeline)"
    )
    parser.add_argument("--overwrite", action="store_true", help="with --dry_run: replace what a former one wrote")


def run(arguments: argparse.Namespace) -> None:
    """Publish, and print what is where."""
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
    print(f"{LIST} there lists them, so that --overwrite may replace them.")
