"""The words of a run on itself before its first step."""

from __future__ import annotations

import textwrap

from vdm_hub.data.kinds import TOKENS
from vdm_hub.fields import idle_fields
from vdm_hub.recipes.arguments import Configuration, defaults

_WIDTH = 119


def describe_recipe(configuration: Configuration) -> str:
    """The effective arguments: of a dry run all of them, as a recipe; else those that are not the defaults.

    >>> print(describe_recipe(Configuration.from_dict({"dataset_name": "digits", "max_train_steps": 5}, "mine")))
    mine: dataset_name digits, output_dir runs/mine, max_train_steps 5
    """
    if configuration.training.dry_run:
        return f"# the effective arguments, as a recipe\n{configuration.to_yaml()}"
    usual = defaults()
    given = {name: value for name, value in configuration.to_dict().items() if value != usual.get(name, value)}
    words = ", ".join(f"{name} {value}" for name, value in given.items())
    return textwrap.fill(f"{configuration.recipe}: {words}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def without_effect(configuration: Configuration, total_steps: int) -> list[str]:
    """Words for what a recipe asks for and will not come to pass.

    Args:
        configuration: The recipe.
        total_steps: The optimiser steps of the run.
    """
    data, training = configuration.data, configuration.training
    warm_up, held_out = training.lr_warmup_steps, bool(data.validation_split or data.validation_size)
    usual = defaults()["lr_warmup_steps"]
    of_run = f"and the run has {total_steps:,} steps"
    reasons = {
        f"lr_warmup_steps is {warm_up:,} {of_run}: learning_rate is never reached": (
            training.lr_scheduler != "constant" and warm_up > total_steps
        ),
        f"lr_warmup_steps is {warm_up:,} and has no effect, as lr_scheduler is 'constant'": (
            training.lr_scheduler == "constant" and warm_up not in (0, usual)
        ),
        f"validation_steps is {training.validation_steps:,} {of_run}: nothing is measured while it trains": (
            training.validation_steps > total_steps
        ),
        f"sample_steps is {training.sample_steps:,} and nothing is drawn, as num_sample_images is 0": (
            training.sample_steps > 0 and training.num_sample_images == 0
        ),
        f"{data.kind.data} are held out for validation and never measured, as validation_steps is 0": (
            held_out and training.validation_steps == 0
        ),
        "channels_last is true and has no effect, as the data are texts": training.channels_last
        and data.kind is TOKENS,
        f"test_size is {data.test_size} and nothing is measured at the end, as evaluation_replicates is 0": (
            bool(data.test_size) and training.evaluation_replicates == 0
        ),
    }
    return [*idle_fields(training), *(words for words, is_so in reasons.items() if is_so)]
