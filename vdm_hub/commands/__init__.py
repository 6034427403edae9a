"""The command ``vdm-hub``: the options of each subcommand, and what it prints."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vdm_hub import registry
from vdm_hub.commands import interrupts, options
from vdm_hub.commands.interrupts import interruptible_import
from vdm_hub.errors import Interrupted, PublishError, VDMHubError, in_one_line, in_words
from vdm_hub.errors.secret_values import mask
from vdm_hub.recipes.command_line import CommandLineParser
from vdm_hub.version import __version__

TRAIN = "train"
_COMMANDS = (
    *(options.recipes, options.explain, options.evaluate, options.classify, options.sample, options.publish),
    *(options.space, options.plugins),
)
COMMANDS = {declare.__name__: declare for declare in _COMMANDS}
"""The commands, and what declares the options of each; ``train`` takes the fields of a recipe besides."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vdm-hub COMMAND ...``; an error that is the user's to mend is one paragraph and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [TRAIN]:
        return report_errors(lambda: interruptible_import("vdm_hub.commands.train").run(words[1:]))
    if words[:1] and (found := _by_plugin(words[0])):
        return report_errors(partial(_run_plugin, found, words[1:]))
    return report_errors(partial(_run, _parser().parse_args(words)))


def _by_plugin(name: str) -> registry.Registration | None:
    """The command of an installed package by that name, where none of our own has it."""
    return next((one for one in _of_plugins() if one.name == name), None)


def _of_plugins() -> list[registry.Registration]:
    return [one for one in registry.registrations("commands") if one.name not in registry.RESERVED["commands"]]


def _run_plugin(found: registry.Registration, words: Sequence[str]) -> object:
    """A plugin's command, by the one package that brings it and may be loaded."""
    command: Any = registry.lookup("commands", found.name).load()()
    said = (command.__doc__ or "").partition("\n")[0]
    parser = CommandLineParser(prog=f"vdm-hub {found.name}", description=said)
    command.declare(parser)
    return command.run(parser.parse_args(words))


def _run(arguments: argparse.Namespace) -> object:
    """A command: first what can be said before anything heavy is imported, then the rest."""
    if (prepare := getattr(arguments, "prepare", None)) is not None:
        prepare(arguments)
    return interruptible_import(f"vdm_hub.commands.{arguments.command}").run(arguments)


def _parser() -> CommandLineParser:
    parser = CommandLineParser(
        prog="vdm-hub", description="Variational diffusion models: train, measure, publish, load."
    )
    parser.add_argument("--version", action="version", version=f"vdm-hub {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(TRAIN, help="Train a model by a recipe: `vdm-hub train RECIPE [--field value ...]`.")
    for name, declare in COMMANDS.items():
        summary = (declare.__doc__ or "").splitlines()[0]
        declare(commands.add_parser(name, help=summary, description=summary))
    for name in dict.fromkeys(one.name for one in _of_plugins()):
        package = next(one.package for one in _of_plugins() if one.name == name)
        commands.add_parser(name, help=f"A command of the package {package}.", add_help=False)
    return parser


def report_errors(run: Callable[[], object]) -> int:
    """Call ``run``; a `VDMHubError`, or what a file system refuses, is a message on standard error and status 2.

    Ctrl-C is a line and status 130. Otherwise the status is what ``run`` returns, where that is a number, or 0.
    Warnings are shown as errors are, whatever library they are of.
    """
    warnings.formatwarning = _line_of_warning
    interrupts.restore_interrupts()
    try:
        status = run()
    except KeyboardInterrupt as stop:
        return _interrupted(stop)
    except Exception as error:
        if interrupts.interrupt_came():  # native code may have made an error of its own of it
            return _interrupted(error)
        if not isinstance(error, (VDMHubError, OSError)):
            raise
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def _interrupted(stop: BaseException) -> int:
    """Say what Ctrl-C leaves, once for all processes; returns the status."""
    is_told = isinstance(stop, (Interrupted, PublishError))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one waits for nothing
    if os.environ.get("RANK", "0") == "0":
        print(f"\ninterrupted: {in_one_line(stop) if is_told else 'nothing half-written is left.'}", file=sys.stderr)
    return 128 + signal.SIGINT


def _line_of_warning(message: Warning | str, *where: object, **line: object) -> str:
    """The line that is printed for a warning, in the form of an error's, without the place in the code."""
    return f"warning: {in_words(mask(str(message)))}\n"
