"""Checkpoints: safetensors and JSON, written beside and renamed, with a manifest that finds every damage.

Nothing is pickled. A checkpoint is a folder ``step-00001000`` with ``<group>.safetensors`` for each group of tensors,
``state.json`` and ``manifest.json`` (size and SHA-256 of each file).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdm_hub.errors import CheckpointError
from vdm_hub.files import clear_leftovers, remove, written_beside

_FORMAT = "vdm_hub checkpoint 2"
_REMOVED = ".removed"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: groups of named tensors, and JSON."""

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
    """
    path = folder / f"step-{step:08d}"
    _clear(folder)
    with written_beside(path) as beside:
        beside.mkdir()
        for group, named in tensors.items():
            save_file({name: _plain(tensor) for name, tensor in named.items()}, beside / f"{group}.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False))
        files = {
            file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(beside.iterdir())
        }
        (beside / "manifest.json").write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1))
        for file in beside.iterdir():  # a power cut must not leave the name of a checkpoint without its content
            _to_disk(file)
    others = [checkpoint for checkpoint in checkpoints(folder) if checkpoint != path]
    _remove(others[: len(others) - keep + 1] if keep and len(others) >= keep else [])
    return path


def tidy(folder: Path, keep: int | None = None) -> None:
    """Finish what a process that was killed in `save_checkpoint` did not: clear away, and keep the latest only."""
    _clear(folder)
    found = checkpoints(folder)
    _remove(found[: len(found) - keep] if keep and len(found) > keep else [])


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whose every file is whole.

    Raises:
        CheckpointError: It is not a checkpoint of this library, or a file is missing, truncated or altered.
    """
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            others = [str(p) for p in checkpoints(path.parent) if p != path][-1:]
            hint = (
                f"move it away and resume from {others[0]} instead"
                if others
                else "start the run again in a new output_dir"
            )
            raise CheckpointError(
                f"the checkpoint {path} is damaged: {name} is missing, truncated or altered; {hint}."
            )
    groups = [Path(name) for name in manifest["files"] if name.endswith(".safetensors")]
    tensors = {group.stem: load_file(path / group) for group in groups}
    return Checkpoint(tensors, json.loads((path / "state.json").read_text()))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; one that was being written when its process died is none."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; ``None`` where ``latest`` finds none.

    Raises:
        CheckpointError: A path was given that is no folder.
    """
    if wanted == "latest":
        found = checkpoints(folder)
        return found[-1] if found else None
    path = Path(wanted)
    if not path.is_dir():
        known = ", ".join(str(p) for p in checkpoints(folder)) or "none"
        raise CheckpointError(f"there is no checkpoint at {path}. Checkpoints of this run: {known}.")
    return path


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        plain_names = all(Path(name).name == name for name in manifest["files"])
        described = all({"size", "sha256"} <= entry.keys() for entry in manifest["files"].values())
        if manifest["format"] == _FORMAT and plain_names and described and "state.json" in manifest["files"]:
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(
        f"{path} is not a checkpoint of vdm_hub (no valid manifest.json): give a folder such as "
        f"runs/digits/checkpoints/step-00001000, or 'latest'."
    )


def _plain(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, such as views of one buffer.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _clear(folder: Path) -> None:
    for removed in folder.glob(f".step-*{_REMOVED}"):
        remove(removed)
    for name in {hidden.name[1:].partition("-")[2].partition("-")[0] for hidden in folder.glob(".step-*")}:
        clear_leftovers(folder / f"step-{name}")


def _remove(paths: list[Path]) -> None:
    for path in paths:
        hidden = path.with_name(f".{path.name}{_REMOVED}")  # half removed, it is no checkpoint
        path.rename(hidden)
        remove(hidden)


def _to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
