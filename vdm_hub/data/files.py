"""What lies in a folder: each file is read, or is among those that are named as not used."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vdm_hub.errors import DataError, explained, shortened
from vdm_hub.files import expanded

_READ = "png apng jpg jpeg jpe jfif webp bmp gif tif tiff ppm pgm pbm pnm pfm mpo"
# Images as well, which are refused by name where they are decoded, so that none is left out unseen.
_REFUSED = (
    "avif avifs heic heif jxl jp2 j2k j2c jpc jpx jpf dds dib eps psd tga ico icns pcx sgi exr hdr fits qoi spi "
    "spider xbm xpm dng nef cr2 arw dcm"
)
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in f"{_READ} {_REFUSED}".split())
METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})

_SHOWN = 3  # names of a reason


@dataclass
class Listing:
    """The files below a folder, by their paths in it with '/' between, and what is not read, by the reason.

    Links to folders are followed, and each folder is read once: by its own name where it has one here, so that a link
    back to where it came from ends, and no image comes twice.
    """

    root: Path
    files: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)
    folders: set[tuple[int, int]] = field(default_factory=set)
    """Device and number of each folder that is read."""

    def leave_out(self, reason: str, *paths: str) -> None:
        """Note a file that is not read, and the reason."""
        if paths:
            self.unused.setdefault(reason, []).extend(paths)


def list_folder(root: Path) -> Listing:
    """List a folder.

    Raises:
        DataError: A folder can't be listed.
    """
    listing = Listing(root)
    above = {_identity(parent) for parent in root.resolve().parents}
    folders, links = deque([""]), deque[str]()
    while folders or links:
        path = folders.popleft() if folders else links.popleft()
        with explained(f"the folder {str(root / path)!r} can't be listed", "make it readable, or move it", DataError):
            identity = _identity(root / path)
            if identity in listing.folders or identity in above:
                listing.leave_out("links to folders that are read already, or that this one lies in", path)
                continue
            listing.folders.add(identity)
            with os.scandir(root / path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        if path and not entries:
            listing.leave_out("empty folders", path)
        for entry in entries:
            inside = f"{path}{entry.name}"
            if entry.name.startswith("."):
                listing.leave_out("hidden", inside + "/" * entry.is_dir(follow_symlinks=False))
            elif (kind := _kind(entry)) == "folder":
                (links if entry.is_symlink() else folders).append(f"{inside}/")
            elif kind == "file":
                listing.files.append(inside)
            else:
                listing.leave_out(kind, inside)
    listing.files.sort()
    return listing


def _kind(entry: os.DirEntry[str]) -> str:
    """The kind of a directory entry: a folder, a file, or the reason why it is neither."""
    try:
        status = entry.stat()
    except OSError:
        return "broken links"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    if not stat.S_ISREG(status.st_mode):
        return "pipes, sockets or devices"
    return "file" if status.st_size else "empty files"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def lies_in(path: Path, listing: Listing) -> bool:
    """Whether a path, which need not exist, is one of the folders that were listed or lies in one."""
    resolved = expanded(path).resolve()
    return any(place.exists() and _identity(place) in listing.folders for place in (resolved, *resolved.parents))


def names_and_count(paths: Iterable[str]) -> str:
    """Words for many names: the first of them, and their number.

    >>> names_and_count(["a", "b", "c", "d"]), names_and_count(["a"])
    ("4 ('a', 'b', 'c', ...)", "1 ('a')")
    """
    names = list(paths)
    shown = [shortened(name, limit=60) for name in names[:_SHOWN]]
    return f"{len(names):,} ({', '.join(shown + ['...'] * (len(names) > _SHOWN))})"


def describe_unused(unused: Mapping[str, list[str]]) -> str:
    """A sentence on the files that are not used, by the reason.

    >>> describe_unused({"hidden": [".DS_Store"], "broken links": ["a.png", "b.png"]})
    "1 ('.DS_Store') hidden; 2 ('a.png', 'b.png') broken links"
    """
    return "; ".join(f"{names_and_count(paths)} {reason}" for reason, paths in unused.items())
