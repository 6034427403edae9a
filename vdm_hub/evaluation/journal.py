"""The journal of a measurement: a kill at any moment loses no image that was finished.

A journal is a folder. ``key.json`` says what is measured: the weights, the images, the process and the protocol; a run
with another key is refused. Each batch is one safetensors file, written beside its place, flushed to the disk and
renamed; those of a finished replicate are joined. So any number of processes may write, and any other number go on.
The digest of each file covers the key, too: one of another journal is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vdm_hub.errors import CheckpointError, OutputError, explained
from vdm_hub.files import check_writable, destination, entries, remove, written_beside
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.schemas import check_record
from vdm_hub.likelihood.measurement import Measured, Results

MODELS = ("unclipped", "clipped")
"""The models that an evaluation measures: each has a journal of its own, in a folder of its name."""

_KEY, _STATE, _INDICES = "key.json", "state.json", "indices"


class _State(TypedDict):
    """The pilot's findings, and their digest."""

    found: dict[str, Any]
    sha256: str


class Journal:
    """The finished images of one measurement, on the disk.

    Args:
        folder: Where; made where it is not there.
        key: What is measured, as plain JSON.

    Raises:
        CheckpointError: The folder holds another measurement, or files that are no journal.
        OutputError: It is no folder, or can't be written.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self._pieces: dict[int, list[Path]] = {}
        self._marked, self.seconds_before = time.perf_counter(), 0.0
        plain = json.loads(json.dumps(key))
        self._key = json.dumps(plain, sort_keys=True)
        check_place(folder)
        with explained(f"the journal {folder} can't be kept", "name another folder", OutputError):
            self._open(folder, plain)

    def _open(self, folder: Path, plain: dict[str, Any]) -> None:
        if (folder / _KEY).is_file():
            self._check(plain)
        elif others := _shown(folder):
            raise _strange(others[0])
        else:
            _write(folder / _KEY, json.dumps(plain, indent=1).encode())

    def _check(self, key: dict[str, Any]) -> None:
        found = read_json(self.folder / _KEY)
        differing = sorted(name for name in found.keys() | key.keys() if found.get(name) != key.get(name))
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{self.folder} is the journal of another measurement: its {', '.join(differing)} differ (such as "
                f"{name}: {_short(found.get(name))} there, {_short(key.get(name))} now). Name another folder, or "
                f"remove this one."
            )

    @property
    def state(self) -> dict[str, Any] | None:
        """The pilot's findings, where any have been kept."""
        path = self.folder / _STATE
        if not path.is_file():
            return None
        kept = read_json(path)
        check_record(_State, kept, str(path))
        if kept["sha256"] != _digest(self._key, {}, {"state": json.dumps(kept["found"], sort_keys=True)}):
            raise CheckpointError(
                f"{path} of the journal is damaged, or of another one: remove the journal's folder, and begin anew."
            )
        found: dict[str, Any] = kept["found"]
        return found

    def keep_state(self, state: Mapping[str, Any]) -> None:
        """Keep the pilot's findings, for whoever goes on."""
        digest = _digest(self._key, {}, {"state": json.dumps(state, sort_keys=True)})
        _write(self.folder / _STATE, json.dumps({"found": state, "sha256": digest}).encode())

    def write(self, replicate: int, indices: Tensor, measured: Measured, seconds: float | None = None) -> None:
        """Keep the results of a batch; they are on the disk when this returns.

        Args:
            replicate: Of all that was found.
            indices: Of the images.
            measured: What was found of them.
            seconds: What it took; the time since the last that was written, where not given.
        """
        if seconds is None:
            now = time.perf_counter()
            seconds, self._marked = now - self._marked, now
        path = self.folder / f"replicate-{replicate:05d}-{uuid.uuid4().hex[:12]}.safetensors"
        tensors = {f"term.{name}": value for name, value in measured.terms.items()}
        tensors |= {f"diagnostic.{name}": value for name, value in measured.diagnostics.items()}
        plain = {name: value.detach().double().cpu().contiguous().clone() for name, value in tensors.items()}
        about = {"replicate": str(replicate), "seconds": repr(seconds), "terms": json.dumps(list(measured.terms))}
        tensors = plain | {_INDICES: indices.cpu().contiguous()}
        _write(path, save(tensors, about | {"sha256": _digest(self._key, tensors, about)}))
        self._pieces.setdefault(replicate, []).append(path)

    def join(self, replicate: int, num_images: int) -> None:
        """Replace this process's files of a finished replicate by one."""
        pieces = self._pieces.pop(replicate, [])
        if len(pieces) < 2:
            return
        own, seconds = Results(num_images), 0.0
        for piece in pieces:
            took, _, indices, measured = _read(piece, self._key)
            own.add(replicate, indices, measured)
            seconds += took
        self.write(replicate, *own.found(replicate), seconds)
        self._pieces.pop(replicate)
        for piece in pieces:  # a kill before this leaves the same values twice, which is harmless
            piece.unlink()

    def tidied(self) -> Journal:
        """This journal, without the half-written files that a kill left; for one process, before others write."""
        name = re.compile(r"\.replicate-\d{5}-[0-9a-f]{12}-[0-9a-f]{8}\.safetensors")
        for leftover in entries(self.folder):
            if name.fullmatch(leftover.name):
                remove(leftover)
        return self

    def read(self, results: Results) -> None:
        """Add all that is kept to the results, whoever measured it; ``seconds_before`` is the time that all took."""
        self.seconds_before = 0.0
        for path in sorted(self.folder.glob("replicate-*.safetensors")):
            seconds, replicate, indices, measured = _read(path, self._key)
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < results.num_images:
                raise CheckpointError(f"{path} of the journal is of other images: remove the journal's folder.")
            if bool(torch.isin(indices, results.missing(replicate)).any()):  # a kill may leave the same twice
                self.seconds_before += seconds
            results.add(replicate, indices, measured)


