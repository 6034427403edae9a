"""Every code block of the README runs, in a folder that looks like a user's after ``make quickstart``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from hub.publications import tiny_network
from hub.server import LoopbackHub

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
# What a test adds to a training command, so that it takes seconds: fewer and smaller, nothing else.
SHORT = "--max_train_steps 2 --train_batch_size 4 --num_inference_steps 2 --num_sample_images 1 --report_to none"
SMALL_UNET = '--unet \'{"block_out_channels": [32], "layers_per_block": 1}\''


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/digits``, ``runs/digits_vae``, ``runs/template``, ``my_images`` and ``my_recipe.yaml``."""
    home = tmp_path_factory.mktemp("readme")
    (home / "my_images").mkdir()
    source = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(source.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(home / "my_images" / f"{i}.png")
    (recipe,) = (text for language, text in BLOCKS if language == "yaml")
    (home / "my_recipe.yaml").write_text(recipe)
    run(home, f"accelerate launch --num_processes 1 {ROOT}/scripts/train.py digits {SHORT} {SMALL_UNET}")
    run(home, f"accelerate launch --num_processes 1 {ROOT}/scripts/train.py digits_vae {SHORT}")
    own = "--train_data_dir my_images --resolution 32"
    run(home, f"python -m vdm_hub.train template {own} {SHORT} {SMALL_UNET}")
    assert (home / "runs/digits/pipeline/model_index.json").is_file()
    stock = DDPMPipeline(tiny_network(stock=True), DDPMScheduler())  # type: ignore[arg-type]
    stock.save_pretrained(home / "my-ddpm")
    return home


def run(home: Path, command: str, environment: Mapping[str, str] = OFFLINE) -> str:
    """Run one line of a shell block as a user would, with this environment's programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = dict(environment) | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def shortened(line: str) -> str:
    """A training command that takes seconds, into a folder of its own."""
    has_unet = "--unet" in line or "digits_vae" in line
    words = re.sub(r"--output_dir \S+", "", line.partition("#")[0])
    return f"{words} {SHORT} {'' if has_unet else SMALL_UNET} --output_dir runs/{abs(hash(line))}"


def lines_of(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in (ROOT / "README.md").read_text()


def test_there_are_blocks_of_every_kind() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_python_block(home: Path, code: str) -> None:
    (home / "block.py").write_text(code)
    run(home, f"{sys.executable} block.py")


@pytest.mark.parametrize("line", [line for kind, text in BLOCKS if kind == "bash" for line in lines_of(text)])
def test_shell_line(home: Path, line: str) -> None:
    """Commands run as they stand; training is cut short, and ``make`` is asked for its plan (CI runs the targets)."""
    if line.startswith("vdm-hub publish"):
        with LoopbackHub() as hub:
            run(home, line, hub.environment(home / "cache"))
            assert ("me/vdm-digits" in hub.repositories) == ("--dry_run" not in line)
    elif line.startswith("make"):
        assert run(ROOT, f"{line} --dry-run PYTHON={sys.executable}")
    else:
        run(home, shortened(line) if re.search(r"vdm_hub.train|vdm-hub train", line) else line)
