"""Dataclass fields that explain themselves and say which values they take, and the one check of all of them."""

from __future__ import annotations

import contextlib
import math
import operator
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union

from vdm_hub.errors import ConfigurationError, shortened, unknown_name

T = TypeVar("T")

MAX_SEED = 2**63 - 1
"""The largest seed that torch and numpy take alike."""


def option(
    default: T,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    only_with: str | None = None,
    idle_without: str | None = None,
) -> T:
    """A dataclass field with a default, a help text, and what it may be; ``None`` is checked by its type alone.

    Args:
        default: Its value where none is given.
        help: What it is, for ``--help``.
        at_least: Bounds of a number, as are the next three.
        above: See ``at_least``.
        at_most: See ``at_least``.
        below: See ``at_least``.
        choices: The names that it may be; of a `Literal` they are known.
        only_with: Another field; where that is off (0, false or not given), this one must have its default.
        idle_without: Another field; where that is off, this one has no effect, which `idle_fields` says.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    metadata = {"bounds": given, "choices": choices, "only_with": only_with, "idle_without": idle_without}
    value: T = field(default=default, metadata={"help": help, **metadata})
    return value


def check_fields(arguments: Any) -> None:
    """Require of each field of a dataclass what its `option` says.

    Raises:
        ConfigurationError: Naming the field, its value and its range, or the nearest name.
    """
    hints = typing.get_type_hints(type(arguments))
    for one in fields(arguments):
        value, allowed = getattr(arguments, one.name), one.metadata
        if value is None or "bounds" not in allowed:
            continue
        hint = getattr(hints[one.name], "__supertype__", hints[one.name])
        kinds = typing.get_args(hint) or (hint,)
        numbers = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, (int, float))]
        if numbers and bool not in numbers:
            _check_number(one.name, value, allowed["bounds"], whole=all(issubclass(kind, int) for kind in numbers))
        known = allowed["choices"] or _names_in(hints[one.name])
        if known and value not in known:
            raise unknown_name(one.name, value, known)
        if (other := allowed["only_with"]) is not None and value != one.default:
            on = getattr(arguments, other)
            require(
                bool(on),
                one.name,
                value,
                f"it acts only with {other}, which is {on!r}: give that, too, or leave it out",
            )


def idle_fields(arguments: Any) -> list[str]:
    """Sentences on the fields of a dataclass that have no effect beside another field of it."""
    idle = [
        (one.name, one.metadata["idle_without"])
        for one in fields(arguments)
        if one.metadata.get("idle_without") and getattr(arguments, one.name) != one.default
    ]
    return [
        f"{name} has no effect, as {other} is {getattr(arguments, other)!r}"
        for name, other in idle
        if not getattr(arguments, other)
    ]


def _check_number(name: str, value: Any, bounds: dict[str, float], whole: bool = False) -> None:
    ranges = " and ".join(f"{word} {bound:,}" for word, bound in bounds.items())
    wanted = f"{'whole' if whole else 'finite'} number {ranges}"
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    tests = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
    within_all = {"above": -math.inf, "below": math.inf} | bounds
    if not is_number or not all(tests[word](value, bound) for word, bound in within_all.items()):
        raise ConfigurationError(f"{name} is {reprlib.repr(value)}: give a {wanted}.")


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type.

    >>> members(int | None), members(str)
    ((<class 'int'>, <class 'NoneType'>), (<class 'str'>,))
    """
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _names_in(annotation: Any) -> tuple[str, ...]:
    """The names of a `Literal`, also of one that may be ``None``."""
    literals = [member for member in members(annotation) if typing.get_origin(member) is Literal]
    return tuple(name for literal in literals for name in typing.get_args(literal))


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise a `ConfigurationError` with the value and the remedy, unless the condition holds."""
    if not condition:
        raise ConfigurationError(f"{name} is {value!r}: {remedy}.")


def within(minimum: float, maximum: float, arguments: object, *names: str) -> None:
    """Require that each named field lies between the two, or is ``None``."""
    for name in names:
        if (value := getattr(arguments, name)) is not None:
            _check_number(name, value, {"at least": minimum, "at most": maximum})


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number in a range; 2.0, True and "2" are none.

    >>> whole_number("batch_size", 2.5)
    Traceback (most recent call last):
    ...
    vdm_hub.errors.ConfigurationError: batch_size is 2.5: give a whole number of at least 1.
    """
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    with contextlib.suppress(TypeError, ValueError):  # an array of one has an index only where it holds whole numbers
        if is_whole and least <= (number := operator.index(value)) <= (number if most is None else most):
            return number
    wanted = f"of at least {least:,}" if most is None else f"from {least:,} to {most:,}"
    raise ConfigurationError(f"{name} is {shortened(value)}: give a whole number {wanted}.")
