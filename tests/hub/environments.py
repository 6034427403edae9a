"""An environment of its own for a reader who has not installed vdm_hub: everything else is as it is here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# No working directory, no script's folder, no user's packages may bring vdm_hub back in.
_ISOLATED = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}


def python_without_vdm_hub(folder: Path) -> tuple[Path, dict[str, str]]:
    """Make a virtual environment in `folder`, with links to all packages of the running one except vdm_hub.

    Nothing is copied or installed, and it makes no difference whether vdm_hub is installed in editable mode or not,
    nor from which working directory the interpreter is started.

    Returns:
        the interpreter, and the environment variables that it is to be run with, over any others.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder.resolve() / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-I", "-c", ask], check=True, capture_output=True, text=True, timeout=120)
    link_packages(package_folders(), Path(answer.stdout.strip()))
    return python, dict(_ISOLATED)


def package_folders() -> list[Path]:
    """Where the running interpreter looks for installed packages, first things first."""
    return [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]


def link_packages(sources: Iterable[Path], target: Path) -> None:
    """Link into `target` what `sources` hold, the first of a name, unless it brings in vdm_hub or a plugin of it."""
    for source in sources:
        for entry in sorted(source.iterdir()):
            link = target / entry.name
            if entry.name != "__pycache__" and not link.exists() and not _brings_vdm_hub(entry):
                link.symlink_to(entry.resolve(), target_is_directory=entry.is_dir())


def _brings_vdm_hub(entry: Path) -> bool:
    """Tell by the name (package, metadata, editable hook), or by the folders that a .pth file adds to the path."""
    if "vdm_hub" in entry.name.lower().replace("-", "_"):
        return True
    if entry.suffix != ".pth":
        return False
    lines = entry.read_text(errors="replace").splitlines()
    folders = (line for line in lines if line.strip() and not line.startswith(("#", "import ", "import\t")))
    return any("vdm_hub" in line for line in lines) or any(
        (entry.parent / line / "vdm_hub").exists() for line in folders
    )
