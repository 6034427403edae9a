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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from vdm_hub import DataError
from vdm_hub_codec.chains import Chain
from vdm_hub_codec.decisions import Decisions, Floats, Integers, Note
from vdm_hub_codec.distributions import Distribution
from vdm_hub_codec.labels import pop_labels, push_labels
from vdm_hub_codec.pictures import levels_of, picture_of
from vdm_hub_codec.stack import ExhaustedError, Stack


class OtherNumbersError(DataError):
    """What was decoded is not what was encoded."""

    def __init__(self) -> None:
        super().__init__(
            "what was decoded is not what was encoded: the network gave other numbers here than where the file was "
            "made. Nothing is written. Decode it on a machine, or with a build of torch, nearer to that one."
        )


@contextmanager
def decoding() -> Iterator[None]:
    """Make other numbers than the encoder's of whatever the coder can't go on with: a symbol that can't be there, NaN.

    Raises:
        OtherNumbersError: There is such a thing.
    """
    try:
        with np.errstate(invalid="ignore"):
            yield
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise OtherNumbersError from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # as the coder's native code raises, and no module names
            raise
        raise OtherNumbersError from error


@dataclass(frozen=True)
class Block:
    """Data that decode by themselves.

    Attributes:
        count: How many data.
        batches: How many of them were coded together, one batch after the other; those before are there as they are.
        words: The stack's content, uint32.
        check: CRC-32 of the data.
        notes: Of values near an edge.
    """

    count: int
    batches: list[int]
    words: np.ndarray
    check: int
    notes: list[Note]


@dataclass
class Lengths:
    """Where the bits of a file come from.

    Attributes:
        as_they_are: Bits of the data that were pushed to start with.
        each: ``log q - log p`` of the latents that were drawn for each datum: the bound on the same draws.
        values: How many values each of them has.
        pushed: What the stack grew by, for the same data.
        labels: Bits of the data's classes.
        started: How many data were pushed as they are.
        evaluations: Of the network, of all data that were coded.
    """

    as_they_are: float = 0.0
    each: list[float] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    pushed: float = 0.0
    labels: float = 0.0
    started: int = 0
    evaluations: int = 0

    @property
    def chain(self) -> float:
        """The bound of all of them."""
        return math.fsum(self.each)

    @property
    def per_value(self) -> float | None:
        """The bound of a value; ``None`` where no datum was coded."""
        return self.chain / sum(self.values) if self.values else None

    @property
    def error(self) -> float | None:
        """The standard error of `per_value`, over the data: that of a ratio, as their sizes may differ."""
        if (bound := self.per_value) is None or len(self.each) < 2:
            return None
        each, values = np.array(self.each), np.array(self.values)
        return float((each - bound * values).std(ddof=1) / math.sqrt(len(each)) / values.mean())


