"""Any diffusers checkpoint of the DDPM family as a VDM: its samples bit for bit, and the bound of Ho et al."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor

from hub.server import LoopbackHub
from runs import ROOT
from tiny import quiet, seeded, tiny_unet_2d
from vdm_hub import VDMPipeline, VDMScheduler
from vdm_hub.commands import main
from vdm_hub.data.loading import load_split
from vdm_hub.errors import ConfigurationError
from vdm_hub.evaluation.evaluate import evaluate

K, T = 17, 20
BETAS = {"num_train_timesteps": T, "beta_start": 0.005, "beta_end": 0.5}


# ---- a DDPM trained with diffusers' own classes ---------------------------------------------------------------------


def new_network() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="session")
def trained() -> DDPMPipeline:
    """As diffusers' own example of training does it: noise, `add_noise`, the mean squared error of the noise."""
    levels = load_split("digits", "train", num_levels=K).levels
    unet, scheduler, generator = new_network(), DDPMScheduler(**BETAS), seeded(1)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(300):
        images = 2 * levels[torch.randint(len(levels), (32,), generator=generator)].float() / (K - 1) - 1
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(T, (len(images),), generator=generator)
        predicted = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        optimizer.zero_grad()
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
    return quiet(DDPMPipeline(unet.eval(), scheduler))


@pytest.fixture(scope="session")
def folder(trained: DDPMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddpm")
    trained.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def levels() -> Tensor:
    return load_split("digits", "test[:40]", num_levels=K).levels.long()


@pytest.fixture
def taken_over(folder: Path) -> VDMPipeline:
    return quiet(VDMPipeline.from_diffusers(folder, num_levels=K))


# ---- the bound ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ho_et_al(unet: Any, betas: Tensor, levels: Tensor, eps: Tensor, eps_1: Tensor) -> dict[str, Tensor]:
    """The terms of Ho et al. (arXiv 2006.11239) eq. 5 per image in nats, with the same noise in each L_{t-1}, t > 1.

    Written out with their t = 1..T, of which diffusers tells the network t - 1.
    """
    beta = torch.cat([torch.zeros(1), betas]).double()  # beta[t]
    alpha = 1 - beta
    bar = alpha.cumprod(0)
    x_0 = 2 * levels.double() / (K - 1) - 1
    beta_tilde = torch.tensor([0.0, 0.0, *((1 - bar[t - 1]) / (1 - bar[t]) * beta[t] for t in range(2, T + 1))])

    def mean_theta(x_t: Tensor, t: int) -> Tensor:  # eq. 11
        predicted = unet(x_t.float(), torch.full((len(x_t),), t - 1)).sample.double()
        return (x_t - beta[t] / (1 - bar[t]).sqrt() * predicted) / alpha[t].sqrt()

    def per_image(values: Tensor) -> Tensor:
        return values.flatten(1).sum(1)

    def diffused(t: int, noise: Tensor) -> Tensor:  # eq. 4
        return bar[t].sqrt() * x_0 + (1 - bar[t]).sqrt() * noise.double()

    last = 1 - bar[T]  # L_T: KL(q(x_T|x_0) || N(0, I))
    prior = per_image(0.5 * (last + bar[T] * x_0**2 - 1 - last.log()))
    diffusion = torch.zeros(len(levels), dtype=torch.float64)
    for t in range(2, T + 1):  # L_{t-1}, eq. 8, with the posterior of eq. 7
        x_t = diffused(t, eps)
        posterior = bar[t - 1].sqrt() * beta[t] / (1 - bar[t]) * x_0
        posterior = posterior + alpha[t].sqrt() * (1 - bar[t - 1]) / (1 - bar[t]) * x_t
        diffusion += per_image((posterior - mean_theta(x_t, t)) ** 2 / (2 * beta_tilde[t]))
    # L_0, eq. 13, with 1/255 for their 256 levels; sigma_1 as in their code: that of t = 2.
    normal = torch.distributions.Normal(mean_theta(diffused(1, eps_1), 1), beta_tilde[2].sqrt())
    upper = torch.where(levels == K - 1, 1.0, normal.cdf(x_0 + 1 / (K - 1)))
    lower = torch.where(levels == 0, 0.0, normal.cdf(x_0 - 1 / (K - 1)))
    return {"reconstruction": -per_image((upper - lower).log()), "prior": prior, "diffusion": diffusion}


def transitions_summed(pipe: VDMPipeline, levels: Tensor, noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """The library's bound with each of the T - 1 transitions visited once, in nats."""
    objective, summed = pipe.objective(T - 1), torch.zeros(len(levels), dtype=torch.float64)
    with torch.no_grad():
        for i in range(T - 1):
            bound = objective({"levels": levels}, torch.full((len(levels),), (i + 0.5) / (T - 1)), noise)
            summed += bound.terms["diffusion"].double() / (T - 1)
    return {name: term.double() for name, term in bound.terms.items()} | {"diffusion": summed}


def test_the_bound_is_that_of_ho_et_al_draw_by_draw(
    taken_over: VDMPipeline, trained: DDPMPipeline, levels: Tensor
) -> None:
    noise = taken_over.objective(T - 1).draw_noise({"levels": levels}, seeded(5))
    ours = transitions_summed(taken_over, levels, noise)
    theirs = ho_et_al(trained.unet, trained.scheduler.betas, levels, noise["marginal"], noise["reconstruction"])
    for name, term in theirs.items():
        torch.testing.assert_close(
            ours[name], term, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_what_is_reported_estimates_the_bound_of_ho_et_al(
    taken_over: VDMPipeline, trained: DDPMPipeline, levels: Tensor
) -> None:
    report = taken_over.bits_per_dim(levels, transitions=T - 1, replicates=40)
    generator, draws = seeded(6), []
    for _ in range(10):
        eps, eps_1 = (torch.randn(levels.shape, generator=generator) for _ in range(2))
        terms = ho_et_al(trained.unet, trained.scheduler.betas, levels, eps, eps_1)
        draws.append(sum(term.mean() for term in terms.values()) / (64 * math.log(2)))
    exact = torch.stack(draws)  # type: ignore[arg-type]
    error = math.hypot(report.standard_error, float(exact.std()) / math.sqrt(len(exact)))
    assert error < 0.1 * report.bits_per_dim
    assert abs(report.bits_per_dim - float(exact.mean())) < 4 * error


def test_training_improved_it(taken_over: VDMPipeline, trained: DDPMPipeline, levels: Tensor) -> None:
    before = VDMPipeline.from_diffusers(DDPMPipeline(new_network().eval(), trained.scheduler), num_levels=K)
    untrained, measured = (pipe.bits_per_dim(levels, transitions=T - 1, replicates=4) for pipe in (before, taken_over))
    assert measured.bits_per_dim < 0.5 * untrained.bits_per_dim
    assert measured.terms["prior"] == untrained.terms["prior"]


def test_what_the_sampler_adds_is_noted_and_changes_no_bound(trained: DDPMPipeline, levels: Tensor) -> None:
    def taken(**changes: Any) -> VDMPipeline:
        scheduler = DDPMScheduler.from_config(trained.scheduler.config, **changes)
        return VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler), num_levels=K)

    plain = taken(clip_sample=False).bits_per_dim(levels, replicates=2)
    assert "notes" not in plain.to_dict() and "note" not in str(plain)
    for changes, words in (
        ({"clip_sample": True}, "clips its estimates (clip_sample=True); the bound is that of the model unclipped"),
        ({"clip_sample": False, "thresholding": True}, "(thresholding=True)"),
        ({"clip_sample": False, "variance_type": "fixed_large"}, "the posterior's variance"),
    ):
        report = taken(**changes).bits_per_dim(levels, replicates=2)
        assert torch.equal(report.per_image, plain.per_image)
        (note,) = report.to_dict()["notes"]
        assert words in note and f"note: {note}" in str(report)


def test_a_last_snr_of_zero_is_measured_for_a_target_that_knows_the_data(
    trained: DDPMPipeline, levels: Tensor
) -> None:
    betas = {"rescale_betas_zero_snr": True, "clip_sample": False}
    for target in ("v_prediction", "sample"):
        scheduler = DDPMScheduler.from_config(trained.scheduler.config, prediction_type=target, **betas)
        pipe = VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler), num_levels=K)
        report = pipe.bits_per_dim(levels, replicates=2)
        assert math.isfinite(report.bits_per_dim) and report.terms["prior"] < 1e-6
        assert "alpha_bar = 2^-24" in report.to_dict()["notes"][0]
    with pytest.raises(ConfigurationError, match=r"end at an SNR of zero .* v_prediction or sample"):
        scheduler = DDPMScheduler.from_config(trained.scheduler.config, **betas)
        VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler))
    with pytest.raises(ConfigurationError, match="SNR of zero"):
        scheduler = DDPMScheduler(trained_betas=[0.1, 0.5, 1.0], num_train_timesteps=3)
        VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler))


