"""The file: who made it and how, the blocks, and a checksum of all.

    VDMZ | version, 1 byte | the model's fingerprint, 12 bytes | length of the description, 4 bytes |
    the description, JSON, deflated by what it usually holds | the blocks' words, 4 bytes each |
    CRC-32 of everything before, 4 bytes

All whole numbers are little-endian.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vdm_hub import DataError
from vdm_hub_codec.blocks import Block
from vdm_hub_codec.decisions import Note

MAGIC, VERSION = b"VDMZ", 2
_HEAD = struct.Struct("<4sB12sI")
_MOST = 1 << 24
"""Bytes of a description."""
_FREE = 1 << 16
"""Data that a block may hold without a bit."""
MOST_TRANSITIONS = 1 << 16
_LARGEST = 1 << 32
_USUAL = (  # what descriptions usually hold, which deflate then only points at; the likeliest comes last
    b'"widths":[-12,-11,-10,-9,-8,-7,-6,-5,-4,-3,-2,-1,0]"kind":"order","sites":1,"length":128,"context":0,'
    b'"kind":"values","transitions":1000,"length":128,"b":[[64,[1,1,1,1,2,2,2,3,3,4,4,5,5,6,6,7,8,9,10,11,12,13,14,15,'
    b'16,17,18,20,21,22,24,26,28,30,32,36,40,48,64,64,64],{"m":"runs/","kind":"latents","transitions":100,'
    b'"spacing":"fff","pictures":true,"b":[[100,[1,1,1,2,3,4,5,6,8,'
)


@dataclass(frozen=True)
class Container:
    """What a file holds.

    Attributes:
        model: The name of the model that made it.
        fingerprint: Of the model's weights and config.
        coder: How it is read: what the coder needs to know beside the model, as plain JSON.
        blocks: The blocks.
    """

    model: str
    fingerprint: str
    coder: dict[str, Any]
    blocks: Sequence[Block] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The file."""
        blocks = [[one.count, one.batches, len(one.words), one.check, *map(list, one.notes)] for one in self.blocks]
        described = {"m": self.model, **self.coder, "b": blocks}
        content, deflating = _json(described), zlib.compressobj(9, wbits=-15, zdict=_USUAL)
        if len(content) > _MOST or not all(_may_hold(one, self.coder["kind"]) for one in self.blocks):
            raise DataError(
                f"{sum(one.count for one in self.blocks):,} data in {len(blocks):,} blocks are more than a file says "
                f"of so few bits: make several files, or larger blocks."
            )
        packed = deflating.compress(content) + deflating.flush()
        words = b"".join(one.words.astype("<u4").tobytes() for one in self.blocks)
        whole = _HEAD.pack(MAGIC, VERSION, bytes.fromhex(self.fingerprint), len(packed)) + packed + words
        return whole + struct.pack("<I", zlib.crc32(whole))

    @classmethod
    def from_bytes(cls, data: bytes) -> Container:
        """The content of a file.

        Raises:
            DataError: It is none, of another version, cut off, or damaged.
        """
        if data[:4] != MAGIC:
            raise DataError(
                "the file is none that `vdm-hub compress` makes (it does not begin with VDMZ): name another."
            )
        damaged = len(data) < _HEAD.size + 4 or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]
        version = data[4] if len(data) > 4 else VERSION
        if version != VERSION:  # which may have its checksum elsewhere
            also = ", or damaged: get a whole copy, or" if damaged else ":"
            raise DataError(
                f"the file is of version {version}, and this package reads version {VERSION}{also} update "
                f"vdm-hub-codec. Nothing is decoded."
            )
        if damaged:
            raise DataError(
                "the file is damaged or cut off, as its checksum is not that of its content: get a whole copy. "
                "Nothing is decoded."
            )
        _, _, fingerprint, length = _HEAD.unpack(data[: _HEAD.size])
        try:
            place = _HEAD.size + length
            return cls._read(fingerprint.hex(), data[_HEAD.size : place], data[place:-4])
        except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, zlib.error) as error:
            raise DataError(f"the file can't be read ({error}): it was not made by `vdm-hub compress`.") from error

    @classmethod
    def _read(cls, fingerprint: str, packed: bytes, words: bytes) -> Container:
        coder = json.loads(zlib.decompressobj(wbits=-15, zdict=_USUAL).decompress(packed, _MOST))
        model, described = coder.pop("m"), coder.pop("b")
        content, blocks, place = np.frombuffer(words, "<u4"), [], 0
        for count, batches, length, check, *notes in described:
            part = content[place : place + length].astype(np.uint32)
            blocks.append(Block(count, batches, part, check, [Note(*note) for note in notes]))
            place += length
        if place != len(content):
            raise ValueError("its blocks are not as long as they are said to be")
        check_description(model, coder, blocks)
        return cls(model, fingerprint, coder, blocks)


