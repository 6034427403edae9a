"""Images that a run would both train on and measure on: then its figure is not one of held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TypeAlias

from vdm_hub.data.sources import Source

Span: TypeAlias = tuple[str, int, int]
"""A range of rows: the split, its first row and the row behind its last."""

_USES = {"train": "trains on", "validation": "validates on", "test": "tests on"}


def overlaps(
    source: Source,
    splits: Mapping[str, str],
    limit: int | None = None,
    *,
    streaming: bool = False,
    data: str = "images",
) -> dict[tuple[str, str], str]:
    """Sentences on each two of the training, validation and test splits that have images in common.

    Args:
        source: The dataset.
        splits: The split of each of ``train``, ``validation`` and ``test`` that there is, in this order, without those
            that are held out of the training split: these have no images in common with what is left of it.
        limit: The most images at the start of the training split that are trained on or held out.
        streaming: Whether whole splits are read as streams.
        data: What rows are called.
    """
    spans = {
        use: _spans(source, split, limit if use == "train" else None, streaming=streaming)
        for use, split in splits.items()
    }
    notes = {}
    for one, other in combinations(spans, 2):
        common = sum(
            max(0, min(stop, other_stop) - max(start, other_start))
            for split, start, stop in spans[one]
            for other_split, other_start, other_stop in spans[other]
            if split == other_split
        )
        if common:
            count = data if streaming else f"{common:,} {data}"
            notes[one, other] = (
                f"{count} of {splits[other]!r}, which the run {_USES[other]}, are also of {splits[one]!r}, which it "
                f"{_USES[one]}: the figure is not one of held-out {data}; name another split with --{other}_split."
            )
    return notes


def _spans(source: Source, split: str, limit: int | None, *, streaming: bool) -> list[Span]:
    if streaming and source.is_remote:  # whole splits, whose sizes only a download would tell
        return [(split, 0, 1)]
    spans = list[Span]()
    for part in source.parts(split):
        start, stop = part.from_ or 0, source.sizes[part.splitname] if part.to is None else part.to
        if limit is not None:
            stop = min(stop, start + limit)
            limit -= stop - start
        spans.append((part.splitname, start, stop))
    return spans
