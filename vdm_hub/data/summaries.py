"""What is said of the images that are read: how many they are, and what lies beside them and is not read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from vdm_hub.data.files import said_of
from vdm_hub.data.images import ImageLevels, ImageStream
from vdm_hub.data.sources import Source

Use: TypeAlias = tuple[str, ImageLevels | ImageStream | None, str | None]
"""What images are for, such as ``trains on``; the images, or none; and the split that they are of."""


def summary_of(source: Source, uses: Sequence[Use], *, streaming: bool = False) -> str:
    """One paragraph: how many images each use has, which splits have none, and what in a folder is no image."""
    counts = [f"{what} {_count(source, images, split)}" for what, images, split in uses]
    said = [f"data from {source.name!r}: {', '.join(counts)}"]
    sizes = source.sizes if source.layout is not None or not streaming else {}  # else it takes a download
    used = _names([split for _, _, split in uses if split is not None])
    unused = [f"{size:,} images of the split {name!r}" for name, size in sizes.items() if name not in used]
    if source.layout is not None:
        said += [source.layout.note] if source.note else []
        unused += [said_of(source.layout.listing.unused)] if source.layout.listing.unused else []
    said += [f"not used: {'; '.join(unused)}"] if unused else []
    return "; ".join(said) + "."


def _count(source: Source, images: ImageLevels | ImageStream | None, split: str | None) -> str:
    if images is None:
        return "none"
    if not isinstance(images, ImageLevels):
        return f"a stream of {split!r}"
    whole = source.sizes.get(str(split), len(images))
    return f"{len(images):,} {f'of the {whole:,} ' if whole != len(images) else ''}images of {split!r}"


def _names(splits: Sequence[str]) -> set[str]:
    """The splits that expressions such as ``train[:90%]+test`` are parts of."""
    return {name for split in splits for name in re.findall(r"[\w.-]+", re.sub(r"\[[^\]]*\]", " ", split))}
