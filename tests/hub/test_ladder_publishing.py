"""Every rung is trained, published, read and measured by what its card says, over HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

import runs
from hub.readers import Reader, reader
from hub.server import LoopbackHub
from naming import naming
from vdm_hub import HVAEPipeline, LatentVDMPipeline, MarkovianHVAE
from vdm_hub.errors import CheckpointError, ConfigurationError
from vdm_hub.pipelines.by_name import PIPELINES
from vdm_hub.publishing.contents import published_recipe
from vdm_hub.publishing.dry_run import write_publication

NETWORK: dict[str, Any] = {"block_out_channels": [8], "norm_num_groups": 4}
RUNGS: dict[str, dict[str, Any]] = {
    "vae": {"model": "hvae", "hvae": NETWORK | {"latent_shapes": [[4]]}},
    "hvae": {"model": "hvae", "hvae": NETWORK | {"depth": 2, "latent_shapes": [[2, 4, 4], [4]]}},
    "latent": {
        "model": "latent_vdm",
        "first_stage": NETWORK | {"latent_shapes": [[2, 4, 4]]},
        "unet": runs.UNET,
        "label_column": "label",
    },
}
KINDS = {
    "vae": "A variational autoencoder (VAE) of 8x8 grey images",
    "hvae": "A hierarchical variational autoencoder (HVAE) with 2 latents of 8x8 grey images",
    "latent": "A class-conditional latent variational diffusion model",
}


@dataclass(frozen=True)
class Published:
    rung: str
    card: str
    user: Reader
    run: Path
    files: set[str]

    @property
    def pipeline(self) -> str:
        return "LatentVDMPipeline" if self.rung == "latent" else "HVAEPipeline"

    @property
    def told(self) -> dict[str, str]:
        return {"class_labels": "3"} if self.rung == "latent" else {}

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", self.card, flags=re.DOTALL)


@pytest.fixture(
    scope="module", params=[*(pytest.param(rung, marks=pytest.mark.slow) for rung in ("vae", "hvae")), "latent"]
)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder, rung = tmp_path_factory.mktemp("ladder"), request.param
    fields = RUNGS[rung] | ({} if rung == "latent" else {"unet": {}, "noise_schedule": "linear"})
    with LoopbackHub() as hub:
        author, user = reader(folder / "author", hub, token="hf_loopback"), reader(folder / "user", hub)
        recipe = runs.recipe(
            folder / "recipe", author.home / "run", **fields, num_sample_images=4, evaluation_replicates=2
        )
        launch = [str(author.python), "-m", *runs.LAUNCH, "-m", "vdm_hub.train", recipe]
        trained = author.run(*launch, "--push_to_hub", "true", "--hub_model_id", f"me/{rung}")
        assert trained.returncode == 0, trained.stderr[-4000:]
        files = hub.repositories[f"me/{rung}"].at("main").files
        yield Published(rung, files["README.md"].content.decode(), user, author.home / "run", set(files))
        assert set(hub.repositories[f"me/{rung}"].branches) == {"main"}, "no twin, and no carried code"


def test_the_card_says_what_the_model_is(published: Published) -> None:
    card = ModelCard(published.card)
    assert KINDS[published.rung] in card.text
    assert "There is no twin for plain diffusers: it" in card.text
    results = {result.metric_type for result in card.data.eval_results}
    assert {"bits_per_dim", "bits_per_dim_reconstruction", "bits_per_dim_prior"} <= results
    has_time = published.rung == "latent"
    assert ("continuous time" in card.text) == has_time
    assert ("num_inference_steps" in card.text) == has_time
    assert ("schedule.png" in card.text) == has_time == ("images/schedule.png" in published.files)
    assert "images/samples.png" in published.files
    assert ("conditional" in card.data.tags) == ('class_labels=["0", "2", "5", "7"]' in card.text) == has_time
    assert ("p(x | class)" in card.text) == ("of the column `label`" in card.text) == has_time
    if not has_time:
        assert f"over {1 if published.rung == 'vae' else 2} latent" in card.text


def test_every_snippet_runs(published: Published) -> None:
    blocks = published.blocks("python")
    assert len(blocks) == 2
    for block in blocks:
        done = published.user.python_block(
            block + "\nassert type(pipe).__name__ in ('HVAEPipeline', 'LatentVDMPipeline')"
        )
        assert done.returncode == 0, done.stderr[-4000:]


def test_what_is_loaded_from_the_hub_is_what_was_trained(published: Published) -> None:
    script = f"""
