"""Makes diffusers know the public classes, so that ``from_pretrained`` works from a Hub id.

diffusers loads a third-party component from a Hub id only if its library is an attribute of ``diffusers.pipelines``,
and a pipeline class only if it is an attribute of ``diffusers``. Both are added here, and nothing is overwritten but
`DiffusionPipeline.from_pretrained`, which hands pipelines of ours to their own class: it checks what it loads.

Readers without this package learn what to install in the same way: from a Hub id, diffusers looks in
``diffusers.pipelines`` for the library of every entry of ``model_index.json`` that is a list, in order, and an error
names the first that is not there. So a repository's first such entry, which nothing else reads, is an instruction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import diffusers.pipelines

from vdm_hub.errors import CheckpointError, MissingFileError, in_one_line, shortened, warn
from vdm_hub.files import written_beside
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.repositories import HUB_ARGUMENTS, INDEX, open_files
from vdm_hub.version import HOW_TO_INSTALL

HINT_KEY = "_requires"
INSTALL_HINT = (
    f"the package vdm_hub: install it ({HOW_TO_INSTALL}), and `import vdm_hub` before you load. Without it, vdm_hub"
)
"""Wire format, as published repositories hold it: diffusers adds ".py as defined in ... does not exist in ..."."""

FORMER_HINTS = (
    "the package vdm_hub: run `pip install vdm-hub`, and `import vdm_hub` before you load. Without it, vdm_hub",
)
"""What earlier versions wrote there: a version that does not know a hint can't load what it stands in."""


def register(package: ModuleType, classes: list[type]) -> None:
    """Add ``package`` and its public ``classes`` to diffusers, where the names are free."""
    for name in (package.__name__, INSTALL_HINT, *FORMER_HINTS):
        if _is_taken(diffusers.pipelines, name, package):
            _warn(f"diffusers.pipelines.{name}", f"load parts of a pipeline by the classes of {package.__name__}")
    pipelines = {cls.__name__: cls for cls in classes if issubclass(cls, diffusers.DiffusionPipeline)}
    _hand_over(pipelines, package.__name__)
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
    index = read_json(path)
    first = {key: value for key, value in index.items() if not isinstance(value, list)}
    hinted = first | {HINT_KEY: [INSTALL_HINT, None]} | {key: index[key] for key in index if key != HINT_KEY}
    with written_beside(path) as beside:
        beside.write_text(json.dumps(hinted, indent=2) + "\n", encoding="utf-8")


def _hand_over(pipelines: Mapping[str, type], library: str) -> None:
    """Let `DiffusionPipeline.from_pretrained` leave pipelines of ours to their own class; once for the process."""
    own_loader = diffusers.DiffusionPipeline.__dict__["from_pretrained"].__func__
    if getattr(own_loader, "hands_over", False):
        return

    @wraps(own_loader)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        is_special = any(kwargs.get(name) for name in ("trust_remote_code", "custom_pipeline", "dduf_file"))
        if cls is diffusers.DiffusionPipeline and not is_special:
            index = _index(pretrained_model_name_or_path, kwargs)
            own = pipelines.get(str(index.get("_class_name")))
            if own is not None:
                return own.from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[attr-defined]
            named = index.get("_class_name")
            parts_of_ours = any(isinstance(value, list) and value[:1] == [library] for value in index.values())
            if not isinstance(named, list) and (parts_of_ours or not _is_pipeline(named)):
                raise CheckpointError(
                    f"{pretrained_model_name_or_path}: {INDEX} names the class {shortened(named)}, which is no "
                    f"pipeline of diffusers or {library} ({', '.join(pipelines)}) that has these components: it was "
                    f"changed. Save the pipeline again, or download it again."
                )
            if isinstance(named, list):
                # The form in which a file of the pipeline's own names its class: diffusers reads it as it stands.
                with _in_words(pretrained_model_name_or_path, named):
                    return own_loader(cls, pretrained_model_name_or_path, **kwargs)
        return own_loader(cls, pretrained_model_name_or_path, **kwargs)

    from_pretrained.hands_over = True  # type: ignore[attr-defined]
    diffusers.DiffusionPipeline.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type]


@contextmanager
def _in_words(source: Any, named: list[Any]) -> Iterator[None]:
    """What Python says of a list that names no class, as an error of ours."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source}: {INDEX} names the class {shortened(named)}, and no file of that class is there "
            f"({in_one_line(error)}): it was changed. Save the pipeline again, or download it again."
        ) from error


def _index(source: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline's index says.

    Raises:
        MissingFileError: There is none.
        CheckpointError: It is damaged, or not what the Hub lists.
        HubError: The Hub does not give it, and the cache has not got it.
    """
    local = Path(source) / INDEX
    if local.is_file():  # of any pipeline, whose other files are its own class's affair
        return read_json(local)
    files = open_files(source, **{key: arguments[key] for key in HUB_ARGUMENTS if key in arguments})
    if INDEX not in files:
        raise MissingFileError(f"{source} holds no pipeline (no {INDEX}): give a folder that save_pretrained wrote.")
    return files.read_json(INDEX)


def _is_pipeline(name: Any) -> bool:
    """Whether diffusers has such a pipeline, or would have with a package that is not installed."""
    found = getattr(diffusers, str(name).removeprefix("Flax"), None)
    return isinstance(found, type) and (issubclass(found, diffusers.DiffusionPipeline) or hasattr(found, "_backends"))


def _is_taken(holder: ModuleType, name: str, value: object) -> bool:
    """Put a value under a free name; says whether something else has it."""
    if not hasattr(holder, name):
        setattr(holder, name, value)
    return getattr(holder, name) is not value


def _warn(name: str, instead: str) -> None:
    warn(f"{name} exists already and is left alone: {instead} instead of DiffusionPipeline.", stacklevel=3)
