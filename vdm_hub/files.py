"""Nothing half-written and nothing lost: what is saved is written beside its place and renamed into it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vdm_hub.errors import ConfigurationError, OutputError, warn

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def written_beside(path: Path, *, keeps_all: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to; on success it takes the place of ``path``, else it vanishes.

    A file takes the place of a file only, a folder that of a folder only. A link is followed: what it points to is
    replaced.

    Args:
        path: The place; ``~`` is the home folder.
        keeps_all: A folder takes the place of one only that holds no file which the new one lacks.

    Raises:
        OutputError: There is a device, a pipe or a socket, a link without end, or a file that would be lost.
        OSError: A file was written where a folder is, or the other way round; what was there stays.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with written_beside(target) as beside:
    ...     _ = beside.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    target = destination(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / _name_beside(target, path)
    try:
        yield beside
        if keeps_all and (lost := sorted(_files(target) - _files(beside))):
            raise OutputError(f"{path} holds {lost[0]}, which nothing here has written: move it away.")
        _replace(beside, destination(path))  # it may have become something else meanwhile
    finally:
        remove(beside)


def check_writable(path: Path) -> None:
    """Refuse a place where `written_beside` could write nothing, by trying it; nothing is left of that.

    Raises:
        OutputError: A folder that it would be in is a file, or may not be written in, or no file can have such a name.
    """
    target = destination(path)
    folder = next(parent for parent in target.parents if os.path.lexists(parent))
    try:
        beside = folder / _name_beside(target, path)
        beside.touch(exist_ok=False)
        beside.unlink()
    except OSError as error:
        raise OutputError(
            f"{path} can't be written, for there can be no such file in {folder} ({error.strerror}): name another "
            f"place."
        ) from error


def destination(path: Path) -> Path:
    """Where something that is written to a path comes to lie: at the end of its links.

    Raises:
        OutputError: There is something that no file may take the place of, or a link without end; or no file can have
            such a name.

    >>> destination(Path("/no/such/folder/a.png"))
    PosixPath('/no/such/folder/a.png')
    """
    if _ADDRESS.match(str(path)):
        raise OutputError(f"{path} is an address, and files are written on this machine: name a folder there.")
    try:
        target = path.expanduser().resolve()
        mode = _mode(target)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, or no such home
        raise OutputError(f"{path} can't be written to ({error}): name another place.") from error
    if mode is not None and not is_replaceable(mode):
        raise OutputError(f"{path} is a {_kind(mode)}, which no file may take the place of: name another place.")
    return target


def expanded(path: str | Path) -> Path:
    """A path whose ``~`` is the home folder; nothing needs to be there.

    Raises:
        ConfigurationError: There is no such home, or nothing can have such a name, or it may not be looked at.

    >>> expanded("runs/digits")
    PosixPath('runs/digits')
    """
    try:
        place = Path(path).expanduser()
        place.exists()
        return place
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"{path} can't be found ({error}): name another place.") from error


def found(name: str) -> Path | None:
    """The path of a name where something is there; a name that nothing can have is nowhere.

    >>> found("/no/such/folder"), found("a" * 1000), found("~no-such-user/birds")
    (None, None, None)
    """
    try:
        place = expanded(name)
    except ConfigurationError:
        return None
    return place if place.exists() else None


def is_replaceable(mode: int) -> bool:
    """Whether a mode, as ``os.stat`` gives it, is that of a plain file or a folder."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def leftovers(path: Path) -> list[Path]:
    """The half-written files that a process killed in `written_beside(path)` left beside ``path``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / ".a-0123abcd.txt").touch()
    >>> [found.name for found in leftovers(folder / "a.txt")]
    ['.a-0123abcd.txt']
    """
    target = destination(path)
    name = re.compile(rf"\.{re.escape(target.stem)}-[0-9a-f]{{8}}{re.escape(path.suffix)}(\.old)?")
    return [found for found in entries(target.parent) if name.fullmatch(found.name)]


def clear_leftovers(path: Path) -> None:
    """Remove the leftovers; but an old folder takes its place again where a kill came before the new one could."""
    target = destination(path)
    for found in leftovers(path):
        if found.suffix == ".old" and not target.exists():
            found.rename(target)
        else:
            remove(found)


def entries(folder: Path) -> list[Path]:
    """The entries of a folder, by name; none, where there is no folder.

    >>> entries(Path("/no/such/folder"))
    []
    """
    return sorted(folder.iterdir()) if folder.is_dir() else []


def remove(path: Path) -> None:
    """Remove a file, a link, or a whole folder; one that is not there is no error.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> remove(folder)
    >>> folder.exists()
    False
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, alone among all processes, within the block; it vanishes with the block.

    The lock of a process that is killed ends with it; the file that is left then holds up nobody.

    Raises:
        BlockingIOError: Another process holds it.
    """
    descriptor, is_ours = os.open(path, os.O_RDWR | os.O_CREAT), False
    try:
        _lock(descriptor)
        is_ours = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
        if not is_ours:
            raise BlockingIOError(errno.EWOULDBLOCK, "its holder is just leaving", str(path))
        yield
    finally:  # an interruption may come at any moment
        if is_ours:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether another process holds this lock file; nothing is changed."""
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        _lock(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn(f"this file system has no locks ({error}): start no two runs in one folder.", stacklevel=3)


def _name_beside(target: Path, path: Path) -> str:
    # The suffix stays last: many libraries choose a file's format by it.
    return f".{target.stem}-{uuid.uuid4().hex[:8]}{path.suffix}"


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _mode(path: Path) -> int | None:
    """The mode of what is at a path; ``None`` where nothing is, which is not so of a name that is too long."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(mode: int) -> str:
    kinds = {"device": stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "pipe": stat.S_ISFIFO(mode)}
    return next((name for name, is_so in kinds.items() if is_so), "socket" if stat.S_ISSOCK(mode) else "special file")


def _replace(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():  # a folder can't be renamed over one that is not empty
        old = source.with_name(source.name + ".old")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
