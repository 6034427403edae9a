"""The parser of every command line: each option is given once and in full, and each word is one that a path may be."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vdm_hub.errors import in_words, shortened
from vdm_hub.errors.secret_values import mask


class CommandLineParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations, whose complaints are as readable as all other messages.

    An option that is given twice is refused with both of its values, also in two spellings; one that is unknown, with
    the nearest that is known, before anything is missed.

    Args:
        takes_others: Whether options that it does not know are left to the caller.
        options: As `argparse.ArgumentParser` takes them.
    """

    def __init__(self, *, takes_others: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.takes_others, self.given = takes_others, dict[str, str]()
        for name, action in {None: _Store, "store_true": _StoreTrue, "store_false": _StoreFalse}.items():
            self.register("action", name, action)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; each word is looked at first."""
        words: Sequence[str] = sys.argv[1:] if args is None else list(args)
        for word in words:
            if "\0" in word or not _is_unicode(word):
                self.error(f"{shortened(word)} on the command line is not UTF-8, or has a zero byte: give another")
        if not self.takes_others:
            self._refuse_unknown(words)
        return super().parse_known_args(words, namespace)

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        own = itertools.takewhile(lambda word: word != "--", words)
        if self._subparsers is not None:  # what follows the subcommand is for its own parser
            own = itertools.takewhile(lambda word: word.startswith("-"), own)
        for name in (word.partition("=")[0] for word in own if word.startswith("--")):
            if name not in self._option_string_actions:
                known = [one for one in self._option_string_actions if one.startswith("--")]
                nearest = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                self.error(f"unknown option {shortened(name)}: {hint}{self.prog} --help lists all options")

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        super().error(in_words(mask(message)))


class _Once(argparse.Action):
    """An action that sets its value once, and refuses a second one."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        words = str(option_string) if values == [] else f"{option_string} {values}"
        if option_string is not None and self.dest in parser.given:
            both = f"{shortened(parser.given[self.dest])} and {shortened(words)}"
            parser.error(f"{option_string} is given twice, as {both}: give it once")
        parser.given[self.dest] = words
        super().__call__(parser, namespace, values, option_string)


class _Store(_Once, argparse._StoreAction):
    """The action of options with a value, such as ``--seed 1``."""


class _StoreTrue(_Once, argparse._StoreTrueAction):
    """The action of switches, such as ``--json``."""


class _StoreFalse(_Once, argparse._StoreFalseAction):
    """The action of switches that turn off, such as ``--no_use_ema``."""


def _is_unicode(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True
