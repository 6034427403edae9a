"""Modules that are imported when they are needed: code that a repository carries needs no more than diffusers does."""

from __future__ import annotations

import importlib
from typing import Any

from vdm_hub.errors import ConfigurationError


def needed_module(name: str, needed_for: str) -> Any:
    """A module of a package that is named as it is.

    Args:
        name: Its name.
        needed_for: What asks for it, for the message.

    Raises:
        ConfigurationError: The package is missing, as it may be where this code came with a model.

    >>> float(needed_module("scipy.special", "an example").gamma(5.0))
    24.0
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"{needed_for} needs {package}, which is not installed: run `pip install {package}`."
        ) from error
