"""The chapter of plugins/vdm-hub-template/README.md, to the letter, in a folder and an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from hub.environments import python_without_vdm_hub
from testing.packages import PLUGINS, ROOT
from vdm_hub.testing.checks import LAWS

CHAPTER = "## From this folder to a schedule of your own"
_WRITTEN = re.compile(r"`([\w./]+\.(?:py|toml))`")


def steps() -> list[tuple[str, str, str]]:
    """``(language, content, file)`` of each block; the file is the last that the text above a block names."""
    text = (PLUGINS / "vdm-hub-template" / "README.md").read_text().partition(CHAPTER)[2]
    found, file = [], ""
    for token in MarkdownIt().parse(text):
        if token.type == "inline":
            file = (_WRITTEN.findall(token.content) or [file])[-1]
        elif token.type == "fence":
            found.append((token.info, token.content, file))
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A virtual environment with all that is installed here but plugins, and the core from a copy of the checkout."""
    root = tmp_path_factory.mktemp("author")
    python, variables = python_without_vdm_hub(root / "env")
    source = root / "vdm_hub-source"
    shutil.copytree(ROOT / "vdm_hub", source / "vdm_hub", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    # pip as an author calls it; here it finds the build backend in the environment, and needs no network.
    pip = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    settings = inherited | variables | pip | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-m", "pip", "install", "--no-deps", str(source)], env=settings, check=True, timeout=300)
    return settings


def shortened(commands: str) -> str:
    """Training and sampling of fewer steps, by a smaller network."""
    fewer = re.sub(r"(_steps) 20\b", r"\1 2", commands)
    small = """ --num_sample_images 1 --unet '{"block_out_channels": [32], "layers_per_block": 1}'"""
    return re.sub(r"^.* -m vdm_hub\.train .*$", lambda line: line[0] + small, fewer, flags=re.MULTILINE)


def run(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = f"set -e\n{command}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )


@pytest.mark.slow
def test_the_chapter_is_carried_out_to_the_letter(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    shutil.copytree(PLUGINS / "vdm-hub-template", folder / "vdm-hub-template")
    blocks, shown = steps(), ""
    assert [language for language, *_ in blocks] == ["bash", "python", "toml", "python", *["bash"] * 3, "text"]
    for (language, content, file), (following, *_) in zip(blocks, [*blocks[1:], ("", "", "")], strict=True):
        if language in ("python", "toml"):
            assert (folder / file).is_file() or file == "pyproject.toml", "the chapter renames what is there"
            (folder / file).write_text(content)
        elif language == "bash":
            done = run(shortened(content), folder, environment)
            assert done.returncode == (2 if following == "text" else 0), f"{content}{done.stdout}{done.stderr}"
            shown = done.stdout + done.stderr
            folder = tmp_path / "my-plugin"  # where the first block leaves its reader
            if "pytest" in content:
                two_schedules = 2 * len(LAWS["noise_schedules"].by_name)
                assert re.search(rf"\b{two_schedules} passed", shown), shown
            if "vdm-hub plugins" in content:
                assert re.search(r"noise_schedules +steep +vdm-hub-steep +0\.1\.0 +vdm_hub_steep:SteepSchedule", shown)
        else:
            assert content.strip() in shown, shown


def test_the_environment_of_the_chapter_is_its_own(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(
        "which vdm-hub; python -c 'import sys, vdm_hub; print(sys.prefix, vdm_hub.__file__)'", tmp_path, environment
    )
    assert done.returncode == 0, done.stderr
    places = done.stdout.split()
    prefix = environment["PATH"].split(os.pathsep)[0].rpartition("/")[0]
    assert len(places) == 3 and all(place.startswith(prefix) for place in places)
    assert not prefix.startswith(sys.prefix) and not str(tmp_path).startswith(str(ROOT))
