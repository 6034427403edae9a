"""`hf vdm ...`, the extension of the unmodified `hf` command that `scripts/hf_extension.py` registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs import ROOT
from vdm_hub.version import __version__

HF = (sys.executable, "-m", "huggingface_hub.cli.hf")
REGISTER = (sys.executable, str(ROOT / "scripts" / "hf_extension.py"))


def call(home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def registered(tmp_path: Path) -> Path:
    done = call(tmp_path, *REGISTER)
    if "install the package first" in done.stderr:
        pytest.skip("THERE IS NO COMMAND vdm-hub HERE, SO `hf vdm` WAS NOT TRIED")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_hf_vdm_is_vdm_hub(registered: Path) -> None:
    assert call(registered, *HF, "vdm", "--version").stdout.strip() == f"vdm-hub {__version__}"
    refused = call(registered, *HF, "vdm", "recipes", "no_such_recipe")
    assert refused.returncode == 2 and "no_such_recipe" in refused.stderr
    assert "vdm" in call(registered, *HF, "extensions", "list").stdout
    assert call(registered, *REGISTER).returncode == 0, "again, as after another installation"
    assert call(registered, *HF, "extensions", "remove", "vdm").returncode == 0
    assert not list((registered / ".local/share/hf/extensions").iterdir())


def test_anothers_extension_stays(registered: Path) -> None:
    (manifest,) = registered.rglob("manifest.json")
    text = json.dumps(json.loads(manifest.read_text()) | {"owner": "ada"})
    manifest.write_text(text)
    refused = call(registered, *REGISTER)
    assert refused.returncode == 2 and "hf extensions remove vdm" in refused.stderr
    assert manifest.read_text() == text
    manifest.write_text("{")
    refused = call(registered, *REGISTER)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
