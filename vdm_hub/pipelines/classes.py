"""The classes of a pipeline by number and name, and what is known of them before an image is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vdm_hub.errors import ConfigurationError, explained, shortened, unknown_name


def class_names(pipeline: Any) -> tuple[str, ...]:
    """The names of a pipeline's classes; their numbers, where it has none."""
    known = getattr(pipeline, "class_names", None)
    return tuple(known or map(str, range(pipeline.num_classes or 0)))


def chosen_classes(pipeline: Any, candidates: Sequence[int | str] | None) -> list[int]:
    """The numbers of the classes that are to be chosen from, each once.

    Args:
        pipeline: The model.
        candidates: Their numbers or names; ``None`` for all.

    Raises:
        ConfigurationError: The model knows no classes, one is none of them or is given twice, or they are fewer than
            two.
    """
    count, names = pipeline.num_classes, class_names(pipeline)
    if count is None:
        raise ConfigurationError(
            f"the {type(pipeline).__name__} is not class-conditional, and a class is found by what the network says "
            f"when told each: give a model that was trained with labels."
        )
    given = list(range(count)) if candidates is None else list(candidates)
    chosen = [_number(one, count, names) for one in given]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ConfigurationError(
            f"candidates are {shortened(given)}: give at least two, each once, of {', '.join(names)}."
        )
    return chosen


def _number(candidate: int | str, count: int, names: Sequence[str]) -> int:
    if isinstance(candidate, str) and candidate in names:
        return names.index(candidate)
    if hasattr(candidate, "__index__") and not isinstance(candidate, bool) and 0 <= int(candidate) < count:
        return int(candidate)
    raise unknown_name(f"class (of 0 to {count - 1})", candidate, names)


def checked_prior(prior: Sequence[float] | Tensor | None, count: int) -> Tensor:
    """``p(c)`` of so many candidates, (count,), float64; uniform where none is given.

    Raises:
        ConfigurationError: It has another length, or is no distribution.
    """
    if prior is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    with explained("the prior is no list of numbers", "give one for each candidate", ConfigurationError):
        chances = torch.as_tensor(prior, dtype=torch.float64, device="cpu")
    total = float(chances.sum())
    if chances.shape != (count,) or not bool((chances > 0).all()) or not math.isclose(total, 1, rel_tol=1e-6):
        raise ConfigurationError(
            f"the prior is {shortened(prior)}, which sums to {total:g}: give {count} numbers above 0 that sum to 1, "
            f"one for each candidate."
        )
    return chances / total
