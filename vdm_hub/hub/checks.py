"""What a folder or a repository says of its pipeline, checked before any of its weights is read.

Only its list of files, its small JSON files and the headers of its weights are looked at, those of one commit, which
is then the one to load. Nothing that they name is imported but classes of diffusers, transformers and this package,
and installed plugins.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from vdm_hub import registry
from vdm_hub.errors import CheckpointError, ConfigurationError, MissingFileError, shortened, unknown_name
from vdm_hub.hub.places import INDEX
from vdm_hub.hub.repositories import CONFIGS, ModelFiles
from vdm_hub.hub.schemas import check_config, check_given_fields, type_of_field
from vdm_hub.hub.text_files import TEXT_COMPONENTS, TextComponent
from vdm_hub.hub.weights import WeightFiles, check_weights, weight_files

_TEXT_LIBRARY = "transformers"
_LIBRARIES = ("diffusers", _TEXT_LIBRARY, registry.PACKAGE)
_COMPONENT_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
_INDEX_KEYS = ("_class_name", "_diffusers_version", "_name_or_path", "_requires", "_module", "_ignore_files")
_CHECKED: ContextVar[Path | None] = ContextVar("checked", default=None)


def check_pipeline(
    files: ModelFiles,
    pipeline: type | None,
    given: Collection[str] = (),
    variant: str | None = None,
    trusts_code: bool = False,
    accept: Callable[[], object] = lambda: None,
) -> None:
    """Refuse a pipeline that could not be loaded, or is not what was saved, before any of its weights is read.

    Args:
        files: The pipeline's.
        pipeline: The class that is to load it; ``None`` where that takes over the components of another library's.
        given: Components that the reader brings; the pipeline's own are not looked at then.
        variant: Of the weights, such as ``fp16``.
        trusts_code: Whether the reader trusts code that the repository carries; then it may name any class, and what
            its code reads is its own affair.
        accept: Called when all configs were found good, before any weight is downloaded: it may refuse, too.

    Raises:
        CheckpointError: A file is damaged, contradicts another one, or names what it should not.
        MissingPluginError: The pipeline needs a plugin that is not installed.
        ConfigurationError: It names a schedule, target, ... that nobody knows, or gives it wrong arguments.
    """
    if INDEX not in files:
        raise MissingFileError(
            f"{files.name} holds no pipeline (no {INDEX}): give a folder that save_pretrained wrote, such as "
            f"runs/digits/pipeline, or a Hub id."
        )
    index = files.read_json(INDEX)
    components = _components(files.name, index, trusts_code)
    if pipeline is not None and not trusts_code:
        _check_index(files.name, index, pipeline, given)
        of_some = [key for key in _of_transformers(pipeline) if key not in index]
        none = [key for key, value in index.items() if value == [None, None]]
        forgotten = [key for key in (*none, *of_some) if files.names_in(key)]
        if forgotten and forgotten[0] not in given:
            raise CheckpointError(
                f"{files.name}: {INDEX} says that there is no {forgotten[0]}, and a folder of it is there: it was "
                f"changed, or an earlier save left it. Save the pipeline in a new folder, or remove {forgotten[0]}/."
            )
    looked_at = {name: value for name, value in components.items() if name not in given}
    if trusts_code:
        for component, (library, _) in looked_at.items():
            _check_configs(files, component, is_own=library == registry.PACKAGE)
        return
    described: list[_Described | TextComponent] = []
    for component, (library, name) in looked_at.items():
        cls = _class(files.name, component, library, name)
        of_text = library == _TEXT_LIBRARY  # of which no other component is, nor a text encoder of another library
        if pipeline is not None and (
            of_text != (component in _of_transformers(pipeline))
            or not issubclass(cls, type_of_field(pipeline, component))
        ):
            raise CheckpointError(f"{files.name}: {INDEX} has a {name} as its {component}, which none is: refused.")
        is_text = pipeline is not None and library == _TEXT_LIBRARY
        described.append((TextComponent if is_text else _Described).of(files, component, cls))
    if variant is not None and not any(f".{variant}." in path or f".{variant}-" in path for path in files.listed):
        raise ConfigurationError(
            f"variant is {variant!r}, and {files.name} has no weights of that name: leave it out."
        )
    accept()
    found = [(one, one.weight_files(variant)) for one in described]
    for one, weights in found:  # they are downloaded after all that describes them was found good
        one.check_weights(weights)


def _of_transformers(pipeline: type) -> tuple[str, ...]:
    """The components of a pipeline that are of transformers, and of no other library."""
    named: tuple[str, ...] = getattr(pipeline, "_of_transformers", TEXT_COMPONENTS)
    return named


def check_component(files: ModelFiles, component: str, cls: type, variant: str | None = None) -> None:
    """Refuse a network or a scheduler that is not what was saved, before any weight is read.

    Args:
        files: Those of the pipeline, or the component's own.
        component: Its folder; empty where the files are its own.
        cls: Its class.
        variant: Of the weights.

    Raises:
        CheckpointError: As `check_pipeline`.
        MissingPluginError: As `check_pipeline`.
        ConfigurationError: As `check_pipeline`.
    """
    described = _Described.of(files, component, cls)
    described.check_weights(described.weight_files(variant))


@dataclass(frozen=True)
class _Described:
    """A component of a pipeline whose config was found good."""

    files: ModelFiles
    component: str
    cls: type
    config: Mapping[str, Any]

    @classmethod
    def of(cls, files: ModelFiles, component: str, kind: type) -> _Described:
        """The component of a class, by its config."""
        name = getattr(kind, "config_name", None) or CONFIGS[0]
        path, place = _join(component, name), _join(files.name, component)
        if path not in files:
            raise MissingFileError(f"{place} has no {name}: it is incomplete. Save it again, or download it again.")
        config = files.read_json(path)
        _check_described(f"{files.name}: {path}", config, kind)
        check_names_in(config, is_own=_is_own(kind))
        return cls(files, component, kind, config)

    @property
    def place(self) -> str:
        """The component's name in messages."""
        return _join(self.files.name, self.component)

    def weight_files(self, variant: str | None) -> WeightFiles | None:
        """The files of the component's weights, where it has any, by their names and the list of shards."""
        if not hasattr(self.cls, "load_state_dict"):
            return None
        names = self.files.names_in(self.component)
        return weight_files(names, variant, self.place, lambda name: self.files.read_json(_join(self.component, name)))

    def check_weights(self, weights: WeightFiles | None) -> None:
        """Hold the headers of the weights against the network of the config."""
        if weights is not None:
            for name in weights.files:
                self.files.fetch(_join(self.component, name))
            check_weights(self.cls, self.config, weights, self.files.folder / self.component, self.place)


