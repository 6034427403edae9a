"""Make `hf vdm ...` the command `vdm-hub ...`: an extension of Hugging Face's `hf`, registered here without GitHub.

python scripts/hf_extension.py
"""

from __future__ import annotations

import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub.cli.extensions import EXTENSIONS_ROOT, ExtensionManifest
from huggingface_hub.errors import CLIError

from vdm_hub import ConfigurationError, report_errors

OWNER = "vdm_hub"  # which no account of GitHub can be called: `hf extensions update` finds nobody's code by it


def register() -> None:
    """Write the manifest by which `hf` finds an extension; `hf extensions remove vdm` takes it away."""
    command = shutil.which("vdm-hub", path=str(Path(sys.executable).parent)) or shutil.which("vdm-hub")
    if command is None:
        raise ConfigurationError("there is no command vdm-hub beside this Python: install the package first.")
    folder = EXTENSIONS_ROOT.expanduser() / "hf-vdm"
    if folder.exists() and _owner(folder) != OWNER:
        raise ConfigurationError(f"{folder} holds another extension: remove it by `hf extensions remove vdm` first.")
    described = "Variational diffusion models: train, measure, publish, load."
    manifest = ExtensionManifest(
        owner=OWNER,
        repo="hf-vdm",
        repo_id=f"{OWNER}/hf-vdm",
        short_name="vdm",
        executable_path=str(Path(command).absolute()),
        type="binary",
        installed_at=datetime.now(UTC),
        description=described,
    )
    manifest.save(folder)
    print(f"`hf vdm` is {command}, by {folder}")


def _owner(folder: Path) -> str | None:
    try:
        return ExtensionManifest.load(folder).owner
    except (CLIError, ValueError, LookupError, TypeError):  # no manifest, or a damaged one
        return None


if __name__ == "__main__":
    sys.exit(report_errors(register))
