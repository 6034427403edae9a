"""What a folder or a repository says of its pipeline, checked before any of its weights is downloaded or read.

Only its list of files and its small JSON files are looked at, those of one commit, which is then the one to load.
Nothing that they name is imported but classes of diffusers, transformers and this package, and installed plugins.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from vdm_hub import registry
from vdm_hub.errors import CheckpointError, ConfigurationError

INDEX = "model_index.json"
CONFIGS = ("config.json", "scheduler_config.json")
MAX_JSON_BYTES = 10_000_000
MAX_JSON_DEPTH = 64
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# A copy of this package under another name, as a repository may carry it, is named so in its own index.
_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = ("diffusers", "transformers", _PACKAGE)
_COMPONENT_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)
# What the client's HTTP library raises without an answer, whichever library its version stands on.
HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineFiles:
    """The files of a folder, or of one commit on the Hub or in the cache.

    Attributes:
        name: The folder or the Hub id, as the reader gave it.
        sizes: Bytes by path; only what the cache holds, where the Hub could not be asked.
        fetch: Where a file is on this machine; downloads it if need be.
        pinned: Arguments of ``from_pretrained`` by which diffusers loads these very files.
    """

    name: str
    sizes: Mapping[str, int]
    fetch: Callable[[str], Path]
    pinned: Mapping[str, Any]

    def read_json(self, path: str) -> dict[str, Any]:
        """A JSON object of a bearable size and depth.

        Raises:
            CheckpointError: It is none.
        """
        _check_size(f"{self.name}: {path}", self.sizes[path])
        return read_json(self.fetch(path), f"{self.name}: {path}")


def open_pipeline(
    name: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool | None = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PipelineFiles:
    """The files of a folder or a Hub id; of the latter at one commit, that which the revision is at now.

    Without a network, or where the Hub is down, they are those that the cache holds, as everywhere in diffusers.

    Raises:
        CheckpointError: A path leads out of the folder.
        ConfigurationError: The name is neither a folder nor a Hub id.
        OSError: There is no such repository or revision, or it can't be reached and the cache has none of it.
    """
    if os.path.isdir(name):  # noqa: PTH112 - a path or a Hub id, as diffusers asks
        return _files_of_folder(str(name), Path(name).resolve())
    place: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
    if local_files_only or huggingface_hub.is_offline_mode():
        return _files_in_cache(str(name), revision, place)
    try:
        return _files_on_hub(str(name), revision, place | {"force_download": force_download})
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled, HTTP_ERROR) as error:
        try:
            files = _files_in_cache(str(name), revision, place)
        except OSError:
            raise error from None
        _LOGGER.warning("The Hub did not answer (%s); loading %s from the cache.", type(error).__name__, name)
        return files


def check_pipeline(files: PipelineFiles, given: Collection[str] = (), trusts_code: bool = False) -> None:
    """Refuse a pipeline that could not be loaded, or should not be, before any of its weights is used.

    Args:
        files: The pipeline's.
        given: Components that the reader brings; the pipeline's own are not looked at then.
        trusts_code: Whether the reader trusts code that the repository carries; then it may name any library.

    Raises:
        CheckpointError: A JSON file is none, too large or too deep, or names what it should not.
        MissingPluginError: The pipeline needs a plugin that is not installed.
        ConfigurationError: It names a schedule, target, ... that nobody knows, or gives it wrong arguments.
    """
    if INDEX not in files.sizes:
        return  # diffusers says so itself, and loads nothing
    for component, (library, cls) in _components(files, trusts_code).items():
        if component in given:
            continue
        if not trusts_code:
            _check_class(files.name, component, library, cls)
        for path in _json_files(files, component):
            content = files.read_json(path)
            if path.endswith(CONFIGS):
                check_config(content, is_own=library == _PACKAGE)
            else:
                _check_shards(files, path, content)


def check_config(config: Mapping[str, Any], is_own: bool = True) -> None:
    """Resolve every name that a component's config gives to the registry.

    Args:
        config: Of a component.
        is_own: Whether its class is of this package; others are looked at if they hold a VDM's process.

    Raises:
        MissingPluginError: The plugin that brings one is not installed.
        ConfigurationError: A name is unknown, or its arguments are.

    >>> check_config({"noise_schedule": "cosine", "decoder": "os:system"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    vdm_hub.errors.ConfigurationError: 'os:system' is no valid name of a decoder: ...
    """
    if is_own or "noise_schedule" in config:
        for field, kind in registry.SERIALISED_FIELDS.items():
            if config.get(field) is not None:
                registry.resolve(kind, config[field])


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file, of a bearable size and depth.

    Args:
        path: The file.
        name: What messages call it.

    Raises:
        CheckpointError: It is none.
    """
    _check_size(name, path.stat().st_size)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} can't be read as JSON ({error}): it is damaged, or no pipeline's.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, not an object: it is damaged.")
    if _is_deeper(content, MAX_JSON_DEPTH):
        raise CheckpointError(f"{name} is nested more than {MAX_JSON_DEPTH} levels deep: no config is; refused.")
    return content


# ---- where the files are --------------------------------------------------------------------------------------------


def _files_of_folder(name: str, folder: Path) -> PipelineFiles:
    """The folder's own files and those of its components; a link may lead elsewhere only within the Hub's cache."""
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    sizes = {}
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() and not any(path.resolve().is_relative_to(bound) for bound in (folder, blobs)):
            raise CheckpointError(
                f"{name}: {relative} is a link to a place outside the folder: put the file itself there."
            )
        if path.is_file():
            sizes[relative] = path.stat().st_size
    _check_paths(name, sizes)
    return PipelineFiles(name, sizes, folder.joinpath, {})


def _files_on_hub(repo_id: str, revision: str | None, place: dict[str, Any]) -> PipelineFiles:
    commit = _resolved(repo_id, revision, place, offline=False)
    info = huggingface_hub.model_info(repo_id, revision=commit.resolved, files_metadata=True, token=place["token"])
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    _check_paths(repo_id, sizes)

    def fetch(path: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repo_id, path, revision=commit, **place))

    return PipelineFiles(repo_id, sizes, fetch, {"revision": commit})


