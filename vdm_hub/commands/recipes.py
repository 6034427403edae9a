"""The recipes that come with the package."""

from __future__ import annotations

import argparse
import re

from vdm_hub.errors import unknown_name
from vdm_hub.recipes.arguments import recipe_text, recipes


def run(arguments: argparse.Namespace) -> None:
    """Print one recipe as it is, or a line for each recipe that says what it trains."""
    if arguments.recipe in recipes():
        print(recipe_text(arguments.recipe), end="")
        return
    if arguments.recipe is not None:
        raise unknown_name("recipe", arguments.recipe, recipes())
    width = max(map(len, recipes()))
    for name in recipes():
        print(f"{name.ljust(width)}  {_summary(recipe_text(name))}")
    print("\n`vdm-hub recipes NAME` prints one; `vdm-hub train NAME --help` explains every field.")


def _summary(text: str) -> str:
    r"""The first clause of the comment that a recipe begins with.

    >>> _summary("# MNIST: digits\n# by hand (LeCun et al. 1998). Slow.\nseed: 1\n")
    'MNIST: digits by hand (LeCun et al. 1998)'
    """
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    return re.split(r"\.(?=\s+[A-Z]|$)|;", comment)[0]
