"""List what is installed and registered, of every kind, and check it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vdm_hub import registry
from vdm_hub.errors import ConfigurationError, in_one_line
from vdm_hub.registry import BUILT_IN_PACKAGE, Registration
from vdm_hub.testing.installed import check_registered, problem, rivals
from vdm_hub.version import __version__

_COLUMNS = ("kind", "name", "package", "version", "defined", "status")


def run(arguments: argparse.Namespace) -> None:
    """List what is registered, and check it where asked to."""
    registry.allowed_packages()  # a value that is none is said once, and before anything else
    found = [registration for kind in registry.BUILT_INS for registration in registry.registrations(kind)]
    rows = [row_of(registration, arguments.check) for registration in found]
    print(json.dumps(rows, indent=2) if arguments.json else table(rows))
    failed = [f"{row['kind']}/{row['name']} of {row['package']}: {row['error']}" for row in rows if "error" in row]
    if failed:
        raise ConfigurationError(f"{len(failed)} of {len(rows)} fail their check. {' | '.join(failed)}")


def row_of(registration: Registration, check: bool) -> dict[str, str]:
    """The row of one registration: its name, its origin and its status; with ``error`` where a check failed."""
    version = __version__ if registration.package == BUILT_IN_PACKAGE else registration.version or "unknown"
    texts = (registration.kind, registration.name, registration.package, version, registration.target)
    row = dict(zip(_COLUMNS, texts, strict=False))
    return row | _status(registration, check)


def _status(registration: Registration, check: bool) -> dict[str, str]:
    trouble = problem(registration)
    if trouble is not None:
        return {"status": trouble}
    others = rivals(registration)
    note = f"; ambiguous without its package: {' and '.join(others)} too" if others else ""
    if not check:
        return {"status": ("built-in" if registration.package == BUILT_IN_PACKAGE else "installed") + note}
    try:
        check_registered(registration)
    except (Exception, SystemExit) as error:  # a plugin may raise anything; the others are checked all the same
        return {"status": f"FAILED{note}", "error": in_one_line(error)}
    return {"status": f"passes{note}"}


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows as lines of text, in columns as wide as their longest word.

    >>> values = ("decoders", "a", "p", "1", "m:A", "ok")
    >>> print(table([dict(zip(_COLUMNS, values))]))
    kind      name  package  version  defined  status
    decoders  a     p        1        m:A      ok
    """
    lines = [_COLUMNS, *(tuple(row[column] for column in _COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    padded = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
