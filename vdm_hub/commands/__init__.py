"""The command ``vdm-hub``: argument parsing and printing, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vdm_hub.commands import evaluate, sample
from vdm_hub.errors import VDMHubError

COMMANDS = {"evaluate": evaluate, "sample": sample}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vdm-hub COMMAND ...``; an error that is the user's to mend is one paragraph and exit status 2."""
    parser = argparse.ArgumentParser(prog="vdm-hub", description="Variational diffusion models.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        help_text = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=help_text, description=help_text, allow_abbrev=False))
    arguments = parser.parse_args(argv)
    return report_errors(lambda: COMMANDS[arguments.command].run(arguments))


def report_errors(run: object) -> int:
    """Call ``run`` and turn a `VDMHubError` into a message on standard error and exit status 2."""
    try:
        run()  # type: ignore[operator]
    except VDMHubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
