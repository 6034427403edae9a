"""The encodings of texts, kept on the disk: made once, read from there ever after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdm_hub.errors import OutputError, in_one_line, warn
from vdm_hub.files import written_beside

FORM = 1
"""The form of the files; another one makes them anew."""


@dataclass(frozen=True, eq=False)
class Encodings:
    """What an encoder makes of the tokens of some texts, one text after the other.

    Args:
        states: Float32, (sum of lengths, D); it may lie on the disk.
        lengths: How many tokens each text has, int64, (N,).
        key: The `fingerprint` of the encoder and the tokens.

    >>> two = Encodings(torch.arange(3.0)[:, None], torch.tensor([1, 2]), "")
    >>> told = two.take(torch.tensor([1, 0]))
    >>> told["encoder_hidden_states"][..., 0].tolist(), told["encoder_attention_mask"].tolist()
    ([[1.0, 2.0], [0.0, 0.0]], [[True, True], [True, False]])
    """

    states: Tensor
    lengths: Tensor
    key: str

    @cached_property
    def longest(self) -> int:
        """L, the number of tokens of the longest text."""
        return int(self.lengths.max())

    @cached_property
    def _starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths

    def take(self, numbers: Tensor, length: int | None = None) -> dict[str, Tensor]:
        """A network's arguments for the texts of these numbers, padded with zeros.

        Args:
            numbers: Int64, (B,).
            length: To what they are padded, L of all texts where not given, so that all batches have one shape.

        Returns:
            ``encoder_hidden_states``, (B, L, D), and ``encoder_attention_mask``, bool of shape (B, L).
        """
        places = torch.arange(length or self.longest)
        mask = places < self.lengths[numbers][:, None]
        rows = self.states[(self._starts[numbers][:, None] + places).clamp(max=len(self.states) - 1)]
        return {
            "encoder_hidden_states": rows.masked_fill_(~mask[..., None], 0),
            "encoder_attention_mask": mask,
        }


def fingerprint(encoder: str, tokens: Iterable[Sequence[int]]) -> str:
    """The SHA-256 of all that encodings depend on: the encoder, and the tokens, in their order.

    Args:
        encoder: The encoder's own fingerprint.
        tokens: Of each text.
    """
    digest = hashlib.sha256(f"{FORM} {encoder}".encode())
    for one in tokens:
        digest.update(np.asarray([len(one), *one], dtype="<i8").tobytes())
    return digest.hexdigest()


def stored(key: str, tokens: Sequence[Sequence[int]], width: int, states: Iterable[Tensor]) -> Encodings:
    """The encodings of a key: those on the disk, or else made now and kept there.

    A file holds real tokens alone, and is mapped into memory: neither writing nor reading takes memory for all of it.

    Args:
        key: The `fingerprint`.
        tokens: Of each text.
        width: D.
        states: Makes the encoding of each text in turn, (its length, D); not asked where the disk has them.

    Raises:
        OutputError: They can't be written.
    """
    place = cached_assets_path("vdm_hub", "text_encodings", "v1") / f"{key}.safetensors"
    lengths = torch.tensor([len(one) for one in tokens])
    found = _read(place, key, lengths, width)
    if found is not None:
        return found
    try:
        with written_beside(place) as beside:
            _write(beside, lengths, width, states)
    except OSError as error:
        raise OutputError(
            f"the encodings of {len(tokens)} texts, {int(lengths.sum()) * width * 4 / 1e6:,.0f} MB, can't be kept in "
            f"{place.parent} ({in_one_line(error)}): make room there, or name another place with HF_ASSETS_CACHE."
        ) from error
    made = _read(place, key, lengths, width)
    assert made is not None
    return made


def _read(place: Path, key: str, lengths: Tensor, width: int) -> Encodings | None:
    """The encodings of a file; ``None`` where there is none, or one that is damaged."""
    if not place.is_file():
        return None
    try:
        with safe_open(place, framework="pt") as file:
            states, written = file.get_tensor("states"), file.get_tensor("lengths")
    except (SafetensorError, OSError) as error:
        warn(f"the encodings in {place} can't be read ({in_one_line(error)}): they are made anew.", stacklevel=2)
        return None
    if tuple(states.shape) != (int(lengths.sum()), width) or not torch.equal(written, lengths):
        warn(f"the encodings in {place} are not those that its name says: they are made anew.", stacklevel=2)
        return None
    return Encodings(states, written, key)


def _write(path: Path, lengths: Tensor, width: int, states: Iterable[Tensor]) -> None:
    """Write a safetensors file text by text: its sizes are known before the first."""
    total, numbers = int(lengths.sum()), lengths.numpy().astype("<i8").tobytes()
    end = len(numbers)
    described = {
        "lengths": {"dtype": "I64", "shape": [len(lengths)], "data_offsets": [0, end]},
        "states": {"dtype": "F32", "shape": [total, width], "data_offsets": [end, end + 4 * total * width]},
    }
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + numbers)
        for one in states:
            file.write(one.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
