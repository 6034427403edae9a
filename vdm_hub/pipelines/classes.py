"""The classes of a pipeline by number and name, and what is known of them before an image is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vdm_hub.data.conditions import ClassCondition
from vdm_hub.errors import ConfigurationError, explained, shortened, unknown_name


def chosen_classes(condition: ClassCondition | None, candidates: Sequence[int | str] | None = None) -> list[int]:
    """The numbers of the classes that are to be chosen from, each once.

    Args:
        condition: The classes that a model knows.
        candidates: Their numbers or names; ``None`` for all.

    Raises:
        ConfigurationError: The model knows no classes, one is none of them or is given twice, or they are fewer than
            two.

    >>> chosen_classes(ClassCondition(3, ("cat", "dog", "eel")), ["eel", 0])
    [2, 0]
    """
    if condition is None:
        raise ConfigurationError(
            "the model is not class-conditional, and a class is found by what the network says when told each: give a "
            "model that was trained with labels."
        )
    if isinstance(candidates, str | int):
        raise ConfigurationError(f"candidates is {shortened(candidates)}: give a list of classes, by number or name.")
    names = [condition.name_of(number) for number in range(condition.count)]
    given = list(range(condition.count)) if candidates is None else list(candidates)
    chosen = [_number(one, names) for one in given]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ConfigurationError(
            f"candidates are {shortened(given)}: give at least two, each once, of {shortened(names, 300)}."
        )
    return chosen


def chosen_texts(candidates: Sequence[int | str] | None) -> tuple[str, ...]:
    """The captions that are to be chosen from, each once.

    Raises:
        ConfigurationError: There are none, or fewer than two, or one is none or given twice.

    >>> chosen_texts(["a cat", "a dog"])
    ('a cat', 'a dog')
    """
    texts = [one for one in candidates or () if isinstance(one, str)]
    if isinstance(candidates, str) or len(texts) != len(candidates or ()) or len(set(texts)) != max(len(texts), 2):
        raise ConfigurationError(
            f"candidates are {shortened(candidates)}, and the model is told captions: give at least two texts, each "
            f"once, such as ['a photo of a shirt', 'a photo of a bag']."
        )
    return tuple(texts)


def _number(candidate: int | str, names: Sequence[str]) -> int:
    if isinstance(candidate, str) and candidate in names:
        return names.index(candidate)
    if hasattr(candidate, "__index__") and not isinstance(candidate, bool) and 0 <= int(candidate) < len(names):
        return int(candidate)
    raise unknown_name(f"class (of 0 to {len(names) - 1})", candidate, names)


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
