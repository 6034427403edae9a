"""diffusers' latent pipelines as latent VDMs: their samples bit for bit, and a likelihood once a scale is fitted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)

from naming import naming
from schedulers.family_table import Case, GaussianNetwork, exact_diffusion_term, zero_snr
from tiny import quiet, seeded
from vdm_hub import LatentVDMPipeline, VDMPipeline, VQModelFirstStage, load_split
from vdm_hub.commands import main
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.likelihood.methods import ImportanceWeighted, ProbabilityFlow, VariationalBound
from vdm_hub.pipelines.by_name import open_pipeline

SHAPE = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CLASSES = 1000  # the null class of a DiTPipeline is number 1,000, whatever its network knows


def dit(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(**SHAPE, **BLOCKS, sample_size=8)
    transformer = DiTTransformer2DModel(
        2, 8, in_channels=2, out_channels=4, num_layers=1, sample_size=4, num_embeds_ada_norm=CLASSES
    )
    for parameter in transformer.parameters():  # it begins with zeros, which say nothing
        torch.nn.init.normal_(parameter, std=0.05)
    names = {i: f"class {i}" for i in range(CLASSES)}
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    return quiet(DiTPipeline(transformer.eval(), autoencoder.eval(), scheduler, id2label=names))


def ldm(network: Any = None, scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    vqvae = VQModel(**SHAPE, **BLOCKS, num_vq_embeddings=16)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = network or UNet2DModel(4, 2, 2, **blocks, layers_per_block=1, norm_num_groups=4)
    return quiet(LDMPipeline(vqvae.eval(), unet.eval(), scheduler or DDIMScheduler(clip_sample=False)))


KINDS = {"DiTPipeline": dit, "LDMPipeline": ldm}
every_kind = pytest.mark.parametrize("kind", ["DiTPipeline", pytest.param("LDMPipeline", marks=pytest.mark.slow)])


def images(count: int, split: str = "train") -> torch.Tensor:
    return load_split("digits", f"{split}[:{count}]", num_levels=256).levels.long()


def told(kind: str, count: int) -> dict[str, Any]:
    return {"class_labels": [3] * count} if kind == "DiTPipeline" else {}


# ---- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()], ids=["ddim", "flow"]
)
def test_dits_samples_are_its_own_bit_for_bit(guidance_scale: float, scheduler: Any) -> None:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.scale_model_input = lambda sample, timestep: sample  # which DiTPipeline asks for, and it lacks
    stock, asked = dit(scheduler), {"guidance_scale": guidance_scale, "num_inference_steps": 5}
    pipe = quiet(LatentVDMPipeline.from_diffusers(stock, num_levels=256))
    theirs = stock([3, 5], generator=seeded(1), **asked).images
    ours = pipe(class_labels=["class 3", 5], generator=seeded(1), **asked).images
    assert [np.array_equal(np.squeeze(a), np.squeeze(b)) for a, b in zip(theirs, ours, strict=True)] == [True, True]


def test_ldms_samples_are_its_own_bit_for_bit() -> None:
    stock = ldm()
    pipe = quiet(LatentVDMPipeline.from_diffusers(stock))
    theirs = stock(2, seeded(1), num_inference_steps=5).images
    ours = pipe(2, seeded(1), num_inference_steps=5).images
    assert [np.array_equal(np.squeeze(a), np.squeeze(b)) for a, b in zip(theirs, ours, strict=True)] == [True, True]


# ---- the first stage's likelihood -----------------------------------------------------------------------------------


@every_kind
def test_there_is_no_likelihood_before_the_scale_is_fitted(kind: str) -> None:
    pipe = LatentVDMPipeline.from_diffusers(KINDS[kind]())
    for method in ("bound", "ode"):
        with pytest.raises(ConfigurationError, match=naming("fit_first_stage")):
            pipe.log_likelihood(images(2), method, **told(kind, 2))
    pipe.fit_first_stage(images(16))
    report = quiet(pipe).log_likelihood(images(2, "test"), replicates=2, **told(kind, 2))
    assert math.isfinite(report.bits_per_dim)
    assert "16 images" in str(report) and "discretised Gaussian" in str(report)


@every_kind
def test_the_scale_that_is_fitted_is_the_likeliest(kind: str) -> None:
    """Levels near a smooth image, so that the best scale is no edge of the range; against a grid of scales."""
    pipe = LatentVDMPipeline.from_diffusers(KINDS[kind]())
    torch.manual_seed(1)
    levels = (128 + 9 * torch.randn(12, 1, 8, 8)).round().clamp(0, 255).long()
    pipe.fit_first_stage(levels)
    stage, best = pipe.first_stage, float(pipe.first_stage.log_scale.detach())
    mean, deviation = stage.posterior(stage.scale(levels))

    def nats(log_scale: float) -> float:
        with torch.no_grad():
            stage.log_scale.fill_(log_scale)
            y = mean + deviation * torch.randn(mean.shape, generator=seeded(0))  # as `fit` draws it, with seed 0
            return -float(stage.log_likelihood(levels, y).mean())

    found = {offset: nats(best + offset) for offset in (-0.2, -0.02, 0.0, 0.02, 0.2)}
    assert min(found, key=lambda offset: found[offset]) == 0.0
    assert math.exp(best) < 1, "the grey levels' own spread, not the range of the data"


def test_the_deviation_of_a_quantised_code_is_weighed_against_what_it_says() -> None:
    """Smooth images that a code of two levels tells apart: a finer deviation costs bits, a wider one mixes them up."""
    torch.manual_seed(0)
    shades = torch.where(torch.rand(64, 1, 1, 1) < 0.5, 60, 190).expand(-1, 1, 8, 8)
    levels = (shades + 2 * torch.randn(64, 1, 8, 8)).round().clamp(0, 255).long()
    stock, x = ldm(), levels.float() / 127.5 - 1
    optimizer = torch.optim.AdamW(stock.vqvae.parameters(), lr=4e-3)
    for _ in range(120):
        out = stock.vqvae(x)
        (torch.nn.functional.mse_loss(out.sample, x) + out.commit_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    pipe = LatentVDMPipeline.from_diffusers(stock)
    pipe.fit_first_stage(levels)
    stage = pipe.first_stage
    chosen, mean = float(stage.log_deviation.detach()), stage.posterior(stage.scale(levels)).mean

    def cost(log_deviation: float) -> float:
        y = mean + math.exp(log_deviation) * torch.randn(mean.shape, generator=seeded(7))
        rate = 0.5 * torch.log1p(mean.var((0, 2, 3)) * math.exp(-2 * log_deviation)).mean() * mean[0].numel()
        return float(rate) - float(stage.log_likelihood(levels, y).mean())

    with torch.no_grad():
        assert cost(chosen) < cost(chosen + 2.5) and cost(chosen) < cost(chosen - 2.5)


def test_the_bound_of_gaussian_latents_is_the_closed_form_within_its_error() -> None:
    """With the exact network of latents from ``N(mu, s^2)``; each y is a draw around its encoder's vectors."""
    pipe, case = gaussian_latents()
    levels = images(8, "test")
    report = pipe.log_likelihood(levels, VariationalBound(), replicates=24, seed=2)
    process = pipe.process
    mean, deviation = process.posterior(process.encode(levels))
    draws = [mean + deviation * torch.randn(mean.shape, generator=seeded(i)) for i in range(200)]
    ends = process.gaussian.schedule.endpoints()
    exact = torch.stack([exact_diffusion_term(y.double(), ends, case) for y in draws]).mean() / (64 * math.log(2))
    assert abs(report.terms["diffusion"] - float(exact)) < 4 * report.standard_error < 1.0


