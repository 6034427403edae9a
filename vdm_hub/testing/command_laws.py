"""The laws of a command: what `vdm-hub` takes for granted of one that a package brings."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import Any

from vdm_hub import registry
from vdm_hub.testing.laws import Laws, require
from vdm_hub.testing.subjects import require_registered

COMMAND_LAWS = Laws("commands", registry.base_class("commands"))


@COMMAND_LAWS.add
def built_without_arguments(command: Any) -> None:
    """The class is built without arguments, as `vdm-hub` does."""
    type(command)()


@COMMAND_LAWS.add
def says_what_it_does(command: Any) -> None:
    """The first line of its docstring says what it does."""
    require((command.__doc__ or "").partition("\n")[0].strip(), "its docstring has no first line")


@COMMAND_LAWS.add
def helps(command: Any) -> None:
    """Its `declare` adds options to a parser, and `--help` prints them."""
    parser, printed, status = argparse.ArgumentParser(prog="vdm-hub command"), io.StringIO(), None
    command.declare(parser)
    with contextlib.redirect_stdout(printed):
        try:
            parser.parse_args(["--help"])
        except SystemExit as end:
            status = end.code
    require(status == 0, f"--help ends with {status}")
    require("usage:" in printed.getvalue(), f"--help prints {printed.getvalue()!r:.100}, not how it is used")


@COMMAND_LAWS.add
def registered(command: Any) -> None:
    """The class is the entry point of an installed package, under a name that none of our own commands has."""
    require_registered("commands", type(command))
    found = registry.registration_of("commands", type(command))
    name = found.name if found else ""
    require(name not in registry.RESERVED["commands"], f"the name {name!r} is that of a command of vdm-hub itself")
