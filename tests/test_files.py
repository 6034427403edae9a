"""What is saved is whole, or is not there; what was there before stays until then."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vdm_hub.errors import OutputError
from vdm_hub.files import clear_leftovers, destination, is_locked, is_replaceable, locked, remove, written_beside


def make(path: Path, text: str, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "inner.txt").write_text(text)
    else:
        path.write_text(text)


def text(path: Path) -> str:
    return (path / "inner.txt" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_new_takes_the_place_of_the_old_and_leaves_nothing_beside(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "thing"
    for content in ("old", "new"):
        with written_beside(target) as beside:
            make(beside, content, kind)
            assert not target.exists() if content == "old" else text(target) == "old"
        assert text(target) == content
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_the_old_and_nothing_beside(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "thing"
    make(target, "old", kind)
    with pytest.raises(ZeroDivisionError), written_beside(target) as beside:
        make(beside, "half", kind)
        raise ZeroDivisionError
    assert text(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("was", "comes"), [("file", "folder"), ("folder", "file")])
def test_a_file_never_takes_the_place_of_a_folder_nor_the_other_way_round(
    was: str, comes: str, tmp_path: Path
) -> None:
    target = tmp_path / "thing"
    make(target, "precious", was)
    with pytest.raises(OSError), written_beside(target) as beside:
        make(beside, "new", comes)
    assert text(target) == "precious"
    assert list(tmp_path.iterdir()) == [target]


def test_the_suffix_stays_last_for_libraries_that_choose_a_format_by_it(tmp_path: Path) -> None:
    with written_beside(tmp_path / "picture.png") as beside:
        assert beside.suffix == ".png"
        assert beside.name.startswith(".")
        beside.touch()


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    target, sizes = tmp_path / "thing", (10_000, 1_000_000)
    target.write_bytes(b"x" * sizes[0])
    seen: set[int] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(len(target.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(60):
            with written_beside(target) as beside:
                beside.write_bytes(b"x" * sizes[turn % 2])
    finally:
        stop.set()
        reader.join()
    assert seen <= set(sizes)
    assert seen


# ---- links, pipes, sockets and devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("links", [1, 3])
def test_a_link_is_followed_and_stays(links: int, kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target.txt", tmp_path / "link.txt"
    make(target, "old", kind)
    link.symlink_to("elsewhere/target.txt")  # relative to where the link lies
    for number in range(1, links):
        link, previous = tmp_path / f"link{number}.txt", link
        link.symlink_to(previous)
    with written_beside(link) as beside:
        make(beside, "new", kind)
    assert link.is_symlink() and text(target) == text(link) == "new"
    assert list((tmp_path / "elsewhere").iterdir()) == [target]
    assert len(list(tmp_path.iterdir())) == 1 + links


def test_a_dangling_link_is_followed_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "later" / "target")
    with written_beside(tmp_path / "link") as beside:
        beside.write_text("new")
    assert (tmp_path / "later" / "target").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


@contextmanager
def bound_socket(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        yield


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "link to itself"])
def test_what_is_no_plain_file_is_refused_and_stays(kind: str) -> None:
    folder = Path(tempfile.mkdtemp())  # the name of a socket may have 107 characters only
    try:
        place = folder / "out.png"
        if kind == "socket":
            with bound_socket(place):
                pass
        elif kind == "link to itself":
            place.symlink_to(place)
        else:
            pipe = place if kind == "pipe" else folder / "pipe"
            os.mkfifo(pipe)
            if pipe != place:
                place.symlink_to(pipe)
        before = sorted((path.name, path.lstat().st_ino, path.lstat().st_mode) for path in folder.iterdir())
        with pytest.raises(OutputError) as caught, written_beside(place) as beside:
            beside.write_text("never")
        assert str(place) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(OutputError):
            clear_leftovers(place)
        assert before == sorted((path.name, path.lstat().st_ino, path.lstat().st_mode) for path in folder.iterdir())
    finally:
        remove(folder)


def test_what_becomes_a_pipe_meanwhile_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(OutputError), written_beside(tmp_path / "out") as beside:
        beside.write_text("new")
        os.mkfifo(tmp_path / "out")
    assert (tmp_path / "out").is_fifo()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_no_file_takes_the_place_of_a_device(tmp_path: Path) -> None:
    """Looked at, and never written to: as root it would be replaced."""
    (tmp_path / "link").symlink_to(os.devnull)
    for path in (Path(os.devnull), tmp_path / "link"):
        assert not is_replaceable(path.stat().st_mode)
        with pytest.raises(OutputError, match="device"):
            destination(path)


def test_home_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with written_beside(Path("~/a/b.txt")) as beside:
        beside.write_text("new")
    assert (tmp_path / "a" / "b.txt").read_text() == "new"
    with pytest.raises(OutputError, match="nobody-of-this-name"):
        destination(Path("~nobody-of-this-name/b.txt"))


# ---- what is not ours -----------------------------------------------------------------------------------------------


def test_a_folder_with_a_file_that_the_new_one_lacks_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    make(target, "old", "folder")
    (target / "deep").mkdir()
    (target / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"deep/notes\.txt"), written_beside(target, keeps_all=True) as beside:
        make(beside, "new", "folder")
    assert text(target) == "old" and (target / "deep" / "notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("stem", ["a", "a[1]", "a*", "a?b"])
def test_only_what_has_exactly_the_name_of_a_leftover_is_cleared(stem: str, tmp_path: Path) -> None:
    kept = [".a-0123abcd.txt.bak", ".a-0123abc.txt", ".a-good.txt", ".a1-0123abcd.txt", ".b-0123abcd.txt", ".a-.txt"]
    for name in kept:
        (tmp_path / name).touch()
    leftover = tmp_path / f".{stem}-0123abcd.txt"
    leftover.touch()
    clear_leftovers(tmp_path / f"{stem}.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


# ---- locks ----------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from vdm_hub.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_one_process_s_and_ends_with_it_even_by_a_kill(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert is_locked(lock)
    with pytest.raises(BlockingIOError), locked(lock):
        pass
    assert lock.exists()
    holder.kill()
    holder.communicate()
    assert lock.exists() and not is_locked(lock), "a file that nobody holds is in nobody's way"
    with locked(lock):
        assert is_locked(lock)
    assert not lock.exists()


@pytest.mark.parametrize("address", ["https://host.example/x.png", "s3://bucket/x", "hf://me/x.png"])
def test_an_address_is_no_place_to_write_to(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="address"), written_beside(Path(address)) as beside:
        beside.write_text("x")
    assert list(tmp_path.iterdir()) == []
