"""The reverse kernel as one object: its density, its divergence, and what the scheduler says of a step by it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

import registered
from naming import naming
from vdm_hub import VDMScheduler, registry
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.draws import normal_noise
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.errors import ConfigurationError
from vdm_hub.testing.installed import example_config

EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}  # float64, and sums of a few dozen numbers


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scheduler_of(schedule: str, target: str) -> VDMScheduler:
    config = example_config(registry.lookup("noise_schedules", schedule))
    form = {"name": schedule, "config": config} if config else schedule
    built = VDMScheduler(noise_schedule=form, prediction_type=target, final_sigmas_type="sigma_min")
    built.set_timesteps(7)
    return built


@pytest.mark.parametrize("gammas", [(-13.3, -12.0), (-3.0, 1.0), (-1.0, -1.0 + 1e-6), (-7.0, 13.0)])
def test_data_and_noise_give_one_kernel_whose_density_and_divergence_are_those_of_torch(
    gammas: tuple[float, float],
) -> None:
    gamma_s, gamma_t = (torch.tensor(gamma, dtype=torch.float64) for gamma in gammas)
    x, eps = normal(0, 3, 2, 4), normal(1, 3, 2, 4)
    z_t = gaussian.marginal_sample(x, gamma_t, eps)
    q = ReverseKernel.from_data(z_t, x, gamma_s, gamma_t)
    by_noise = ReverseKernel.from_noise(z_t, eps, gamma_s, gamma_t)
    # x is the difference of z_t and the noise, over alpha_t: at gamma_t = 13 that loses three digits.
    torch.testing.assert_close(q.mean, by_noise.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(q.scale, by_noise.scale, **EXACT)
    p = ReverseKernel.from_noise(z_t, 0.9 * eps, gamma_s, gamma_t, torch.full_like(x, 0.3))
    noise = normal(2, 3, 2, 4)
    z_s = q.sample(noise)
    torch.testing.assert_close((z_s - q.mean) / q.scale, noise, rtol=1e-9, atol=1e-9)  # a difference, over 1e-4
    ours, torchs = p, Independent(Normal(p.mean, p.scale.expand_as(p.mean)), 2)
    torch.testing.assert_close(ours.log_prob(z_s), torchs.log_prob(z_s), **EXACT)
    other = Independent(Normal(q.mean, q.scale.expand_as(q.mean)), 2)
    torch.testing.assert_close(q.kl(p), kl_divergence(other, torchs), **EXACT)


def test_the_divergence_is_the_term_of_the_bound() -> None:
    """VDM eq. 13, and the general one where the variances differ: `gaussian.transition_kl`."""
    gamma_s, gamma_t, eps, eps_hat = torch.tensor(-2.0), torch.tensor(1.0), normal(0, 3, 5), normal(1, 3, 5)
    gamma_s, gamma_t, log_ratio = gamma_s.double(), gamma_t.double(), torch.tensor(-0.4, dtype=torch.float64)
    z_t = gaussian.marginal_sample(normal(2, 3, 5), gamma_t, eps)
    q = ReverseKernel.from_noise(z_t, eps, gamma_s, gamma_t)
    p = ReverseKernel.from_noise(z_t, eps_hat, gamma_s, gamma_t, log_ratio)
    term = gaussian.transition_kl((eps - eps_hat) ** 2, torch.expm1(gamma_t - gamma_s), log_ratio)
    torch.testing.assert_close(q.kl(p), term.sum(1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("target", registered.names("parameterizations"))
@pytest.mark.parametrize("schedule", registered.names("noise_schedules"))
def test_the_log_probability_of_a_step_is_that_of_its_noise(schedule: str, target: str) -> None:
    scheduler = scheduler_of(schedule, target)
    z_t, output, dimensions = normal(0, 2, 1, 4, 4), normal(1, 2, 1, 4, 4), 16
    for timestep in scheduler.timesteps[:3]:
        drawn = scheduler.step(output, timestep, z_t, torch.Generator().manual_seed(5), return_log_prob=True)
        eps = normal_noise(z_t.shape, torch.Generator().manual_seed(5), z_t.device, z_t.dtype)
        s, t = scheduler.interval(timestep)
        times = torch.tensor([s, t], dtype=torch.float64)
        gamma_s, gamma_t = scheduler.process.schedule(times).double()
        variance = torch.sigmoid(gamma_s) * -torch.expm1(gamma_s - gamma_t)
        known = -0.5 * (eps**2).sum((1, 2, 3)) - 0.5 * dimensions * torch.log(2 * math.pi * variance)
        # The noise is read off a draw: at the least scale, 1e-4 of the mean, four digits of sixteen are lost.
        torch.testing.assert_close(drawn.log_prob, known, rtol=1e-10, atol=1e-10)
        again = scheduler.transition_log_prob(drawn.prev_sample, z_t, output, timestep)
        assert torch.equal(again, drawn.log_prob)
        as_tuple = scheduler.step(output, timestep, z_t, torch.Generator().manual_seed(5), False, return_log_prob=True)
        assert len(as_tuple) == 3 and torch.equal(as_tuple[2], drawn.log_prob)
        assert len(scheduler.step(output, timestep, z_t, return_dict=False)) == 2


@pytest.mark.parametrize("options", [{}, {"noise_schedule": "discrete_betas", "clip_sample": True}], ids=str)
@pytest.mark.parametrize("schedule", registered.names("noise_schedules"))
def test_each_datum_may_have_a_step_of_its_own(schedule: str, options: dict[str, Any]) -> None:
    """As trainers by reinforcement have it, who shuffle the steps of many chains into batches."""
    scheduler = scheduler_of(schedule, "epsilon") if not options else VDMScheduler(num_train_timesteps=50, **options)
    scheduler.set_timesteps(5)
    z_s, z_t, output = (normal(seed, 3, 1, 4, 4) for seed in range(3))
    timesteps = scheduler.timesteps[[2, 0, 3]]
    together = scheduler.transition_log_prob(z_s, z_t, output, timesteps)
    for place, timestep in enumerate(timesteps):
        row = slice(place, place + 1)
        alone = scheduler.transition_log_prob(z_s[row], z_t[row], output[row], timestep)
        torch.testing.assert_close(together[row], alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigurationError, match=naming("timestep", "(2,)", 3)):
        scheduler.transition_log_prob(z_s, z_t, output, timesteps[:2])
    with pytest.raises(ConfigurationError, match="prev_sample"):
        scheduler.transition_log_prob(z_s[:1], z_t, output, timesteps)


def test_its_gradient_is_the_closed_form() -> None:
    """``d log p / d z_s = -(z_s - mean) / v``, and that times ``alpha_s/alpha_t c sigma_t`` for the noise estimate."""
    scheduler = scheduler_of("linear", "epsilon")
    timestep, z_t = scheduler.timesteps[2], normal(0, 2, 1, 4, 4)
    output, z_s = normal(1, 2, 1, 4, 4).requires_grad_(), normal(2, 2, 1, 4, 4).requires_grad_()
    scheduler.transition_log_prob(z_s, z_t, output, timestep).sum().backward()
    times = torch.tensor(scheduler.interval(timestep), dtype=torch.float64)
    gamma_s, gamma_t = scheduler.process.schedule(times).double()
    c = -torch.expm1(gamma_s - gamma_t)
    ratio = gaussian.alpha(gamma_s) / gaussian.alpha(gamma_t)
    mean = ratio * (z_t - c * gaussian.sigma(gamma_t) * output.detach())
    pull = -(z_s.detach() - mean) / (torch.sigmoid(gamma_s) * c)
    assert z_s.grad is not None and output.grad is not None
    torch.testing.assert_close(z_s.grad, pull, **EXACT)
    torch.testing.assert_close(output.grad, pull * ratio * c * gaussian.sigma(gamma_t), **EXACT)


DDPM: dict[str, dict[str, Any]] = {
    "its own steps": {},
    "fewer, by linspace": {"timestep_spacing": "linspace"},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.5},
    "thresholded": {"thresholding": True},
    "the larger variance": {"variance_type": "fixed_large"},
}


@pytest.mark.parametrize("options", DDPM.values(), ids=DDPM.keys())
def test_on_ddpm_s_chain_it_is_that_of_diffusers_own_draw(options: dict[str, Any]) -> None:
    scheduler = VDMScheduler(noise_schedule="discrete_betas", num_train_timesteps=50, **options)
    scheduler.set_timesteps(50 if not options else 11)
    z_t, output = normal(0, 2, 1, 4, 4), normal(1, 2, 1, 4, 4)
    for timestep in scheduler.timesteps[:4]:
        drawn = scheduler.step(output, timestep, z_t, torch.Generator().manual_seed(5), return_log_prob=True)
        eps = normal_noise(z_t.shape, torch.Generator().manual_seed(5), z_t.device, z_t.dtype)
        s, t = (round(time * 49) for time in scheduler._stock.interval(timestep))
        bars = scheduler.alphas_cumprod.double()
        beta = 1 - bars[t] / bars[s]
        variance = beta if options.get("variance_type") == "fixed_large" else beta * (1 - bars[s]) / (1 - bars[t])
        known = -0.5 * (eps**2).sum((1, 2, 3)) - 8 * torch.log(2 * math.pi * variance)
        torch.testing.assert_close(drawn.log_prob, known, rtol=1e-4, atol=1e-4)  # its table is float32
    with pytest.raises(ConfigurationError, match=naming("timestep", int(scheduler.timesteps[-1]))):
        scheduler.step(output, scheduler.timesteps[-1], z_t, return_log_prob=True)
