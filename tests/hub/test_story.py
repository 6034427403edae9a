"""The whole story: one trains and publishes, one reads with vdm_hub, one with diffusers alone; none shares a cache.

Each does what the published card says, word for word.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

import runs
from hub.environments import python_without_vdm_hub
from hub.readers import Reader, reader
from hub.server import LoopbackHub
from vdm_hub.version import HOW_TO_INSTALL

pytestmark = pytest.mark.slow  # a minute for all of them together; their parts have tests of their own
REPO = "me/story"
NETWORK = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
FIELDS = {"unet": NETWORK, "noise_schedule": runs.LEARNED, "num_sample_images": 4, "evaluation_replicates": 2}


@dataclass(frozen=True)
class Story:
    hub: LoopbackHub
    card: str
    author: Reader
    user: Reader
    stranger: Reader
    run: Path

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", self.card, flags=re.DOTALL)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The author trains, which publishes the model, and then publishes it again with the code."""
    folder = tmp_path_factory.mktemp("story")
    with LoopbackHub() as hub:
        author = reader(folder / "author", hub, token="hf_loopback")
        user = reader(folder / "user", hub)
        bare = reader(folder / "stranger", hub)
        python, variables = python_without_vdm_hub(folder / "without")
        stranger = Reader(python, dict(bare.environment) | variables, bare.home)
        recipe = runs.recipe(folder / "recipe", author.home / "run", **FIELDS)
        launch = [str(author.python), "-m", *runs.LAUNCH, "-m", "vdm_hub.train", recipe]
        trained = author.run(*launch, "--push_to_hub", "true", "--hub_model_id", REPO)
        assert trained.returncode == 0, trained.stderr[-4000:]
        assert f"{hub.url}/{REPO}" in trained.stdout
        publish = f"vdm-hub publish run/pipeline {REPO} --remote_code --license apache-2.0"
        published = author.run(*shlex.split(publish))
        assert published.returncode == 0, published.stderr[-4000:]
        card = hub.repositories[REPO].at("main").files["README.md"].content.decode()
        yield Story(hub, card, author, user, stranger, author.home / "run")
        assert hub.leaked_tokens() == []


def test_the_card_speaks_to_every_reader(story: Story) -> None:
    blocks = story.blocks("python")
    assert sum("vdm_hub" in block for block in blocks) == 2
    assert sum("DDPMPipeline" in block for block in blocks) == 1
    assert sum("trust_remote_code=True" in block for block in blocks) == 1


def test_every_snippet_for_vdm_hub_runs(story: Story) -> None:
    for block in story.blocks("python"):
        if "vdm_hub" in block:
            done = story.user.python_block(block)
            assert done.returncode == 0, done.stderr[-4000:]


def test_every_other_snippet_runs_with_diffusers_alone(story: Story) -> None:
    for block in story.blocks("python"):
        if "vdm_hub" not in block:
            absent = "import importlib.util\nassert importlib.util.find_spec('vdm_hub') is None\n"
            done = story.stranger.python_block(absent + block + "assert len(images) == 4\n")
            assert done.returncode == 0, done.stderr[-4000:]


def test_the_figure_on_the_card_can_be_measured_again(story: Story) -> None:
    (command,) = (block for block in story.blocks("bash") if "vdm-hub evaluate" in block)
    (total,) = re.findall(r"\*\*total\*\* \| \*\*([\d.]+)\*\*", story.card)
    (error,) = re.findall(r"standard error, Monte Carlo \| ([\d.]+)", story.card)
    said = story.user.shell_block(command)
    assert f"{total} bits/dim" in said
    assert f"standard error {error}" in said


@pytest.mark.slow  # tests/training/test_records.py repeats a run, too
def test_the_run_can_be_repeated_to_the_same_weights(story: Story) -> None:
    (commands,) = (block for block in story.blocks("bash") if "vdm_hub.train" in block)
    story.user.shell_block(commands)
    (weights,) = (story.user.home / "runs" / "recipe" / "pipeline" / "unet").glob("*.safetensors")
    published = story.hub.repositories[REPO].at("main").files["unet/diffusion_pytorch_model.safetensors"]
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == published.sha256


@pytest.mark.parametrize(
    ("revision", "words"),
    [("main", HOW_TO_INSTALL), ("remote-code", "trust_remote_code=True")],
)
def test_without_package_and_trust_the_message_says_what_to_do(story: Story, revision: str, words: str) -> None:
    load = f"DiffusionPipeline.from_pretrained({REPO!r}, revision={revision!r})"
    done = story.stranger.python_block(f"from diffusers import DiffusionPipeline\n{load}")
    assert done.returncode != 0
    assert words in done.stderr


def test_readers_need_no_token_and_write_nothing(story: Story) -> None:
    # An LFS upload carries no token: its address alone is the right to it.
    calls = [c for c in story.hub.calls if "Authorization" not in c.headers and c.route != "lfs_upload"]
    assert {call.method for call in calls} <= {"GET", "HEAD"}
    assert any(call.route == "resolve" for call in calls)
