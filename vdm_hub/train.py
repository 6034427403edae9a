"""``accelerate launch -m vdm_hub.train RECIPE [--field value ...]``."""

from __future__ import annotations

import sys

from vdm_hub.commands import report_errors
from vdm_hub.recipes.arguments import parse
from vdm_hub.training.loop import train


def main() -> int:
    """Train by the command line, and say what came out and where it is."""
    return report_errors(_main)


def _main() -> None:
    train(parse())


if __name__ == "__main__":
    sys.exit(main())
