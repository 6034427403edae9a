"""diffusers' families beside DDPM's: exact networks in their own conventions, their samples, and what is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from naming import naming
from schedulers import family_table
from schedulers.family_table import ALL, CASES, Case
from tiny import quiet, seeded
from vdm_hub import VDMPipeline, VDMScheduler
from vdm_hub.commands import main
from vdm_hub.errors import ConfigurationError
from vdm_hub.schedulers.families import process_config

NATS = 1e-4
every_case = pytest.mark.parametrize("name", CASES)
SAID = {"num_levels": 17, "data_scaling": "full", "decoder": "factorised"}


# ---- likelihoods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_ode_finds_the_density_of_gaussian_data(name: str) -> None:
    assert family_table.density_error(ALL[name]) < NATS


@pytest.mark.parametrize("name", ALL)
def test_the_bound_is_the_closed_form_within_its_error(name: str) -> None:
    off, standard_error = family_table.bound_error(ALL[name])
    most = 0.12 if name in CASES else 0.4  # of latents the encoder's draws are in it, too
    assert abs(off) < 4 * standard_error < most, "bits/dim; a wrong convention is off by more than 1"


def test_the_table_of_the_docs_is_of_these_families() -> None:
    written = family_table.PAGE.read_text().split(family_table.BEGIN)[1].split(family_table.END)[0]
    rows = [line.split(" | ") for line in written.strip().splitlines()[2:]]
    assert [row[1].strip("`") for row in rows] == list(ALL)
    assert all(float(row[5]) <= NATS for row in rows)


# ---- samples --------------------------------------------------------------------------------------------------------


def in_the_common_loop(stock: Any, steps: int) -> Tensor:
    """The latents of diffusers' own loop, as its pipelines write it: scale, network, step."""
    scheduler, latents = stock.scheduler, torch.randn((2, *shape_of(stock)), generator=seeded(3))
    scheduler.set_timesteps(steps)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(stock.unet(scaled, timestep).sample, timestep, latents).prev_sample
    return latents


def shape_of(stock: Any) -> tuple[int, int, int]:
    return stock.unet.config.in_channels, stock.unet.config.sample_size, stock.unet.config.sample_size


@every_case
def test_samples_are_the_stock_pipelines_bit_for_bit(name: str) -> None:
    case, steps = CASES[name], 6
    stock, pipe = case.stock(), case.pipe()
    if case.pipeline != "DDPMPipeline":
        theirs = stock(2, num_inference_steps=steps, generator=seeded(3)).images
        ours = pipe(2, seeded(3), num_inference_steps=steps).images
        assert [np.asarray(one).tobytes() for one in ours] == [np.asarray(one).tobytes() for one in theirs]
        return
    if "rescale" in name:  # DDPM's own steps draw
        theirs = stock(2, seeded(3), num_inference_steps=steps, output_type="pt").images
        latents = pipe(2, seeded(3), num_inference_steps=steps, output_type="latent").images
        assert torch.equal((latents / 2 + 0.5).clamp(0, 1), theirs)
        return
    ours = pipe(2, seeded(3), num_inference_steps=steps, output_type="latent").images
    assert torch.equal(ours, in_the_common_loop(stock, steps))
    images = pipe(2, seeded(3), num_inference_steps=steps, output_type="pt").images
    assert float((images - (ours / 2 + 0.5).clamp(0, 1)).abs().max()) <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "ScoreSdeVeScheduler"])
def test_the_vdms_own_samplers_run_it_too(name: str) -> None:
    case = CASES[name]
    pipe = case.pipe(sample_size=8)
    pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config)
    for sampler in ("ancestral", "probability_flow"):
        images = pipe(16, seeded(0), num_inference_steps=500, output_type="latent", sampler=sampler).images
        gamma = pipe.process.schedule.endpoints()[0]  # type: ignore[union-attr]
        values = images * math.sqrt(1 + math.exp(gamma))  # z_0 / alpha_0
        chance, steps = 4.5 / math.sqrt(values.numel()), 0.02  # what 500 steps are off by
        assert abs(float(values.mean()) - case.mean) < (chance + steps) * case.deviation
        assert abs(float(values.std()) / case.deviation - 1) < chance / math.sqrt(2) + steps


# ---- saved and loaded -----------------------------------------------------------------------------------------------


def network(channels: int = 1, **fields: Any) -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    shape = {"sample_size": 8, "in_channels": channels, "out_channels": channels}
    return diffusers.UNet2DModel(**shape, **blocks, layers_per_block=1, norm_num_groups=4, **fields).eval()


SAVED = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler", "KarrasVeScheduler"]


