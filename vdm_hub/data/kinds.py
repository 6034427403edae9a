"""The kinds of data, in words: what stands around the bound calls a datum, counts bits by and shows samples in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataKind:
    """A kind of data: what is said of it wherever data are read, measured and shown.

    Attributes:
        name: Of the kind.
        datum: What one of them is called.
        value: What a datum consists of: bits are counted by it.
        samples: The name of the file that shows samples in a run's folder.

    >>> TOKENS.data, TOKENS.unit
    ('windows', 'bits/token')
    """

    name: str
    datum: str
    value: str
    samples: str

    @property
    def data(self) -> str:
        """What several of them are called."""
        return f"{self.datum}s"

    @property
    def unit(self) -> str:
        """The unit of a likelihood by value."""
        return f"bits/{self.value}"


IMAGES = DataKind("images", "image", "dim", "samples.png")
TOKENS = DataKind("tokens", "window", "token", "samples.txt")

KINDS = {kind.name: kind for kind in (IMAGES, TOKENS)}
"""The kinds of data by name."""


@dataclass(frozen=True)
class Units:
    """What the bits of some data are counted by.

    Attributes:
        kind: Of the data.
        per_datum: How many values a datum has, on average where they differ: only those that are measured.
        bytes_per_value: How many UTF-8 bytes of a text a token stands for, on average, each byte counted once;
            ``None`` where a figure per byte has no meaning.
        notes: What the reader of a figure must know of that, one sentence each.
        each: How many values each datum has, a tensor, (data,), where they differ.

    >>> units = Units(TOKENS, per_datum=128.0, bytes_per_value=2.5)
    >>> units.leading, units.by_leading(5.0)
    ('bits/byte', 2.0)
    """

    kind: DataKind = IMAGES
    per_datum: float = 0.0
    bytes_per_value: float | None = None
    notes: tuple[str, ...] = ()
    each: Any = field(default=None, compare=False)

    @property
    def leading(self) -> str:
        """The unit in which errors are asked for, and figures shown while they are measured."""
        return self.kind.unit if self.bytes_per_value is None else "bits/byte"

    def by_leading(self, by_value: float) -> float:
        """A figure by value in the `leading` unit."""
        return by_value if self.bytes_per_value is None else by_value / self.bytes_per_value
