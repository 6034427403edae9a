"""Dataclass fields that explain themselves, and the checks of their values."""

from __future__ import annotations

from dataclasses import field
from typing import TypeVar

from vdm_hub.errors import ConfigurationError

T = TypeVar("T")


def option(default: T, help: str) -> T:
    """A dataclass field with a default and a help text."""
    value: T = field(default=default, metadata={"help": help})
    return value


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise a `ConfigurationError` with the value and the remedy, unless the condition holds."""
    if not condition:
        raise ConfigurationError(f"{name} is {value!r}: {remedy}.")


def at_least(minimum: float, arguments: object, *names: str) -> None:
    """Require that each named field is at least the minimum, or ``None``."""
    for name in names:
        value = getattr(arguments, name)
        # `not >=`, so that NaN is refused too.
        require(value is None or value >= minimum, name, value, f"give at least {minimum}")


def positive(arguments: object, *names: str) -> None:
    """Require that each named field is finite and above zero."""
    for name in names:
        value = getattr(arguments, name)
        require(0 < value < float("inf"), name, value, "give a finite number above 0")