def saved(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A stock pipeline of a common network in a folder, and what must be said of it."""
    case, is_ve = CASES[name], "Ve" in name
    unet = network(3, time_embedding_type="fourier") if is_ve else network()
    stock = quiet(getattr(diffusers, case.pipeline)(unet=unet, scheduler=case.scheduler()))
    stock.save_pretrained(folder)
    return stock, case.said if is_ve else SAID


@pytest.mark.parametrize("name", SAVED)
def test_it_is_taken_over_from_a_folder_saved_and_loaded(name: str, tmp_path: Path) -> None:
    stock, said = saved(name, tmp_path / "stock")
    pipes = [VDMPipeline.from_diffusers(stock, **said), VDMPipeline.from_diffusers(tmp_path / "stock", **said)]
    pipes[0].save_pretrained(tmp_path / "ours")
    pipes.append(VDMPipeline.from_pretrained(tmp_path / "ours"))
    levels = torch.randint(0, 17, (3, *pipes[0].image_shape), generator=seeded(0))
    bits = [quiet(pipe).bits_per_dim(levels, replicates=2).per_image for pipe in pipes]
    images = [pipe(2, seeded(1), num_inference_steps=4, output_type="np").images for pipe in pipes]
    assert all(torch.equal(one, bits[0]) for one in bits)
    assert all(np.array_equal(one, images[0]) for one in images)
    assert type(pipes[2].scheduler) is type(stock.scheduler)
    configs = [dict(process_config(pipe.scheduler.config)) for pipe in (pipes[0], pipes[2])]
    assert configs[0] == configs[1] and configs[0]["prediction_type"] != "epsilon"


def test_a_stock_sampler_in_its_place_keeps_the_process(tmp_path: Path) -> None:
    stock, said = saved("EDMEulerScheduler", tmp_path)
    pipe = quiet(VDMPipeline.from_diffusers(stock, **said))
    levels = torch.randint(0, 17, (3, 1, 8, 8), generator=seeded(0))
    before = pipe.bits_per_dim(levels, replicates=2).per_image
    pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(pipe.bits_per_dim(levels, replicates=2).per_image, before)


def test_the_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("FlowMatchEulerDiscreteScheduler", tmp_path / "flow")
    place = str(tmp_path / "flow")
    words = ["evaluate", place, "--dataset_name", "digits", "--max_images", "3", "--replicates", "2", "--json"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in SAID)
    said = [word for name, value in SAID.items() for word in (f"--{name}", str(value))]
    assert main([*words, *said]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_images"] == 3 and math.isfinite(report["bits_per_dim"])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "missing"), [(name, field) for name, case in CASES.items() for field in case.said])
def test_what_a_family_leaves_undefined_is_asked_for(name: str, missing: str) -> None:
    case = CASES[name]
    with pytest.raises(ConfigurationError, match=naming(missing)):
        VDMPipeline.from_diffusers(case.stock(), **{key: case.said[key] for key in case.said if key != missing})


FLOW = CASES["FlowMatchEulerDiscreteScheduler"]
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "time runs the other way": (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), SAID, "invert_sigmas"),
    "no family": (diffusers.CMStochasticIterativeScheduler(), SAID, "CMStochasticIterativeScheduler"),
    "no positive noise": (diffusers.EDMEulerScheduler(sigma_min=0.0), SAID, "sigma_min"),
    "no noise in order": (diffusers.EDMEulerScheduler(sigma_max=0.001), SAID, "sigma_max"),
    "betas' variance": (diffusers.EDMEulerScheduler(), SAID | {"variance_type": "fixed_large"}, "variance_type"),
    "another scaling": (diffusers.KarrasVeScheduler(), SAID, "data_scaling"),
    "continuous, without ends": (
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        SAID,
        "sigma_min",
    ),
    "a target that flow matching has not": (
        diffusers.FlowMatchEulerDiscreteScheduler(),
        SAID | {"prediction_type": "epsilon"},
        "prediction_type",
    ),
    "distilled": (diffusers.LCMScheduler(), {"num_levels": 17}, "LCMScheduler"),
    "flow of another target": (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), SAID, "flow_prediction"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_process_is_refused_by_name(kind: str) -> None:
    scheduler, said, named = BAD[kind]
    with pytest.raises(ConfigurationError, match=naming(named)):
        VDMPipeline.from_diffusers(diffusers.DDPMPipeline(unet=network(), scheduler=scheduler), **said)


def test_more_outputs_than_the_family_has_are_refused() -> None:
    unet = network()
    unet.register_to_config(out_channels=2)
    with pytest.raises(ConfigurationError, match=naming(2)):
        VDMPipeline.from_diffusers(
            diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.FlowMatchEulerDiscreteScheduler()), **SAID
        )


def test_grey_images_of_a_loop_that_draws_colours_are_sampled_by_the_vdm() -> None:
    stock = diffusers.ScoreSdeVePipeline(network(time_embedding_type="fourier"), diffusers.ScoreSdeVeScheduler())
    with pytest.warns(UserWarning, match="3 channels"):
        pipe = quiet(VDMPipeline.from_diffusers(stock, **SAID | {"data_scaling": "unit"}))
    assert isinstance(pipe.scheduler, VDMScheduler)
    assert pipe(2, seeded(0), num_inference_steps=3, output_type="pt").images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("name", SAVED)
def test_what_it_is_saved_as_can_be_published_with_a_card(name: str, tmp_path: Path) -> None:
    stock, said = saved(name, tmp_path / "stock")
    VDMPipeline.from_diffusers(stock, **said).save_pretrained(tmp_path / "ours")
    words = ["publish", str(tmp_path / "ours"), "me/model", "--license", "mit", "--dry_run"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "main" / "README.md").is_file()


def test_the_loop_of_a_stock_pipeline_takes_no_more_than_it_does() -> None:
    pipe = CASES["ScoreSdeVeScheduler"].pipe()
    asked: dict[str, Any] = {"sampler": "reverse_sde", "guidance_scale": 2.0, "latents": torch.zeros(1, 3, 2, 2)}
    asked |= {"class_labels": [1], "output_type": "latent", "callback_on_step_end": lambda *given: {}}
    for name, value in asked.items():
        with pytest.raises(ConfigurationError, match=naming(name)):
            pipe(1, num_inference_steps=2, **{name: value})


def test_a_wrong_prediction_type_may_be_put_right() -> None:
    scheduler = diffusers.EDMEulerScheduler()  # whose config says epsilon, and whose network has the other sign
    case = Case(
        "EDM", "all", lambda: scheduler, "edm_v", CASES["EDMEulerScheduler"].said | {"prediction_type": "v_prediction"}
    )
    assert family_table.density_error(case) < NATS
