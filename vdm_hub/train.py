"""``accelerate launch -m vdm_hub.train RECIPE [--field value ...]``: ``vdm-hub train``, for launchers of modules."""

from __future__ import annotations

import sys

from vdm_hub import commands


def main() -> int:
    """Train by the command line, and say what came out and where it is."""
    return commands.main([commands.TRAIN, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