@dataclass
class Coder:
    """Codes blocks by a chain.

    Attributes:
        chain: The model.
        batch_size: Data at once in the networks, and coded together at most.
        pictures: Whether the data to start with are there as pictures: see `vdm_hub_codec.pictures`.
        classes: Of how many classes each datum has one, which is kept: see `vdm_hub_codec.labels`.
        untold: The class that the network is told of all data, where none is kept.
        advance: Told how many data are done.
    """

    chain: Chain
    batch_size: int
    pictures: bool = False
    classes: int | None = None
    untold: int = 0
    advance: Callable[[int], object] = lambda count: None
    lengths: Lengths = field(default_factory=Lengths)

    def encode(self, levels: Integers, labels: Integers | None = None) -> Block:
        """A block of data, (N, *shape), and their classes, (N,): as few as they are as leave enough for the others."""
        rows, place, told = levels.reshape(len(levels), -1), 0, self.told(len(levels), labels)
        stack, decisions, batches = Stack(), Decisions(), []
        while place < len(rows):
            size = self._fitting(stack, rows[place:])
            kept, notes = stack.copy(), len(decisions.notes)
            while size:
                try:
                    part = slice(place, place + size)
                    self._push(stack, rows[part], np.arange(place, place + size), told[part], decisions)
                    break
                except ExhaustedError:
                    stack, size = kept.copy(), size // 2
                    del decisions.notes[notes:]
            if size:
                batches.append(size)
                place += size
                self.advance(size)
                continue
            assert not batches, "what was enough for a batch is enough for one more datum"
            self.lengths.as_they_are += self._start(stack, rows[place])
            place += 1
            self.advance(1)
        self.lengths.started += len(rows) - sum(batches)
        if self.classes is not None:
            self.lengths.labels += push_labels(stack, told, self.classes)
        return Block(len(rows), batches, stack.words(), checksum(levels, labels), decisions.notes)

    def told(self, count: int, labels: Integers | None) -> Integers:
        """What the network is told of each datum."""
        return np.full(count, self.untold) if labels is None else labels

    def opened(self, block: Block) -> tuple[Stack, Integers | None]:
        """The stack of a block, and the classes that lay on top of it, (N,)."""
        stack = Stack(block.words)
        with decoding():
            return stack, None if self.classes is None else pop_labels(stack, block.count, self.classes)

    def _start(self, stack: Stack, row: Integers) -> float:
        """Push a datum as it is; returns its bits."""
        if self.pictures:
            picture = picture_of(row.reshape(self.chain.shapes[0]))
            stack.push_bytes(picture)
            return 8.0 * len(picture) + 16
        stack.push_levels(row, self.chain.num_levels)
        return len(row) * math.log2(self.chain.num_levels)

    def _started(self, stack: Stack) -> Integers:
        """Pop what `_start` has pushed, (1, n)."""
        if self.pictures:
            return levels_of(stack.pop_bytes(), self.chain.shapes[0]).reshape(1, -1)
        return stack.pop_levels(math.prod(self.chain.shapes[0]), self.chain.num_levels).reshape(1, -1)

    def _fitting(self, stack: Stack, rows: Integers) -> int:
        """About how many data may be coded together: those whose first two latents the stack has bits for."""
        q = self.chain.q(1, self.chain.value(rows[:1], 0), 1)
        needed = 2.5 * q.decided(1, True, np.arange(1), Decisions()).bits + 256
        return min(self.batch_size, len(rows), int(stack.bits / needed))

    def decode(self, block: Block) -> Integers:
        """The data of a block, (N, *shape); their classes are what `opened` gives.

        Raises:
            DataError: They are not what was encoded.
        """
        decisions, (stack, labels) = Decisions.of(block.notes), self.opened(block)
        told = self.told(block.count, labels)
        found, end = [], block.count
        for batch in reversed(block.batches):
            found.append(self.pop_batch(stack, np.arange(end - batch, end), told[end - batch : end], decisions))
            end -= batch
            self.advance(batch)
        self.advance(end)
        with decoding():
            found += [self._started(stack) for _ in range(end)]
        levels = np.concatenate(found[::-1]).reshape(-1, *self.chain.shapes[0])
        if stack.words().size or checksum(levels, labels) != block.check:
            raise OtherNumbersError
        return levels

    def _push(self, stack: Stack, below: Integers, images: Integers, told: Integers, by: Decisions) -> None:
        """Push a batch, (B, n): see the module."""
        chain, before, ideal = self.chain, stack.bits, np.zeros(len(images))

        def push(distribution: Distribution, numbers: Integers, t: int) -> Floats:
            distribution.decided(t, False, images, by).push(stack, numbers)
            return distribution.log2(numbers)

        for t in range(1, chain.depth + 1):
            q = chain.q(t, chain.value(below, t - 1), self.batch_size)
            above = q.decided(t, True, images, by).draw(stack, _seed(images, t))
            ideal += q.log2(above)
            ideal -= push(chain.p(t - 1, chain.value(above, t), self.batch_size, told), below, t - 1)
            below = above
        ideal -= push(chain.prior(len(images)), below, chain.depth)
        self.lengths.each += ideal.tolist()
        self.lengths.values += [math.prod(chain.shapes[0])] * len(images)
        self.lengths.pushed += stack.bits - before

    def pop_batch(
        self,
        stack: Stack,
        images: Integers,
        told: Integers,
        by: Decisions,
        observe: Callable[[int, Integers], object] = lambda t, numbers: None,
    ) -> Integers:
        """Pop a batch, (B, n): what `_push` did, backwards.

        Args:
            stack: Ends with the batch.
            images: The images' numbers in the block, (B,).
            told: What the network is told of each, (B,).
            by: The notes of the block.
            observe: Told each latent's t and numbers, once the bits that drew the latent above are back.
        """
        with decoding():
            return self._pop_batch(stack, images, told, by, observe)

    def _pop_batch(
        self, stack: Stack, images: Integers, told: Integers, by: Decisions, observe: Callable[[int, Integers], object]
    ) -> Integers:
        chain = self.chain
        above = chain.prior(len(images)).decided(chain.depth, False, images, by).pop(stack)
        observe(chain.depth, above)
        for t in range(chain.depth, 0, -1):
            p = chain.p(t - 1, chain.value(above, t), self.batch_size, told)
            below = p.decided(t - 1, False, images, by).pop(stack)
            q = chain.q(t, chain.value(below, t - 1), self.batch_size)
            q.decided(t, True, images, by).undraw(stack, above, _seed(images, t))
            above = below
            observe(t - 1, above)
        return above


def _seed(images: Integers, t: int) -> int:
    """Of a draw: any number that both sides know, another for each."""
    return int(images[0]) * 100_003 % 2**31 + t


def checksum(levels: Integers, more: Integers | None = None) -> int:
    """The CRC-32 of data, and of their classes or lengths behind them, as little-endian integers of 32 bits."""
    found = zlib.crc32(levels.astype("<i4").tobytes())
    return found if more is None else zlib.crc32(more.astype("<i4").tobytes(), found)
