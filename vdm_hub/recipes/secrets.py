"""A secret has no place on a command line or in a recipe."""

from __future__ import annotations

from vdm_hub.errors import ConfigurationError
from vdm_hub.errors.secret_values import find_secret

_REMEDY = (
    "what stands on a command line is seen by other processes and stays in the shell's history, and what stands in a "
    "recipe is published with it. Log in once with `hf auth login`, or set HF_TOKEN, and leave it out here"
)


def refuse_token_field(name: str) -> None:
    """Refuse fields such as ``hub_token``, which other trainers have.

    Raises:
        ConfigurationError: Without the value.
    """
    if name.endswith("token"):
        raise ConfigurationError(f"{name} is no field: {_REMEDY}.")


def refuse_secret(name: str, value: object) -> None:
    """Refuse a secret that was given as a field's value, or within it.

    Raises:
        ConfigurationError: Without the value.
    """
    if what := find_secret(value):
        raise ConfigurationError(f"{name} holds {what}: {_REMEDY}.")
