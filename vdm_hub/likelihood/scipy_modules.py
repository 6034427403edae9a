"""scipy, imported when it is needed: code that a repository carries needs no more than diffusers to be imported."""

from __future__ import annotations

import importlib
from typing import Any

from vdm_hub.errors import ConfigurationError


def scipy_module(name: str, needed_for: str) -> Any:
    """A module of scipy.

    Args:
        name: Its name within scipy.
        needed_for: What asks for it, for the message.

    Raises:
        ConfigurationError: scipy is missing, as it may be where this code came with a model.

    >>> float(scipy_module("special", "an example").gamma(5.0))
    24.0
    """
    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError as error:
        raise ConfigurationError(
            f"{needed_for} needs scipy, which is not installed: run `pip install scipy`."
        ) from error
