"""A reader without vdm_hub: the environment has everything else, however and wherever vdm_hub is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hub.environments import link_packages, python_without_vdm_hub

CHECKOUT = Path(__file__).resolve().parents[2]

LOOK = """
import importlib.metadata, importlib.util, json, sys
installed = {(d.metadata["Name"] or "").lower().replace("-", "_") for d in importlib.metadata.distributions()}
commands = {point.value for point in importlib.metadata.entry_points(group="console_scripts")}
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4,
                   down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
pipe = DDPMPipeline(unet, DDPMScheduler())
pipe.set_progress_bar_config(disable=True)
images = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
print(json.dumps({
    "spec": importlib.util.find_spec("vdm_hub") is not None,
    "installed": sorted(installed),
    "commands": any(value.startswith("vdm_hub") for value in commands),
    "loaded": any(name.startswith("vdm_hub") for name in sys.modules),
    "finders": [str(finder) for finder in sys.meta_path if "vdm_hub" in str(finder)],
    "shape": images.shape,
    "prefix": sys.prefix,
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return python_without_vdm_hub(tmp_path_factory.mktemp("reader") / "env")


def test_diffusers_works_and_vdm_hub_is_not_there(environment: tuple[Path, dict[str, str]]) -> None:
    """Not even for one who stands in the checkout and has it on the path."""
    python, variables = environment
    inherited = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [python, "-c", LOOK], env=inherited | variables, cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert seen["spec"] is False
    assert {"torch", "diffusers", "huggingface_hub", "safetensors"} <= set(seen["installed"])
    assert not [name for name in seen["installed"] if name.startswith("vdm_hub")]
    assert (seen["commands"], seen["loaded"], seen["finders"]) == (False, False, [])
    assert seen["shape"] == [1, 8, 8, 3]
    assert Path(seen["prefix"]) == python.parent.parent


def test_there_is_a_vdm_hub_to_be_left_out(environment: tuple[Path, dict[str, str]]) -> None:
    """Or the test above would pass for an environment that never could have had it."""
    python, variables = environment
    ask = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('vdm_hub') else 3)"

    def status(**inherited: str) -> int:
        return subprocess.run(
            [python, "-c", ask], env={**os.environ, **inherited}, cwd=CHECKOUT, check=False
        ).returncode

    assert status(**variables) == 3
    assert status(**variables | {"PYTHONPATH": str(CHECKOUT)}) == 0
    assert status(**dict.fromkeys(variables, "")) == 0, "the working directory brings it in"


def test_every_way_of_installing_vdm_hub_is_left_out(tmp_path: Path) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    (checkout / "vdm_hub").mkdir(parents=True)
    elsewhere.mkdir()
    first, second, target = tmp_path / "first", tmp_path / "second", tmp_path / "target"
    for folder in (first / "vdm_hub", first / "vdm_hub-0.1.0.dist-info", first / "diffusers", second / "diffusers"):
        folder.mkdir(parents=True)
    for folder in (first / "vdm_hub_mulan", first / "vdm-hub.egg-info", second / "torch", first / "__pycache__"):
        folder.mkdir(parents=True)
    target.mkdir()
    texts = {
        "__editable__.vdm_hub-0.1.0.pth": "import __editable___vdm_hub_0_1_0_finder\n",
        "__editable___vdm_hub_0_1_0_finder.py": "",
        "easy-install.pth": f"{elsewhere}\n{checkout}\n",
        "other.pth": f"# a comment\n\nimport os\n{elsewhere}\n",
        "hook.pth": "import vdm_hub.pipelines.registration\n",
        "six.py": "",
    }
    for name, text in texts.items():
        (first / name).write_text(text)
    link_packages([first, second], target)
    links = {link.name: link.resolve().parent for link in target.iterdir()}
    assert links == {"diffusers": first, "torch": second, "other.pth": first, "six.py": first}
