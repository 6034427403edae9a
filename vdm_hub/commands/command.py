"""The interface of a command that a plugin adds to ``vdm-hub``."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod


class Command(ABC):
    """A command of ``vdm-hub`` that an installed package brings, by an entry point in the group ``vdm_hub.commands``.

    The entry point's name is the command's; its docstring's first line says what it does. Listing commands imports
    none; the one that is called is imported, built without arguments, and given its command line.

    Example:
        >>> class Greet(Command):
        ...     "Greet somebody."
        ...
        ...     def declare(self, parser):
        ...         parser.add_argument("name")
        ...
        ...     def run(self, arguments):
        ...         print(f"Hello, {arguments.name}!")
        >>> parser = argparse.ArgumentParser()
        >>> Greet().declare(parser)
        >>> Greet().run(parser.parse_args(["reader"]))
        Hello, reader!
    """

    @abstractmethod
    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's options to its parser."""

    @abstractmethod
    def run(self, arguments: argparse.Namespace) -> int | None:
        """Do what is asked; a `VDMHubError` is printed as one paragraph, and the status is 2."""
