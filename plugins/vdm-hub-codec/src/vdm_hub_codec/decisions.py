"""The same numbers on both sides: what decides an interval is rounded, and what lies near an edge is noted.

A network's output differs in its last bits between machines, numbers of threads and sizes of batches. Whatever an
interval of the entropy coder depends on is therefore rounded to whole numbers of a unit that is wide beside these
differences: float64 has about 1e-11 of a unit of them. A value within `TOLERANCE` of the edge between two whole
numbers is noted with the file, with the number that the encoder took; nearly none is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOLERANCE = 1e-8
"""Of a unit: a thousand times what float64 differs by, and a note for fifty million values."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Place(NamedTuple):
    """Where a value belongs: a latent (0 for the data), whether to its q, and which of its numbers it is."""

    latent: int
    of_q: bool
    which: int


class Note(NamedTuple):
    """The whole number that a value near an edge was rounded to."""

    latent: int
    of_q: bool
    which: int
    image: int
    element: int
    value: int


@dataclass
class Decisions:
    """Rounds values, and notes those near an edge; with notes, those of the encoder hold.

    >>> encoder = Decisions()
    >>> encoder.rounded(np.array([[0.5 - 1e-12, 1.2]]), Place(1, True, 0), np.array([7]))
    array([[0, 1]])
    >>> decoder = Decisions.of(encoder.notes)
    >>> decoder.rounded(np.array([[0.5 + 1e-12, 1.2]]), Place(1, True, 0), np.array([7]))
    array([[0, 1]])
    """

    notes: list[Note] = field(default_factory=list)
    known: dict[Place, list[Note]] | None = None

    @classmethod
    def of(cls, notes: Iterable[Note]) -> Decisions:
        """Those of an encoder."""
        known: dict[Place, list[Note]] = defaultdict(list)
        for note in notes:
            known[Place(*note[:3])].append(note)
        return cls(known=dict(known))

    def rounded(self, values: Floats, place: Place, images: Integers) -> Integers:
        """The nearest whole numbers.

        Args:
            values: (B, n).
            place: Where they belong.
            images: The number of each row's image, (B,).
        """
        found = np.rint(values).astype(np.int64)
        if self.known is None:
            near = np.abs(np.abs(values - np.floor(values)) - 0.5) < TOLERANCE
            for row, element in zip(*np.nonzero(near), strict=True):
                self.notes.append(Note(*place, int(images[row]), int(element), int(found[row, element])))
            return found
        rows = {int(image): row for row, image in enumerate(images)}
        for note in self.known.get(place, []):
            if note.image in rows:
                found[rows[note.image], note.element] = note.value
        return found
