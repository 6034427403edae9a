"""`VDMPipeline`: samples, likelihoods, and what diffusers' users expect of a pipeline."""

from __future__ import annotations

import math
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL.Image import Image
from torch import Tensor

import registered
from naming import naming
from tiny import LEVELS, Inputs, quiet, randomised, sampled, seeded, tiny_pipeline, tiny_unet, tiny_unet_2d
from vdm_hub import RegisteredModel, UNetVDMModel, VariationalBound, VDMObjective, VDMPipeline, VDMScheduler
from vdm_hub.diffusion.samplers import SAMPLERS
from vdm_hub.errors import ConfigurationError

STOCK_SAMPLERS = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
    EulerDiscreteScheduler,
)
# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_three_output_types_are_one_image(channels: int, mode: str) -> None:
    pipe = tiny_pipeline(channels=channels)
    pt = sampled(pipe)
    array = sampled(pipe, output_type="np")
    pictures = sampled(pipe, output_type="pil")
    assert pt.shape == (2, channels, 8, 8) and pt.dtype == torch.float32
    assert array.shape == (2, 8, 8, channels) and array.dtype == np.float32
    assert [(type(p), p.mode, p.size) for p in pictures] == [(Image, mode, (8, 8))] * 2
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    bytes_of_pictures = np.stack([np.asarray(p).reshape(8, 8, channels) for p in pictures])
    np.testing.assert_array_equal(bytes_of_pictures, np.round(255 * array.astype(np.float64)))


def test_samples_are_levels() -> None:
    scaled = sampled(tiny_pipeline()).double() * (LEVELS - 1)
    torch.testing.assert_close(scaled, scaled.round(), rtol=0, atol=1e-5)
    assert 0 <= float(scaled.min()) < float(scaled.max()) <= LEVELS - 1


def test_pictures_are_the_default_and_a_tuple_on_request() -> None:
    pipe = tiny_pipeline()
    (image,) = pipe(num_inference_steps=2).images
    assert isinstance(image, Image)
    unwrapped = pipe(2, generator=seeded(), num_inference_steps=2, output_type="pt", return_dict=False)
    assert isinstance(unwrapped, tuple) and len(unwrapped) == 1
    assert torch.equal(unwrapped[0], sampled(pipe, steps=2))


def test_images_need_not_be_square() -> None:
    unet = randomised(
        UNetVDMModel(
            sample_size=(4, 6),
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
        )
    )
    pipe = tiny_pipeline(unet)
    images = sampled(pipe)
    assert images.shape == (2, 1, 4, 6)
    assert math.isfinite(pipe.bits_per_dim(images, replicates=1).bits_per_dim)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "jpeg"}, ("output_type", "jpeg")),
        ({"batch_size": 0}, ("batch_size", 0)),
        ({"num_inference_steps": 0}, ("num_inference_steps", 0)),
        ({"latents": torch.zeros(2, 3, 8, 8)}, ("latents", "(2, 3, 8, 8)")),
        ({"generator": [seeded()], "batch_size": 2}, ("generators", 1, 2)),
        ({"class_labels": [0, 0], "batch_size": 2}, ("class_labels",)),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ("callback", "noise")),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        tiny_pipeline()(**arguments)


# ---- randomness -----------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_samples() -> None:
    pipe = tiny_pipeline()
    assert torch.equal(sampled(pipe, seed=3), sampled(pipe, seed=3))
    assert not torch.equal(sampled(pipe, seed=3), sampled(pipe, seed=4))


