"""The entropy coder as a stack of symbols: constriction's asymmetric numeral systems.

What is pushed last is popped first. A pop under a distribution draws from it, using up as many bits as a push would
add: that is how bits come back. They are a draw only if they are as good as random, and what was pushed just before is
not: a latent's noise would be a function of another's. So before a draw the bits that it takes are combined with
pseudorandom ones (exclusive or), which the decoder undoes.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np

from vdm_hub_codec.decisions import Integers

_MODEL = constriction.stream.model


class ExhaustedError(Exception):
    """A draw asked for more bits than there are."""


class Stack:
    """A stack of symbols.

    >>> stack = Stack()
    >>> stack.push_levels(np.arange(100) % 17, 17)
    >>> stack.pop_levels(100, 17)[:5].tolist(), stack.words().size
    ([0, 1, 2, 3, 4], 0)
    """

    def __init__(self, words: np.ndarray | None = None) -> None:
        coder = constriction.stream.stack.AnsCoder
        self._coder = coder() if words is None else coder(words)

    @property
    def bits(self) -> int:
        """How many it holds, in whole words."""
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

    def push(self, symbols: np.ndarray, model: Any, *parameters: Any) -> None:
        """Push symbols, int32, (n,), under a model of constriction."""
        self._coder.encode_reverse(symbols, model, *parameters)

    def pop(self, model: Any, *parameters: Any) -> Integers:
        """Pop symbols under a model of constriction; of one without parameters so many."""
        return self._coder.decode(model, *parameters).astype(np.int64)

    def push_levels(self, levels: Integers, count: int) -> None:
        """Push whole numbers 0 to count - 1, each alike."""
        self.push(levels.ravel().astype(np.int32), _MODEL.Uniform(count))

    def pop_levels(self, size: int, count: int) -> Integers:
        """Pop what `push_levels` has pushed."""
        return self.pop(_MODEL.Uniform(count), size)

    def push_bytes(self, content: bytes) -> None:
        """Push fewer than 65536 bytes, and how many they are."""
        self.push_levels(np.frombuffer(content, np.uint8), 1 << 8)
        self.push_levels(np.array([len(content)]), 1 << 16)

    def pop_bytes(self) -> bytes:
        """Pop what `push_bytes` has pushed."""
        return self.pop_levels(int(self.pop_levels(1, 1 << 16)[0]), 1 << 8).astype(np.uint8).tobytes()

    def whiten(self, words: int, seed: int, *, checked: bool = False) -> None:
        """Combine the topmost words of 16 bits with pseudorandom ones; twice is not at all.

        Raises:
            ExhaustedError: Where it is to be checked, and there are not many more.
        """
        if checked and self.bits < 16 * words + 256:
            raise ExhaustedError
        found = self.pop(_MODEL.Uniform(1 << 16), words).astype(np.int32)
        # The legacy generator, whose stream never changes.
        mask = np.frombuffer(np.random.RandomState(seed).bytes(2 * words), "<u2").astype(np.int32)
        self.push(found ^ mask, _MODEL.Uniform(1 << 16))