def gaussian_latents() -> tuple[LatentVDMPipeline, Case]:
    """A pipeline with the exact network of latents from ``N(mu, s^2)``, on a table of betas that ends in noise."""
    case = Case("", "", zero_snr, "velocity", mean=0.05, deviation=0.3)
    network = GaussianNetwork("velocity", case.mean, case.deviation, sample_size=4, in_channels=2, out_channels=2)
    pipe = quiet(LatentVDMPipeline.from_diffusers(ldm(network, zero_snr())))
    pipe.fit_first_stage(images(16))
    return pipe, case


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ode", "importance_weighted"])
def test_the_ode_of_gaussian_latents_is_the_closed_form_within_its_error(method: str) -> None:
    """``E log p_0(z_0)`` of ``z_0 = alpha_0 y``, y a draw from q(y|x), under the data's own marginal at gamma_0."""
    pipe, case = gaussian_latents()
    levels, process = images(3, "test"), pipe.process
    chosen = ProbabilityFlow(divergence="exact", tolerance=1e-5)
    asked = chosen if method == "ode" else ImportanceWeighted(draws=2, flow=chosen)
    report = pipe.log_likelihood(levels, asked, replicates=8)
    mean, deviation = (value.double() for value in process.posterior(process.encode(levels)))
    gamma_0 = process.gaussian.schedule.endpoints()[0]
    alpha_2, sigma_2 = 1 / (1 + math.exp(gamma_0)), 1 / (1 + math.exp(-gamma_0))
    variance = alpha_2 * case.deviation**2 + sigma_2
    distance = alpha_2 * ((mean - case.mean) ** 2 + deviation**2) / (2 * variance)
    nats = (0.5 * math.log(2 * math.pi * variance) + distance).flatten(1).sum(1)
    entropy = (deviation.log() + 0.5 * math.log(2 * math.pi * math.e) + 0.5 * math.log(alpha_2)).flatten(1).sum(1)
    terms = report.terms["base_density"] + report.terms["volume_change"]
    assert abs(terms - float(nats.mean()) / (64 * math.log(2))) < 5 * report.standard_error, "by 8 replicates"
    drawn = abs(report.terms["latent"] + float(entropy.mean()) / (64 * math.log(2)))
    assert drawn < (1e-6 if method == "ode" else 4 * report.standard_error), "the entropy itself, or its draws"
    total = sum(report.terms.values())
    assert report.bits_per_dim == pytest.approx(total, abs=1e-9) and "reconstruction" in report.terms
    assert pipe.log_likelihood(levels, VariationalBound(), replicates=16).bits_per_dim > report.bits_per_dim - 0.2


