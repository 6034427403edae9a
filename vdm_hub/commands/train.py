"""Train a model by a recipe, as ``vdm-hub train RECIPE`` and ``accelerate launch -m vdm_hub.train RECIPE`` do."""

from __future__ import annotations

from collections.abc import Sequence

from vdm_hub.commands.interrupts import interruptible_import
from vdm_hub.recipes.arguments import parse_recipe


def run(words: Sequence[str]) -> None:
    """Read the command line, which needs no torch, then train, and print the result and its place."""
    configuration = parse_recipe(words)
    interruptible_import("vdm_hub.training.loop").train_model(configuration)