# ---- samples --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ConfigurationError, match=r"VDMPipeline already: load it with VDMPipeline\.from_pretrained"):
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
    with pytest.raises(ConfigurationError, match="knows no revison: it takes num_levels"):
        VDMPipeline.from_diffusers(folder, revison="main")
    with pytest.raises(ConfigurationError, match="revision is for folders and Hub ids"):
        VDMPipeline.from_diffusers(DDPMPipeline(tiny_unet_2d(), DDPMScheduler()), revision="main")


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_evaluate_prints_it(folder: Path, taken_over: VDMPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(folder), "--dataset_name", "digits", "--num_levels", "17", "--max_images", "20"]
    words += ["--transitions", str(T - 1), "--replicates", "3"]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    images = load_split("digits", "test", num_levels=K, max_samples=20)
    expected = evaluate(taken_over, images, transitions=T - 1, replicates=3, progress=False)
    assert printed["bits_per_dim"] == pytest.approx(expected.bits_per_dim, rel=1e-6)
    assert printed["terms"] == pytest.approx(expected.terms, rel=1e-6)
    assert printed["transitions"] == T - 1 and "unclipped" in printed["notes"][0]
    assert main(words) == 0
    assert "note: the sampler clips" in capsys.readouterr().out


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
    assert f"give --num_inference_steps {T}" in capsys.readouterr().err


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
