"""Rectified flow, EDM and VE: the laws, diffusers' own formulas, and a network of either as a VDM."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vdm_hub import (
    Check,
    Conditioning,
    ConfigurationError,
    Parameterization,
    UNetVDMModel,
    VDMObjective,
    VDMPipeline,
    VDMScheduler,
    alpha,
    load_split,
    marginal_sample,
    parametrize_with_checks,
    registry,
    sigma,
    stratified_times,
)
from vdm_hub.diffusion.conditioning import EDMNoise, FlowTime, VENoise
from vdm_hub.diffusion.parameterizations import EDMPrediction, FlowPrediction, VEScore

ENDS = {"name": "linear", "config": {"gamma_min": -7.65, "gamma_max": 5.5}}
FLOW = {"prediction_type": "flow_prediction", "conditioning": "flow_time"}
EDM = {"prediction_type": {"name": "edm", "config": {"sigma_data": 0.6}}, "conditioning": "edm_noise"}
GAMMAS = torch.linspace(-7.65, 5.5, 40, dtype=torch.float64)


@parametrize_with_checks(
    [
        *(FlowPrediction(), EDMPrediction(), EDMPrediction(0.3, "v_prediction"), VEScore()),
        *(FlowTime(), FlowTime(100), EDMNoise(), VENoise()),
    ]
)
def test_conformance(check: Check) -> None:
    check()


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data, noise, the VDM's latents and a network's output at each gamma."""
    x, eps, output = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    return x, eps, marginal_sample(x, GAMMAS, eps), output


# ---- against the sources --------------------------------------------------------------------------------------------