@every_kind
def test_it_is_saved_loaded_and_read_from_a_folder(kind: str, tmp_path: Path) -> None:
    stock = KINDS[kind]()
    stock.save_pretrained(tmp_path / "stock")
    pipes = [LatentVDMPipeline.from_diffusers(one) for one in (stock, tmp_path / "stock")]
    for pipe in pipes:
        pipe.fit_first_stage(images(8))
    pipes[0].save_pretrained(tmp_path / "ours")
    pipes.append(LatentVDMPipeline.from_pretrained(tmp_path / "ours"))
    levels = images(3, "test")
    bits = [quiet(pipe).log_likelihood(levels, replicates=2, **told(kind, 3)).per_image for pipe in pipes]
    assert all(torch.equal(one, bits[0]) for one in bits)
    samples = [pipe(3, seeded(1), num_inference_steps=3, output_type="np", **told(kind, 3)).images for pipe in pipes]
    assert all(np.array_equal(one, samples[0]) for one in samples)
    assert pipes[2].first_stage.config.fitted_on == 8


def test_the_command_fits_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ldm().save_pretrained(tmp_path)
    words = ["evaluate", str(tmp_path), "--dataset_name", "digits", "--max_images", "3", "--replicates", "2", "--json"]
    assert main(words) == 2
    assert "--fit_split" in capsys.readouterr().err
    assert main([*words, "--fit_split", "train[:16]"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_images"] == 3 and any("16 images" in note for note in report["notes"])


# ---- bad input ------------------------------------------------------------------------------------------------------


@every_kind
def test_a_pixel_pipelines_reader_names_the_latent_one(kind: str) -> None:
    with pytest.raises(ConfigurationError, match=naming("LatentVDMPipeline.from_diffusers")):
        VDMPipeline.from_diffusers(KINDS[kind]())


@pytest.mark.parametrize("field", ["decoder", "variance_type"])
def test_what_a_latent_model_has_not_is_refused(field: str) -> None:
    with pytest.raises(ConfigurationError, match=naming(field)):
        LatentVDMPipeline.from_diffusers(ldm(), **{field: "ddpm"})


def test_a_pipeline_of_text_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for cls in (LatentVDMPipeline, VDMPipeline):
        with pytest.raises(ConfigurationError, match=naming("text_encoder")):
            cls.from_diffusers(tmp_path)
    with pytest.raises(ConfigurationError, match=naming("text_encoder")):
        open_pipeline(str(tmp_path))


def test_a_network_that_is_not_of_the_latents_is_refused() -> None:
    for outputs in (1, 6):
        stock = ldm()
        stock.unet.register_to_config(out_channels=outputs)
        with pytest.raises(ConfigurationError, match=naming(outputs)):
            LatentVDMPipeline.from_diffusers(stock)


def test_a_family_without_betas_asks_for_the_number_of_levels() -> None:
    with pytest.raises(ConfigurationError, match=naming("num_levels")):
        LatentVDMPipeline.from_diffusers(ldm(scheduler=FlowMatchEulerDiscreteScheduler()))


def test_a_scale_is_not_fitted_on_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ldm().save_pretrained(tmp_path)
    words = ["evaluate", str(tmp_path), "--dataset_name", "digits", "--max_images", "3", "--replicates", "2"]
    assert main([*words, "--fit_split", "test[:16]"]) == 2
    assert "--fit_split" in capsys.readouterr().err


def test_images_of_another_shape_fit_nothing() -> None:
    pipe = LatentVDMPipeline.from_diffusers(ldm())
    with pytest.raises(DataError, match="16"):
        pipe.fit_first_stage(torch.zeros(2, 1, 16, 16, dtype=torch.long))


def test_a_scale_that_was_trained_is_not_fitted_again() -> None:
    taken = LatentVDMPipeline.from_diffusers(ldm())
    stage = VQModelFirstStage.from_autoencoder(taken.first_stage.autoencoder, sample_size=8)
    pipe = LatentVDMPipeline(stage, taken.unet, taken.scheduler)
    with pytest.raises(ConfigurationError, match=naming("VQModelFirstStage")):
        pipe.fit_first_stage(images(2))


def test_a_network_of_betas_that_end_at_no_signal_must_predict_more_than_noise() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    with pytest.raises(ConfigurationError, match=naming("prediction_type")):
        LatentVDMPipeline.from_diffusers(ldm(scheduler=scheduler))
