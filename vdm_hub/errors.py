"""The errors a user may meet. Each message says what is wrong, with the value, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from vdm_hub.secret_values import mask


class VDMHubError(Exception):
    """Base of all errors that are the user's to mend. The doors print it as one paragraph, without a traceback.

    No message holds a secret, whatever it was made of.

    >>> print(VDMHubError("https://ada:tiger@example.org/x is not there."))
    https://***@example.org/x is not there.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*(mask(argument) if isinstance(argument, str) else argument for argument in args))


class ConfigurationError(VDMHubError, ValueError):
    """A name, a field or a value in a config, a recipe or on the command line is wrong."""


class DataError(VDMHubError, ValueError):
    """The data are not what the model or the recipe needs."""


class CheckpointError(VDMHubError):
    """A checkpoint or an output folder can't be used."""


class NonFiniteLossError(VDMHubError, ArithmeticError):
    """The loss became NaN or infinite: training stopped before the weights were touched."""


class PublishError(VDMHubError):
    """A publication to the Hub did not happen; what was published before is as it was."""


class MissingPluginError(VDMHubError, ImportError):
    """A config names a plugin that is not installed."""


def in_one_line(error: BaseException) -> str:
    r"""What an error says, without secrets, or its name where it says nothing; at most 1,000 characters.

    >>> in_one_line(ValueError("two\n  lines")), in_one_line(ValueError())
    ('two lines', 'ValueError')
    """
    return mask(" ".join(str(error).split()) or type(error).__name__)[:1000]  # before the cut: half a secret shows


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigurationError:
    """An error for an unknown name, with the nearest known one.

    >>> print(unknown_name("noise schedule", "cosin", ["cosine", "linear"]))
    unknown noise schedule 'cosin': did you mean 'cosine'? Known: cosine, linear.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" did you mean '{nearest[0]}'?" if nearest else ""
    return ConfigurationError(f"unknown {kind} {name!r}:{hint} Known: {', '.join(names)}.")
