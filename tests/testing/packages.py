"""Plugin packages, really built and installed by pip, into a folder that a test puts on the path."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"

_PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"

[tool.setuptools]
py-modules = ["{module}"]
"""


def project(
    folder: Path, name: str, source: str, entry_points: dict[str, dict[str, str]], version: str = "0.1"
) -> Path:
    """A project of one module, named after it; ``entry_points`` are targets by kind and name."""
    folder.mkdir(parents=True)
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    text = _PYPROJECT.format(name=name, version=version, module=module)
    for kind, targets in entry_points.items():
        lines = "".join(f'{entry} = "{module}:{target}"\n' for entry, target in targets.items())
        text += f'\n[project.entry-points."vdm_hub.{kind}"]\n{lines}'
    (folder / "pyproject.toml").write_text(text)
    return folder


def pip_install(target: Path, *sources: Path) -> Path:
    """What ``pip install`` leaves behind, in a folder of its own; built from copies, so the sources stay clean."""
    work = target.parent / f"{target.name}-sources"
    copies = [shutil.copytree(source, work / source.name, ignore=_LEFT_BEHIND) for source in sources]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-index", "--no-build-isolation", "--no-cache-dir", "--target", str(target)]
    done = subprocess.run([*command, *map(str, copies)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return target


_LEFT_BEHIND = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