def test_flow_is_diffusers_flow_matching() -> None:
    """The network's input, target and timestep are those of `FlowMatchEulerDiscreteScheduler`."""
    x, eps, z, output = case()
    u = sigma(GAMMAS) / (alpha(GAMMAS) + sigma(GAMMAS))
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=u.flip(0).tolist())  # from noise to data, timesteps sigma * 1000
    timesteps = theirs.timesteps.double().flip(0)
    torch.testing.assert_close(FlowTime()(GAMMAS), timesteps, rtol=1e-5, atol=1e-5)
    noised = theirs.scale_noise(x, theirs.timesteps.flip(0), eps)
    scaled = FlowPrediction().input_scale(GAMMAS)[:, None] * z
    torch.testing.assert_close(scaled, noised, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(FlowPrediction().target(x, eps, GAMMAS), eps - x)
    x_hat = scaled - u[:, None] * output  # one Euler step of dx/du = F to u = 0
    torch.testing.assert_close(FlowPrediction().x_hat(output, z, GAMMAS), x_hat)


@pytest.mark.parametrize("sigma_data", [0.5, 0.3, 1.0])
def test_edm_is_diffusers_preconditioning(sigma_data: float) -> None:
    """c_in, c_skip, c_out and c_noise are those of `EDMEulerScheduler`."""
    x, _, z, output = case()
    s = torch.exp(GAMMAS / 2)
    theirs, ours = EDMEulerScheduler(sigma_data=sigma_data), EDMPrediction(sigma_data)
    y = z / alpha(GAMMAS)[:, None]
    for i, one in enumerate(s):
        fed = theirs.precondition_inputs(y[i], one)
        torch.testing.assert_close(ours.input_scale(GAMMAS[i : i + 1]) * z[i], fed, rtol=1e-6, atol=1e-6)
        denoised = theirs.precondition_outputs(y[i], output[i], one)
        x_hat = ours.x_hat(output[i : i + 1], z[i : i + 1], GAMMAS[i : i + 1])[0]
        torch.testing.assert_close(x_hat, denoised, rtol=1e-6, atol=1e-6)
        noise_level = theirs.precondition_noise(one)
        torch.testing.assert_close(EDMNoise()(GAMMAS[i]), noise_level.double(), rtol=1e-6, atol=1e-6)
    target, skip = ours.target(x, (y - x) / s[:, None], GAMMAS), sigma_data**2 / (s**2 + sigma_data**2)
    out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(target, (x - skip[:, None] * y) / out[:, None])


def test_edm_weighs_all_noise_levels_alike() -> None:
    """Target and input have unit variance at every noise level, where the data have the deviation sigma_data."""
    target = EDMPrediction(0.5)
    a, b = target.coefficients(GAMMAS)
    torch.testing.assert_close((0.5 * a) ** 2 + b**2, torch.ones_like(GAMMAS))
    variance = 0.25 * torch.sigmoid(-GAMMAS) + torch.sigmoid(GAMMAS)
    torch.testing.assert_close(target.input_scale(GAMMAS) ** 2 * variance, torch.ones_like(GAMMAS))


# ---- a network of either kind as a VDM ------------------------------------------------------------------------------


class Denoiser(torch.nn.Module):
    """One denoiser of the latent ``z``, told gamma, dressed as a network of a target and a conditioning."""

    def __init__(self, target: Parameterization, conditioning: Conditioning) -> None:
        super().__init__()
        self.target, self.conditioning = target, conditioning

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        gamma = self.conditioning.inverse(timestep.double()).reshape(-1, 1, 1, 1)
        z = sample.double() / self.target.input_scale(gamma)
        x_hat = torch.tanh(z / alpha(gamma)) * 0.7
        eps_hat = (z - alpha(gamma) * x_hat) / sigma(gamma)
        a, b = self.target.coefficients(gamma)
        return ((a * x_hat + b * eps_hat).to(sample.dtype),)


def _raw_output(network: torch.nn.Module, sample: Tensor, timestep: Tensor) -> Tensor:
    output: Tensor = network(sample, timestep)[0]
    return output


@pytest.mark.parametrize("transitions", [None, 7])
@pytest.mark.parametrize("fields", [FLOW, EDM], ids=["flow", "edm"])
def test_one_denoiser_has_one_bound_and_one_chain_whatever_it_was_trained_as(
    fields: dict[str, Any], transitions: int | None
) -> None:
    levels = torch.randint(0, 17, (8, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    found = []
    for chosen in ({}, fields):
        scheduler = VDMScheduler(noise_schedule=ENDS, num_levels=17, **chosen)
        process = scheduler.process
        objective = VDMObjective(Denoiser(process.parameterization, process.conditioning), process, transitions)
        noise = objective.draw_noise({"levels": levels}, torch.Generator().manual_seed(2))
        bound = objective({"levels": levels}, stratified_times(8, 0.3), noise).total
        generator, (_, chain) = torch.Generator().manual_seed(3), process.bind(None, {})
        z = chain.prior_sample((8, 1, 4, 4), generator, torch.device("cpu"))
        network = partial(_raw_output, objective.network)
        scheduler.set_timesteps(6)
        for i, timestep in enumerate(scheduler.timesteps):
            time = torch.tensor(scheduler.times[i], dtype=torch.float64)
            output = chain.predict(network, z, time)
            z = scheduler.step(output, timestep, z, generator).prev_sample
        found.append((bound, z))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-3)


def test_a_network_trained_by_flow_matching_is_a_vdm() -> None:
    """Its own loss alone, in a loop that knows no gamma, lowers the bound; and the VDM's sampler runs it."""
    torch.manual_seed(0)
    unet = UNetVDMModel(8, 1, 1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, dropout=0.0)
    pipe = VDMPipeline(unet, VDMScheduler(noise_schedule=ENDS, num_levels=17, **FLOW))
    test, x = load_split("digits", "test[:32]", num_levels=17).levels, load_split("digits", "train", num_levels=17)
    before = pipe.bits_per_dim(test, replicates=2).bits_per_dim
    optimizer, data = torch.optim.AdamW(unet.parameters(), lr=4e-3), pipe.process.encode(x.levels)
    for _ in range(80):
        chosen = data[torch.randint(len(data), (32,))]
        eps, u = torch.randn_like(chosen), torch.rand(32, 1, 1, 1)
        output = unet((1 - u) * chosen + u * eps, 1000 * u.flatten(), return_dict=False)[0]
        (output - (eps - chosen)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pipe.bits_per_dim(test, replicates=2).bits_per_dim < 0.7 * before
    pipe.set_progress_bar_config(disable=True)
    images = pipe(64, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="pt").images
    ink = x.levels.float().mean() / 16
    assert abs(float(images.mean() - ink)) < 0.08  # noise has 0.5, digits 0.3


@pytest.mark.parametrize("fields", [FLOW, EDM], ids=["flow", "edm"])
def test_a_scheduler_keeps_its_target_and_its_timesteps(fields: dict[str, Any], tmp_path: Path) -> None:
    scheduler = VDMScheduler(noise_schedule=ENDS, num_levels=17, num_train_timesteps=500, **fields)
    scheduler.save_pretrained(tmp_path)
    again = VDMScheduler.from_pretrained(tmp_path)
    assert again.config.trained_betas is None and again.config.prediction_type == scheduler.config.prediction_type
    assert again.process.conditioning.to_config() == scheduler.process.conditioning.to_config()
    for one in (scheduler, again):
        one.set_timesteps(9)
    assert torch.equal(again.timesteps, scheduler.timesteps) and again.times == scheduler.times
    by_hand = VDMScheduler.from_pretrained(tmp_path)
    by_hand.set_timesteps(timesteps=scheduler.timesteps.tolist())
    assert by_hand.times == pytest.approx(scheduler.times, abs=1e-4)


@pytest.mark.parametrize("conditioning", ["flow_time", "edm_noise"])
def test_no_stock_sampler_is_given_timesteps_that_are_no_integers(conditioning: str) -> None:
    with pytest.raises(ConfigurationError, match="integer"):
        VDMScheduler(conditioning=conditioning).to_diffusers(DDIMScheduler)
    with pytest.raises(ConfigurationError, match="target"):
        VDMScheduler(prediction_type="flow_prediction").to_diffusers(DDIMScheduler)


def test_a_deviation_of_the_data_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sigma_data=-1"):
        registry.build("parameterizations", {"name": "edm", "config": {"sigma_data": -1}})
