"""Makes diffusers know the public classes, so that ``from_pretrained`` works from a Hub id.

diffusers loads a third-party component from a Hub id only if its library is an attribute of ``diffusers.pipelines``,
and a pipeline class only if it is an attribute of ``diffusers``. Both are added here, and nothing is ever overwritten.
"""

from __future__ import annotations

import warnings
from types import ModuleType

import diffusers
import diffusers.pipelines


def register(package: ModuleType, classes: list[type]) -> None:
    """Add ``package`` and its public ``classes`` to diffusers, where the names are free."""
    for holder, name, value in (
        (diffusers.pipelines, package.__name__, package),
        *((diffusers, cls.__name__, cls) for cls in classes),
    ):
        if not hasattr(holder, name):
            setattr(holder, name, value)
        elif getattr(holder, name) is not value:
            warnings.warn(
                f"{holder.__name__}.{name} exists already and is left alone: load through {package.__name__}.{name} "
                f"instead of DiffusionPipeline.",
                stacklevel=2,
            )
