"""How long a file is, and where its bits go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vdm_hub_codec.blocks import Lengths


@dataclass(frozen=True)
class CodecReport:
    """How long a file is, and why. All lengths are in bits/dim (of texts bits/token) over all data.

    ``bits_per_dim = bound + start + quantisation + labels + header``, the bound none where there is none.

    Attributes:
        kind: Of the data: ``images``, or ``windows`` of texts.
        bytes: Of the file.
        bits_per_dim: Of the file.
        bound: On the draws that were made: what the file's length should be; of data that are there as they are, as of
            the others. Of images with classes it is that of the images, given their classes. ``None`` where all data
            are there as they are, and nothing was drawn.
        standard_error_over_data: Of the bound, over the data that were coded, each with its own draws; ``None`` of
            fewer than two.
        start: More than the bound, by the data that are there as they are, to start with; without a bound all of them.
        quantisation: More, by bins, rounding and the coder's precision.
        labels: More, by the classes of the images.
        header: The description, and what is left over in the coder.
        overhead: Of all that, relative to the bound, where there is one.
        count: Of data, or windows.
        dimensions: Of all of them.
        started: How many data are there as they are.
        evaluations: Of the network, each of one datum: all that encoding made, the spacing of its latents and the
            choice of their bins among them.
        transitions: T, the latents' number less one; none where no bits come back.
        seconds: It took.
        notes: What the reader of the figures must know, one sentence each.
    """

    kind: str
    bytes: int
    bits_per_dim: float
    bound: float | None
    standard_error_over_data: float | None
    start: float
    quantisation: float
    labels: float
    header: float
    overhead: float | None
    count: int
    dimensions: int
    started: int
    evaluations: int
    transitions: int | None
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @property
    def unit(self) -> str:
        """What lengths are in."""
        return "bits/dim" if self.kind == "images" else "bits/token"

    @property
    def _above(self) -> str:
        if self.overhead is None:
            return ""
        return f", {abs(self.overhead):.2%} {'below' if self.overhead < 0 else 'above'} the bound"

    @property
    def _bound(self) -> list[str]:
        """What to say of the bound."""
        if self.bound is None:
            return [
                f"  the model was not used: all {self.kind} are there as they are, as they hold too few bits to draw "
                f"latents from, so there is no bound"
            ]
        error = "" if self.standard_error_over_data is None else f" ± {self.standard_error_over_data:.4f}"
        also = f"; of the {self.started:,} {self.kind} that are there as they are, as of the others"
        drawn = f"the model's bound, on the draws that were made{also if self.started else ''}"
        return [f"  {self.bound:8.4f}{error}  {drawn}"]

    def __str__(self) -> str:
        each = "dimensions" if self.kind == "images" else "tokens"
        there = f"{self.started:,} {self.kind} that are there as they are"
        parts = [
            (self.start, f"the start: {there}, beyond their bound" if self.bound is not None else there),
            (self.quantisation, "quantisation: bins of latents, rounding, the coder's precision"),
            (self.labels, f"the classes of the images, {self.labels * self.dimensions / self.count:.2f} bits each"),
            (self.header, "the description in front, checksums, and what is left over in the coder"),
        ]
        lines = [
            f"{self.bytes:,} bytes for {self.dimensions:,} {each} of {self.count:,} {self.kind}: "
            f"{self.bits_per_dim:.4f} {self.unit}{self._above}",
            *self._bound,
            *[f"  {value:+8.4f}  {words}" for value, words in parts if round(value, 4)],
            f"  {self.evaluations:,} network evaluations in {self.seconds:.1f} s, {self.seconds / self.count:.3f} s "
            f"for each of the {self.kind}",
        ]
        return "\n".join([*lines, *[f"  note: {note}." for note in self.notes]])


@dataclass(frozen=True)
class Parts:
    """What a report is made of.

    Attributes:
        kind: As of `CodecReport`, like the next two.
        count: Of data.
        dimensions: Of all of them.
        lengths: What the coder counted.
        transitions: T.
        notes: As of `CodecReport`.
    """

    kind: str
    count: int
    dimensions: int
    lengths: Lengths
    transitions: int | None = None
    notes: Sequence[str] = ()

    def report(self, size: int, seconds: float) -> CodecReport:
        """The report on a file of so many bytes."""
        lengths, bits, scale = self.lengths, 8 * size, 1 / self.dimensions
        # Of the values that are there as they are, too: what they would have cost, as the others do.
        bound, by_model = lengths.per_value, lengths.chain * scale
        return CodecReport(
            kind=self.kind,
            bytes=size,
            bits_per_dim=bits * scale,
            bound=bound,
            standard_error_over_data=lengths.error,
            start=lengths.as_they_are * scale - ((bound or 0) - by_model),
            quantisation=(lengths.pushed - lengths.chain) * scale,
            labels=lengths.labels * scale,
            header=(bits - lengths.as_they_are - lengths.pushed - lengths.labels) * scale,
            overhead=bits * scale / bound - 1 if bound else None,
            count=self.count,
            dimensions=self.dimensions,
            started=lengths.started,
            evaluations=lengths.evaluations,
            transitions=self.transitions,
            seconds=seconds,
            notes=list(self.notes),
        )
