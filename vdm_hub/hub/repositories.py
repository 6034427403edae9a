"""The places of a model's files: a folder, or one commit on the Hub or in its cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import huggingface_hub
from huggingface_hub import constants, file_download
from huggingface_hub import errors as hub_errors

from vdm_hub.errors import CheckpointError, ConfigurationError, HubError, shortened
from vdm_hub.hub.fetching import Listed, fetch, hub_explained, in_cache, is_content
from vdm_hub.hub.json_files import check_json_size, read_json

CONFIGS = ("config.json", "scheduler_config.json")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """The files of a folder, or of one commit on the Hub or in the cache.

    Attributes:
        name: The folder or the Hub id, as the reader gave it.
        listed: Size and hash by path; only what the cache holds, where the Hub could not be asked.
        folder: Where they are on this machine, once they were fetched.
        fetch: Where a file is on this machine; downloads it if need be.
        pinned: Arguments of ``from_pretrained`` by which diffusers loads these very files by their name.
    """

    name: str
    listed: Mapping[str, Listed]
    folder: Path
    fetch: Callable[[str], Path]
    pinned: Mapping[str, Any]

    def __contains__(self, path: str) -> bool:
        return path in self.listed

    def read_json(self, path: str) -> dict[str, Any]:
        """A JSON object of a bearable size and depth.

        Raises:
            CheckpointError: It is none.
        """
        check_json_size(f"{self.name}: {path}", self.listed[path].size)
        return read_json(self.fetch(path), f"{self.name}: {path}", infinite=path.endswith(CONFIGS[1]))

    def names_in(self, component: str) -> list[str]:
        """The names of the files of a component's folder; of the whole, where it is empty."""
        prefix = f"{component}/" if component else ""
        return [path.removeprefix(prefix) for path in self.listed if path.startswith(prefix)]


def open_files(
    name: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool | None = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ModelFiles:
    """The files of a folder or a Hub id; of the latter at one commit, that which the revision is at now.

    Without a network, or where the Hub is down, they are those that the cache holds, as everywhere in diffusers.

    Raises:
        CheckpointError: A path leads out of the folder.
        ConfigurationError: The name is neither a folder nor a Hub id.
        HubError: There is no such repository or revision, or it can't be reached and the cache has none of it.
    """
    if os.path.isdir(name):  # noqa: PTH112 - a path or a Hub id, as diffusers asks
        return _files_of_folder(str(name), Path(name).resolve())
    place = _Place(str(name), revision, Path(cache_dir or constants.HF_HUB_CACHE), token)
    if local_files_only or huggingface_hub.is_offline_mode():
        return _files_in_cache(place)
    try:
        return _files_on_hub(place, force_download)
    except HubError as error:
        try:
            files = _files_in_cache(place)
        except HubError:
            raise error from error.__cause__
        _LOGGER.warning("The Hub did not answer (%s); loading %s from the cache.", error, name)
        return files


@dataclass(frozen=True)
class _Place:
    """A repository, and how it is reached."""

    repo_id: str
    revision: str | None
    cache: Path
    token: str | bool | None

    def resolved(self, offline: bool) -> Any:
        """The commit that the revision is at; the client notes it in the cache, for readers without a network."""
        try:
            return huggingface_hub.resolve_revision(
                self.repo_id, revision=self.revision, local_files_only=offline, cache_dir=self.cache, token=self.token
            )
        except hub_errors.HFValidationError as error:
            raise ConfigurationError(
                f"{shortened(self.repo_id)} is neither a folder nor a Hub id such as owner/name."
            ) from error

    @property
    def folder(self) -> Path:
        """The repository's folder in the cache."""
        return self.cache / file_download.repo_folder_name(repo_id=self.repo_id, repo_type="model")


def _files_of_folder(name: str, folder: Path) -> ModelFiles:
    """The folder's own files and those of its components; a link may lead elsewhere only within the Hub's cache."""
    # A snapshot in the Hub's cache, or a component's folder in one.
    roots = [parent for parent in folder.parents[:2] if parent.name == "snapshots"]
    blobs = roots[0].parent / "blobs" if roots else folder
    listed = {}
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() and not any(path.resolve().is_relative_to(bound) for bound in (folder, blobs)):
            raise CheckpointError(
                f"{name}: {relative} is a link to a place outside the folder: put the file itself there."
            )
        if path.is_file():
            listed[relative] = Listed(path.stat().st_size)
    _check_paths(name, listed)
    return ModelFiles(name, listed, folder, folder.joinpath, {})


def _files_on_hub(place: _Place, force_download: bool) -> ModelFiles:
    with hub_explained(f"there is no folder {place.repo_id}, and {place.repo_id} can't be read from the Hub"):
        commit = place.resolved(offline=False)
        sha = str(commit.resolved)
        info = huggingface_hub.model_info(place.repo_id, revision=sha, files_metadata=True, token=place.token)
        listed = {
            str(file.rfilename): Listed(int(file.size or 0), str(file.lfs.sha256 if file.lfs else file.blob_id))
            for file in info.siblings or ()
        }
    if not re.fullmatch("[0-9a-f]{40}", sha):
        raise CheckpointError(f"{place.repo_id} is said to be at the commit {sha!r}, which is none: nothing is used.")
    _check_paths(place.repo_id, listed)
    get = partial(fetch, token=place.token, folder=place.folder, force=force_download)
    return ModelFiles(
        place.repo_id,
        listed,
        place.folder / "snapshots" / sha,
        lambda path: get(place.repo_id, path, sha, listed[path]),
        {"revision": commit},
    )


def _files_in_cache(place: _Place) -> ModelFiles:
    missing = f"the cache holds nothing of {place.repo_id} at the revision {place.revision or 'main'!r}"
    with hub_explained(f"there is no folder {place.repo_id}, and {missing}"):
        commit = place.resolved(offline=True)
    folder = place.folder / "snapshots" / str(commit.resolved)
    if not folder.is_dir():
        raise HubError(f"there is no folder {place.repo_id}, and {missing}: load it once with a network.")
    files = _files_of_folder(place.repo_id, folder.resolve())

    def whole(path: str) -> Path:
        """The file, if its content is still what its name in the cache says."""
        found = folder / path
        if not is_content(found, in_cache(found)):
            raise CheckpointError(
                f"{place.repo_id}: {path} in the cache is damaged (its content is not what its name says): load the "
                f"model once with a network, which fetches it again."
            )
        return found

    pinned = {"revision": commit, "local_files_only": True}
    return ModelFiles(files.name, files.listed, files.folder, whole, pinned)


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