def check_place(folder: Path) -> None:
    """Refuse, before anything is measured, a place where there can be no folder.

    Raises:
        OutputError: There is a file, a device, a pipe or a socket, or a link without end, or nothing can be written.
    """
    if (target := destination(folder)).exists() and not target.is_dir():
        raise OutputError(f"the journal {folder} is a file, and a journal is a folder: name another place.")
    check_writable(folder / _KEY)


def check_evaluation_journal(folder: Path) -> None:
    """Refuse, before anything is measured, a place where an evaluation can't keep the journals of its models.

    Raises:
        OutputError: As `check_place` does.
        CheckpointError: The folder holds anything else.
    """
    check_place(folder)
    others = [path for path in _shown(folder) if path.name not in MODELS or not path.is_dir()]
    others += [path for model in MODELS if not (folder / model / _KEY).is_file() for path in _shown(folder / model)]
    if others:
        raise _strange(others[0])


def _shown(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, as those are which a kill leaves half-written."""
    return [path for path in entries(folder) if not path.name.startswith(".")]


def _strange(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.parent} holds {path.name}, and is no journal of a measurement: name another folder, or a new one."
    )


def _read(path: Path, key: str) -> tuple[float, int, Tensor, Measured]:
    """The content of a piece, if it is what was written into the journal with this key."""
    with explained(
        f"{path} of the journal is damaged, or of another journal", "remove it, and its images are measured again"
    ):
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if about.pop("sha256") != _digest(key, tensors, about):
            raise ValueError("its content is not what was written")
        indices = tensors.pop(_INDICES)
        parts: dict[str, dict[str, Tensor]] = {"term": {}, "diagnostic": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        ordered = {name: parts["term"][name] for name in json.loads(about["terms"])}  # safetensors has its own order
        return float(about["seconds"]), int(about["replicate"]), indices, Measured(ordered, parts["diagnostic"])


def _digest(key: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """The digest of all that a piece holds, and of what its journal measures."""
    digest = hashlib.sha256(json.dumps([key, dict(about)], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with written_beside(path) as beside, beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
