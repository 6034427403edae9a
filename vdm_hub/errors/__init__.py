"""The errors and warnings that a user may meet: what is wrong, with the value, and what to do; never a secret."""

from __future__ import annotations

import difflib
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vdm_hub.errors.secret_values import mask

MAX_MESSAGE = 1000
"""The largest number of characters of a message."""

_READ = 4 * MAX_MESSAGE  # characters of either end of a text that may come to be shown
_LONG_WORD = re.compile(r"\S{240,}")


class VDMHubError(Exception):
    r"""Base of all errors that are the user's to mend. The doors print it as one paragraph, without a traceback.

    Whatever a message repeats of a file or a name, it is one paragraph of at most `MAX_MESSAGE` characters, in which
    control characters and marks of writing direction are shown, not obeyed, and no secret stands.

    >>> str(VDMHubError("the file 'a\u202egnp.exe' is\n\tdamaged"))
    "the file 'a\\u202egnp.exe' is damaged"
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(in_words(mask(_ends(str(message)))))


class ConfigurationError(VDMHubError, ValueError):
    """The error for a wrong name, field or value in a config, in a recipe or on the command line."""


class DataError(VDMHubError, ValueError):
    """The error for data that are not what the model or the recipe needs."""


class CheckpointError(VDMHubError):
    """The error for a checkpoint, a model's folder or an output folder that can't be used."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """The error for a folder or a repository that lacks a file that a model needs."""


class HubError(VDMHubError, OSError):
    """The error for files that the Hub did not give and the cache does not have."""


class OutputError(VDMHubError, OSError):
    """The error for a place that can't be written to; what is there stays."""


class NonFiniteLossError(VDMHubError, ArithmeticError):
    """The error for a loss that is NaN or infinite: training stopped before the weights were touched."""


class PublishError(VDMHubError):
    """The error for a publication to the Hub that failed, or may have: then the message says so, and where to look."""


class MissingPluginError(VDMHubError, ImportError):
    """The error for a config that names a plugin that is not installed."""


class Interrupted(KeyboardInterrupt):
    """The exception for Ctrl-C where more is to be said than that nothing half-written is left."""

    def __init__(self, message: str) -> None:
        super().__init__(in_words(mask(_ends(message))))


def warn(message: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Warn of something, in text that is shown as that of an error is: no secret, and nothing that would be obeyed.

    >>> with warnings.catch_warnings(record=True) as said:
    ...     warnings.simplefilter("always")
    ...     warn("the file at https://ada:tiger@example.org is left out")
    >>> str(said[0].message)
    'the file at https://***@example.org is left out'
    """
    warnings.warn(in_words(mask(_ends(message))), category, stacklevel + 1)


def in_words(text: str) -> str:
    r"""Text as a message may repeat it: one paragraph, its ends kept where it is long, nothing in it invisible.

    >>> in_words("two\n  lines\x07"), len(in_words("word " * 1000)), len(in_words("w" * 5000))
    ('two lines\\x07', 1000, 185)
    """
    shown = "".join(map(shown_character, " ".join(text.split())))
    shown = _LONG_WORD.sub(lambda word: f"{word[0][:120]}[...]{word[0][-60:]}", shown)
    if len(shown) <= MAX_MESSAGE:
        return shown
    return f"{shown[:600]} [...] {shown[len(shown) - (MAX_MESSAGE - 607) :]}"


def in_one_line(error: BaseException) -> str:
    r"""The message of an error, or its name where it says nothing; at most `MAX_MESSAGE` characters.

    >>> in_one_line(ValueError("two\n  lines")), in_one_line(ValueError())
    ('two lines', 'ValueError')
    """
    return in_words(mask(_ends(str(error)))) or type(error).__name__


def shortened(value: object, limit: int = 100) -> str:
    """A value as a message may repeat it.

    >>> shortened("a" * 1000, limit=10)
    "'aaaaaa...aa'"
    """
    text = mask(_ends(repr(value)))
    return text if len(text) <= limit + 3 else f"{text[: limit - 3]}...{text[-3:]}"


@contextmanager
def explained(what: str, remedy: str, error_class: type[VDMHubError] = CheckpointError) -> Iterator[None]:
    """Turn whatever a library raises within into an error of ours; ours stay what they are.

    Args:
        what: The beginning of the message, such as ``the network of runs/digits can't be built``.
        remedy: Its end.
        error_class: Of the error.

    >>> with explained("the file a.json can't be read", "make it again"):
    ...     raise KeyError("b")
    Traceback (most recent call last):
    ...
    vdm_hub.errors.CheckpointError: the file a.json can't be read (KeyError: 'b'): make it again.
    """
    try:
        yield
    except VDMHubError:
        raise
    except Exception as error:
        # A bare KeyError or IndexError says nothing without its name.
        message = in_one_line(error)[:400].rstrip(". ")
        name = type(error).__name__
        raise error_class(f"{what} ({message if message == name else f'{name}: {message}'}): {remedy}.") from error


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigurationError:
    """An error for an unknown name, with the nearest known one.

    >>> print(unknown_name("noise schedule", "cosin", ["cosine", "linear"]))
    unknown noise schedule 'cosin': did you mean 'cosine'? Known: cosine, linear.
    """
    names = sorted(known)
    nearest = [one for one in names if one.lower() == str(name).lower()]
    nearest = nearest or difflib.get_close_matches(str(name)[:100], names, n=1, cutoff=0.5)
    hint = f" did you mean '{nearest[0]}'?" if nearest else ""
    return ConfigurationError(f"unknown {kind} {shortened(name)}:{hint} Known: {', '.join(names)}.")


def _ends(text: str) -> str:
    """The ends of a text, where it is very long: what lies between is never shown."""
    return text if len(text) <= 2 * _READ else f"{text[:_READ]} [...] {text[-_READ:]}"


def shown_character(character: str) -> str:
    """The character, or its escape where it would not be seen, or would change how others are."""
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
    return character.encode("unicode_escape").decode() if hidden else character
