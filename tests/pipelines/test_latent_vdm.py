"""The latent VDM as a pipeline: samples, latents, likelihood, saved and loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UniPCMultistepScheduler
from torch import Tensor

from naming import naming
from runs import environment
from tiny import quiet, randomised, seeded
from vdm_hub import (
    AutoencoderKLFirstStage,
    ImportanceWeighted,
    LatentVDMPipeline,
    MarkovianHVAE,
    UNetVDMModel,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
)
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.levels import levels_from_images
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError, NonFiniteLossError
from vdm_hub.evaluation.evaluate import evaluate

LEVELS = torch.randint(0, 17, (5, 1, 8, 8), generator=seeded(1)).byte()
SCALING = {"shift": [0.25, -0.5], "scale": [2.0, 0.75]}
UNSCALED = {"shift": [0.0], "scale": [1.0]}
KINDS = ("grid", "vector", "autoencoder_kl")


def pipeline(kind: str = "grid", scaling: Any = SCALING) -> LatentVDMPipeline:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"in_channels": 1, "num_levels": 17, "block_out_channels": (8,), "norm_num_groups": 4}
    if kind == "autoencoder_kl":
        config = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
        stage: Any = AutoencoderKLFirstStage(config | {"latent_channels": 2}, sample_size=8, num_levels=17)
    else:
        stage = MarkovianHVAE(8, **fields, latent_shapes=[(2, 4, 4) if kind == "grid" else (2,)])
    size = {"grid": 4, "vector": 1, "autoencoder_kl": 8}[kind]
    unet = UNetVDMModel(
        size,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        fourier_features=(),
    )
    scheduler = VDMScheduler(num_levels=17)
    return quiet(LatentVDMPipeline(randomised(stage), randomised(unet), scheduler, latent_scaling=scaling))


def tensors(pipe: LatentVDMPipeline, *arguments: Any, **keywords: Any) -> Tensor:
    images: Tensor = pipe(*arguments, num_inference_steps=5, **{"output_type": "pt"} | keywords).images
    return images


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_images_of_the_levels_and_a_function_of_their_generators(kind: str) -> None:
    pipe = pipeline(kind)
    one = tensors(pipe, 3, seeded(4))
    assert one.shape == (3, 1, 8, 8)
    assert levels_from_images(one, 17).max() <= 16
    assert torch.equal(one, tensors(pipe, 3, seeded(4)))
    each = tensors(pipe, 3, [seeded(seed) for seed in range(3)])
    torch.testing.assert_close(each[2:], tensors(pipe, 1, [seeded(2)]))
    assert torch.equal(pipe.sample(3, seeded(4), 5), one)
    assert tensors(pipe, 2, seeded(4), output_type="latent").shape == (2, *pipe.latent_shape)
    assert tensors(pipe, 2, seeded(4), sampler="probability_flow").shape == (2, 1, 8, 8)
    assert pipe(2, seeded(), num_inference_steps=2).images[0].size == (8, 8)


def test_a_stock_sampler_takes_the_scheduler_s_place() -> None:
    pipe = pipeline()
    pipe.scheduler = pipe.scheduler.to_diffusers(UniPCMultistepScheduler)
    assert tensors(pipe, 2, seeded(4)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_reconstructions(kind: str) -> None:
    pipe = pipeline(kind)
    mean = pipe.encode(LEVELS, mean=True)
    assert mean.shape == (5, *pipe.latent_shape)
    drawn = torch.stack([pipe.encode(LEVELS, seeded(seed)) for seed in range(400)])
    own_mean, own_scale = pipe.first_stage.posterior(pipe.first_stage.scale(LEVELS))
    shift, scale = (torch.tensor(SCALING[name]).reshape(2, 1, 1) for name in ("shift", "scale"))
    torch.testing.assert_close(mean, (own_mean.reshape(mean.shape) - shift) / scale)
    deviation = own_scale.reshape(mean.shape) / scale
    assert bool(((drawn.mean(0) - mean).abs() < 5 * deviation / 20).all())  # 5 standard errors of 400 draws
    expected = pipe.first_stage.likeliest_levels(own_mean)
    assert torch.equal(levels_from_images(pipe.reconstruct(LEVELS, "pt"), 17).long(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_is_loaded_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    pipe = pipeline(kind)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["latent_scaling"] == SCALING
    assert index["first_stage"][0] == "vdm_hub"
    report = pipe.bits_per_dim(LEVELS, replicates=2)
    np.savez(tmp_path / "expected.npz", samples=tensors(pipe, 2, seeded(1)), bits=report.per_image)
    script = """