def check_names_in(config: Mapping[str, Any], is_own: bool = True) -> None:
    """Resolve every name that a component's config gives to the registry.

    Args:
        config: Of a component.
        is_own: Whether its class is of this package; others are looked at if they hold a VDM's process.

    Raises:
        MissingPluginError: The plugin that brings one is not installed.
        ConfigurationError: A name is unknown, or its arguments are.

    >>> check_names_in({"noise_schedule": "cosine", "decoder": "os:system"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    vdm_hub.errors.ConfigurationError: 'os:system' is no valid name of a decoder: ...
    """
    if isinstance(config.get(registry.CARRIED_PROCESS), Mapping):
        check_names_in(config[registry.CARRIED_PROCESS])
    if is_own or "noise_schedule" in config:
        for field, kind in (registry.SERIALISED_FIELDS | {"network": "networks"}).items():
            if isinstance(config.get(field), Mapping) and field in config[field]:  # all fields of a process
                check_names_in(config[field])
            elif config.get(field) is not None:
                registry.resolve(kind, config[field])


@contextmanager
def already_checked(folder: Path) -> Iterator[None]:
    """What lies in a folder was checked as a whole: its parts are not looked at again within."""
    token = _CHECKED.set(folder)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def is_checked(source: Any) -> bool:
    """Whether a folder is one that `already_checked` names."""
    folder = _CHECKED.get()
    return folder is not None and isinstance(source, str | os.PathLike) and Path(source) == folder


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


# ---- what they may say ----------------------------------------------------------------------------------------------


def _components(name: str, index: Mapping[str, Any], trusts_code: bool) -> dict[str, tuple[str, str]]:
    """The library and the class of each component that is there, by its name."""
    if not trusts_code and not isinstance(index.get("_class_name"), str):
        raise CheckpointError(
            f"{name}: {INDEX} names the class {shortened(index.get('_class_name'))}, which is code of the "
            f"repository's own. Load a revision without code (main), or, if you trust the code, load with "
            f"trust_remote_code=True."
        )
    found = {}
    for key, value in index.items():
        if not isinstance(value, list) or key == "_class_name":
            continue
        # diffusers makes paths of every key with a list, private or not.
        if not _COMPONENT_NAME.fullmatch(key.lstrip("_")):
            raise CheckpointError(f"{name}: {INDEX} names a component {shortened(key)}: no name of a folder; refused.")
        if key.startswith("_") or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise CheckpointError(f"{name}: {INDEX} gives {key} as {shortened(value)}, not as [library, class].")
        # diffusers 0.42 names a folder of its own as the library of schedulers that it calls deprecated.
        found[key] = (value[0] if value[0] != "deprecated" else "diffusers", value[1])
    return found


