"""The logged course of a run; part of its checkpoints, so that a resumed run has each step of it, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Columns = dict[str, list[float]]


class History:
    """Columns of equal length for training and for held-out data, each with the step.

    >>> history = History()
    >>> history.add("train", 50, {"bits_per_dim": 3.5, "diffusion": 3.2, "learning_rate": 1e-3})
    >>> history.add("validation", 50, {"bits_per_dim": 3.4, "standard_error": 0.1})
    >>> history.to_dict()["train"]
    {'step': [50], 'bits_per_dim': [3.5], 'diffusion': [3.2], 'learning_rate': [0.001]}
    >>> History(history.to_dict()).to_dict() == history.to_dict()
    True
    """

    def __init__(self, columns: Mapping[str, Mapping[str, list[float]]] | None = None) -> None:
        self._parts: dict[str, Columns] = {part: {"step": [], "bits_per_dim": []} for part in ("train", "validation")}
        for part, saved in (columns or {}).items():
            self._parts[part] = {name: list(values) for name, values in saved.items()}

    def add(self, part: str, step: int, values: Mapping[str, float]) -> None:
        """Append what was measured at a step: the same names each time, ``bits_per_dim`` among them."""
        columns = self._parts[part]
        for name, value in {"step": step, **values}.items():
            columns.setdefault(name, []).append(value)

    def last(self, part: str, step: int) -> dict[str, float] | None:
        """The last measurement at a step or before it; ``None`` where there is none.

        >>> history = History({"validation": {"step": [10, 20], "bits_per_dim": [3.5, 3.25]}})
        >>> history.last("validation", 15), history.last("validation", 5)
        ({'step': 10, 'bits_per_dim': 3.5}, None)
        """
        columns = self._parts[part]
        until = [row for row, at in enumerate(columns["step"]) if at <= step]
        return {name: values[until[-1]] for name, values in columns.items()} if until else None

    def to_dict(self) -> dict[str, Any]:
        """A copy as ``{"train": {"step": [...], "bits_per_dim": [...], ...}, "validation": {...}}``."""
        return {
            part: {name: list(values) for name, values in columns.items()} for part, columns in self._parts.items()
        }
