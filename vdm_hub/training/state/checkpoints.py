"""Checkpoints: safetensors and JSON, written beside and renamed, with a manifest that finds every damage.

Nothing is pickled. A checkpoint is a folder ``step-00001000`` with ``<group>.safetensors`` for each group of tensors,
``state.json`` and ``manifest.json`` (its step; size and SHA-256 of each file). A folder of another name, a copy under
the name of another step, and a folder that holds anything else are never renamed and never removed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdm_hub.errors import CheckpointError, shortened, warn
from vdm_hub.files import clear_leftovers, entries, expanded, remove, sha256, written_beside
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.records import Whole
from vdm_hub.hub.schemas import Within, check_record

_FORMAT = "vdm_hub checkpoint 2"
_NAME = re.compile(r"step-(\d{8})", re.ASCII)
_HIDDEN = re.compile(r"\.(step-\d{8})-[0-9a-f]{8}(\.old)?", re.ASCII)
_MAX_STATE_BYTES = 500_000_000  # a long run logs many figures
_REMOVED = re.compile(r"\.step-\d{8}\.removed", re.ASCII)
_FILE = re.compile(r"manifest\.json|state\.json|\w+\.safetensors")
# Before the manifest is written: safetensors, too, writes beside and renames.
_UNFINISHED = re.compile(rf"{_FILE.pattern}|\.tmp\w{{6}}", re.ASCII)


class _File(TypedDict):
    """The entry of a manifest for a file."""

    size: Whole
    sha256: Annotated[str, Within(64, 64)]


class _Manifest(TypedDict):
    """The manifest of a checkpoint: the files that it consists of."""

    format: Literal["vdm_hub checkpoint 2"]
    step: NotRequired[Whole]
    files: dict[str, _File]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: groups of named tensors, and JSON."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    keep: int | None = None,
) -> Path:
    """Write ``folder/step-<step>``; afterwards only the latest ``keep`` checkpoints remain, this one among them.

    What a process that was killed left half-written is cleared away.

    Raises:
        OutputError: What has the checkpoint's name is no checkpoint, or holds other files, too.
        OSError: It can't be written.
    """
    path = folder / f"step-{step:08d}"
    _clear(folder)
    with written_beside(path, keeps_all=True) as beside:
        beside.mkdir()
        for group, named in tensors.items():
            save_file({name: _plain(tensor) for name, tensor in named.items()}, beside / f"{group}.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False))
        files = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in sorted(beside.iterdir())}
        (beside / "manifest.json").write_text(json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1))
        for file in beside.iterdir():  # a power cut must not leave the name of a checkpoint without its content
            _to_disk(file)
    others = [checkpoint for checkpoint in checkpoints(folder) if checkpoint != path]
    _remove(others[: len(others) - keep + 1] if keep and len(others) >= keep else [])
    return path


def tidy(folder: Path, keep: int | None = None) -> None:
    """Finish the work of a process that was killed in `save_checkpoint`: clear away, and keep the latest only."""
    _clear(folder)
    found = checkpoints(folder)
    _remove(found[: len(found) - keep] if keep and len(found) > keep else [])


def load_checkpoint(path: Path) -> Checkpoint:
    """The content of a checkpoint whose every file is whole.

    Raises:
        CheckpointError: It is not a checkpoint of this library, or a file is missing, truncated or altered.
    """
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["size"] or sha256(file) != expected["sha256"]:
            others = [str(p) for p in checkpoints(path.parent) if p != path][-1:]
            hint = (
                f"move it away and resume from {others[0]} instead"
                if others
                else "start the run again in a new output_dir"
            )
            raise CheckpointError(
                f"the checkpoint {path} is damaged: {name} is missing, truncated or altered; {hint}."
            )
    groups = {file.name for file in entries(path) if file.suffix == ".safetensors"}
    if unlisted := groups - manifest["files"].keys():
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its manifest does not list {', '.join(sorted(unlisted))}: start the "
            f"run again in a new output_dir, or restore it from a copy."
        )
    tensors = {Path(group).stem: load_file(path / group) for group in sorted(groups)}
    state = read_json(path / "state.json", max_bytes=_MAX_STATE_BYTES)
    step = state.get("step")
    if type(step) is not int or step != manifest.get("step", step):
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its manifest is of step {manifest.get('step')}, and its state of "
            f"{shortened(step)}: start the run again in a new output_dir, or restore it from a copy."
        )
    return Checkpoint(tensors, state)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or damaged; a copy that has another name is none."""
    return [path for path in entries(folder) if _NAME.fullmatch(path.name) and _is_checkpoint(path)]


