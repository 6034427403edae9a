"""Makes diffusers know the public classes, so that ``from_pretrained`` works from a Hub id.

diffusers loads a third-party component from a Hub id only if its library is an attribute of ``diffusers.pipelines``,
and a pipeline class only if it is an attribute of ``diffusers``. Both are added here, and nothing is ever overwritten.

Readers without this package learn what to install in the same way: from a Hub id, diffusers looks in
``diffusers.pipelines`` for the library of every entry of ``model_index.json`` that is a list, in order, and an error
names the first that is not there. So a repository's first such entry, which nothing else reads, is an instruction.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType

import diffusers
import diffusers.pipelines

from vdm_hub.files import written_beside
from vdm_hub.hub.repositories import INDEX, read_json

HINT_KEY = "_requires"
INSTALL_HINT = (
    "the package vdm_hub: run `pip install vdm-hub`, and `import vdm_hub` before you load. Without it, vdm_hub"
)
"""Wire format, as published repositories hold it: diffusers adds ".py as defined in ... does not exist in ..."."""


def register(package: ModuleType, classes: list[type]) -> None:
    """Add ``package`` and its public ``classes`` to diffusers, where the names are free."""
    for name in (package.__name__, INSTALL_HINT):
        if _is_taken(diffusers.pipelines, name, package):
            _warn(f"diffusers.pipelines.{name}", f"load parts of a pipeline by the classes of {package.__name__}")
    for cls in classes:
        if _is_taken(diffusers, cls.__name__, cls):
            _warn(f"diffusers.{cls.__name__}", f"load through {package.__name__}.{cls.__name__}")


def add_install_hint(folder: Path) -> None:
    """Tell readers without this package what to install: in the index of a pipeline's folder, before it is published.

    Readers with this package, and those who load the folder itself, notice nothing of it; saved again, it is gone.

    Args:
        folder: The pipeline.

    Raises:
        CheckpointError: The folder's index is damaged.
        OSError: There is none.
    """
    path = folder / INDEX
    index = read_json(path, str(path))
    first = {key: value for key, value in index.items() if not isinstance(value, list)}
    hinted = first | {HINT_KEY: [INSTALL_HINT, None]} | {key: index[key] for key in index if key != HINT_KEY}
    with written_beside(path) as beside:
        beside.write_text(json.dumps(hinted, indent=2) + "\n", encoding="utf-8")


def _is_taken(holder: ModuleType, name: str, value: object) -> bool:
    """Put a value under a free name; says whether something else has it."""
    if not hasattr(holder, name):
        setattr(holder, name, value)
    return getattr(holder, name) is not value


def _warn(name: str, instead: str) -> None:
    warnings.warn(f"{name} exists already and is left alone: {instead} instead of DiffusionPipeline.", stacklevel=3)