def _json(described: dict[str, Any]) -> bytes:
    return json.dumps(described, separators=(",", ":")).encode()


def _may_hold(block: Block, kind: str) -> bool:
    """Whether the words of a block may be of so many data: what is read first must not decide what memory it takes.

    A batch is drawn from bits that are there, 256 for each datum at least. Data that are there as they are may be of
    next to no bits, as black images are, but only so many of them are kept in one block; else they are of a bit at
    least. What a model knows well is of less, in an order, too.
    """
    bits, as_they_are = 32 * len(block.words), 0 if kind == "order" else block.count - sum(block.batches)
    in_all = block.count <= _FREE + 1024 * bits and as_they_are <= _FREE + 2 * bits
    return in_all and max(block.batches, default=0) * 128 <= bits


def _is(value: object, low: int, high: int) -> bool:
    """Whether a value is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _are(values: object, low: int, high: int) -> bool:
    return isinstance(values, list) and all(_is(one, low, high) for one in values)


def _shown(value: object) -> str:
    return repr(value)[:100]


_TEXTS: dict[str, Callable[[Any], bool]] = {
    "length": lambda value: _is(value, 2, 1 << 20),
    "ended": lambda value: value is True,
    "documents": lambda value: _are(value, 0, _LARGEST) and bool(value),
}
_KNOWN: dict[str, dict[str, Callable[[Any], bool]]] = {
    "latents": {
        "transitions": lambda value: value is None or _is(value, 1, MOST_TRANSITIONS),
        "spacing": lambda value: isinstance(value, str) and any(bytes.fromhex(value)),
        "pictures": lambda value: value is True,
        "labels": lambda value: value is True,
        "widths": lambda value: _are(value, -1000, 1000),
    },
    "values": {"transitions": lambda value: _is(value, 1, MOST_TRANSITIONS), **_TEXTS},
    "order": {
        "sites": lambda value: _is(value, 1, 1 << 20),
        "context": lambda value: _is(value, 0, 1 << 20),
        **_TEXTS,
    },
}
"""What a description of each kind may hold, and what is right of it."""
_NEEDED = {"latents": {"transitions"}, "values": {"transitions", "length"}, "order": {"sites", "length", "context"}}
_BLOCKS = {"values": 2, "order": 1}


def check_description(model: object, coder: dict[str, Any], blocks: Sequence[Block]) -> None:
    """Refuse a description that no encoder makes.

    Raises:
        ValueError: It is one.
    """
    kind = coder.get("kind")
    if not isinstance(model, str) or kind not in _KNOWN:
        raise ValueError(f"its kind is {_shown(kind)}")
    known, told = _KNOWN[kind], {name: value for name, value in coder.items() if name != "kind"}
    wrong = [name for name in told if name not in known or not known[name](told[name])]
    wrong += sorted(_NEEDED[kind] - told.keys())
    if wrong:
        raise ValueError(f"{wrong[0]!r} in it is {_shown(told.get(wrong[0], 'missing'))}")
    if len(blocks) != _BLOCKS.get(kind, len(blocks)) or not blocks:
        raise ValueError(f"it has {len(blocks)} blocks")
    for one in blocks:
        numbers = _is(one.count, 0, _LARGEST) and _is(one.check, 0, (1 << 32) - 1)
        notes = all(_are(list(note), -(1 << 62), 1 << 62) for note in one.notes)
        batches = _are(one.batches, 1, _LARGEST) and sum(one.batches) <= one.count
        if not (numbers and notes and batches and _may_hold(one, kind)):
            raise ValueError(f"a block of it is of {_shown(one.count)} data, {_shown(one.batches)} together")
