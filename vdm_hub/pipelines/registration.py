"""Makes diffusers know the public classes, so that ``from_pretrained`` works from a Hub id.

diffusers loads a third-party component from a Hub id only if its library is an attribute of ``diffusers.pipelines``,
and a class by its bare name only if it is an attribute of ``diffusers``. Both are added here as soon as diffusers is
imported, by whomever, and nothing is overwritten but `DiffusionPipeline.from_pretrained`, which hands pipelines of
ours to their own class: it checks what it loads.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from vdm_hub.errors import CheckpointError, MissingFileError, in_one_line, shortened, warn
from vdm_hub.hub.install_hint import FORMER_HINTS, INSTALL_HINT
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.places import INDEX

PIPELINE_NAMES = ("HVAEPipeline", "LatentVDMPipeline", "TokenPipeline", "VDMPipeline")
CLASSES = (
    "AutoencoderKLFirstStage",
    "MarkovianHVAE",
    "RegisteredModel",
    "TokenTimeEmbedding",
    "UNetVDMModel",
    "VDMScheduler",
    "VQModelFirstStage",
    *PIPELINE_NAMES,
)
"""The classes that diffusers may look for by their bare names."""


def register(library: str) -> None:
    """Add a package and its public classes to diffusers, where the names are free, once diffusers is imported."""
    hooks = {"diffusers": _add_classes, "diffusers.pipelines": _add_library}
    hooks["diffusers.pipelines.pipeline_utils"] = _hand_over
    waiting: dict[str, Callable[[], None]] = {
        module: partial(hook, sys.modules[library]) for module, hook in hooks.items()
    }
    for module in [module for module in waiting if module in sys.modules]:
        waiting.pop(module)()
    sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(MetaPathFinder):
    """A finder that calls a function once a module was imported, and leaves the finding to the others.

    The package wrapt has the same, and takes twice as long to import as all else that a command line needs.
    """

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The specification that the others find, whose loader calls the function after it has run the module."""
        hook = self.waiting.pop(name, None)  # first, as the next line comes here again
        spec = importlib.util.find_spec(name) if hook is not None else None
        if hook is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            hook()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _add_classes(package: Any) -> None:
    """Let ``diffusers.VDMPipeline`` and its like be found, each imported when it is asked for."""
    diffusers: Any = sys.modules["diffusers"]
    before = vars(diffusers).get("__getattr__")
    if getattr(before, "library", None) is package:
        return
    taken = {name for name in CLASSES if hasattr(diffusers, name)}
    for name in sorted(taken):
        _warn(f"diffusers.{name}", f"load through {package.__name__}.{name}")

    def __getattr__(name: str) -> Any:
        if name in CLASSES and name not in taken:
            return getattr(package, name)
        if before is not None:
            return before(name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    __getattr__.library = package  # type: ignore[attr-defined]
    diffusers.__getattr__ = __getattr__


def _add_library(package: Any) -> None:
    pipelines = sys.modules["diffusers.pipelines"]
    for name in (package.__name__, INSTALL_HINT, *FORMER_HINTS):
        if not hasattr(pipelines, name):
            setattr(pipelines, name, package)
        elif getattr(pipelines, name) is not package:
            _warn(f"diffusers.pipelines.{name}", f"load parts of a pipeline by the classes of {package.__name__}")


def _hand_over(package: Any) -> None:
    """Let `DiffusionPipeline.from_pretrained` leave pipelines of ours to their own class; once for the process."""
    pipeline_class: Any = sys.modules["diffusers.pipelines.pipeline_utils"].DiffusionPipeline
    own_loader = pipeline_class.__dict__["from_pretrained"].__func__
    if getattr(own_loader, "hands_over", False):
        return

    @wraps(own_loader)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        is_special = any(kwargs.get(name) for name in ("trust_remote_code", "custom_pipeline", "dduf_file"))
        if cls is pipeline_class and not is_special:
            index = _index(pretrained_model_name_or_path, kwargs)
            named = index.get("_class_name")
            if named in PIPELINE_NAMES:
                return getattr(package, named).from_pretrained(pretrained_model_name_or_path, **kwargs)
            _check_class(pretrained_model_name_or_path, index, package.__name__)
            if isinstance(named, list):
                # The form in which a file of the pipeline's own names its class: diffusers reads it as it stands.
                with _in_words(pretrained_model_name_or_path, named):
                    return own_loader(cls, pretrained_model_name_or_path, **kwargs)
        return own_loader(cls, pretrained_model_name_or_path, **kwargs)

    from_pretrained.hands_over = True  # type: ignore[attr-defined]
    pipeline_class.from_pretrained = classmethod(from_pretrained)  # type: ignore[arg-type]


def _check_class(source: Any, index: Mapping[str, Any], library: str) -> None:
    """Refuse an index that names no pipeline by its bare name, or another for components of ours."""
    named = index.get("_class_name")
    parts_of_ours = any(isinstance(value, list) and value[:1] == [library] for value in index.values())
    if not isinstance(named, list) and (parts_of_ours or not _is_pipeline(named)):
        raise CheckpointError(
            f"{source}: {INDEX} names the class {shortened(named)}, which is no pipeline of diffusers or {library} "
            f"({', '.join(PIPELINE_NAMES)}) that has these components: it was changed. Save the pipeline again, or "
            f"download it again."
        )


@contextmanager
def _in_words(source: Any, named: list[Any]) -> Iterator[None]:
    """Turn what Python says of a list that names no class into an error of ours."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source}: {INDEX} names the class {shortened(named)}, and no file of that class is there "
            f"({in_one_line(error)}): it was changed. Save the pipeline again, or download it again."
        ) from error


def _index(source: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a pipeline's index.

    Raises:
        MissingFileError: There is none.
        CheckpointError: It is damaged, or not what the Hub lists.
        HubError: The Hub does not give it, and the cache has not got it.
    """
    from vdm_hub.hub.repositories import HUB_ARGUMENTS, open_files

    local = Path(source) / INDEX
    if local.is_file():  # of any pipeline, whose other files are its own class's affair
        return read_json(local)
    files = open_files(source, **{key: arguments[key] for key in HUB_ARGUMENTS if key in arguments})
    if INDEX not in files:
        raise MissingFileError(f"{source} holds no pipeline (no {INDEX}): give a folder that save_pretrained wrote.")
    return files.read_json(INDEX)


def _is_pipeline(name: Any) -> bool:
    """Whether diffusers has such a pipeline, or would have with a package that is not installed."""
    import diffusers

    found = getattr(diffusers, str(name).removeprefix("Flax"), None)
    return isinstance(found, type) and (issubclass(found, diffusers.DiffusionPipeline) or hasattr(found, "_backends"))


def _warn(name: str, instead: str) -> None:
    warn(f"{name} exists already and is left alone: {instead} instead of DiffusionPipeline.", stacklevel=3)