import sys, numpy as np, torch, vdm_hub
from diffusers import DiffusionPipeline
expected = np.load(sys.argv[1] + "/expected.npz")
levels = torch.randint(0, 17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
for cls in (DiffusionPipeline, vdm_hub.LatentVDMPipeline):
    pipe = cls.from_pretrained(sys.argv[1])
    assert type(pipe) is vdm_hub.LatentVDMPipeline
    images = pipe(2, torch.Generator().manual_seed(1), num_inference_steps=5, output_type="pt").images
    assert (images.numpy() == expected["samples"]).all()
    assert (pipe.bits_per_dim(levels, replicates=2).per_image.numpy() == expected["bits"]).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr  # diffusers' complaint of an argument's type


@pytest.mark.parametrize("transitions", [None, 6])
def test_the_evaluator_and_the_pipeline_say_the_same(transitions: int | None) -> None:
    pipe = pipeline()
    ours = pipe.log_likelihood(LEVELS, method=VariationalBound(transitions), replicates=3)
    images = ImageLevels(LEVELS, (1, 8, 8), 17)
    report = evaluate(pipe, images, method=VariationalBound(transitions), replicates=3, progress=False)
    torch.testing.assert_close(report.per_image, ours.per_image)
    assert list(report.terms) == ["reconstruction", "prior", "diffusion", "latent"]


def test_a_report_tells_how_the_latents_lie() -> None:
    pipe = pipeline(scaling=UNSCALED)
    mean, scale = pipe.first_stage.posterior(pipe.first_stage.scale(LEVELS))
    told = pipe.bits_per_dim(LEVELS, replicates=2).to_dict()["latents"]
    spread = mean.var((0, 2, 3), correction=0) + (scale**2).mean((0, 2, 3))
    assert told["images"] == 5
    assert told["mean"] == pytest.approx(mean.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert told["standard_deviation"] == pytest.approx(spread.sqrt().tolist(), rel=1e-5)
    report = evaluate(pipe, ImageLevels(LEVELS, (1, 8, 8), 17), replicates=2, progress=False)
    assert report.details["latents"] == told
    scaled = pipeline(scaling={"shift": told["mean"], "scale": told["standard_deviation"]})
    again = scaled.bits_per_dim(LEVELS, replicates=2)
    assert again.details["latents"]["standard_deviation"] == pytest.approx([1, 1], rel=1e-5)
    assert not again.details.get("notes")


@pytest.mark.parametrize("scaling", [{"shift": [2.5, 2.5]}, {"scale": [0.2, 0.2]}, {"scale": [50.0, 1.0]}])
def test_latents_that_are_not_normalised_are_reported(scaling: dict[str, list[float]]) -> None:
    (said,) = pipeline(scaling=UNSCALED | scaling).bits_per_dim(LEVELS, replicates=2).details["notes"]
    assert said.startswith("the latents are not normalised: over 5 images the latents have means ")


def test_latents_that_carry_nothing_are_reported() -> None:
    pipe = pipeline(scaling=UNSCALED)
    with torch.no_grad():
        for parameter in pipe.first_stage.encoders[0].trunk.head.parameters():
            parameter.zero_()
    (said,) = pipe.bits_per_dim(LEVELS, replicates=2).details["notes"]
    assert said.startswith("posterior collapse: over 5 images q(y|x) hardly depends on x (0 nats")


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"foo": [1.0]}, ("latent_scaling", "foo")),
        ([1, 2], ("latent_scaling", "[1, 2]")),
        ({"shift": [0.0], "scale": None}, ("latent_scaling", "'scale': None")),
        ({"shift": ["a", "b"], "scale": [1.0]}, ("latent_scaling", "shift")),
        ({"shift": [0.0]}, ("latent_scaling", "scale")),
        ({"scale": [1.0]}, ("latent_scaling", "shift")),
        ({}, ("latent_scaling", "{}", "shift", "scale")),
        (None, ("latent_scaling", "None")),
    ],
)
def test_what_is_no_scaling_is_refused(scaling: Any, message: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        pipeline(scaling=scaling)


@pytest.mark.parametrize("kept", [{}, None, {"shift": [0.25, -0.5]}, {"scale": [2.0, 0.75]}], ids=str)
def test_a_saved_scaling_without_a_part_of_it_is_refused(kept: Any, tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"latent_scaling": kept}))
    with pytest.raises(CheckpointError, match="latent_scaling is"):
        LatentVDMPipeline.from_pretrained(tmp_path)


