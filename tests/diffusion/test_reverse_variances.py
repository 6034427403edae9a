"""The variances of DDPM-family reverse steps, against the formulas with betas, and the general KL against its own."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import registered
from ddpm_variances import by_betas
from naming import naming
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.diffusion.reverse_variances import REVERSE_VARIANCES, reverse_variance
from vdm_hub.errors import ConfigurationError

PAIRS = [(-13.3, -13.2), (-13.3, 5.0), (-1.0, 1.0), (2.0, 2.001), (4.0, 16.6)]


@pytest.mark.parametrize("name", REVERSE_VARIANCES)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_ratio_is_that_of_the_formulas_with_betas(name: str, pair: tuple[float, float]) -> None:
    gamma_s, gamma_t = (torch.tensor(gamma, dtype=torch.float64) for gamma in pair)
    prediction = torch.tensor([0.001, 0.3, 0.999], dtype=torch.float64)
    tilde = by_betas("fixed_small", prediction, gamma_s, gamma_t)
    expected = (tilde / by_betas(name, prediction, gamma_s, gamma_t)).log()
    found = reverse_variance(name).log_ratio(prediction, gamma_s, gamma_t)
    torch.testing.assert_close(found.expand_as(prediction), expected.expand_as(prediction), rtol=1e-7, atol=1e-7)
    in_float32 = reverse_variance(name).log_ratio(prediction.float(), gamma_s.float(), gamma_t.float())
    torch.testing.assert_close(in_float32.double(), found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", REVERSE_VARIANCES)
def test_the_variance_of_the_last_step_is_the_posterior_s_before_unless_the_network_says_it(name: str) -> None:
    """``learned_range`` at -1, 0 and 1: the posterior's, the geometric mean, and the first beta, ``1 - alpha-bar``."""
    posterior, gamma_0 = torch.tensor(1e-4, dtype=torch.float64), torch.tensor(-6.0, dtype=torch.float64)
    said = {"learned": [0.001, 0.3, 0.9]}.get(name, [-1.0, 0.0, 1.0])
    beta = 1 / (1 + math.exp(6))
    expected = {"learned": said, "learned_range": [1e-4, math.sqrt(1e-4 * beta), beta]}.get(name, [1e-4] * 3)
    variance = reverse_variance(name)
    assert variance.learned == name.startswith("learned")
    found = variance.log_first(torch.tensor(said, dtype=torch.float64), posterior, gamma_0).exp().expand(3)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ConfigurationError) if name == "learned" else contextlib.nullcontext():
        variance.check_continuous()


@pytest.mark.parametrize("log_ratio", [-3.0, -0.1, 0.0, 0.7])
def test_the_general_kl_is_that_of_two_gaussians(log_ratio: float) -> None:
    gamma_s, gamma_t = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    x, z, x_hat = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(3)
    )
    weight_z, weight_x, variance = gaussian.posterior(gamma_s, gamma_t)
    means = (weight_z * z + weight_x * data for data in (x, x_hat))
    mean_q, mean_p = means
    expected = gaussian.kl_divergence(mean_q, variance, mean_p, variance * math.exp(-log_ratio))
    error = torch.exp(-gamma_t) * (x - x_hat) ** 2  # |eps - eps_hat|^2
    found = gaussian.transition_kl(error, torch.expm1(gamma_t - gamma_s), torch.full_like(gamma_s, log_ratio))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["fixed_small", "fixed_large", "learned_range", "learned"])
def test_a_reverse_step_draws_with_its_variance(name: str) -> None:
    process = registered.process(LinearSchedule(-6.0, 4.0))
    process.variance = reverse_variance(name)
    _, bound = process.bind(None, {})
    count, said = 40_000, 0.4
    z = torch.full((count, 1, 1, 1), 0.3, dtype=torch.float64)
    output = torch.full_like(z, 0.1)
    if process.variance.learned:
        output = torch.cat([output, torch.full_like(z, said)], dim=1)
    s, t = (torch.tensor(time, dtype=torch.float64) for time in (0.3, 0.7))
    drawn, _ = bound.reverse_step(output, z, s, t, torch.Generator().manual_seed(0))
    gamma_s, gamma_t = process.schedule(s), process.schedule(t)
    expected = float(by_betas(name, torch.tensor(said).double(), gamma_s, gamma_t))
    # The variance of a sample variance of normal draws is 2 v^2 / n: five of its deviations.
    assert float(drawn.var()) == pytest.approx(expected, rel=5 * math.sqrt(2 / count))
    weight_z, weight_x, _ = gaussian.posterior(gamma_s, gamma_t)
    x_hat = (0.3 - gaussian.sigma(gamma_t) * 0.1) / gaussian.alpha(gamma_t)
    mean = float(weight_z * 0.3 + weight_x * x_hat)
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * math.sqrt(expected / count))


@pytest.mark.parametrize("name", ["fixed_large", "learned_range"])
def test_many_steps_forget_the_variance(name: str) -> None:
    """With T steps the KL of the variances alone is of the order of 1/T in sum, so continuous time has one bound."""

    def excess(steps: int) -> float:
        gamma = torch.linspace(-13.3, 5.0, steps + 1, dtype=torch.float64)
        log_ratio = reverse_variance(name).log_ratio(torch.tensor(0.2), gamma[:-1], gamma[1:])
        return float(gaussian.transition_kl(torch.zeros(()), torch.zeros(()), log_ratio).sum())

    assert excess(100) > 0
    assert excess(1000) == pytest.approx(excess(100) / 10, rel=0.1)
    assert excess(10_000) < 0.02


def test_a_variance_acts_on_beta_tables_alone_and_its_name_is_checked() -> None:
    betas = torch.linspace(1e-3, 0.3, 20).tolist()
    table = {"noise_schedule": "discrete_betas", "trained_betas": betas, "conditioning": "table"}
    for name, cls in REVERSE_VARIANCES.items():
        assert type(GaussianProcess.from_fields(table | {"variance_type": name}).variance) is cls
        assert GaussianProcess.from_fields({"variance_type": name}).variance.is_posterior
    with pytest.raises(ConfigurationError, match=naming("variance_type", "'fixed_larg'", "'fixed_large'")):
        GaussianProcess.from_fields(table | {"variance_type": "fixed_larg"})


def test_a_network_without_the_channels_of_a_learned_variance_is_refused() -> None:
    process = registered.process(LinearSchedule(-6.0, 4.0))
    process.variance = reverse_variance("learned_range")
    with pytest.raises(ConfigurationError, match=naming(1, "channels")):
        process.split(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
