r"""The classes of data, which a conditional network is told before the data are decoded: on top of a block's stack.

Each is coded under those before it, ``p(c) = (n_c + 1/2) / (n + C/2)``, n_c of n of them of class c (Krichevsky and
Trofimov, 1981): no counts are kept, and classes that are as frequent cost about log2 C bits each.
"""

from __future__ import annotations

import numpy as np

from vdm_hub_codec.decisions import Integers
from vdm_hub_codec.distributions import ChoiceSymbols
from vdm_hub_codec.stack import Stack

_AT_ONCE = 1 << 22  # numbers


def push_labels(stack: Stack, labels: Integers, classes: int) -> float:
    """Push whole numbers 0 to C - 1, (N,), so that the first is popped first; returns their bits.

    >>> stack, labels = Stack(), np.array([0, 1] + [2] * 98)
    >>> bits = push_labels(stack, labels, 3)
    >>> round(bits, 1), bool((pop_labels(stack, 100, 3) == labels).all()), stack.words().size
    (22.9, True, 0)
    """
    bits, size = 0.0, max(1, _AT_ONCE // classes)
    for start in reversed(range(0, len(labels), size)):
        part, before = labels[start : start + size], np.bincount(labels[:start], minlength=classes)
        ones = part[:, None] == np.arange(classes)
        weights = 2 * (before + ones.cumsum(0) - ones) + 1
        ChoiceSymbols(weights[:, None]).push(stack, part[:, None])
        bits -= float(np.log2(weights[ones] / weights.sum(1)).sum())
    return bits


def pop_labels(stack: Stack, count: int, classes: int) -> Integers:
    """Pop what `push_labels` has pushed."""
    found, weights = np.zeros(count, dtype=np.int64), np.ones(classes, dtype=np.int64)
    for place in range(count):
        found[place] = ChoiceSymbols(weights[None, None]).pop(stack)[0, 0]
        weights[found[place]] += 2
    return found
