"""docs/ladder: every page runs as it stands, and leaves the pictures that it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs import ROOT, environment

PAGES = sorted((ROOT / "docs" / "ladder").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_draws_what_it_shows(page: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "run_page.py"), str(page), "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = set(re.findall(r"\]\(\.\./images/([\w.]+)\)", page.read_text()))
    assert shown == {path.name for path in tmp_path.glob("*.png")}
    assert all((ROOT / "docs" / "images" / name).is_file() for name in shown)


def test_there_is_a_page_for_every_rung() -> None:
    assert [page.stem.partition("_")[0] for page in PAGES] == [str(i + 1) for i in range(len(PAGES))]
    assert len(PAGES) >= 3
