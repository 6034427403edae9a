"""What is saved is whole, or is not there; what was there before stays until then."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vdm_hub.files import written_beside


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
