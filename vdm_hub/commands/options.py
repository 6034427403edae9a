"""What each command of ``vdm-hub`` takes. Nothing here imports torch, so that words are answered at once.

The first line of a function's docstring is what ``vdm-hub --help`` says of its command.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from vdm_hub import registry
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.likelihood.methods import KIND, METHODS, method_of
from vdm_hub.likelihood.protocol import ClassificationEffort

METHOD_OPTIONS = {name: one for method in reversed(METHODS) for name, one in method.options().items()}
"""What may be chosen of the methods that come with the package; of a plugin's, see ``--method``."""

OVERRIDES = {
    "prediction_type": "what the network predicts: epsilon, sample, v_prediction, score, or a plugin's",
    "variance_type": "of the reverse steps: fixed_small, fixed_large, learned_range, ...",
    "data_scaling": "where the levels lie: full, from -1 to 1; unit, from 0 to 1; or bin_centers",
    "decoder": "from z_0 to the levels: ddpm or factorised",
}
"""The config fields that may be corrected for a checkpoint of diffusers, each with its help text."""

_LEVELS = "K, the images' levels (default: 256 for betas; other families ask for it)"

_OF_DIFFUSERS = "a checkpoint of diffusers, what its config does not say or says wrongly"

_EPILOG = (
    "Exit status: 0; 2 for an error; 3 where --target_standard_error was not reached within the budget (the report is "
    "printed and written all the same). Under `accelerate launch`, or torchrun, the processes share the images."
)


def given_overrides(arguments: argparse.Namespace) -> dict[str, str]:
    """The fields of `OVERRIDES` that a command line gives."""
    return {name: value for name in OVERRIDES if (value := getattr(arguments, name)) is not None}


def recipes(parser: argparse.ArgumentParser) -> None:
    """List the recipes that come with the package, or print one."""
    parser.add_argument("recipe", nargs="?", help="print this one, as a file to copy and change")


def explain(parser: argparse.ArgumentParser) -> None:
    """Say what a network, a noise schedule, a process or another part of a recipe is, and what it takes."""
    parser.add_argument("name", nargs="?", help="a class such as UNetVDMModel, or a name such as learned_monotone")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Measure a pipeline's likelihood on a dataset, in bits per dimension, or per byte of texts."""
    parser.epilog = _EPILOG
    parser.set_defaults(prepare=_choose_method_and_mixture)
    parser.add_argument("pipeline", help="a run's folder, a pipeline's, or a Hub id; of a VDM, or one of diffusers'")
    parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
    group = parser.add_argument_group(_OF_DIFFUSERS)
    _add_checkpoint(group)
    group.add_argument(
        "--fit_split",
        help="of a latent one: the images that its autoencoder's scale is fitted on, such as 'train[:256]'",
    )
    _add_images(parser.add_argument_group("images"))
    _add_texts(parser.add_argument_group("texts, of a model of tokens"))
    _add_method(parser.add_argument_group("method"))
    _add_mixture(parser.add_argument_group("classes"))
    _add_effort(parser.add_argument_group("effort"))
    _add_output(parser.add_argument_group("output"))
    _add_submission(parser.add_argument_group("submission"))


def classify(parser: argparse.ArgumentParser) -> None:
    """Find the class or the caption of each image by a pipeline's bound, and how often it is right."""
    parser.set_defaults(prepare=_choose_effort)
    parser.add_argument(
        "pipeline", help="a run's folder, a pipeline's, or a Hub id; of a VDM that is told classes or captions"
    )
    parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
    _add_checkpoint(parser.add_argument_group(_OF_DIFFUSERS))
    _add_images(
        parser.add_argument_group("images"), label_column="the column of the classes, to say how many are found"
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        help="what to choose from: classes by number or name (default: all), or captions, each in quotes (default: "
        "those of the dataset)",
    )
    group = parser.add_argument_group("effort")
    for one in fields(ClassificationEffort):
        default = "" if one.default is None else f" (default: {one.default})"
        kind = float if "float" in str(one.type) else int
        group.add_argument(f"--{one.name}", type=kind, help=f"{one.metadata['help']}{default}")
    group.add_argument(
        "--equal_effort", action="store_true", help="drop no class: each has the same share of the budget"
    )
    group.add_argument("--transitions", type=int, help="T, the number of transitions; without it, continuous time")
    group.add_argument(
        "--prior", help="p(c) of the candidates before an image is seen, as 0.5,0.3,0.2 (default: uniform)"
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=256,
        help="pairs of an image and a class at once; changes no figure (default: 256)",
    )
    group.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument(
        "--output_dir",
        type=Path,
        help="a folder for classification.json, posterior.parquet with a row for each image, and confusion.png",
    )
    group.add_argument("--overwrite", action="store_true", help="replace those files, where there are any")


