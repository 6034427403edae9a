"""Train a model by a recipe, as ``vdm-hub train RECIPE`` and ``accelerate launch -m vdm_hub.train RECIPE`` do."""

from __future__ import annotations

from collections.abc import Sequence

from vdm_hub.commands.interrupts import interruptible_import
from vdm_hub.recipes.arguments import parse_recipe


def run(words: Sequence[str]) -> None:
    """Read the words, which needs no torch, then train and say what came out and where it is."""
    configuration = parse_recipe(words)
    interruptible_import("vdm_hub.training.loop").train_model(configuration)
