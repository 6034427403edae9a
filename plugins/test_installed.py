"""All plugins of this repository, installed: they are listed, keep all laws, and the core knows none of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"^from vdm_hub_\w+ import", re.MULTILINE)
PAGES = sorted(
    page
    for page in (ROOT / "docs").rglob("*.md")
    if "```python\n" in page.read_text() and IMPORT.search(page.read_text())
)
PACKAGES = sorted(path.parent.name for path in Path(__file__).parent.glob("*/pyproject.toml"))


@pytest.mark.parametrize("package", PACKAGES)
def test_it_is_installed_and_brings_something(package: str) -> None:
    groups = {point.group for point in metadata.distribution(package).entry_points}
    assert any(group.startswith("vdm_hub.") for group in groups), f"run `make install-plugins`; {package} has {groups}"


@pytest.mark.slow  # the kit's laws hold each plugin in tests of its own, too
def test_check_is_green() -> None:
    command = [sys.executable, "-m", "vdm_hub.commands", "plugins", "--check", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert shown.returncode == 0, shown.stderr
    rows = json.loads(shown.stdout)
    assert {row["package"] for row in rows} >= {"vdm-hub", *PACKAGES}
    assert {row["status"] for row in rows} == {"passes"}


def test_there_is_a_page_of_plugins() -> None:
    assert "from_bits_to_text" in {page.stem for page in PAGES}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_that_needs_them_runs(page: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "run_page.py"), str(page), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
