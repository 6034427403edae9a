"""Any diffusers checkpoint of the DDPM family as a VDM: its samples bit for bit, and the bound of Ho et al."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor

from ddpm import K, T, digits_levels, trained_ddpm, with_variance
from hub.server import LoopbackHub
from naming import naming
from runs import ROOT
from tiny import quiet, seeded, tiny_unet_2d
from vdm_hub import VariationalBound, VDMPipeline, VDMScheduler
from vdm_hub.commands import main
from vdm_hub.data.loading import load_split
from vdm_hub.errors import ConfigurationError
from vdm_hub.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def trained() -> DDPMPipeline:
    return trained_ddpm()


@pytest.fixture(scope="session")
def folder(trained: DDPMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddpm")
    trained.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def levels() -> Tensor:
    return digits_levels()


@pytest.fixture
def taken_over(folder: Path) -> VDMPipeline:
    return quiet(VDMPipeline.from_diffusers(folder, num_levels=K))


# ---- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_samples_with_another_variance_are_bitwise_those_of_ddpm(variance: str, trained: DDPMPipeline) -> None:
    stock = with_variance(trained, variance)
    theirs = copy.deepcopy(stock)(3, seeded(3), num_inference_steps=T, output_type="pt").images
    ours = quiet(VDMPipeline.from_diffusers(stock, num_levels=K))
    latents = ours(3, seeded(3), num_inference_steps=T, output_type="latent").images
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), theirs)


@pytest.mark.parametrize("steps", [7, T])
@pytest.mark.parametrize("one_each", [False, True])
def test_samples_are_bitwise_those_of_ddpm_pipeline(
    taken_over: VDMPipeline, trained: DDPMPipeline, steps: int, one_each: bool
) -> None:
    def source() -> Any:
        return [seeded(s) for s in (3, 4, 5)] if one_each else seeded(3)

    stock = copy.deepcopy(trained)  # its scheduler remembers the number of steps
    theirs = quiet(stock)(3, source(), num_inference_steps=steps, output_type="pt").images
    ours = taken_over(3, source(), num_inference_steps=steps, output_type="latent").images
    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), theirs)
    # As images, ours are on the levels, and theirs within rounding to them.
    images = taken_over(3, source(), num_inference_steps=steps, output_type="pt").images
    assert float((images - theirs).abs().max()) <= 0.5 / (K - 1) + 1e-6


def test_at_256_levels_the_pictures_are_those_of_ddpm_pipeline_too(folder: Path, trained: DDPMPipeline) -> None:
    stock, ours = copy.deepcopy(trained), quiet(VDMPipeline.from_diffusers(folder))
    pictures = [quiet(pipe)(4, seeded(2), num_inference_steps=T).images for pipe in (stock, ours)]
    for theirs, own in zip(*pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(theirs).squeeze(), np.asarray(own))


# ---- what is taken over ---------------------------------------------------------------------------------------------


def test_network_process_scaling_and_decoder_are_taken_over(taken_over: VDMPipeline, trained: DDPMPipeline) -> None:
    config = taken_over.scheduler.config
    assert type(taken_over) is VDMPipeline and type(taken_over.unet) is UNet2DModel
    assert type(taken_over.scheduler) is VDMScheduler
    assert (config.num_levels, config.data_scaling, config.decoder, config.conditioning) == (
        17,
        "full",
        "ddpm",
        "table",
    )
    assert torch.equal(taken_over.scheduler.alphas_cumprod, trained.scheduler.alphas_cumprod)
    weights, expected = taken_over.unet.state_dict(), trained.unet.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not taken_over.unet.training


def test_what_was_taken_over_is_saved_as_a_vdm(taken_over: VDMPipeline, levels: Tensor, tmp_path: Path) -> None:
    taken_over.save_pretrained(tmp_path)
    again = VDMPipeline.from_pretrained(tmp_path)
    one, two = (pipe.bits_per_dim(levels, replicates=2) for pipe in (taken_over, again))
    assert torch.equal(one.per_image, two.per_image) and one.to_dict() == two.to_dict()
    with pytest.raises(ConfigurationError, match=naming("VDMPipeline.from_pretrained")):
        VDMPipeline.from_diffusers(tmp_path)
    with pytest.raises(ConfigurationError, match="VDMPipeline already"):
        VDMPipeline.from_diffusers(again)


def test_a_pipeline_in_memory_is_its_folder(
    taken_over: VDMPipeline, trained: DDPMPipeline, levels: Tensor, tmp_path: Path
) -> None:
    expected = taken_over.bits_per_dim(levels, replicates=2).per_image
    shared = VDMPipeline.from_diffusers(trained, num_levels=K)
    assert shared.unet is trained.unet
    assert torch.equal(shared.bits_per_dim(levels, replicates=2).per_image, expected)
    ddim = DDIMPipeline(trained.unet, DDIMScheduler.from_config(trained.scheduler.config))
    ddim.save_pretrained(tmp_path)
    for source in (ddim, tmp_path, str(tmp_path)):
        pipe = VDMPipeline.from_diffusers(source, num_levels=K)
        assert torch.equal(pipe.bits_per_dim(levels, replicates=2).per_image, expected)


def test_fields_can_be_overridden(folder: Path, levels: Tensor) -> None:
    plain = VDMPipeline.from_diffusers(folder, K).bits_per_dim(levels, replicates=2).bits_per_dim
    for changes in ({"data_scaling": "bin_centers"}, {"decoder": "factorised"}, {"prediction_type": "sample"}):
        pipe = VDMPipeline.from_diffusers(folder, K, **changes)  # type: ignore[arg-type]
        assert changes.items() <= dict(pipe.scheduler.config).items()
        assert pipe.bits_per_dim(levels, replicates=2).bits_per_dim != plain
    assert VDMPipeline.from_diffusers(folder).scheduler.config.num_levels == 256
    assert VDMPipeline.from_diffusers(folder, dtype=torch.float16).unet.dtype == torch.float16
    with pytest.raises(ConfigurationError, match=naming("revison", "revision")):
        VDMPipeline.from_diffusers(folder, revison="main")
    with pytest.raises(ConfigurationError, match=naming("revision")):
        VDMPipeline.from_diffusers(DDPMPipeline(tiny_unet_2d(), DDPMScheduler()), revision="main")


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_evaluate_prints_it(folder: Path, taken_over: VDMPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(folder), "--dataset_name", "digits", "--num_levels", "17", "--max_images", "20"]
    words += ["--transitions", str(T - 1), "--replicates", "3"]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    images = load_split("digits", "test", num_levels=K, max_samples=20)
    expected = evaluate(taken_over, images, VariationalBound(T - 1), replicates=3, progress=False)
    assert printed["bits_per_dim"] == pytest.approx(expected.bits_per_dim, rel=1e-6)
    assert printed["terms"] == pytest.approx(expected.terms, rel=1e-6)
    assert printed["transitions"] == T - 1 and "unclipped" in printed["notes"][0]
    assert main(words) == 0
    assert "note: the sampler clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [{"prediction_type": "score"}, {"variance_type": "fixed_large", "data_scaling": "bin_centers"}]
)
def test_a_config_that_is_wrong_is_set_right_on_the_command_line(
    changes: dict[str, str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(folder), "--dataset_name", "digits", "--num_levels", "17", "--max_images", "5"]
    words += ["--replicates", "2", "--transitions", str(T - 1), "--json"]
    assert main([*words, *(word for name, value in changes.items() for word in (f"--{name}", value))]) == 0
    printed = json.loads(capsys.readouterr().out)
    images = load_split("digits", "test", num_levels=K, max_samples=5)
    pipe = VDMPipeline.from_diffusers(folder, K, **changes)  # type: ignore[arg-type]
    expected = evaluate(pipe, images, VariationalBound(T - 1), replicates=2, progress=False)
    assert printed["terms"] == pytest.approx(expected.terms, rel=1e-6)


def test_evaluate_takes_256_levels_and_names_the_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The digits' bytes are 256 levels too, so that is an answer; a VDM of 17 is told where images lie between."""
    words = ["evaluate", str(folder), "--dataset_name", "digits", "--max_images", "4", "--replicates", "2", "--json"]
    assert main(words) == 0
    of_256 = json.loads(capsys.readouterr().out)["bits_per_dim"]
    assert main([*words, "--num_levels", "17"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_dim"] < of_256
    assert main([*words, "--num_levels", "16"]) == 2
    assert "none of the 16 levels" in (said := capsys.readouterr().err) and "(--num_levels)" in said


def test_sample_draws_from_it(folder: Path, trained: DDPMPipeline, tmp_path: Path, capsys: Any) -> None:
    words = ["sample", str(folder), "--num_images", "1", "--output", str(tmp_path / "one.png"), "--seed", "3"]
    assert main([*words, "--num_inference_steps", str(T)]) == 0
    grid = np.asarray(Image.open(tmp_path / "one.png"))
    stock = quiet(copy.deepcopy(trained))
    pixels = np.asarray(stock(1, [seeded(3)], num_inference_steps=T).images[0]).squeeze()
    np.testing.assert_array_equal(grid[8:-8:8, 8:-8:8], pixels)
    capsys.readouterr()
    assert main([*words, "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "num_inference_steps is 250" in said and f"1 to {T}" in said


# ---- from the Hub ---------------------------------------------------------------------------------------------------

PUBLISH = """
import sys
from huggingface_hub import create_branch, create_repo, upload_folder
create_repo("me/ddpm")
create_branch("me/ddpm", branch="variants")
upload_folder(repo_id="me/ddpm", folder_path=sys.argv[1])
upload_folder(repo_id="me/ddpm", folder_path=sys.argv[2], revision="variants")
"""

EVALUATE = """
import json, sys, torch
from vdm_hub import VDMPipeline
from vdm_hub.commands import main
torch.set_num_threads(1)
levels = torch.arange(2 * 64).reshape(2, 1, 8, 8) % 17
for arguments in ({}, {"revision": "variants", "variant": "fp16", "dtype": torch.float16}):
    pipe = VDMPipeline.from_diffusers("me/ddpm", num_levels=17, **arguments)
    print(json.dumps([str(pipe.unet.dtype), pipe.bits_per_dim(levels, replicates=2).per_image.tolist()]))
sys.exit(main("evaluate me/ddpm --dataset_name digits --num_levels 17 --max_images 3 --json".split()))
"""


@pytest.mark.slow  # tests/hub/test_loading.py loads one of diffusers from all places, too
def test_from_a_hub_id_and_from_its_cache(trained: DDPMPipeline, folder: Path, tmp_path: Path) -> None:
    half = copy.deepcopy(trained).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")

    def run(script: str, *arguments: str, **environment: str) -> list[Any]:
        command = [sys.executable, "-c", script, *arguments]
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{"))]

    with LoopbackHub() as hub:
        run(PUBLISH, str(folder), str(tmp_path / "half"), **hub.environment(tmp_path / "publisher"))
        online = run(EVALUATE, **hub.environment(tmp_path / "reader"))
    offline = run(EVALUATE, **hub.environment(tmp_path / "reader"), HF_HUB_OFFLINE="1")
    assert online[:2] == offline[:2] and online[2]["terms"] == offline[2]["terms"]
    levels = torch.arange(2 * 64).reshape(2, 1, 8, 8) % 17
    pipe = VDMPipeline.from_diffusers(folder, num_levels=K)
    assert online[0] == ["torch.float32", pipe.bits_per_dim(levels, replicates=2).per_image.tolist()]
    assert online[1][0] == "torch.float16" and online[1][1] == pytest.approx(online[0][1], rel=0.05)
    assert online[2]["num_images"] == 3
