"""Nothing half-written: what is saved is written beside its place and renamed into it."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to; on success it takes the place of ``path``, else it vanishes.

    A file takes the place of a file only, a folder that of a folder only.

    Raises:
        OSError: A file was written where a folder is, or the other way round; what was there stays.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with written_beside(target) as beside:
    ...     _ = beside.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: many libraries choose a file's format by it.
    beside = path.parent / f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}"
    try:
        yield beside
        _replace(beside, path)
    finally:
        remove(beside)


def leftovers(path: Path) -> list[Path]:
    """What a process that was killed in `written_beside(path)` left beside ``path``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".a-0123abcd.txt").touch()
    >>> [found.name for found in leftovers(folder / "a.txt")]
    ['.a-0123abcd.txt']
    """
    name = re.compile(rf"\.{re.escape(path.stem)}-[0-9a-f]{{8}}{re.escape(path.suffix)}(\.old)?")
    return [found for found in path.parent.glob(f".{path.stem}-*") if name.fullmatch(found.name)]


def clear_leftovers(path: Path) -> None:
    """Remove them; but the old folder takes its place again where a kill came before the new one could."""
    for found in leftovers(path):
        if found.suffix == ".old" and not path.exists():
            found.rename(path)
        else:
            remove(found)


def _replace(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():  # a folder can't be renamed over one that is not empty
        old = source.with_name(source.name + ".old")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.replace(target)
    if os.name == "posix":
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; one that is not there is no error.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> remove(folder)
    >>> folder.exists()
    False
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
