"""Distributions of symbols as the entropy coder takes them: normals on bins, and choices of K values.

What they depend on is rounded first, as `vdm_hub_codec.decisions` says. A distribution is pushed and popped, or drawn
from: see `vdm_hub_codec.stack`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import constriction
import numpy as np

from vdm_hub import DataError
from vdm_hub_codec.decisions import Decisions, Floats, Integers, Place
from vdm_hub_codec.stack import Stack

MEANS_PER_BIN = 64
"""Units of a mean: a mean off by half of one costs some 1e-6 nats."""
SCALES_PER_BIN = 1024
"""Units of a standard deviation."""
_NARROWEST = SCALES_PER_BIN // 8
_DEVIATIONS = 10
"""A normal reaches so many standard deviations; what lies beyond has a wider reach, which is pushed after it."""
_WIDER = np.concatenate([[1 - 2.0**-10], 2.0**-10 / 20 * np.ones(20)])
_WIDEST = 2**22
"""Bins that a normal reaches at most: the coder has 24 bits for all of them."""
_WEIGHTS = 2**22
_MODEL = constriction.stream.model


class Symbols(ABC):
    """A distribution of whole numbers, (B, n), described by whole numbers alone."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """About how many a draw takes."""

    @abstractmethod
    def push(self, stack: Stack, numbers: Integers) -> None:
        """Push numbers, any."""

    @abstractmethod
    def pop(self, stack: Stack) -> Integers:
        """Pop what `push` has pushed."""

    def draw(self, stack: Stack, seed: int) -> Integers:
        """Pop numbers as a draw.

        Raises:
            ExhaustedError: There are not bits enough.
        """
        stack.whiten(self._words, seed, checked=True)
        return self._pop_near(stack)

    def undraw(self, stack: Stack, numbers: Integers, seed: int) -> None:
        """Push back what `draw` has drawn."""
        self._push_near(stack, numbers)
        stack.whiten(self._words, seed)

    def _push_near(self, stack: Stack, numbers: Integers) -> None:
        self.push(stack, numbers)

    def _pop_near(self, stack: Stack) -> Integers:
        return self.pop(stack)

    @property
    def _words(self) -> int:
        """Of 16 bits, more than a draw takes."""
        return int(1.2 * self.bits / 16) + 4


class Distribution(ABC):
    """A distribution of a latent or of the data, for each datum of a batch, in floating-point numbers."""

    @abstractmethod
    def decided(self, latent: int, of_q: bool, images: Integers, by: Decisions) -> Symbols:
        """The symbols that it gives.

        Args:
            latent: Whose it is, 0 for the data.
            of_q: Whether it is q's.
            images: The number of each row's image, (B,).
            by: What rounds.
        """

    @abstractmethod
    def log2(self, numbers: Integers) -> Floats:
        """Of each datum's numbers, the log-probability, or the density's at the centres of bins, in bits: (B,)."""


@dataclass(frozen=True)
class Normal(Distribution):
    """Independent normals, (B, n), of which numbers of bins are coded.

    Attributes:
        mean: Of each.
        scale: The standard deviation of each.
        width: Of a bin.
    """

    mean: Floats
    scale: Floats
    width: float

    def decided(self, latent: int, of_q: bool, images: Integers, by: Decisions) -> NormalSymbols:
        """See `Distribution.decided`.

        What lies in a bin is moved to its centre, which adds the variance of a bin, width^2/12: it is subtracted
        before.
        """
        means = by.rounded(self.mean / self.width * MEANS_PER_BIN, Place(latent, of_q, 0), images)
        narrowed = np.sqrt(np.maximum((self.scale / self.width) ** 2 - 1 / 12, (_NARROWEST / SCALES_PER_BIN) ** 2))
        scales = by.rounded(narrowed * SCALES_PER_BIN, Place(latent, of_q, 1), images)
        return NormalSymbols(means, np.maximum(scales, _NARROWEST))

    def log2(self, numbers: Integers) -> Floats:
        """Of densities."""
        standard = (numbers * self.width - self.mean) / self.scale
        found: Floats = -(0.5 * standard**2 + np.log(self.scale) + 0.5 * math.log(2 * math.pi)).sum(1) / math.log(2)
        return found


@dataclass(frozen=True)
class NormalSymbols(Symbols):
    """Normals on bins.

    Attributes:
        means: In units of 1/64 of a bin, (B, n).
        scales: In units of 1/1024 of a bin, (B, n).
    """

    means: Integers
    scales: Integers

    @property
    def bits(self) -> float:
        """Of a normal: log2 of 4.13 standard deviations, in bins."""
        return float(np.log2(4.2 * self.scales / SCALES_PER_BIN + 1).sum())

    @property
    def _centres(self) -> Integers:
        """The bins in which the means lie."""
        return (self.means + MEANS_PER_BIN // 2) // MEANS_PER_BIN

    @property
    def _reach(self) -> int:
        """How many bins from its centre a normal reaches."""
        return int(self.scales.max()) * _DEVIATIONS // SCALES_PER_BIN + 2

    def push(self, stack: Stack, numbers: Integers) -> None:
        """Push numbers of bins, however far away; how far comes last."""
        farthest, wider = int(np.abs(numbers - self._centres).max()), 0
        while farthest > self._reach << wider:
            wider += 1
        if self._reach << wider > _WIDEST:
            raise DataError(
                f"a latent lies {farthest:,} bins from where the model expects it, and a file has room for "
                f"{_WIDEST:,}: the model says nothing of such data; look at its bound, or give others."
            )
        self._push_within(stack, numbers, self._reach << wider)
        stack.push(np.array([wider], dtype=np.int32), _MODEL.Categorical(_WIDER, perfect=False))

    def pop(self, stack: Stack) -> Integers:
        """Pop numbers of bins, (B, n)."""
        wider = int(stack.pop(_MODEL.Categorical(_WIDER, perfect=False), 1)[0])
        return self._pop_within(stack, self._reach << wider)

    def _push_near(self, stack: Stack, numbers: Integers) -> None:
        self._push_within(stack, numbers, self._reach)

    def _pop_near(self, stack: Stack) -> Integers:
        return self._pop_within(stack, self._reach)

    def _push_within(self, stack: Stack, numbers: Integers, reach: int) -> None:
        away = (numbers - self._centres).ravel().astype(np.int32)
        stack.push(away, _MODEL.QuantizedGaussian(-reach, reach), *self._parameters)

    def _pop_within(self, stack: Stack, reach: int) -> Integers:
        if not 0 < reach <= _WIDEST:
            raise ValueError(f"a normal of {reach} bins")
        away = stack.pop(_MODEL.QuantizedGaussian(-reach, reach), *self._parameters)
        return away.reshape(self.means.shape) + self._centres

    @property
    def _parameters(self) -> tuple[Floats, Floats]:
        """The means within their bins and the scales, flat, in bins: exact in float64."""
        within = (self.means - self._centres * MEANS_PER_BIN) / MEANS_PER_BIN
        return within.ravel(), (self.scales / SCALES_PER_BIN).ravel()


@dataclass(frozen=True)
class Choices(Distribution):
    """Independent choices of K values.

    Attributes:
        probabilities: (B, n, K).
    """

    probabilities: Floats

    def decided(self, latent: int, of_q: bool, images: Integers, by: Decisions) -> ChoiceSymbols:
        """See `Distribution.decided`: weights that are whole numbers above zero."""
        rows = self.probabilities.reshape(len(images), -1) * _WEIGHTS
        weights = by.rounded(rows, Place(latent, of_q, 0), images).reshape(self.probabilities.shape) + 1
        return ChoiceSymbols(weights)

    def log2(self, numbers: Integers) -> Floats:
        """Of probabilities."""
        chosen = np.take_along_axis(self.probabilities, numbers[..., None], -1)
        found: Floats = np.log2(np.maximum(chosen, 1e-300)).sum((1, 2))
        return found


@dataclass(frozen=True)
class ChoiceSymbols(Symbols):
    """Choices in the ratio of weights, (B, n, K)."""

    weights: Integers

    @property
    def bits(self) -> float:
        """The entropy."""
        shares = self.weights / self.weights.sum(-1, keepdims=True)
        return float(-(shares * np.log2(shares)).sum())

    def push(self, stack: Stack, numbers: Integers) -> None:
        """Push values 0..K-1, (B, n)."""
        stack.push(numbers.ravel().astype(np.int32), *self.model)

    def pop(self, stack: Stack) -> Integers:
        """Pop values 0..K-1, (B, n)."""
        return stack.pop(*self.model).reshape(self.weights.shape[:-1])

    @property
    def model(self) -> tuple[object, Floats]:
        """The distributions, each in the ratio of its row of weights, as constriction takes them."""
        flat = self.weights.reshape(-1, self.weights.shape[-1])
        return _MODEL.Categorical(perfect=False), flat / flat.sum(-1, keepdims=True)