def _files_in_cache(repo_id: str, revision: str | None, place: dict[str, Any]) -> PipelineFiles:
    commit = _resolved(repo_id, revision, place, offline=True)
    try:
        found = huggingface_hub.hf_hub_download(repo_id, INDEX, revision=commit, local_files_only=True, **place)
    except hub_errors.EntryNotFoundError as error:
        raise OSError(
            f"the cache holds no pipeline of {repo_id} at the revision {str(commit)!r}: load it once with a network."
        ) from error
    snapshot = _files_of_folder(repo_id, Path(found).parent)
    return replace(snapshot, pinned={"revision": commit, "local_files_only": True})


def _resolved(repo_id: str, revision: str | None, place: dict[str, Any], offline: bool) -> Any:
    """The commit that a revision is at; the client notes it in the cache, for readers without a network."""
    where = {key: place[key] for key in ("cache_dir", "token")}
    try:
        return huggingface_hub.resolve_revision(repo_id, revision=revision, local_files_only=offline, **where)
    except hub_errors.HFValidationError as error:
        raise ConfigurationError(f"{repo_id!r} is neither a folder nor a Hub id such as owner/name.") from error
    except hub_errors.RevisionResolutionError as error:
        raise OSError(str(error)) from error


# ---- what they may say ----------------------------------------------------------------------------------------------


def _check_paths(name: str, paths: Collection[str]) -> None:
    for path in paths:
        windows = [PureWindowsPath(part) for part in path.split("/")]
        if (
            not path
            or "\\" in path
            or ".." in path.split("/")
            or PurePosixPath(path).is_absolute()
            or any(part.drive or part.root for part in windows)
        ):
            raise CheckpointError(f"{name} has a file {path!r}, whose path leaves its folder: nothing of it is used.")


def _check_size(name: str, size: int) -> None:
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{name} has {size:,} bytes; a pipeline's JSON files have at most {MAX_JSON_BYTES:,}: refused."
        )


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


def _components(files: PipelineFiles, trusts_code: bool) -> dict[str, tuple[str, str]]:
    """Library and class of each component that is there."""
    index, found = files.read_json(INDEX), {}
    if not trusts_code and not isinstance(index.get("_class_name"), str):
        raise CheckpointError(
            f"{files.name}: {INDEX} names the class {index.get('_class_name')!r}, which is code of the repository's "
            f"own. Load a revision without code (main), or, if you trust the code, load with trust_remote_code=True."
        )
    for key, value in index.items():
        if not isinstance(value, list) or key == "_class_name":
            continue
        # diffusers makes paths of every key with a list, private or not.
        if not _COMPONENT_NAME.fullmatch(key.lstrip("_")):
            raise CheckpointError(f"{files.name}: {INDEX} names a component {key!r}: no name of a folder; refused.")
        if key.startswith("_") or value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise CheckpointError(f"{files.name}: {INDEX} gives {key} as {value!r}, not as [library, class].")
        found[key] = (value[0], value[1])
    return found


def _check_class(name: str, component: str, library: str, cls: str) -> None:
    if library not in _LIBRARIES:
        raise CheckpointError(
            f"{name}: {INDEX} has its {component} from the library {library!r}; only {', '.join(_LIBRARIES)} are "
            f"loaded. Give the component yourself ({component}=...), or, if you trust code that the repository "
            f"carries, load with trust_remote_code=True."
        )
    module = sys.modules.get(library) or importlib.import_module(library)
    found = getattr(module, cls, None) if cls.isidentifier() and not cls.startswith("_") else None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise CheckpointError(
            f"{name}: {INDEX} has {cls!r} of {library} as its {component}: there is no such component in the "
            f"installed version ({getattr(module, '__version__', 'unknown')}). Check the name, or upgrade {library}."
        )


def _json_files(files: PipelineFiles, component: str) -> list[str]:
    """What is read of a component before its weights: its config, and the lists of its shards."""
    own = (path for path in files.sizes if path.startswith(f"{component}/") and path.count("/") == 1)
    return sorted(path for path in own if path.endswith(".json") and (".index." in path or path.endswith(CONFIGS)))


def _check_shards(files: PipelineFiles, path: str, index: Mapping[str, Any]) -> None:
    """Every shard that the list names lies beside it."""
    shards, folder = index.get("weight_map"), path.rpartition("/")[0]
    if not isinstance(shards, dict):
        raise CheckpointError(f"{files.name}: {path} has no weight_map: it is damaged.")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or "/" in shard or f"{folder}/{shard}" not in files.sizes:
            raise CheckpointError(
                f"{files.name}: {path} has {tensor} in {shard!r}, which is no file beside it: refused, or incomplete."
            )