@pytest.mark.parametrize("scheduler", [VDMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_an_image_with_its_own_generator_does_not_depend_on_its_batch(scheduler: Any) -> None:
    pipe = tiny_pipeline()
    for parameter in pipe.unet.conv_out.parameters():  # the identity: exact, whatever the batch
        torch.nn.init.zeros_(parameter)
    if scheduler is not VDMScheduler:
        pipe.scheduler = pipe.scheduler.to_diffusers(scheduler)
    together = sampled(pipe, 3, generator=[seeded(5), seeded(6), seeded(7)])
    apart = torch.cat([sampled(pipe, 1, generator=[seeded(seed)]) for seed in (5, 6, 7)])
    assert torch.equal(together, apart)
    assert not torch.equal(together[0], together[1])


def test_latents_take_the_place_of_the_prior() -> None:
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    z_1 = torch.randn(3, 1, 8, 8, generator=seeded(9))
    images = sampled(pipe, 1, latents=z_1)
    assert torch.equal(inputs.samples[0], z_1)
    assert images.shape[0] == 3  # the batch is that of the latents
    drawn = seeded(0)
    first = torch.randn(2, 1, 8, 8, generator=drawn)
    assert torch.equal(sampled(pipe, latents=first, generator=drawn), sampled(pipe, seed=0))


def test_latents_in_half_precision_are_sampled_in_float32() -> None:
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    sampled(pipe, latents=torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16))
    assert {sample.dtype for sample in inputs.samples} == {torch.float32}


# ---- the steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_n_steps_are_n_network_evaluations(steps: int) -> None:
    """Decoding ``p(x|z_0)`` needs none: the levels come from z_0 alone."""
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    sampled(pipe, steps=steps)
    assert len(inputs.samples) == steps
    timesteps = torch.stack([timestep[0] for timestep in inputs.timesteps])
    torch.testing.assert_close(timesteps, 999 * (1 - torch.arange(steps) / steps))


def test_the_image_is_drawn_around_the_last_latent() -> None:
    pipe = tiny_pipeline(noise_schedule={"name": "linear", "config": {"gamma_min": -13.3}})
    latents: list[Tensor] = []
    images = sampled(pipe, steps=5, callback_on_step_end=lambda p, i, t, tensors: latents.append(tensors["latents"]))
    # At gamma_0 = -13.3 the noise of z_0 is a hundredth of the width of 17 levels.
    assert torch.equal(images, pipe.process.quantise(latents[-1]).float() / (LEVELS - 1))


def test_a_callback_reads_and_changes_latents() -> None:
    pipe = tiny_pipeline()
    seen: list[tuple[Any, int, float, tuple[str, ...], tuple[int, ...]]] = []

    def replace(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        seen.append((pipeline, step, float(timestep), tuple(tensors), tuple(tensors["latents"].shape)))
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if step == 3 else None

    images = sampled(pipe, steps=4, callback_on_step_end=replace)
    assert seen == [(pipe, i, t, ("latents",), (2, 1, 8, 8)) for i, t in enumerate([999.0, 749.25, 499.5, 249.75])]
    assert bool((images == 12 / 16).all())  # 0.5 is the centre of level 12, for every pixel


def test_a_progress_bar_counts_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=False)
    sampled(pipe, steps=3)
    assert "3/3" in capsys.readouterr().err
    sampled(quiet(pipe), steps=3)
    assert capsys.readouterr().err == ""


def test_class_labels_reach_the_network() -> None:
    pipe = tiny_pipeline(tiny_unet(num_class_embeds=3))
    inputs = Inputs(pipe.unet)
    as_list, as_tensor = (sampled(pipe, class_labels=labels) for labels in ([0, 2], torch.tensor([0, 2])))
    assert torch.equal(as_list, as_tensor)
    assert all(keywords["class_labels"].tolist() == [0, 2] for keywords in inputs.keywords)
    assert not torch.equal(as_list, sampled(pipe, class_labels=[0, 1]))
    one, other = (
        pipe.bits_per_dim(as_list, class_labels=labels, replicates=1, method=VariationalBound(pilot_evaluations=0))
        for labels in ([0, 2], [1, 2])
    )
    assert one.per_image[0] != other.per_image[0]
    torch.testing.assert_close(one.per_image[1], other.per_image[1])


class Guided(UNetVDMModel):
    """A network with an argument that the core has never heard of."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, strength: Tensor, return_dict: bool = True
    ) -> Any:
        return (super().forward(sample, timestep, return_dict=False)[0] * strength[:, None, None, None],)


def test_any_conditioning_of_the_network_passes_through_samples_and_likelihood() -> None:
    unet = randomised(Guided(**{key: value for key, value in tiny_unet().config.items() if not key.startswith("_")}))
    pipe = tiny_pipeline(unet)
    strong, weak = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.5])
    images = sampled(pipe, strength=strong)
    assert not torch.equal(images[1], sampled(pipe, strength=weak)[1])
    one, other = (
        pipe.bits_per_dim(images, strength=s, replicates=1, method=VariationalBound(pilot_evaluations=0)).per_image
        for s in (strong, weak)
    )
    assert one[0] == other[0] and one[1] != other[1]


def test_latents_are_an_output_type() -> None:
    pipe = tiny_pipeline()
    latents: list[Tensor] = []
    left = sampled(pipe, output_type="latent", callback_on_step_end=lambda p, i, t, x: latents.append(x["latents"]))
    assert torch.equal(left, latents[-1])


# ---- the processes of diffusers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "config"),
    [
        (200, {}),
        (7, {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}),
        (50, {"prediction_type": "sample", "variance_type": "fixed_large", "timestep_spacing": "trailing"}),
    ],
    ids=["epsilon", "v_prediction", "sample"],
)
def test_a_ddpm_config_gives_ddpms_trajectory_bit_for_bit(steps: int, config: dict[str, Any]) -> None:
    unet, stock = tiny_unet_2d(), DDPMScheduler(**config)
    inputs = Inputs(unet)
    ours = quiet(VDMPipeline(unet, VDMScheduler.from_config(stock.config)))
    images = sampled(ours, steps=steps)
    our_inputs, inputs.samples = inputs.samples, []
    our_timesteps, inputs.timesteps = inputs.timesteps, []
    stock_images = sampled(quiet(DDPMPipeline(unet, stock)), steps=steps)
    assert len(our_inputs) == len(inputs.samples) == steps
    assert all(torch.equal(a, b) for a, b in zip(our_inputs, inputs.samples, strict=True))
    assert [float(t.flatten()[0]) for t in our_timesteps] == [float(t) for t in inputs.timesteps]
    assert torch.equal(images, (stock_images * 255).round() / 255)


@pytest.mark.parametrize("sampler", STOCK_SAMPLERS)
def test_a_stock_sampler_stays_what_it_is(sampler: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    measured = sampled(pipe)
    bound = pipe.bits_per_dim(measured, replicates=2)
    pipe.scheduler = pipe.scheduler.to_diffusers(sampler)
    images = sampled(pipe)
    pipe.save_pretrained(tmp_path)
    for loader in (VDMPipeline, DiffusionPipeline):
        loaded = quiet(loader.from_pretrained(tmp_path))
        assert type(loaded) is VDMPipeline and type(loaded.scheduler) is sampler
        assert torch.equal(sampled(loaded), images)
        # Likelihoods are still those of the VDM.
        assert torch.equal(loaded.bits_per_dim(measured, replicates=2).per_image, bound.per_image)


def test_a_unet_2d_takes_the_place_of_the_vdms_network(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tiny_unet_2d())
    images = sampled(pipe)
    bound = pipe.bits_per_dim(images)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(VDMPipeline.from_pretrained(tmp_path))
    assert type(loaded.unet) is UNet2DModel
    assert torch.equal(sampled(loaded), images)
    assert torch.equal(loaded.bits_per_dim(images).per_image, bound.per_image)


# ---- weights --------------------------------------------------------------------------------------------------------


class Malice:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("component", ["unet", "noise_schedule"])
@pytest.mark.parametrize("loader", [VDMPipeline, DiffusionPipeline])
def test_nothing_is_unpickled_from_a_pipeline(loader: Any, component: str, tmp_path: Path) -> None:
    scheduler = VDMScheduler(num_levels=LEVELS, noise_schedule="learned_linear")
    VDMPipeline(tiny_unet(), scheduler, RegisteredModel("learned_linear")).save_pretrained(tmp_path / "pipeline")
    folder, mark = tmp_path / "pipeline" / component, tmp_path / "mark"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Malice(mark)))
    with pytest.raises(OSError, match=r"safetensors|diffusion_pytorch_model\.bin"):
        loader.from_pretrained(tmp_path / "pipeline")
    assert not mark.exists()
    pickle.loads((folder / "diffusion_pytorch_model.bin").read_bytes())
    assert mark.exists()  # the plant works


def test_pickled_weights_are_refused_even_when_asked_for(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    doors = ((VDMPipeline, {}), (DiffusionPipeline, {}), (UNetVDMModel, {"subfolder": "unet"}))
    for cls, arguments in doors:
        with pytest.raises(OSError, match="safetensors"):
            cls.from_pretrained(tmp_path, **arguments)
        with pytest.raises(ConfigurationError, match=naming("safetensors")):
            cls.from_pretrained(tmp_path, use_safetensors=False, **arguments)


def test_a_scheduler_of_another_schedule_than_the_component_is_refused() -> None:
    """Beside a learned schedule, whose weights would decide, without a word."""
    pipe = quiet(VDMPipeline(tiny_unet(), VDMScheduler(noise_schedule="learned_monotone", num_levels=LEVELS)))
    own = pipe.scheduler
    pipe.scheduler = VDMScheduler(noise_schedule={"name": "linear", "config": {"gamma_min": -4}}, num_levels=LEVELS)
    for call in (lambda: pipe(1, num_inference_steps=2), lambda: pipe.bits_per_dim(torch.zeros(1, 1, 8, 8).long())):
        with pytest.raises(ConfigurationError, match=naming("linear", "noise_schedule")):
            call()
    pipe.scheduler = own
    assert pipe(1, num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 8)


def test_an_output_of_another_shape_is_refused_and_not_broadcast() -> None:
    """One channel for three would fit into every formula."""
    network = tiny_unet(3, add_input=False)
    network.conv_out = torch.nn.Conv2d(8, 1, 3, padding=1)
    pipe = quiet(VDMPipeline(network, VDMScheduler(num_levels=LEVELS)))
    levels = torch.zeros(1, 3, 8, 8).long()
    samplers = [partial(pipe, 1, num_inference_steps=4, sampler=name) for name in ("ancestral", *SAMPLERS)]
    methods = [registered.build("likelihood_methods", name) for name in registered.names("likelihood_methods")]
    likelihoods = [partial(pipe.log_likelihood, levels, one) for one in (*methods, VariationalBound(3))]
    objective, batch = VDMObjective(network, pipe.process), {"levels": levels}
    train = partial(objective, batch, torch.tensor([0.5]), objective.draw_noise(batch, torch.Generator()))
    for call in (*samplers, *likelihoods, train):
        with pytest.raises(ConfigurationError, match=naming("(1, 8, 8)", "(3, 8, 8)", "output channels")):
            call()
