"""Bits back through a chain of latents (BB-ANS, arXiv 1901.04866; bottom up as Bit-Swap, arXiv 1905.06845).

Upwards, for each batch of data: pop ``z_1 ~ q(z_1|x)``, push x under ``p(x|z_1)``, pop ``z_2 ~ q(z_2|z_1)``, push z_1
under ``p(z_1|z_2)``, ..., push z_T under ``p(z_T)``. The expected length is the bound at T, and the bits to start with
are those of two latents alone. They come from the data themselves: the first data of a block are pushed as they are,
until there are enough for one; later batches grow with what the stack holds. Latents are numbers of bins of one width
for each latent, so that the width is in no length.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, fields

import numpy as np

from vdm_hub import DataError
from vdm_hub_codec.chains import Chain
from vdm_hub_codec.decisions import Decisions, Integers, Note
from vdm_hub_codec.distributions import Distribution
from vdm_hub_codec.stack import ExhaustedError, Stack


class OtherNumbersError(DataError):
    """What was decoded is not what was encoded."""

    def __init__(self) -> None:
        super().__init__(
            "what was decoded is not what was encoded: the network gave other numbers here than where the file was "
            "made. Nothing is written. Decode it on a machine, or with a build of torch, nearer to that one."
        )


@dataclass(frozen=True)
class Block:
    """Data that decode by themselves.

    Attributes:
        count: How many data.
        started: How many of them, the first, are there as they are.
        most: How many of the others were coded together, at most: see `batches`.
        words: The stack's content, uint32.
        check: CRC-32 of the data.
        notes: Of values near an edge.
    """

    count: int
    started: int
    most: int
    words: np.ndarray
    check: int
    notes: list[Note]

    @property
    def batches(self) -> list[int]:
        """How many data were coded together, one batch after the other, behind those that are there as they are.

        A batch is half of what is there already: its latents take up bits of it.
        """
        return batches_of(self.count, self.started, self.most)


def batches_of(count: int, started: int, most: int) -> list[int]:
    """See `Block.batches`.

    >>> batches_of(20, 2, 4)
    [1, 1, 2, 3, 4, 4, 3]
    """
    sizes: list[int] = []
    done = started
    while done < count:
        sizes.append(min(most, max(done // 2, 1), count - done))
        done += sizes[-1]
    return sizes


@dataclass
class Lengths:
    """Where the bits of a file come from: bits by name, and network evaluations of a datum by name.

    Attributes:
        as_they_are: Bits of the data that were pushed to start with.
        chain: ``log q - log p`` of the latents that were drawn: the bound on the same draws.
        pushed: What the stack grew by, for the same data.
        started: How many data were pushed as they are.
    """

    as_they_are: float = 0.0
    chain: float = 0.0
    pushed: float = 0.0
    started: int = 0
    evaluations: int = 0

    def __add__(self, other: Lengths) -> Lengths:
        """Those of two blocks together."""
        return Lengths(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@dataclass
class Coder:
    """Codes blocks by a chain.

    Attributes:
        chain: The model.
        batch_size: Data at once in the networks, and coded together at most.
    """

    chain: Chain
    batch_size: int
    lengths: Lengths = field(default_factory=Lengths)

    def encode(self, levels: Integers) -> Block:
        """A block of data, (N, *shape): as few as they are as leave bits enough for the others."""
        rows = levels.reshape(len(levels), -1)
        for started in range(1, len(rows) + 1):
            stack, decisions, lengths = Stack(), Decisions(), Lengths(started=started)
            stack.push_levels(rows[:started], self.chain.num_levels)
            lengths.as_they_are = stack.bits
            place = started
            try:
                for size in batches_of(len(rows), started, self.batch_size):
                    numbers = np.arange(place, place + size)
                    self._push(stack, rows[numbers], numbers, decisions, lengths)
                    place += size
            except ExhaustedError:
                continue
            self.lengths += lengths
            return Block(len(rows), started, self.batch_size, stack.words(), checksum(levels), decisions.notes)
        raise AssertionError("no batch is left where all data are there as they are")

    def decode(self, block: Block) -> Integers:
        """The data of a block.

        Raises:
            DataError: They are not what was encoded.
        """
        stack, decisions = Stack(block.words), Decisions.of(block.notes)
        size, found, end = math.prod(self.chain.shapes[0]), [], block.count
        for batch in reversed(block.batches):
            found.append(self._pop(stack, np.arange(end - batch, end), decisions))
            end -= batch
        found.append(stack.pop_levels(block.started * size, self.chain.num_levels).reshape(-1, size))
        levels = np.concatenate(found[::-1]).reshape(-1, *self.chain.shapes[0])
        if stack.words().size or checksum(levels) != block.check:
            raise OtherNumbersError
        return levels

    def _push(self, stack: Stack, below: Integers, images: Integers, by: Decisions, lengths: Lengths) -> None:
        """Push a batch, (B, n): see the module."""
        chain, before, ideal = self.chain, stack.bits, 0.0

        def push(distribution: Distribution, numbers: Integers, t: int) -> float:
            distribution.decided(t, False, images, by).push(stack, numbers)
            return distribution.log2(numbers)

        for t in range(1, chain.depth + 1):
            q = chain.q(t, chain.value(below, t - 1), self.batch_size)
            above = q.decided(t, True, images, by).draw(stack, _seed(images, t))
            ideal += q.log2(above)
            ideal -= push(chain.p(t - 1, chain.value(above, t), self.batch_size), below, t - 1)
            below = above
        ideal -= push(chain.prior(len(images)), below, chain.depth)
        lengths.chain += ideal
        lengths.pushed += stack.bits - before
        lengths.evaluations += chain.depth * len(images)

    def _pop(self, stack: Stack, images: Integers, by: Decisions) -> Integers:
        """Pop a batch, (B, n): what `_push` did, backwards."""
        chain = self.chain
        above = chain.prior(len(images)).decided(chain.depth, False, images, by).pop(stack)
        for t in range(chain.depth, 0, -1):
            p = chain.p(t - 1, chain.value(above, t), self.batch_size)
            below = p.decided(t - 1, False, images, by).pop(stack)
            q = chain.q(t, chain.value(below, t - 1), self.batch_size)
            q.decided(t, True, images, by).undraw(stack, above, _seed(images, t))
            above = below
        return above


def _seed(images: Integers, t: int) -> int:
    """Of a draw: any number that both sides know, another for each."""
    return int(images[0]) * 100_003 % 2**31 + t


def checksum(levels: Integers) -> int:
    """The CRC-32 of data, as little-endian integers of 32 bits."""
    return zlib.crc32(levels.astype("<i4").tobytes())
