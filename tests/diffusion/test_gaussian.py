"""The Gaussian process in gamma against the same formulas written out in alpha-bar (Luo, arXiv 2208.11970)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import registered
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.noise_schedules import gamma_and_derivative
from vdm_hub.diffusion.reverse_kernel import ReverseKernel

GAMMA = st.floats(-13.3, 13.0)
STEP = st.floats(0.01, 10.0)


def double(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def alpha_bar(gamma: Tensor) -> Tensor:
    return 1 / (1 + gamma.exp())


@given(GAMMA)
def test_alpha_and_sigma_preserve_the_variance_and_have_the_ratio_of_the_snr(gamma: float) -> None:
    (g,) = double(gamma)
    alpha, sigma = gaussian.alpha(g), gaussian.sigma(g)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(g), rtol=1e-14, atol=0)
    torch.testing.assert_close(2 * (sigma.log() - alpha.log()), g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [-40.0, -13.3, 0.0, 13.0, 40.0])
def test_nothing_cancels_in_float32(gamma: float) -> None:
    double_gamma, single_gamma = torch.tensor(gamma, dtype=torch.float64), torch.tensor(gamma)
    exact = single_gamma.double()
    for function in (gaussian.alpha, gaussian.sigma):
        torch.testing.assert_close(function(single_gamma).double(), function(exact), rtol=1e-5, atol=0)
    for exact_term, single_term in zip(
        (*gaussian.transition(exact, exact + 0.5), *gaussian.posterior(exact, exact + 0.5)),
        (
            *gaussian.transition(single_gamma, single_gamma + 0.5),
            *gaussian.posterior(single_gamma, single_gamma + 0.5),
        ),
        strict=True,
    ):
        torch.testing.assert_close(single_term.double(), exact_term, rtol=2e-5, atol=0)
    x = torch.full((1, 3), 0.5)
    torch.testing.assert_close(
        gaussian.prior_kl(x, single_gamma[None]).double(),
        gaussian.prior_kl(x.double(), double_gamma[None]),
        rtol=1e-5,
        atol=1e-6,
    )


@given(GAMMA, STEP, STEP)
def test_chapman_kolmogorov(gamma_r: float, to_s: float, to_t: float) -> None:
    r, s, t = double(gamma_r, gamma_r + to_s, gamma_r + to_s + to_t)
    first, first_variance = gaussian.transition(r, s)
    second, second_variance = gaussian.transition(s, t)
    whole, whole_variance = gaussian.transition(r, t)
    torch.testing.assert_close(first * second, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(second**2 * first_variance + second_variance, whole_variance, rtol=1e-8, atol=0)
    # From the data: q(z_t|x) is q(z_s|x) carried on.
    torch.testing.assert_close(gaussian.alpha(s) * second, gaussian.alpha(t), rtol=1e-12, atol=0)
    carried = second**2 * gaussian.sigma(s) ** 2 + second_variance
    torch.testing.assert_close(carried, gaussian.sigma(t) ** 2, rtol=1e-8, atol=0)


@given(GAMMA, STEP, st.floats(-3, 3), st.floats(-1, 1))
def test_posterior_is_bayes_rule_on_the_transition(gamma_s: float, step: float, z_t: float, x: float) -> None:
    s, t, z, data = double(gamma_s, gamma_s + step, z_t, x)
    ratio, variance = gaussian.transition(s, t)
    precision = 1 / torch.sigmoid(s) + ratio**2 / variance
    mean = (gaussian.alpha(s) * data / torch.sigmoid(s) + ratio * z / variance) / precision
    weight_z, weight_x, posterior_variance = gaussian.posterior(s, t)
    torch.testing.assert_close(posterior_variance, 1 / precision, rtol=1e-8, atol=0)
    torch.testing.assert_close(weight_z * z + weight_x * data, mean, rtol=1e-7, atol=1e-8)


@given(GAMMA, STEP)
def test_posterior_is_luo_equation_84(gamma_s: float, step: float) -> None:
    s, t = double(gamma_s, gamma_s + step)
    bar_s, bar_t = alpha_bar(s), alpha_bar(t)
    a = bar_t / bar_s
    weight_z, weight_x, variance = gaussian.posterior(s, t)
    torch.testing.assert_close(weight_z, a.sqrt() * (1 - bar_s) / (1 - bar_t), rtol=1e-8, atol=0)
    torch.testing.assert_close(weight_x, bar_s.sqrt() * (1 - a) / (1 - bar_t), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance, (1 - a) * (1 - bar_s) / (1 - bar_t), rtol=1e-7, atol=0)


@given(st.floats(-5, 5), st.floats(0.01, 10), st.floats(-5, 5), st.floats(0.01, 10))
def test_kl_divergence_is_that_of_torch_distributions(m_q: float, v_q: float, m_p: float, v_p: float) -> None:
    mean_q, variance_q, mean_p, variance_p = double(m_q, v_q, m_p, v_p)
    q = torch.distributions.Normal(mean_q, variance_q.sqrt())
    p = torch.distributions.Normal(mean_p, variance_p.sqrt())
    expected = torch.distributions.kl_divergence(q, p)
    actual = gaussian.kl_divergence(mean_q, variance_q, mean_p, variance_p)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@given(GAMMA, st.floats(0.01, 3.0), st.floats(-3, 3), st.floats(-1, 1), st.floats(-1, 1), st.floats(-2, 2))
def test_transition_kl_is_that_of_the_two_posteriors(
    gamma_s: float, step: float, z_t: float, x: float, x_hat: float, log_ratio: float
) -> None:
    """``q(z_s|z_t, x)`` against the same with the network's ``x_hat`` and a variance of its own, ``v_q / r``."""
    s, t, z, data, guess, r = double(gamma_s, gamma_s + step, z_t, x, x_hat, log_ratio)
    weight_z, weight_x, variance = gaussian.posterior(s, t)
    means = [weight_z * z + weight_x * value for value in (data, guess)]
    expected = gaussian.kl_divergence(means[0], variance, means[1], variance / r.exp())
    eps, eps_hat = ((z - gaussian.alpha(t) * value) / gaussian.sigma(t) for value in (data, guess))
    found = gaussian.transition_kl((eps - eps_hat) ** 2, torch.expm1(t - s), r)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_step_is_the_posteriors_mean_and_deviation_for_every_shape_of_gamma() -> None:
    generator = torch.Generator().manual_seed(0)
    z, x, eps = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64).unbind()
    s = torch.linspace(-6, 3, 4, dtype=torch.float64)
    t = s + torch.linspace(0.1, 2, 4, dtype=torch.float64)
    for shape in ((4,), (4, 2, 3)):
        wide = [gamma.reshape(4, 1, 1).expand(4, 2, 3) if len(shape) > 1 else gamma for gamma in (s, t)]
        drawn = ReverseKernel.from_data(z, x, *wide).sample(eps)
        for i in range(4):
            weight_z, weight_x, variance = gaussian.posterior(s[i], t[i])
            torch.testing.assert_close(drawn[i], weight_z * z[i] + weight_x * x[i] + variance.sqrt() * eps[i])