import torch
from diffusers import DiffusionPipeline
import vdm_hub
own, repository, folder = vdm_hub.{published.pipeline}, "me/{published.rung}", {str(published.run / "pipeline")!r}
pipes = [own.from_pretrained(repository), DiffusionPipeline.from_pretrained(repository), own.from_pretrained(folder)]
levels = torch.arange(64).reshape(1, 1, 8, 8) % 17
told = {published.told!r}
samples = [pipe.sample(2, torch.Generator().manual_seed(0), 3, **told) for pipe in pipes]
bits = [pipe.bits_per_dim(levels, replicates=2, **told).per_image for pipe in pipes]
assert all(torch.equal(samples[2], each) for each in samples)
assert all(torch.equal(bits[2], each) for each in bits)
"""
    done = published.user.python_block(script)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_figure_on_the_card_can_be_measured_again(published: Published) -> None:
    (command,) = (block for block in published.blocks("bash") if "vdm-hub evaluate" in block)
    (total,) = re.findall(r"\*\*total\*\* \| \*\*([\d.]+)\*\*", published.card)
    assert f"{total} bits/dim" in published.user.shell_block(command)


@pytest.mark.slow  # tests/training/test_records.py repeats a run, too
def test_the_run_can_be_repeated_to_the_same_weights(published: Published) -> None:
    (commands,) = (block for block in published.blocks("bash") if "vdm_hub.train" in block)
    published.user.shell_block(commands)
    again = published.user.home / "runs" / "recipe" / "pipeline"
    for weights in (published.run / "pipeline").glob("*/*.safetensors"):
        relative = weights.relative_to(published.run / "pipeline")
        assert weights.read_bytes() == (again / relative).read_bytes(), relative


def hvae_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    model = MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(4,)], block_out_channels=(8,))
    HVAEPipeline(model).save_pretrained(folder)
    return folder


def test_code_is_carried_for_a_vdm_alone(tmp_path: Path) -> None:
    folder = hvae_folder(tmp_path / "model")
    with pytest.raises(ConfigurationError, match=naming("HVAEPipeline", "VDMPipeline")):
        write_publication(folder, "me/vae", tmp_path / "out", remote_code=True)
    assert not (tmp_path / "out").exists()
    written = write_publication(folder, "me/vae", tmp_path / "out")
    assert {path.parts[0] for path in written} == {"main"}
    assert "has not been measured" in (tmp_path / "out" / "main" / "README.md").read_text()


def test_only_pipelines_of_the_ladder_are_published(tmp_path: Path) -> None:
    folder = hvae_folder(tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("HVAEPipeline", "LikelihoodPipeline"))
    with pytest.raises(CheckpointError, match=naming("LikelihoodPipeline", "HVAEPipeline")):
        write_publication(folder, "me/vae", tmp_path / "out")
    assert set(PIPELINES) == {"HVAEPipeline", "LatentVDMPipeline", "TokenPipeline", "VDMPipeline"}
    assert issubclass(LatentVDMPipeline, DiffusionPipeline)


def test_where_a_first_stage_lay_is_nobody_s_business() -> None:
    recipe = {"first_stage_from": "/home/ada/runs/digits_vae/pipeline"}
    assert published_recipe(recipe) == {"first_stage_from": "pipeline"}
    assert published_recipe({"first_stage_from": "ada/vae"}) == {"first_stage_from": "ada/vae"}
