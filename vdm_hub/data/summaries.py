"""The summary of the images that are read: their number, and the files beside them that are not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from vdm_hub.data.files import describe_unused
from vdm_hub.data.images import ImageLevels, ImageStream
from vdm_hub.data.sources import Source

Use: TypeAlias = tuple[str, ImageLevels | ImageStream | None, str | None]
"""A use of images: its verb, such as ``trains on``; the images, or none; and the split that they are of."""


def summary_of(source: Source, uses: Sequence[Use], *, streaming: bool = False) -> str:
    """The paragraph that says how many images each use has, which splits have none, and which files are no images."""
    sizes = {} if streaming and source.is_remote else source.sizes  # else it takes a download
    counts = [f"{what} {_count(sizes, images, split)}" for what, images, split in uses]
    clauses = [f"data from {source.name!r}: {', '.join(counts)}"]
    unused = _unused(source, sizes, [split for _, images, split in uses if images is not None and split is not None])
    if source.layout is not None:
        clauses += [source.layout.note] if source.note else []
        unused += [describe_unused(source.layout.listing.unused)] if source.layout.listing.unused else []
    clauses += [f"not used: {'; '.join(unused)}"] if unused else []
    return "; ".join(clauses) + "."


def _count(sizes: Mapping[str, int], images: ImageLevels | ImageStream | None, split: str | None) -> str:
    if images is None:
        return "none"
    stream = "" if isinstance(images, ImageLevels) else "a stream of "
    count = len(images) if isinstance(images, ImageLevels) else images.size
    if count is None:
        return f"{stream}{split!r}"
    whole = sizes.get(str(split), count)
    return f"{stream}{count:,} {f'of the {whole:,} ' if whole != count else ''}images of {split!r}"


def _unused(source: Source, sizes: Mapping[str, int], splits: Sequence[str]) -> list[str]:
    """The images of which none of these splits, or slices of them, is made."""
    read = {name: np.zeros(size, dtype=bool) for name, size in sizes.items()}
    for part in (part for split in splits if read for part in source.parts(split)):
        read[part.splitname][part.from_ : part.to] = True
    left = {name: (int((~used).sum()), len(used)) for name, used in read.items() if not used.all()}
    return [
        f"{count:,} {f'of the {size:,} ' if count != size else ''}images of the split {name!r}"
        for name, (count, size) in left.items()
    ]
