"""Laws of a kind, and how an instance is put under all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from vdm_hub.errors import ConfigurationError, in_one_line, unknown_name


class LawViolation(AssertionError):
    """An instance breaks a law of its kind; the message names the law and the numbers."""


@dataclass(frozen=True)
class Law:
    """A statement that must be true of every instance of a kind.

    Attributes:
        name: By which reports and ``expected_failures`` call it.
        statement: What it says, in one sentence.
        test: Raises a `LawViolation` where an instance breaks it.
    """

    name: str
    statement: str
    test: Callable[[Any], None]

    def check(self, instance: object) -> None:
        """Put an instance under this law alone; the random state is afterwards as it was before.

        Raises:
            LawViolation: It breaks the law, or raises an error on the way.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                self.test(instance)
            except LawViolation as violation:
                self._report(instance, str(violation), violation)
            except (Exception, SystemExit) as error:  # whatever a plugin's code may raise
                self._report(instance, f"it raised {type(error).__name__}: {in_one_line(error)}", error)

    def _report(self, instance: object, what: str, cause: BaseException) -> NoReturn:
        raise LawViolation(
            f"{type(instance).__name__} breaks the law {self.name!r} ({self.statement}): {what}"
        ) from cause


class Laws:
    """The laws of one kind, in the order in which they are written down.

    >>> laws = Laws("numbers", int)
    >>> @laws.add
    ... def positive(number: int) -> None:
    ...     '''It is above zero.'''
    ...     require(number > 0, f"it is {number}")
    >>> laws.check(3)
    >>> laws.check(-3)
    Traceback (most recent call last):
    ...
    vdm_hub.testing.laws.LawViolation: int breaks the law 'positive' (it is above zero): it is -3
    """

    def __init__(self, kind: str, base: type) -> None:
        self.kind, self.base = kind, base
        self.by_name: dict[str, Law] = {}

    def add(self, test: Callable[[Any], None]) -> Callable[[Any], None]:
        """A decorator: the function's name is the law's, the first line of its docstring what the law says."""
        statement = (inspect.getdoc(test) or "").splitlines()[0].rstrip(".")
        self.by_name[test.__name__] = Law(test.__name__, statement[0].lower() + statement[1:], test)
        return test

    def check(self, instance: object, expected_failures: Mapping[str, str] | None = None) -> None:
        """Put an instance under all laws.

        Args:
            instance: Of this kind.
            expected_failures: Laws that it is known to break, each with the reason.

        Raises:
            LawViolation: It breaks others, or keeps one that it is said to break.
            ConfigurationError: It is not of this kind, or ``expected_failures`` names no law or gives no reason.
        """
        if not isinstance(instance, self.base):
            raise ConfigurationError(
                f"{instance!r:.200} is not a {self.base.__name__}: give an instance of a class derived from it."
            )
        expected = check_reasons(expected_failures or {}, self.by_name)
        found = []
        for law in self.by_name.values():
            violation = _violation(law, instance)
            if violation is None and law.name in expected:
                found.append(f"{type(instance).__name__} keeps the law {law.name!r}, which it is expected to break")
            if violation is not None and law.name not in expected:
                found.append(violation)
        if found:
            raise LawViolation("\n".join(found))


def require(condition: object, message: str) -> None:
    """Raise a `LawViolation` unless the condition, a bool or a tensor of one, holds."""
    if not bool(condition):
        raise LawViolation(message)


def check_reasons(expected_failures: Mapping[str, str], known: Mapping[str, Law]) -> Mapping[str, str]:
    """Refuse an expected failure of a law that is none, or without a reason."""
    for name, reason in expected_failures.items():
        if name not in known:
            raise unknown_name("law in expected_failures", name, known)
        if not isinstance(reason, str) or not reason.strip():
            raise ConfigurationError(f"the expected failure of the law {name!r} has the reason {reason!r}: say why.")
    return expected_failures


def _violation(law: Law, instance: object) -> str | None:
    try:
        law.check(instance)
    except LawViolation as violation:
        return str(violation)
    return None
