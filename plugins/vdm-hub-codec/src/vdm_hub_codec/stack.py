"""The entropy coder as a stack of symbols: constriction's asymmetric numeral systems, and what the chains push.

What is pushed last is popped first. A pop under a distribution draws from it, using up as many bits as a push would
add: that is how bits come back. They are a draw only if they are as good as random, and what was pushed just before is
not: a latent's noise would be a function of another's. So before a pop the bits that it takes are combined with
pseudorandom ones (exclusive or), which the decoder undoes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import constriction  # type: ignore[import-untyped]
import numpy as np

from vdm_hub_codec.decisions import Decisions, Floats, Integers, Place

MEANS_PER_BIN = 64
"""Units of a mean: a mean off by half of one costs some 1e-6 nats."""
SCALES_PER_BIN = 1024
"""Units of a standard deviation."""
_MODEL = constriction.stream.model
_NARROWEST = SCALES_PER_BIN // 8
_DEVIATIONS = 10
"""A normal reaches so many standard deviations; what lies beyond has a wider reach, which is pushed after it."""
_WIDER = np.concatenate([[0.98], 0.02 / 20 * np.ones(20)])
_WEIGHTS = 2**22

MEAN_OF_Q, SCALE_OF_Q, MEAN_OF_P, SCALE_OF_P, WEIGHT = range(5)


class ExhaustedError(Exception):
    """A pop asked for more bits than there are."""


@dataclass(frozen=True)
class Normals:
    """Normal distributions of whole numbers of a bin's width, (B, n), described by whole numbers.

    Attributes:
        means: In units of 1/64 of a bin.
        scales: In units of 1/1024 of a bin.
    """

    means: Integers
    scales: Integers

    @classmethod
    def decided(
        cls, mean: Floats, scale: Floats, width: float, place: tuple[int, bool], images: Integers, by: Decisions
    ) -> Normals:
        """Those of a mean and a standard deviation, (B, n), on bins of a width.

        What lies in a bin is moved to its centre, which adds the variance of a bin, width^2/12: it is subtracted
        before.

        Args:
            mean: Of each.
            scale: Of each.
            width: Of a bin.
            place: The latent, and whether it is q's.
            images: The number of each row's image, (B,).
            by: What rounds.
        """
        latent, of_q = place
        roles = (MEAN_OF_Q, SCALE_OF_Q) if of_q else (MEAN_OF_P, SCALE_OF_P)
        means = by.rounded(mean / width * MEANS_PER_BIN, Place(latent, roles[0]), images)
        narrowed = np.sqrt(np.maximum((scale / width) ** 2 - 1 / 12, (_NARROWEST / SCALES_PER_BIN) ** 2))
        scales = by.rounded(narrowed * SCALES_PER_BIN, Place(latent, roles[1]), images)
        return cls(means, np.maximum(scales, _NARROWEST))

    @property
    def centres(self) -> Integers:
        """The bins in which the means lie."""
        return (self.means + MEANS_PER_BIN // 2) // MEANS_PER_BIN

    @property
    def reach(self) -> int:
        """How many bins from its centre a normal reaches."""
        return int(self.scales.max()) * _DEVIATIONS // SCALES_PER_BIN + 2

    @property
    def parameters(self) -> tuple[Floats, Floats]:
        """The means within their bins and the scales, flat, in bins: exact in float64."""
        within = (self.means - self.centres * MEANS_PER_BIN) / MEANS_PER_BIN
        return within.ravel(), (self.scales / SCALES_PER_BIN).ravel()


class Stack:
    """A stack of symbols.

    >>> images = np.arange(1)
    >>> normals = Normals.decided(np.array([[0.3, -2.0]]), np.ones((1, 2)), 0.25, (1, True), images, Decisions())
    >>> coder = Stack()
    >>> coder.push_levels(np.arange(256) % 17, 17)
    >>> before = coder.words().tolist()
    >>> bins = coder.draw_normals(normals, seed=0)
    >>> coder.undraw_normals(bins, normals, seed=0)
    >>> coder.words().tolist() == before
    True
    """

    def __init__(self, words: np.ndarray | None = None) -> None:
        self._coder = (
            constriction.stream.stack.AnsCoder() if words is None else constriction.stream.stack.AnsCoder(words)
        )

    @property
    def bits(self) -> int:
        """How many it holds."""
        return int(self._coder.num_valid_bits())

    def words(self) -> np.ndarray:
        """What it holds, uint32."""
        found: np.ndarray = self._coder.get_compressed()
        return found

    def copy(self) -> Stack:
        """Another with the same content."""
        other = Stack()
        other._coder = self._coder.clone()
        return other

    def push_levels(self, levels: Integers, count: int) -> None:
        """Push whole numbers 0 to count - 1, each alike."""
        self._coder.encode_reverse(levels.ravel().astype(np.int32), _MODEL.Uniform(count))

    def pop_levels(self, size: int, count: int) -> Integers:
        """Pop what `push_levels` has pushed."""
        return self._coder.decode(_MODEL.Uniform(count), size).astype(np.int64)

    def push_normals(self, bins: Integers, normals: Normals, *, anywhere: bool = False) -> None:
        """Push numbers of bins, (B, n).

        Args:
            bins: Them.
            normals: Under which.
            anywhere: Whether they may lie beyond the normals' reach.
        """
        away = bins - normals.centres
        wider = 0
        while int(np.abs(away).max()) > normals.reach << wider:
            wider += 1
        reach = normals.reach << wider
        distribution = _MODEL.QuantizedGaussian(-reach, reach)
        self._coder.encode_reverse(away.ravel().astype(np.int32), distribution, *normals.parameters)
        if anywhere:
            self._coder.encode_reverse(wider, _MODEL.Categorical(_WIDER, perfect=False))
        else:
            assert wider == 0

    def draw_normals(self, normals: Normals, seed: int) -> Integers:
        """Pop numbers of bins, (B, n), as a draw.

        Raises:
            ExhaustedError: There are not bits enough.
        """
        words = _words_of(normals)
        if self.bits < 16 * words + 256:
            raise ExhaustedError
        self._whiten(words, seed)
        return self.pop_normals(normals)

    def undraw_normals(self, bins: Integers, normals: Normals, seed: int) -> None:
        """Push back what `draw_normals` has drawn."""
        self.push_normals(bins, normals)
        self._whiten(_words_of(normals), seed)

    def _whiten(self, words: int, seed: int) -> None:
        """Combine the topmost bits with pseudorandom ones; twice is not at all."""
        distribution = _MODEL.Uniform(1 << 16)
        found = self._coder.decode(distribution, words)
        # The legacy generator, whose stream never changes.
        mask = np.frombuffer(np.random.RandomState(seed).bytes(2 * words), "<u2").astype(np.int32)
        self._coder.encode_reverse(found ^ mask, distribution)

    def pop_normals(self, normals: Normals, *, anywhere: bool = False) -> Integers:
        """Pop numbers of bins, (B, n); see `push_normals`."""
        wider = int(self._coder.decode(_MODEL.Categorical(_WIDER, perfect=False))) if anywhere else 0
        reach = normals.reach << wider
        away = self._coder.decode(_MODEL.QuantizedGaussian(-reach, reach), *normals.parameters)
        return away.reshape(normals.means.shape).astype(np.int64) + normals.centres

    def push_choices(self, choices: Integers, weights: Integers) -> None:
        """Push whole numbers 0..K-1, (n,), each under weights of its own, (n, K)."""
        self._coder.encode_reverse(choices.ravel().astype(np.int32), *chosen_under(weights))

    def pop_choices(self, weights: Integers) -> Integers:
        """Pop what `push_choices` has pushed, (n,)."""
        return self._coder.decode(*chosen_under(weights)).astype(np.int64)


def _words_of(normals: Normals) -> int:
    """Words of 16 bits, more than a draw takes."""
    deviations = normals.scales.astype(np.float64) / SCALES_PER_BIN
    return int(1.2 * np.log2(4.2 * deviations + 1).sum() / 16) + 4


def weights_of(probabilities: Floats, place: int, images: Integers, by: Decisions) -> Integers:
    """Whole numbers, all positive, in the ratio of probabilities, (B, n, K) -> (B n, K)."""
    rows = probabilities.reshape(len(images), -1) * _WEIGHTS
    return by.rounded(rows, Place(place, WEIGHT), images).reshape(-1, probabilities.shape[-1]) + 1


def chosen_under(weights: Integers) -> tuple[Any, Floats]:
    """The distributions of choices, each in the ratio of its row of weights, as constriction takes them."""
    return _MODEL.Categorical(perfect=False), weights / weights.sum(-1, keepdims=True)
