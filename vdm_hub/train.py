"""``accelerate launch -m vdm_hub.train RECIPE [--field value ...]``."""

from __future__ import annotations

import sys

from vdm_hub.commands import report_errors
from vdm_hub.training.arguments import parse
from vdm_hub.training.loop import train
from vdm_hub.training.outputs import OutputFolder


def main() -> int:
    """Train by the command line, and say what came out and where it is."""
    return report_errors(_main)


def _main() -> None:
    configuration = parse()
    report = train(configuration)
    if report is not None:
        folder = OutputFolder(configuration)
        print(f"\ntest split of {configuration.data.dataset_name or configuration.data.train_data_dir}:\n{report}")
        print(f"pipeline     {folder.pipeline}\nsamples      {folder.samples}\nschedule     {folder.schedule}")


if __name__ == "__main__":
    sys.exit(main())
