"""What ``pip install`` gives is enough: the built wheel alone trains and evaluates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents in a folder of their own; the dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # From a copy of what git tracks: a build would leave its folders in the checkout.
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(source)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_the_wheel_trains_and_evaluates(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str, program: str = sys.executable) -> str:
        command = [program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    origin = run("-c", "import vdm_hub; print(vdm_hub.__file__)").strip()
    assert Path(origin).is_relative_to(installed)
    few = ("--max_train_steps", "2", "--num_inference_steps", "2", "--num_sample_images", "1", "--report_to", "none")
    small = json.dumps({"block_out_channels": [32], "layers_per_block": 1})
    run("-m", "vdm_hub.train", "digits", *few, "--unet", small, "--evaluation_replicates", "1")
    measured = ("evaluate", "runs/digits/pipeline", "--dataset_name", "digits", "--json")
    printed = run(*measured, program=str(installed / "bin" / "vdm-hub"))
    assert json.loads(printed)["num_images"] == 360
    assert (installed / "vdm_hub" / "py.typed").is_file()
