"""The kinds of data, in words: what stands around the bound calls a datum, counts bits by and shows samples in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A measured figure in one unit.

    Attributes:
        metric: Its name for programs, such as ``bits_per_dim``.
        unit: The unit, for readers.
        value: The figure itself.
        standard_error: Its Monte Carlo error; ``None`` where one replicate could not tell it.
        standard_error_over_data: Its error as an estimate for the population of the data.
        terms: What it is the sum of; empty where it is no sum.
    """

    metric: str
    unit: str
    value: float
    standard_error: float | None = None
    standard_error_over_data: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)

    def times(self, scale: float, metric: str, unit: str) -> Figure:
        """The figure in another unit, of which this one's is so many.

        >>> Figure("bits_per_token", "bits/token", 6.0, 0.2).times(0.5, "bits_per_byte", "bits/byte").standard_error
        0.1
        """
        terms = {name: term * scale for name, term in self.terms.items()}
        return Figure(metric, unit, self.value * scale, *self._errors_times(scale), terms)

    def perplexity(self) -> Figure:
        """``2^figure``, whose errors are to first order, ``2^figure log 2`` times those of the figure."""
        known = 2.0**self.value
        return Figure("perplexity", "perplexity", known, *self._errors_times(known * math.log(2)))

    def _errors_times(self, scale: float) -> tuple[float | None, float | None]:
        first, second = self.standard_error, self.standard_error_over_data
        return None if first is None else first * scale, None if second is None else second * scale


@dataclass(frozen=True)
class DataKind:
    """A kind of data: what is said of it wherever data are read, measured and shown.

    Attributes:
        name: Of the kind.
        datum: What one of them is called.
        value: What a datum consists of: bits are counted by it.
        samples: The name of the file that shows samples in a run's folder.
        task: What the Hub calls the task of a model that is told nothing.
        tag: What the Hub's tags call the unit.

    >>> TOKENS.data, TOKENS.unit
    ('windows', 'bits/token')
    """

    name: str
    datum: str
    value: str
    samples: str
    task: str
    tag: str

    @property
    def data(self) -> str:
        """What several of them are called."""
        return f"{self.datum}s"

    @property
    def unit(self) -> str:
        """The unit of a likelihood by value."""
        return f"bits/{self.value}"

    def figures(self, record: Mapping[str, Any]) -> tuple[Figure, ...]:
        """The figures of a measurement's record, the leading one first: of texts by byte, where there is such a one.

        >>> record = {"bits_per_dim": 4.0, "bits_per_byte": 2.0, "perplexity": 16.0, "terms": {"diffusion": 4.0}}
        >>> [(figure.unit, figure.value) for figure in TOKENS.figures(record)]
        [('bits/byte', 2.0), ('bits/token', 4.0), ('perplexity', 16.0)]
        """
        total, by_byte = record["bits_per_dim"], record.get("bits_per_byte")
        errors = (record.get("standard_error"), record.get("standard_error_over_images"))
        own = Figure(f"bits_per_{self.value}", self.unit, total, *errors, record.get("terms", {}))
        if by_byte is None:
            of_bytes = []
        else:
            of_bytes = [own.times(by_byte / total if total else 1.0, "bits_per_byte", "bits/byte")]
        return (*of_bytes, own, *([own.perplexity()] if "perplexity" in record else []))


IMAGES = DataKind("images", "image", "dim", "samples.png", "unconditional-image-generation", "bits-per-dimension")
TOKENS = DataKind("tokens", "window", "token", "samples.txt", "text-generation", "bits-per-byte")


def kind_of(record: Mapping[str, Any]) -> DataKind:
    """The kind of the data that a record describes, as `vdm_hub.evaluation.provenance` makes it.

    >>> kind_of({"images": 360}).name
    'images'
    """
    return TOKENS if "windows" in record else IMAGES


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