def foreign_entries(folder: Path) -> list[Path]:
    """The entries with the name of a checkpoint that are none: where they lie, none can be written."""
    return [path for path in entries(folder) if _NAME.fullmatch(path.name) and not _is_checkpoint(path)]


def holds_nothing_else(checkpoint: Path) -> bool:
    """Whether all that is in a checkpoint's folder is the checkpoint's."""
    manifest = _read_manifest(checkpoint)
    known = None if manifest is None else {"manifest.json", *manifest["files"]}
    return all(
        path.is_file()
        and not path.is_symlink()
        and (path.name in known if known else _UNFINISHED.fullmatch(path.name))
        for path in entries(checkpoint)
    )


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; ``None`` where ``latest`` finds none.

    Raises:
        CheckpointError: A path was given that is no folder.
    """
    if wanted == "latest":
        found = checkpoints(folder)
        return found[-1] if found else None
    path = expanded(wanted)
    if not path.is_dir():
        known = ", ".join(str(p) for p in checkpoints(folder)) or "none"
        raise CheckpointError(f"there is no checkpoint at {path}. Checkpoints of this run: {known}.")
    return path


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder with the name of a checkpoint is that one, or was before it was damaged."""
    if path.is_symlink() or not path.is_dir():
        return False
    manifest = _read_manifest(path)
    if manifest is None:
        return bool(entries(path)) and holds_nothing_else(path)
    return f"step-{manifest.get('step', int(path.name[5:])):08d}" == path.name  # older ones do not say it


def _manifest(path: Path) -> dict[str, Any]:
    manifest = _read_manifest(path)
    if manifest is None:
        raise CheckpointError(
            f"{path} is not a checkpoint of vdm_hub (no valid manifest.json): give a folder such as "
            f"runs/digits/checkpoints/step-00001000, or 'latest'."
        )
    return manifest


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = read_json(path / "manifest.json")
        check_record(_Manifest, manifest, str(path))
    except CheckpointError:
        return None
    plain_names = all(_FILE.fullmatch(name) for name in manifest["files"])
    return manifest if plain_names and "state.json" in manifest["files"] else None


def _plain(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, such as views of one buffer.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _clear(folder: Path) -> None:
    hidden = [path for path in entries(folder) if not path.is_symlink()]
    for path in hidden:
        if _REMOVED.fullmatch(path.name) and path.is_dir() and holds_nothing_else(path):
            remove(path)
    left = [path for path in hidden if _HIDDEN.fullmatch(path.name)]
    foreign = {path for path in left if path.is_dir() and not holds_nothing_else(path)}
    for path in sorted(foreign):
        warn(f"{path} holds files that no run wrote, and is kept: remove it yourself.", stacklevel=3)
    names = {_HIDDEN.fullmatch(path.name)[1] for path in left}  # type: ignore[index]
    for name in sorted(names - {_HIDDEN.fullmatch(path.name)[1] for path in foreign}):  # type: ignore[index]
        clear_leftovers(folder / name)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if not holds_nothing_else(path):
            warn(f"{path} holds files that no run wrote, and is kept: remove it yourself.", stacklevel=3)
            continue
        hidden = path.with_name(f".{path.name}.removed")  # half removed, it is no checkpoint
        path.rename(hidden)
        remove(hidden)


def _to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
