"""All plugins of this repository, installed: they are listed, keep all laws, and the core knows none of them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGES = sorted(path.parent.name for path in Path(__file__).parent.glob("*/pyproject.toml"))


@pytest.mark.parametrize("package", PACKAGES)
def test_it_is_installed_and_brings_something(package: str) -> None:
    groups = {point.group for point in metadata.distribution(package).entry_points}
    assert any(group.startswith("vdm_hub.") for group in groups), f"run `make install-plugins`; {package} has {groups}"


def test_check_is_green() -> None:
    command = [sys.executable, "-m", "vdm_hub.commands", "plugins", "--check", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert shown.returncode == 0, shown.stderr
    rows = json.loads(shown.stdout)
    assert {row["package"] for row in rows} >= {"vdm-hub", *PACKAGES}
    assert {row["status"] for row in rows} == {"passes"}
