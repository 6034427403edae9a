"""The encodings of texts, kept on the disk: made once, read from there ever after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdm_hub.errors import OutputError, in_one_line, warn
from vdm_hub.files import written_beside

_FOLDER = ("vdm_hub", "text_encodings", "v2")
_DIGEST = 16  # bytes of the SHA-256 of one text's tokens
Tokens: TypeAlias = Sequence[Sequence[int]]


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


def fingerprint(encoder: str, tokens: Tokens) -> str:
    """The SHA-256 of all that encodings depend on: the encoder, and the tokens, in their order.

    Args:
        encoder: The encoder's own fingerprint.
        tokens: Of each text.
    """
    digest = hashlib.sha256(f"1 {encoder}".encode())
    for one in tokens:
        digest.update(_bytes(one))
    return digest.hexdigest()


def stored(encoder: str, tokens: Tokens, width: int, encode: Callable[[Tokens], Iterator[Tensor]]) -> Encodings:
    """The encodings of some texts: from the disk, or else made now and kept there.

    A file holds the texts that were asked for at once, real tokens alone, and is mapped into memory: neither writing
    nor reading takes memory for all of it. A text that any file of the same encoder holds is not encoded again.

    Args:
        encoder: The encoder's own fingerprint.
        tokens: Of each text.
        width: D.
        encode: Makes the encoding of each text in turn, (its length, D); asked for those alone that no file holds.

    Raises:
        OutputError: They can't be written.
    """
    key, digests = fingerprint(encoder, tokens), [hashlib.sha256(_bytes(one)).digest()[:_DIGEST] for one in tokens]
    folder = cached_assets_path(*_FOLDER)
    place = folder / f"{encoder}-{key}.safetensors"
    if (found := _read(place, width)) is not None and found[1] == digests:
        return Encodings(*found[0], key)
    known = _known(set(digests), sorted(folder.glob(f"{encoder}-*.safetensors")), width)
    made = encode([one for one, digest in zip(tokens, digests, strict=True) if digest not in known])
    states = (known[one][0][slice(*known[one][1:])] if one in known else next(made) for one in digests)
    lengths = torch.tensor([len(one) for one in tokens])
    try:
        with written_beside(place) as beside:
            _write(beside, lengths, width, digests, states)
    except OSError as error:
        raise OutputError(
            f"the encodings of {len(tokens)} texts, {int(lengths.sum()) * width * 4 / 1e6:,.0f} MB, can't be kept in "
            f"{folder} ({in_one_line(error)}): make room there, or name another place with HF_ASSETS_CACHE."
        ) from error
    written = _read(place, width)
    assert written is not None
    return Encodings(*written[0], key)


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray([len(tokens), *tokens], dtype="<i8").tobytes()


def _known(wanted: set[bytes], files: Sequence[Path], width: int) -> dict[bytes, tuple[Tensor, int, int]]:
    """Where the encodings of texts lie that some files hold: the states of a file, and the first and the last row."""
    known: dict[bytes, tuple[Tensor, int, int]] = {}
    for path in files:
        if len(known) == len(wanted) or (found := _read(path, width)) is None:
            continue
        (states, lengths), digests = found
        ends = lengths.cumsum(0).tolist()
        for digest, start, end in zip(digests, [0, *ends], ends, strict=False):
            if digest in wanted:
                known[digest] = (states, start, end)
    return known


def _read(place: Path, width: int) -> tuple[tuple[Tensor, Tensor], list[bytes]] | None:
    """States, lengths and digests of a file; ``None`` where there is none, or one that is damaged."""
    if not place.is_file():
        return None
    try:
        with safe_open(place, framework="pt") as file:
            states, lengths, texts = (file.get_tensor(name) for name in ("states", "lengths", "texts"))
    except (SafetensorError, OSError) as error:
        warn(f"the encodings in {place} can't be read ({in_one_line(error)}): they are made anew.", stacklevel=2)
        return None
    if tuple(states.shape) != (int(lengths.sum()), width) or tuple(texts.shape) != (len(lengths), _DIGEST):
        warn(f"the encodings in {place} are not those that its name says: they are made anew.", stacklevel=2)
        return None
    return (states, lengths), [one.tobytes() for one in texts.numpy()]


def _write(path: Path, lengths: Tensor, width: int, digests: Sequence[bytes], states: Iterable[Tensor]) -> None:
    """Write a safetensors file text by text: its sizes are known before the first."""
    total, numbers, texts = int(lengths.sum()), lengths.numpy().astype("<i8").tobytes(), b"".join(digests)
    first, end = len(numbers), len(numbers) + len(texts)
    described = {
        "lengths": {"dtype": "I64", "shape": [len(lengths)], "data_offsets": [0, first]},
        "texts": {"dtype": "U8", "shape": [len(lengths), _DIGEST], "data_offsets": [first, end]},
        "states": {"dtype": "F32", "shape": [total, width], "data_offsets": [end, end + 4 * total * width]},
    }
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + numbers + texts)
        for one in states:
            file.write(one.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
