"""Law 3, as mathematics: a reverse step draws from q(z_s|z_t, x_hat), against Luo's formulas in alpha-bar."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import registered
from vdm_hub.diffusion.draws import normal_noise

every_schedule = pytest.mark.parametrize("schedule", registered.names("noise_schedules"))
every_target = pytest.mark.parametrize("target", registered.names("parameterizations"))


def luo_posterior(z_t: Tensor, x: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``q(x_{t-1}|x_t, x_0)`` (Luo eq. 84; 92 and 93 with x_0 replaced by its estimate)."""
    bar_s, bar_t = 1 / (1 + gamma_s.double().exp()), 1 / (1 + gamma_t.double().exp())
    one_minus_bar_s, one_minus_bar_t = 1 / (1 + (-gamma_s.double()).exp()), 1 / (1 + (-gamma_t.double()).exp())
    a = bar_t / bar_s
    mean = (a.sqrt() * one_minus_bar_s * z_t + bar_s.sqrt() * (1 - a) * x) / one_minus_bar_t
    return mean, (1 - a) * one_minus_bar_s / one_minus_bar_t


@every_schedule
@every_target
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@settings(max_examples=8)
@given(start=st.floats(0, 0.95), step=st.floats(0.01, 1))
def test_law_3_mean_and_variance(
    schedule: str, target: str, dtype: torch.dtype, tolerance: float, start: float, step: float
) -> None:
    process = registered.process(registered.learned(schedule), target)
    s, t = (torch.tensor(v, dtype=torch.float64) for v in (start, min(start + step, 1.0)))
    generator = torch.Generator().manual_seed(0)
    x_hat = torch.rand(2, 3, 4, dtype=torch.float64, generator=generator) * 2 - 1
    eps_hat = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        gamma_s, gamma_t = process.schedule(s), process.schedule(t)
        bar_t = 1 / (1 + gamma_t.exp())
        z_t = bar_t.sqrt() * x_hat + (1 / (1 + (-gamma_t).exp())).sqrt() * eps_hat
        output = process.parameterization.target(x_hat, eps_hat, gamma_t)
        bound = process.bind(None, {})[1]
        z_s, estimate = bound.reverse_step(output.to(dtype), z_t.to(dtype), s, t, torch.Generator().manual_seed(9))
    assert z_s.dtype == estimate.dtype == dtype and z_s.shape == z_t.shape
    mean, variance = luo_posterior(z_t, x_hat, gamma_s, gamma_t)
    # The same generator gives the same standard normal: the draw must be mean + sqrt(variance) eps, elementwise.
    eps = normal_noise(z_t.shape, torch.Generator().manual_seed(9), z_t.device, dtype).double()
    torch.testing.assert_close(z_s.double(), mean + variance.sqrt() * eps, rtol=tolerance, atol=10 * tolerance)


@every_schedule
def test_law_3_the_whole_chain_with_the_exact_denoiser_converges_to_the_data(schedule: str) -> None:
    """Data N(0, s^2): the chain's variance, carried in closed form, tends to that of q(z_0) as the steps shrink."""
    few, many = chain_error(schedule, 200), chain_error(schedule, 800)
    assert many < 0.02
    assert many < 0.4 * few


def chain_error(schedule: str, steps: int, data_variance: float = 0.25) -> float:
    built = registered.scalar_schedule(schedule)
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        gammas = built(times)
    bar, one_minus_bar = 1 / (1 + gammas.exp()), 1 / (1 + (-gammas).exp())
    bound = registered.process(built, "sample").bind(None, {})[1]
    variance = 1.0
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for i in range(steps, 0, -1):
        denoised = bar[i].sqrt() * data_variance / (bar[i] * data_variance + one_minus_bar[i]) * probe
        (zero, one), _ = bound.reverse_step(denoised, probe, times[i - 1], times[i], torch.Generator().manual_seed(i))
        eps = normal_noise((2, 1), torch.Generator().manual_seed(i), probe.device, torch.float64)
        deviation = float(zero.detach() / eps[0])
        gain = float(one.detach() - deviation * eps[1])
        variance = gain**2 * variance + deviation**2
    exact = float(bar[0] * data_variance + one_minus_bar[0])
    return abs(variance / exact - 1)
