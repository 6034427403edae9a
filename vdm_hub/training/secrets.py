"""A token has no place on a command line or in a recipe, nor in what is said about either."""

from __future__ import annotations

import re

from vdm_hub.errors import ConfigurationError

_MAY_BE_TOKEN = re.compile(r"\bhf_\w+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_REMEDY = (
    "a token on a command line is seen by other processes and stays in the shell's history, and one in a recipe is "
    "published with it. Log in once with `hf auth login`, or set HF_TOKEN, and leave it out here"
)


def refuse_token_field(name: str) -> None:
    """Refuse fields such as ``hub_token``, which other trainers have.

    Raises:
        ConfigurationError: Without the value.
    """
    if name.endswith("token"):
        raise ConfigurationError(f"{name} is no field: {_REMEDY}.")


def refuse_token_value(name: str, value: object) -> None:
    """Refuse a token that was given as something else.

    Raises:
        ConfigurationError: Without the value.
    """
    if _TOKEN.search(str(value)):
        raise ConfigurationError(f"{name} holds what looks like a Hugging Face token: {_REMEDY}.")


def without_tokens(text: str) -> str:
    """Text without anything that may be a token.

    >>> without_tokens("unknown recipe 'hf_abc'")
    "unknown recipe 'hf_***'"
    """
    return _MAY_BE_TOKEN.sub("hf_***", text)