def _choose_effort(arguments: argparse.Namespace) -> None:
    """Make the options of the effort one object, and the prior a list of numbers.

    Raises:
        ConfigurationError: A value is out of range, or two options contradict each other.
    """
    names = [one.name for one in fields(ClassificationEffort)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.equal_effort and "confidence" in given:
        raise ConfigurationError(
            f"confidence is {given['confidence']}, and --equal_effort drops no class: leave one out."
        )
    arguments.effort = ClassificationEffort(**given | ({"confidence": None} if arguments.equal_effort else {}))
    arguments.prior = _numbers("prior", arguments.prior)


def _numbers(name: str, text: str | None) -> list[float] | None:
    """The numbers that commas separate."""
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(
            f"--{name} is {shortened(text)}: give numbers with commas between, as 0.7,0.3."
        ) from error


def _add_checkpoint(group: argparse._ArgumentGroup) -> None:
    for name, what in OVERRIDES.items():
        group.add_argument(f"--{name}", help=what)


def _add_images(
    group: argparse._ArgumentGroup, label_column: str = "the column of the classes, of a class-conditional model"
) -> None:
    group.add_argument(
        "--dataset_name", required=True, help="'digits', a folder, a Parquet file, a text file, or a Hub dataset"
    )
    group.add_argument("--dataset_config_name", help="the configuration of the dataset, where it has several")
    group.add_argument(
        "--split",
        help="the split, such as test or 'test[:1000]'; held_out is what the model's run held out of its training "
        "split (default: test, or held_out where there is no test split)",
    )
    trained = "(default: as the model was trained"
    group.add_argument("--image_column", help=f"the column that holds the images {trained}, else image)")
    group.add_argument("--label_column", help=f"{label_column} {trained})")
    group.add_argument("--caption_column", help=f"that of the captions, of a model that is told them {trained})")
    group.add_argument("--num_levels", type=int, help=f"{_LEVELS}; for a checkpoint of diffusers")
    group.add_argument(
        "--color", choices=("auto", "grey", "rgb"), help=f"convert the images first {trained}, else auto)"
    )
    group.add_argument(
        "--resolution",
        type=int,
        help=f"resize first; such figures can't be compared with published ones {trained}, else as they are)",
    )
    group.add_argument("--max_images", type=int, help="evaluate only the first so many images, or windows of texts")


def _add_texts(group: argparse._ArgumentGroup) -> None:
    trained = "(default: as the model was trained)"
    group.add_argument("--text_column", help=f"the column that holds the texts, of data that have columns {trained}")
    group.add_argument("--window_length", type=int, help=f"cut texts into windows of so many tokens {trained}")
    group.add_argument(
        "--window_context",
        type=int,
        help=f"how many tokens at the start of a window, the last of the one before, are given {trained}",
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method",
        help="bound, the variational bound; ode, the probability-flow ODE; importance_weighted, over chains where "
        "there are --transitions, else over dequantised draws of the ODE; or a plugin's, whose options are given as "
        """'{"name": ..., "config": {...}}' (default: bound; of masked texts masked_counts)""",
    )
    for name, one in METHOD_OPTIONS.items():
        of = " and ".join(method.name for method in METHODS if name in method.options())
        kind = next(known for known in (int, float, str) if known.__name__ in str(one.type))
        default = "" if one.default is None else f"; default: {one.default}"
        choices = one.metadata["choices"]
        group.add_argument(f"--{name}", type=kind, choices=choices, help=f"{one.metadata['help']} ({of}{default})")


_PRIOR = "p(c) of the classes before an image is seen, as 0.5,0.3,0.2 (default: uniform)"


def _add_mixture(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--marginal",
        action="store_true",
        help="measure under every class, or every caption of the dataset, on the same draws, and say by how "
        "many bits a label lowers an image's bound below the mixture's; as many times the evaluations as there are "
        "classes",
    )
    group.add_argument("--prior", help=f"with --marginal: {_PRIOR}")


def _choose_method_and_mixture(arguments: argparse.Namespace) -> None:
    _choose_method(arguments)
    arguments.prior = _numbers("prior", arguments.prior)
    if arguments.prior is not None and not arguments.marginal:
        raise ConfigurationError("--prior acts only with --marginal: add it, or leave it out.")


def _choose_method(arguments: argparse.Namespace) -> None:
    """Make the method's name and the options that are given the method itself.

    Raises:
        ConfigurationError: There is no such method, an option is another's, or its value is out of range.
    """
    given = {name: value for name in METHOD_OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.method is None and not given:
        return  # the pipeline knows which
    cls: Any
    cls, config = registry.resolve(KIND, arguments.method or "bound")
    if given and config:
        raise ConfigurationError(
            f"--method is {shortened(arguments.method)}, and --{next(iter(given))} is given too: give the options in "
            f"one of the two."
        )
    arguments.method = cls.from_options(given) if given else method_of(arguments.method)


def _add_effort(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--replicates", type=int, default=8, help="independent passes, behind the error (default: 8)")
    group.add_argument(
        "--target_standard_error",
        type=float,
        help="add replicates until the Monte Carlo error is at most this, in bits/dim, or of texts in bits/byte (in "
        "bits/token where there is no figure in bits/byte, which is said)",
    )
    group.add_argument("--max_replicates", type=int, help="with a target: the most replicates (default: 256)")
    group.add_argument("--max_evaluations", type=int, help="with a target: the most network evaluations")
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


def _add_submission(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--submit",
        action="store_true",
        help="open a pull request to the model's repository on the Hub, whoever it belongs to, with the figure, its "
        "error and its protocol; of a whole split of a dataset on the Hub",
    )
    group.add_argument(
        "--dry_run", action="store_true", help="with --submit: measure, show what would be submitted, and send nothing"
    )


def sample(parser: argparse.ArgumentParser) -> None:
    """Draw samples from a pipeline into one picture, or one file of texts."""
    parser.add_argument("pipeline", help="a run's folder, a pipeline's, or a Hub id; of a VDM, or one of diffusers'")
    parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
    group = parser.add_argument_group(_OF_DIFFUSERS)
    group.add_argument("--num_levels", type=int, help=_LEVELS)
    _add_checkpoint(group)
    parser.add_argument("--num_images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument(
        "--output", type=Path, help="the PNG, or the file of texts, to write (default: grid.png, or samples.txt)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output, where there is one")
    parser.add_argument("--num_inference_steps", type=int, default=250, help="network evaluations (default: 250)")
    parser.add_argument(
        "--sampler",
        default="ancestral",
        help="of a diffusion: ancestral, the reverse step of its bound, or one by the score: reverse_sde, "
        "probability_flow, predictor_corrector, annealed_langevin (default: ancestral)",
    )
    parser.add_argument(
        "--class_labels",
        help="of a class-conditional model: classes by number or name, separated by commas, each a row of "
        "--num_images over them (default: all classes, ten at most)",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="of a model that is conditioned on captions: captions, each in quotes and each a row of --num_images "
        "over them (default: some of its training); of a model of texts: texts to continue, or to fill where they "
        "have the tokenizer's mask token, such as 'To be, [MASK][MASK]'",
    )
    parser.add_argument("--length", type=int, help="of a model of texts: tokens of each (default: a window's)")
    parser.add_argument(
        "--temperature",
        type=float,
        help="of a model of texts: below 1 likelier tokens come more often (default: 1)",
    )
    parser.add_argument(
        "--remasking",
        type=float,
        help="of a masked model of texts: how much of what is open is masked again on the way, from 0 to 1",
    )
    parser.add_argument("--negative_prompt", help="with guidance: what takes the place of no caption")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="how strongly samples are drawn to their class or caption, for a model trained with condition dropout; "
        "1: not at all (default: 1)",
    )
    parser.add_argument(
        "--guider", default="ClassifierFreeGuidance", help="how, by a guider of diffusers (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i (default: 0)")


def publish(parser: argparse.ArgumentParser) -> None:
    """Publish a pipeline to the Hugging Face Hub, with its model card."""
    parser.epilog = "The token is the one of `hf auth login`, or HF_TOKEN; it is never an argument."
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


def space(parser: argparse.ArgumentParser) -> None:
    """Make a Gradio app of a model, as a Space of the Hub, a folder, or served on this machine."""
    parser.epilog = "The token is the one of `hf auth login`, or HF_TOKEN; it is never an argument."
    parser.add_argument("model", help="a Hub id such as me/vdm-digits; or a run's folder, or a pipeline's")
    parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
    group = parser.add_argument_group(_OF_DIFFUSERS)
    group.add_argument("--num_levels", type=int, help=_LEVELS)
    _add_checkpoint(group)
    parser.add_argument("--title", help="over the app (default: the model's name)")
    parser.add_argument(
        "--requirement",
        action="append",
        default=[],
        help="a line of requirements.txt, in place of that of the same package, such as 'vdm-hub @ "
        "git+https://host/vdm_hub@COMMIT'; may be given several times",
    )
    group = parser.add_argument_group("where to; at least one")
    group.add_argument(
        "--output", type=Path, help="write it into this folder; a model of this machine is copied into its model/"
    )
    group.add_argument("--overwrite", action="store_true", help="with --output: replace what a former one wrote")
    group.add_argument(
        "--push", help="commit it to this Space, such as me/vdm-digits-demo; a model of this machine goes with it"
    )
    group.add_argument("--private", action="store_true", help="with --push: make a new Space private")
    group.add_argument("--serve", action="store_true", help="run it on this machine, until Ctrl-C")
    group.add_argument("--port", type=int, help="with --serve: the port (default: 7860, or the next that is free)")


def plugins(parser: argparse.ArgumentParser) -> None:
    """List the noise schedules, targets and processes that are installed, and check them."""
    parser.epilog = (
        "The built-ins are those of the package vdm-hub. Listing imports no plugin; --check does, and puts an "
        "instance of each under the laws of its kind."
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")
    parser.add_argument("--check", action="store_true", help="import each and run the conformance kit on it")
