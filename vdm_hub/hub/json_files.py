"""JSON from files that others may have written or changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from vdm_hub.errors import CheckpointError, in_one_line

MAX_JSON_BYTES = 10_000_000
MAX_JSON_DEPTH = 64


def read_json(
    path: Path, name: str | None = None, max_bytes: int = MAX_JSON_BYTES, *, infinite: bool = False
) -> dict[str, Any]:
    """The JSON object in a file: in UTF-8, of a bearable size and depth, each key once, each number finite.

    Args:
        path: The file.
        name: What messages call it; its path where not given.
        max_bytes: The most that it may have.
        infinite: Whether ``Infinity`` may stand in it, as in the configs of some schedulers of diffusers.

    Raises:
        CheckpointError: It is none, or is not there.
    """
    name = str(path) if name is None else name
    try:
        check_json_size(name, path.stat().st_size, max_bytes)
        return parse_json(path.read_bytes(), name, infinite=infinite)
    except OSError as error:
        raise CheckpointError(
            f"{name} can't be read ({in_one_line(error)}): make it again, or download it."
        ) from error


def parse_json(content: bytes, name: str, *, infinite: bool = False) -> dict[str, Any]:
    """`read_json` of the content of a file.

    >>> parse_json(b'{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    ...
    vdm_hub.errors.CheckpointError: x.json can't be read as JSON (the key 'a' is there twice): it is damaged: make it \
again, or download it.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_repeated_keys,
            parse_constant=_infinity if infinite else _refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name} can't be read as JSON ({in_one_line(error)[:300]}): it is damaged: make it again, or download it."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a {type(value).__name__}, not an object: it is damaged.")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise CheckpointError(f"{name} is nested more than {MAX_JSON_DEPTH} levels deep: refused, as no config is.")
    return value


def check_json_size(name: str, size: int, max_bytes: int = MAX_JSON_BYTES) -> None:
    """Refuse a file that is too large to be a config, before it is downloaded or read."""
    if size > max_bytes:
        raise CheckpointError(f"{name} has {size:,} bytes; such a JSON file has at most {max_bytes:,}: refused.")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _infinity(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
