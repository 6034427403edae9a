"""The scripts that figures were measured with start: each imports what it needs, and says what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import ROOT, python

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts" / "bench").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_starts(name: str) -> None:
    place = Path("scripts", "bench")
    done = python(name, "--help", PYTHONPATH=f"{ROOT / place}:{ROOT}")
    assert done.returncode == 0, done.stderr[-2000:]
