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
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from vdm_hub import DataError
from vdm_hub_codec.chains import Chain, in_parts, probabilities_in_parts
from vdm_hub_codec.decisions import Decisions, Floats, Integers, Note
from vdm_hub_codec.stack import ExhaustedError, Normals, Stack, weights_of


class OtherNumbersError(DataError):
    """What was decoded is not what was encoded."""

    def __init__(self) -> None:
        super().__init__(
            "what was decoded is not what was encoded: the network gave other numbers here than where the file was "
            "made. Nothing is written. Decode it on a machine, or with a build of torch, nearer to that one."
        )


_BINS_PER_DEVIATION = 2
"""At least: of the narrower of a latent's two distributions."""


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


def widths_of(chain: Chain, levels: Integers) -> list[int]:
    """The exponents of two of each latent's bins, by a few data."""
    below = torch.from_numpy(levels[:8])
    scales: list[float] = []
    for up in chain.up:
        mean, scale = in_parts(up, below, len(below))
        scales.append(float(np.quantile(scale, 0.05)))
        shape = chain.shapes[len(scales) - 1]
        draws = np.random.default_rng(0).standard_normal(mean.shape)
        below = torch.from_numpy(mean + scale * draws).reshape(-1, *shape)
        if len(scales) > 1:
            _, own = in_parts(chain.down[len(scales) - 2], below, len(below))
            scales[-2] = min(scales[-2], float(np.quantile(own, 0.05)))
    return [math.floor(math.log2(one / _BINS_PER_DEVIATION)) for one in scales]


@dataclass
class Coder:
    """Codes blocks by a chain.

    Attributes:
        chain: The model.
        exponents: Of two, each latent's width of a bin.
        batch_size: Data at once in the networks.
    """

    chain: Chain
    exponents: Sequence[int]
    batch_size: int
    lengths: Lengths = field(default_factory=Lengths)

    def encode(self, levels: Integers) -> Block:
        """A block of data, (N, *shape): as few as they are as leave bits enough for the others."""
        for started in range(1, len(levels) + 1):
            stack, decisions, lengths = Stack(), Decisions(), Lengths(started=started)
            stack.push_levels(levels[:started], self.chain.num_levels)
            lengths.as_they_are = stack.bits
            place = started
            try:
                for size in batches_of(len(levels), started, self.batch_size):
                    numbers = np.arange(place, place + size)
                    self._push(stack, levels[place : place + size], numbers, decisions, lengths)
                    place += size
            except ExhaustedError:
                continue
            self.lengths += lengths
            return Block(len(levels), started, self.batch_size, stack.words(), checksum(levels), decisions.notes)
        raise AssertionError("no batch is left where all data are there as they are")

    def decode(self, block: Block) -> Integers:
        """The data of a block.

        Raises:
            DataError: They are not what was encoded.
        """
        stack, decisions = Stack(block.words), Decisions.of(block.notes)
        size, found, end = math.prod(self.chain.shape), [], block.count
        for batch in reversed(block.batches):
            found.append(self._pop(stack, np.arange(end - batch, end), decisions))
            end -= batch
        found.append(stack.pop_levels(block.started * size, self.chain.num_levels).reshape(-1, *self.chain.shape))
        levels = np.concatenate(found[::-1])
        if stack.words().size or checksum(levels) != block.check:
            raise OtherNumbersError
        return levels

    def _push(self, stack: Stack, levels: Integers, images: Integers, by: Decisions, lengths: Lengths) -> None:
        chain, below, bins = self.chain, torch.from_numpy(levels), levels
        before, ideal, under = stack.bits, 0.0, 0
        for t in range(1, chain.depth + 1):
            mean, scale = in_parts(chain.up[t - 1], below, self.batch_size)
            above = stack.draw_normals(self._decided(mean, scale, t, True, images, by), _seed(images, t))
            z = self._latents(above, t)
            ideal += _log2_density(z, mean, scale)
            if t == 1:
                probabilities = probabilities_in_parts(chain.levels, z, self.batch_size)
                stack.push_choices(levels, weights_of(probabilities, 0, images, by))
                chosen = np.take_along_axis(probabilities, levels.reshape(len(levels), -1, 1), -1)
                ideal -= float(np.log2(chosen).sum())
            else:
                mean, scale = in_parts(chain.down[t - 2], z, self.batch_size)
                stack.push_normals(bins, self._decided(mean, scale, t - 1, False, images, by), anywhere=True)
                ideal -= _log2_density(below, mean, scale)
            below, bins, under = z, above, t
        stack.push_normals(bins, self._prior(bins, under, images, by), anywhere=True)
        ideal -= _log2_density(below, np.zeros(bins.shape), np.ones(bins.shape))
        lengths.chain += ideal
        lengths.pushed += stack.bits - before
        lengths.evaluations += chain.depth * len(levels)

    def _pop(self, stack: Stack, images: Integers, by: Decisions) -> Integers:
        chain, depth = self.chain, self.chain.depth
        size = (len(images), math.prod(chain.shapes[-1]))
        above = stack.pop_normals(self._prior(np.zeros(size), depth, images, by), anywhere=True)
        for t in range(depth, 0, -1):
            z = self._latents(above, t)
            if t == 1:
                probabilities = probabilities_in_parts(chain.levels, z, self.batch_size)
                bins = stack.pop_choices(weights_of(probabilities, 0, images, by)).reshape(len(images), *chain.shape)
                below = torch.from_numpy(bins)
            else:
                mean, scale = in_parts(chain.down[t - 2], z, self.batch_size)
                bins = stack.pop_normals(self._decided(mean, scale, t - 1, False, images, by), anywhere=True)
                below = self._latents(bins, t - 1)
            mean, scale = in_parts(chain.up[t - 1], below, self.batch_size)
            stack.undraw_normals(above, self._decided(mean, scale, t, True, images, by), _seed(images, t))
            above = bins
        return above

    def _decided(
        self, mean: Floats, scale: Floats, latent: int, of_q: bool, images: Integers, by: Decisions
    ) -> Normals:
        return Normals.decided(mean, scale, 2.0 ** self.exponents[latent - 1], (latent, of_q), images, by)

    def _prior(self, like: np.ndarray, latent: int, images: Integers, by: Decisions) -> Normals:
        return self._decided(np.zeros(like.shape), np.ones(like.shape), latent, False, images, by)

    def _latents(self, bins: Integers, t: int) -> Tensor:
        """The centres of bins, (B, *latent)."""
        return torch.from_numpy(bins * 2.0 ** self.exponents[t - 1]).reshape(-1, *self.chain.shapes[t - 1])


def _seed(images: Integers, t: int) -> int:
    """Of a draw: any number that both sides know, another for each."""
    return int(images[0]) * 100_003 % 2**31 + t


def checksum(levels: Integers) -> int:
    """The CRC-32 of data, as little-endian integers of 32 bits."""
    return zlib.crc32(levels.astype("<i4").tobytes())


def _log2_density(z: Tensor, mean: Floats, scale: Floats) -> float:
    standard = (z.flatten(1).numpy() - mean) / scale
    return float(-(0.5 * standard**2 + np.log(scale) + 0.5 * math.log(2 * math.pi)).sum() / math.log(2))
