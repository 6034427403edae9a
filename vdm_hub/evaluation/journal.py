"""What is measured is kept: a kill at any moment loses no image that was finished.

A journal is a folder. ``key.json`` says what is measured: the weights, the images, the process and the protocol; a run
with another key is refused. Each batch is one safetensors file, written beside its place, flushed to the disk and
renamed; those of a finished replicate are joined. So any number of processes may write, and any other number go on.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vdm_hub.errors import CheckpointError
from vdm_hub.files import written_beside
from vdm_hub.likelihood.per_image import Measured, Results

_KEY, _STATE, _INDICES = "key.json", "state.json", "indices"


class Journal:
    """The finished images of one measurement, on the disk.

    Args:
        folder: Where; made where it is not there.
        key: What is measured, as plain JSON.

    Raises:
        CheckpointError: The folder holds another measurement, or files that are no journal.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self._pieces: dict[int, list[Path]] = {}
        self._marked, self.seconds_before = time.perf_counter(), 0.0
        plain = json.loads(json.dumps(key))
        if (folder / _KEY).is_file():
            self._check(plain)
        elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise CheckpointError(f"{folder} holds other files, and no journal of a measurement: name another folder.")
        else:
            _write(folder / _KEY, json.dumps(plain, indent=1).encode())

    def _check(self, key: dict[str, Any]) -> None:
        found = _read_object(self.folder / _KEY)
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
        """What the pilot found, where one has been kept."""
        return _read_object(self.folder / _STATE) if (self.folder / _STATE).is_file() else None

    def keep_state(self, state: Mapping[str, Any]) -> None:
        """Keep what the pilot found, for whoever goes on."""
        _write(self.folder / _STATE, json.dumps(state).encode())

    def write(self, replicate: int, indices: Tensor, measured: Measured, seconds: float | None = None) -> None:
        """Keep what was found of a batch; on the disk when this returns.

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
        _write(path, save(plain | {_INDICES: indices.cpu().contiguous()}, about))
        self._pieces.setdefault(replicate, []).append(path)

    def join(self, replicate: int, num_images: int) -> None:
        """Replace this process's files of a finished replicate by one."""
        pieces = self._pieces.pop(replicate, [])
        if len(pieces) < 2:
            return
        own, seconds = Results(num_images), 0.0
        for piece in pieces:
            took, _, indices, measured = _read(piece)
            own.add(replicate, indices, measured)
            seconds += took
        self.write(replicate, *own.found(replicate), seconds)
        self._pieces.pop(replicate)
        for piece in pieces:  # a kill before this leaves the same values twice, which is harmless
            piece.unlink()

    def tidied(self) -> Journal:
        """This journal, without the half-written files that a kill left; for one process, before others write."""
        for leftover in self.folder.glob(".*.safetensors"):
            leftover.unlink()
        return self

    def read(self, results: Results) -> None:
        """Take in all that is kept, whichever process measured it; ``seconds_before`` is what all of it took."""
        self.seconds_before = 0.0
        for path in sorted(self.folder.glob("replicate-*.safetensors")):
            seconds, replicate, indices, measured = _read(path)
            if bool(torch.isin(indices, results.missing(replicate)).any()):  # a kill may leave the same twice
                self.seconds_before += seconds
            results.add(replicate, indices, measured)


def _read(path: Path) -> tuple[float, int, Tensor, Measured]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            replicate, seconds, terms = int(about["replicate"]), float(about["seconds"]), json.loads(about["terms"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} of the journal is damaged ({error}): remove it, and its images are measured again."
        ) from error
    parts: dict[str, dict[str, Tensor]] = {"term": {}, "diagnostic": {}}
    indices = tensors.pop(_INDICES)
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    ordered = {name: parts["term"][name] for name in terms}  # a safetensors file has an order of its own
    return seconds, replicate, indices, Measured(ordered, parts["diagnostic"])


def _write(path: Path, content: bytes) -> None:
    with written_beside(path) as beside, beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} of the journal is damaged ({error}): remove the journal's folder.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} of the journal is damaged (no object): remove the journal's folder.")
    return content


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