def test_latents_as_they_are_are_said_to_be_so(tmp_path: Path) -> None:
    pipe = LatentVDMPipeline(**pipeline().components)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["latent_scaling"] == {"shift": [0.0], "scale": [1.0]}
    loaded = quiet(LatentVDMPipeline.from_pretrained(tmp_path))
    assert torch.equal(loaded.encode(LEVELS, mean=True), pipe.encode(LEVELS, mean=True))


def test_parts_that_do_not_fit_are_refused() -> None:
    pipe = pipeline()
    for size, channels in ((8, 2), (4, 3)):
        unet = UNetVDMModel(size, channels, channels, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
        with pytest.raises(ConfigurationError, match=naming("2x4x4", f"{channels}x{size}x{size}")):
            LatentVDMPipeline(pipe.first_stage, unet, pipe.scheduler)
    bare = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ConfigurationError, match=naming("AutoencoderKL", "from_autoencoder")):
        LatentVDMPipeline(bare, pipe.unet, pipe.scheduler)


def test_latents_that_are_not_finite_are_not_decoded() -> None:
    given = torch.stack([torch.zeros(2, 4, 4), torch.full((2, 4, 4), torch.nan)])
    with pytest.raises(ConfigurationError, match=naming("latents", "(2, 2, 4, 4)")):
        tensors(pipeline(), latents=given)
    pipe = pipeline()
    second_fails = torch.tensor([1.0, torch.nan]).reshape(2, 1, 1, 1)
    pipe.unet.register_forward_hook(lambda module, arguments, output: (output[0] * second_fails,))
    with pytest.raises(NonFiniteLossError, match=naming(1, 2)):
        tensors(pipe, latents=torch.zeros(2, 2, 4, 4))


def test_the_scaling_decides_the_likelihood_s_description() -> None:
    assert pipeline().description() != pipeline(scaling=UNSCALED).description()


def test_what_it_has_not_is_refused() -> None:
    pipe = pipeline()
    with pytest.raises(ConfigurationError, match=naming("LatentProcess")):
        pipe.log_likelihood(LEVELS, ImportanceWeighted(transitions=4))
    with pytest.raises(DataError, match=naming("(1, 6, 6)")):
        pipe.encode(LEVELS[..., :6, :6])
    with pytest.raises(ConfigurationError, match=naming("latents", "(2, 1, 8, 8)", "2, 4, 4")):
        pipe(latents=torch.zeros(2, 1, 8, 8))
    pipe.scheduler = VDMScheduler(num_levels=256)
    with pytest.raises(ConfigurationError, match=naming(17, "num_levels", 256)):
        pipe.log_likelihood(LEVELS)
    assert isinstance(pipe, VDMPipeline)
    assert DiffusionPipeline in type(pipe).__mro__
