"""What a call is given is checked before its first evaluation; `from_pipe` for every pipeline."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor

from naming import naming
from tiny import Inputs, quiet, sampled, seeded, tiny_pipeline, tiny_unet, tiny_unet_2d
from vdm_hub import (
    HVAEPipeline,
    LatentVDMPipeline,
    MarkovianHVAE,
    RegisteredModel,
    UNetVDMModel,
    VDMPipeline,
    VDMScheduler,
)
from vdm_hub.errors import ConfigurationError
from vdm_hub.schedulers.configs import SHOWN_SAMPLERS


def pipelines() -> dict[str, Any]:
    ddpm = VDMScheduler.from_config(DDPMScheduler(num_train_timesteps=50).config)
    stock = tiny_pipeline()
    stock.scheduler = stock.scheduler.to_diffusers(DDIMScheduler)
    return {
        "vdm": tiny_pipeline(),
        "a beta table": quiet(VDMPipeline(tiny_unet(), ddpm)),
        "a stock sampler": stock,
    }


STEPS = [-1, 0, 2.5, 4.0, True, "4", None, math.nan, [4], torch.tensor(2.5)]


@pytest.mark.parametrize("kind", ["vdm", "a beta table", "a stock sampler"])
def test_steps_are_whole_numbers_from_one(kind: str) -> None:
    pipe = pipelines()[kind]
    inputs = Inputs(pipe.unet)
    for steps in STEPS:
        with pytest.raises(ConfigurationError, match="num_inference_steps is"):
            pipe(1, num_inference_steps=steps)
    if kind != "vdm":
        with pytest.raises(ConfigurationError, match=naming("num_inference_steps", 1001)):
            pipe(1, num_inference_steps=1001)
    assert inputs.samples == []
    assert len(sampled(pipe, steps=np.int64(3))) == 2  # type: ignore[arg-type]
    assert len(inputs.samples) == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *(({"batch_size": size}, ("batch_size",)) for size in (0, -2, 1.5, True, "2", math.nan)),
        ({"generator": 7}, ("generator", 7)),
        ({"generator": [seeded(), 7], "batch_size": 2}, ("generator",)),
        ({"generator": (seeded(),), "batch_size": 2}, ("generators", 1, 2)),
        ({"generator": [seeded(), None], "batch_size": 2}, ("generators", 2)),
        ({"generator": [], "batch_size": 2}, ("generators", 0, 2)),
        ({"latents": torch.zeros(1, 1, 8, 8, dtype=torch.long)}, ("latents", "torch.int64")),
        ({"latents": [[0.0]]}, ("latents", "list")),
        ({"latents": torch.zeros(0, 1, 8, 8)}, ("latents",)),
        ({"latents": torch.full((1, 1, 8, 8), math.nan)}, ("latents",)),
        ({"class_labels": [0]}, ("class_labels",)),
    ],
)
def test_what_a_sample_is_drawn_of_is_checked(arguments: dict[str, Any], named: Any) -> None:
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    hvae = HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(1, 8, 8)]))
    with pytest.raises(ConfigurationError, match=naming(*named)):
        pipe(**{"num_inference_steps": 2} | arguments)
    if "class_labels" not in arguments:
        with pytest.raises(ConfigurationError, match=naming(*named)):
            hvae(**arguments)
    assert inputs.samples == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"callback_on_step_end": 3},
        *({"callback_on_step_end_tensor_inputs": asked} for asked in (None, "latents", ["images"])),
    ],
)
def test_a_callback_is_a_function_of_what_there_is(arguments: dict[str, Any]) -> None:
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    with pytest.raises(ConfigurationError, match="callback"):
        pipe(1, num_inference_steps=2, **arguments)
    assert inputs.samples == []


SOME_SAMPLERS = {
    "DDPMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}
SAMPLERS = [
    name if name in SOME_SAMPLERS else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(SHOWN_SAMPLERS.keys() - {"VDMScheduler"})
]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_stock_sampler_gives_numbers_or_says_before_the_first_evaluation_how_many_steps(name: str) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = pipe.scheduler.to_diffusers(getattr(diffusers, name))
    inputs = Inputs(pipe.unet)
    assert bool(pipe(1, num_inference_steps=50, output_type="latent").images.isfinite().all())
    for steps in (1, 2, 3, 1000):
        inputs.samples.clear()
        try:
            assert bool(pipe(1, num_inference_steps=steps, output_type="latent").images.isfinite().all())
        except ConfigurationError as error:
            assert inputs.samples == [] and "num_inference_steps" in str(error)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (None, ("class_labels", 3)),
        ([0, 3], ("class_labels", 3)),
        ([-1, 0], ("class_labels", "-1")),
        ([0.0, 1.0], ("class_labels", "torch.float32")),
        ([True, False], ("class_labels", "torch.bool")),
        (["a", "b"], ("class_labels",)),
        ([None, 0], ("class_labels",)),
        ([[0], [1]], ("labels", 2)),
        ([0], ("labels", 2)),
        ([0, 1, 2], ("labels", 2)),
    ],
)
def test_labels_are_classes_of_the_network_one_for_each_image(labels: Any, named: Any) -> None:
    pipe = tiny_pipeline(tiny_unet(num_class_embeds=3))
    inputs, images = Inputs(pipe.unet), torch.zeros(2, 1, 8, 8, dtype=torch.long)
    with pytest.raises(ConfigurationError, match=naming(*named)):
        pipe(2, num_inference_steps=2, class_labels=labels)
    with pytest.raises(ConfigurationError, match=naming(*named)):
        pipe.bits_per_dim(images, class_labels=labels)
    assert inputs.samples == []
    assert len(sampled(pipe, class_labels=torch.tensor([0, 2], dtype=torch.uint8))) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        *({name: value} for name in ("batch_size", "replicates") for value in (0, -1, 1.5, True)),
        *({"seed": value} for value in (-1, 0.5)),
        *({"times_per_datum": value} for value in (0, -1, 1.5, True)),
        *({"transitions": value} for value in (0, 2.5, True)),
        *({"draws": value, "name": "importance_weighted", "transitions": 2} for value in (0, 1.5)),
        *({"pilot_evaluations": value} for value in (-1, 255, 256.5, True)),
    ],
)
def test_numbers_of_a_likelihood_are_whole_and_in_range(arguments: dict[str, Any]) -> None:
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    name, value = next(iter(arguments.items()))
    kind = arguments.pop("name", "bound")
    if name not in ("batch_size", "replicates", "seed"):
        arguments = {"method": {"name": kind, "config": arguments}}
    with pytest.raises(ConfigurationError, match=naming(name, value)):
        pipe.log_likelihood(torch.zeros(1, 1, 8, 8, dtype=torch.long), **arguments)
    assert inputs.samples == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"replicate": 4},
        {"tolerance": 1e-3},
        {"flow": {"tolerance": 1e-3}},
        {"transitions": 4},
        {"draws": 4, "method": "importance_weighted"},
        {"method": "exact"},
        {"sample": torch.zeros(2)},
        {"context": torch.zeros(2, 3)},
        {"encoder_hidden_states": torch.zeros(2, 3)},
    ],
)
def test_a_likelihood_takes_no_argument_that_neither_it_nor_its_network_knows(arguments: dict[str, Any]) -> None:
    pipe, images = tiny_pipeline(), torch.zeros(2, 1, 8, 8, dtype=torch.long)
    inputs = Inputs(pipe.unet)
    hvae = HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(1, 8, 8)]))
    for model in (pipe, hvae):
        with pytest.raises(ConfigurationError, match=next(iter(arguments))):
            model.bits_per_dim(images, **arguments)
    assert inputs.samples == []


@pytest.mark.parametrize("name", ["num_inference_step", "timesteps", "sample", "return_dicts", "context"])
def test_a_sample_takes_no_argument_that_neither_it_nor_its_network_knows(name: str) -> None:
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    with pytest.raises(ConfigurationError, match=name):
        pipe(1, **{"num_inference_steps": 2} | {name: 2})
    assert inputs.samples == []


def test_what_a_network_takes_by_name_is_one_for_each_image() -> None:
    class Shifted(UNetVDMModel):
        def forward(self, sample: Tensor, timestep: Tensor, shift: Any = None, return_dict: bool = True) -> Any:
            return super().forward(sample + shift.reshape(-1, 1, 1, 1), timestep, return_dict=return_dict)

    pipe, images = tiny_pipeline(Shifted(**dict(tiny_unet().config))), torch.zeros(2, 1, 8, 8, dtype=torch.long)
    for value in (3.0, torch.zeros(3), torch.tensor(1.0)):
        with pytest.raises(ConfigurationError, match=naming("shift", 2)):
            pipe.bits_per_dim(images, shift=value)
    assert pipe.bits_per_dim(images, shift=torch.zeros(2)).is_bound
    assert len(sampled(pipe, shift=torch.zeros(2))) == 2


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    "grid",
    [
        {"timesteps": []},
        {"timesteps": [10.0, 10.0]},
        {"timesteps": [5.0, 10.0]},
        {"timesteps": [math.nan]},
        {"timesteps": [40.0, math.nan, 3.0]},
        {"timesteps": [math.inf, 3.0]},
        {"timesteps": [1000.0]},
        {"timesteps": [5.0, -1.0]},
        {"timesteps": ["a"]},
        {"timesteps": 5},
        {"sigmas": []},
        {"sigmas": [0.5, 1.0]},
        {"sigmas": [math.nan, 0.5]},
        {"sigmas": [1.0, -0.5]},
        {"sigmas": [1e6, 1.0]},
        {"sigmas": [1.0, 1e-9]},
        {"sigmas": [0.0]},
        {"num_inference_steps": 3, "sigmas": [1.0]},
        {},
    ],
)
def test_grids_are_finite_descending_and_within_the_schedule(grid: dict[str, Any], table: bool) -> None:
    scheduler = VDMScheduler.from_config(DDPMScheduler().config) if table else VDMScheduler()
    before = scheduler.timesteps
    with pytest.raises(ConfigurationError):
        scheduler.set_timesteps(**grid)
    assert scheduler.timesteps is before


def test_a_table_takes_whole_timesteps_and_diffusers_own_last_sigma() -> None:
    table, vdm = VDMScheduler.from_config(DDPMScheduler().config), VDMScheduler()
    with pytest.raises(ConfigurationError, match=naming("timestep", 2.5)):
        table.set_timesteps(timesteps=[5.0, 2.5])
    table.set_timesteps(timesteps=[999.0, 500, 0])
    assert table.timesteps.tolist() == [999, 500, 0]
    for sigmas in ([5.0, 1.0, 0.1], [5.0, 1.0, 0.1, 0.0]):  # a zero at the end is the chain's end
        vdm.set_timesteps(sigmas=sigmas)
        assert len(vdm.timesteps) == 3


# ---- a step by itself ----------------------------------------------------------------------------------------------


def vdm_chain() -> VDMScheduler:
    return VDMScheduler()


def ddpm_chain() -> VDMScheduler:
    found: VDMScheduler = VDMScheduler.from_config(DDPMScheduler(num_train_timesteps=50).config)
    return found


@pytest.mark.parametrize("timestep", [math.nan, math.inf, 1234.0, -5.0, None, "now", torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("chain", [vdm_chain, ddpm_chain])
def test_a_step_from_no_timestep_of_the_process_is_refused(chain: Any, timestep: Any) -> None:
    scheduler = chain()
    scheduler.set_timesteps(5)
    z = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigurationError, match="timestep"):
        scheduler.step(z, timestep, z)
    if isinstance(timestep, float):
        for call in (scheduler.interval, lambda one: scheduler.transition_log_prob(z, z, z, one)):
            with pytest.raises(ConfigurationError, match="timestep"):
                call(timestep)


def test_a_step_is_from_any_time_of_the_process_and_of_a_chain_from_its_own() -> None:
    z = torch.zeros(1, 3, 8, 8)
    for scheduler in (vdm_chain(), ddpm_chain()):
        scheduler.set_timesteps(5)
        for timestep in (*scheduler.timesteps, int(scheduler.timesteps.max())):
            assert scheduler.step(z, timestep, z).prev_sample.shape == z.shape
    for timestep in (3.7, 3):
        with pytest.raises(ConfigurationError, match=naming(timestep, "timesteps")):
            scheduler.step(z, timestep, z)
    ours = VDMScheduler()
    ours.set_timesteps(5)
    assert ours.step(z, 3.7, z).prev_sample.shape == z.shape


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 8, 1), (1, 6, 8, 8)])
def test_an_output_that_would_be_broadcast_is_refused_by_both_shapes(shape: tuple[int, ...]) -> None:
    scheduler, z = VDMScheduler(), torch.zeros(1, 3, 8, 8)
    scheduler.set_timesteps(5)
    with pytest.raises(ConfigurationError, match=naming(str(shape), str(tuple(z.shape)))):
        scheduler.step(torch.zeros(shape), scheduler.timesteps[0], z)


@pytest.mark.parametrize("name", ["LCMScheduler", "IPNDMScheduler", "DDIMInverseScheduler", "EDMEulerScheduler"])
def test_a_sampler_that_is_not_shown_is_refused_whichever_way_it_came(name: str) -> None:
    pipe = tiny_pipeline()
    inputs = Inputs(pipe.unet)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    with pytest.raises(ConfigurationError, match=naming(name, "DDIMScheduler")):
        pipe(1, num_inference_steps=4)
    assert inputs.samples == []


def test_a_process_that_no_sampler_runs_is_refused_with_what_can_be_done() -> None:
    ours = VDMScheduler(num_levels=4096, noise_schedule={"name": "linear", "config": {"gamma_min": -18.9}})
    with pytest.raises(ConfigurationError, match=naming("DDIMScheduler", "VDMScheduler")) as refused:
        ours.to_diffusers(DDIMScheduler)
    assert "give num_inference_steps" not in str(refused.value)


def test_samples_do_not_depend_on_the_mode_of_the_network() -> None:
    pipe = tiny_pipeline(tiny_unet(dropout=0.5))
    pipe.unet.eval()
    before = sampled(pipe)
    pipe.unet.train()
    assert torch.equal(sampled(pipe), before) and torch.equal(sampled(pipe), before)
    assert pipe.unet.training and all(module.training for module in pipe.unet.modules())


# ---- from_pipe ------------------------------------------------------------------------------------------------------


def latent_pipeline() -> LatentVDMPipeline:
    stage = MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(2, 4, 4)], block_out_channels=(8,))
    unet = UNetVDMModel(
        4, in_channels=2, out_channels=2, block_out_channels=(8,), norm_num_groups=4, fourier_features=()
    )
    scaling = {"shift": [0.5], "scale": [2.0]}
    return LatentVDMPipeline(stage, unet, VDMScheduler(num_levels=17), latent_scaling=scaling)


def learned_pipeline() -> VDMPipeline:
    scheduler = VDMScheduler(num_levels=17, noise_schedule="learned_linear")
    return VDMPipeline(tiny_unet(), scheduler, RegisteredModel("learned_linear"))


MADE = {
    "vdm": tiny_pipeline,
    "a network of diffusers": lambda: tiny_pipeline(tiny_unet_2d()),
    "a learned schedule": learned_pipeline,
    "latent": latent_pipeline,
    "hvae": lambda: HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(4,)])),
}


@pytest.mark.parametrize("kind", MADE)
def test_from_pipe_shares_the_components_and_keeps_what_the_pipeline_knows(kind: str) -> None:
    pipe = MADE[kind]()
    grey = {"resolution": 8, "center_crop": False, "color": "grey", "num_levels": 17, "image_column": "image"}
    pipe.register_to_config(preprocessing=grey)
    made = type(pipe).from_pipe(pipe)
    assert type(made) is type(pipe) and made is not pipe
    assert all(made.components[name] is part for name, part in pipe.components.items())
    assert made.preprocessing == grey
    assert made.config.get("latent_scaling") == pipe.config.get("latent_scaling")
    images = torch.zeros(2, *pipe.image_shape, dtype=torch.long)
    assert torch.equal(
        made.bits_per_dim(images, replicates=1).per_image, pipe.bits_per_dim(images, replicates=1).per_image
    )


def test_from_pipe_takes_other_components_by_name_and_keeps_precision() -> None:
    pipe = tiny_pipeline()
    pipe.unet.half()
    other = VDMScheduler(num_levels=256)
    made = VDMPipeline.from_pipe(pipe, scheduler=other)
    assert made.scheduler is other and made.unet is pipe.unet and pipe.unet.dtype == torch.float16
    assert VDMPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32
    assert VDMPipeline.from_pipe(pipe, torch_dtype=torch.float16).unet.dtype == torch.float16
    assert VDMPipeline.from_pipe(DDPMPipeline(tiny_unet_2d(), DDPMScheduler())).num_levels == 256


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"unet": None}, "unet"), ({"scheduler": None}, "scheduler"), ({"sheduler": 1}, "scheduler")],
)
def test_from_pipe_takes_no_component_away_and_no_argument_that_is_none(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        VDMPipeline.from_pipe(tiny_pipeline(), **arguments)


@pytest.mark.parametrize(
    ("cls", "kind", "named"),
    [
        (VDMPipeline, "latent", "first_stage"),
        (LatentVDMPipeline, "vdm", "first_stage"),
        (HVAEPipeline, "vdm", "hvae"),
        (VDMPipeline, "hvae", "scheduler, unet"),
    ],
)
def test_from_pipe_says_which_component_is_missing_or_would_be_lost(cls: Any, kind: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        cls.from_pipe(MADE[kind]())
    with pytest.raises(ConfigurationError, match="pipeline"):
        cls.from_pipe("runs/digits")
