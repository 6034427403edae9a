"""Nothing half-written: what is saved is written beside its place and renamed into it."""

from __future__ import annotations

import os
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
        _remove(beside)


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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