def _check_index(name: str, index: Mapping[str, Any], pipeline: type, given: Collection[str]) -> None:
    """Refuse an index that another class saved than the one that loads it, or that lacks what that class writes."""
    known = {cls.__name__: cls for cls in pipeline.__mro__ if issubclass(cls, diffusers.DiffusionPipeline)}
    if index["_class_name"] not in known:
        raise CheckpointError(
            f"{name} holds a {shortened(index['_class_name'])}, and {pipeline.__name__} was asked to load it: load it "
            f"with its own class, or a checkpoint of diffusers with VDMPipeline.from_diffusers."
        )
    parameters = inspect.signature(pipeline.__init__).parameters  # type: ignore[misc]
    fields = [key for key in parameters if key != "self"]
    for key in index:
        if key not in fields and not key.startswith("_"):
            raise CheckpointError(f"{name}: {INDEX}: {unknown_name(f'field of {pipeline.__name__}', key, fields)}")
        if key.startswith("_") and key not in _INDEX_KEYS:
            raise CheckpointError(f"{name}: {INDEX} has the private field {shortened(key)}, which none of ours is.")
    # What its base class saved lacks what this one asks for besides: the reader brings it, or the constructor refuses.
    written = inspect.signature(known[index["_class_name"]].__init__).parameters  # type: ignore[misc]
    not_always = getattr(pipeline, "_left_out_where_none", ())
    missing = [key for key in written if key not in ("self", *index, *given, *not_always)]
    if missing:
        raise CheckpointError(
            f"{name}: {INDEX} does not name {', '.join(missing)}, as save_pretrained always does: it was changed. "
            f"Save the pipeline again, or download it again."
        )
    optional = getattr(pipeline, "_optional_components", ())
    for key, value in index.items():
        if value == [None, None] and key not in optional and key not in given:
            raise CheckpointError(f"{name}: {INDEX} has no {key}, without which there is no {pipeline.__name__}.")
    check_given_fields(
        pipeline, {key: value for key, value in index.items() if not isinstance(value, list)}, f"{name}: {INDEX}"
    )


def _class(name: str, component: str, library: str, cls: str) -> type:
    """The class of a component, out of one of the libraries that may be named."""
    if library not in _LIBRARIES:
        raise CheckpointError(
            f"{name}: {INDEX} has its {component} from the library {shortened(library)}; only {', '.join(_LIBRARIES)} "
            f"are loaded. Give the component yourself ({component}=...), or, if you trust code that the repository "
            f"carries, load with trust_remote_code=True."
        )
    module = sys.modules.get(library) or importlib.import_module(library)
    found = getattr(module, cls, None) if cls.isidentifier() and not cls.startswith("_") else None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise CheckpointError(
            f"{name}: {INDEX} has {shortened(cls)} of {library} as its {component}: there is no such component in the "
            f"installed version ({getattr(module, '__version__', 'unknown')}). Check the name, or upgrade {library}."
        )
    return found


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == registry.PACKAGE


def _check_described(name: str, config: Mapping[str, Any], cls: type) -> None:
    """Refuse a config of another class than the one that loads it, or not as that class saves it."""
    saved = config.get("_class_name")
    if saved != cls.__name__:
        found = getattr(diffusers, str(saved), None)
        if not (isinstance(found, type) and issubclass(cls, SchedulerMixin) and issubclass(found, SchedulerMixin)):
            raise CheckpointError(
                f"{name} is of a {shortened(saved)}, and a {cls.__name__} was to be loaded: it was changed. Save it "
                f"again, or download it again."
            )
        cls = found  # schedulers are made of each other's configs, and ours refuses what it can't be made of
    check_config(cls, config, name)


def _check_configs(files: ModelFiles, component: str, is_own: bool) -> None:
    """Check the JSON of a component whose class the repository brings, as far as any loader reads it."""
    for name in files.names_in(component):
        if name.endswith(".json") and "/" not in name and (".index." in name or name in CONFIGS):
            content = files.read_json(_join(component, name))
            if name in CONFIGS:
                check_names_in(content, is_own)