def test_information_is_that_of_a_gaussian_channel() -> None:
    """Two dimensions: ``1/2 log(1 + var / E variance)`` each, by moments over the data."""
    mean = torch.tensor([[0.0, 1.0], [2.0, 1.0], [7.0, -5.0]])
    variance = torch.tensor([[0.5, 1.0], [1.0, 2.0], [3.0, 9.0]])
    expected = sum(
        0.5 * math.log(1 + mean[:, i].double().numpy().var() / variance[:, i].double().numpy().mean()) for i in (0, 1)
    )
    assert gaussian.information(mean, variance) == pytest.approx(expected, rel=1e-12)
    assert gaussian.information(torch.ones(3, 2), variance) == 0 < gaussian.COLLAPSED < 0.1


@given(st.floats(-5, 12), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_prior_term_is_the_kl_to_the_standard_normal(gamma_1: float, values: list[float]) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    (g,) = double(gamma_1)
    one = torch.ones_like(x)
    expected = gaussian.kl_divergence(gaussian.alpha(g) * x, torch.sigmoid(g) * one, 0 * one, one).sum(1)
    torch.testing.assert_close(gaussian.prior_kl(x, g[None]), expected, rtol=1e-9, atol=1e-14)


def test_coefficients_broadcast_over_the_batch_and_per_dimension() -> None:
    x, eps = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    per_datum = torch.linspace(-5, 5, 4)
    whole = gaussian.marginal_sample(x, per_datum, eps)
    bar = alpha_bar(per_datum)[:, None, None]
    torch.testing.assert_close(whole, bar.sqrt() * x + (1 - bar).sqrt() * eps)
    for i, gamma in enumerate(per_datum):
        torch.testing.assert_close(whole[i], gaussian.marginal_sample(x[i], gamma, eps[i]))
    per_dimension = per_datum[:, None, None].expand(4, 3, 5)
    torch.testing.assert_close(gaussian.marginal_sample(x, per_dimension, eps), whole)
    torch.testing.assert_close(gaussian.prior_kl(x, per_dimension), gaussian.prior_kl(x, per_datum))


def test_one_gamma_for_all_leaves_the_latents_their_precision() -> None:
    x = torch.ones(2, 3)
    assert gaussian.marginal_sample(x, torch.tensor(-3.0, dtype=torch.float64), x).dtype == torch.float32


@pytest.mark.parametrize("name", registered.names("noise_schedules"))
def test_sde_coefficients_are_the_derivatives_of_alpha_and_sigma(name: str) -> None:
    schedule = registered.scalar_schedule(name)
    # Off the knots of the tables, whose second derivative jumps there.
    t = (torch.arange(40, dtype=torch.float64) + 0.37) / 40
    h = 1e-5
    with torch.no_grad():
        gamma, gamma_prime = gamma_and_derivative(schedule, t)
        after, before = schedule(t + h), schedule(t - h)
    f, g_squared = gaussian.sde_coefficients(gamma, gamma_prime)
    d_log_alpha = (gaussian.alpha(after).log() - gaussian.alpha(before).log()) / (2 * h)
    d_variance = (torch.sigmoid(after) - torch.sigmoid(before)) / (2 * h)
    torch.testing.assert_close(f, d_log_alpha, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(g_squared, d_variance - 2 * f * torch.sigmoid(gamma), rtol=1e-5, atol=1e-8)
