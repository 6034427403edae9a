"""The learned forward process: the laws, its oracles, and the way from training to a published pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from vdm_hub import (
    Check,
    CosineSchedule,
    GaussianProcess,
    ImportanceWeighted,
    LinearSchedule,
    VDMObjective,
    alpha,
    parametrize_with_checks,
    sigma,
)
from vdm_hub_learned import BoundEncoded, ConvolutionalEncoder, EncodedProcess, Encoder, LearnedProcess

ENDS = (-7.65, 5.5)
SHAPE = (1, 4, 4)


def moved(process: LearnedProcess, size: float = 0.1) -> LearnedProcess:
    """With an encoder as training leaves it: none of its layers at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in process.encoder.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return process


def learned(
    target: str = "epsilon", schedule: Any = None, size: float = 0.1, dtype: torch.dtype = torch.float64
) -> LearnedProcess:
    torch.manual_seed(0)
    process = moved(LearnedProcess(width=8), size)
    fields = {"num_levels": 17, "prediction_type": target}
    process.over(GaussianProcess.from_fields(fields, schedule or LinearSchedule(*ENDS)))
    return process.to(dtype)


def network(sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
    return torch.tanh(1.3 * sample) + 0.2 * torch.sin(timestep / 300).to(sample.dtype).reshape(
        -1, *(1,) * (sample.ndim - 1)
    )


def drawn(process: Any, size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Levels, data and noise."""
    levels = torch.randint(0, 17, (size, *SHAPE), generator=torch.Generator().manual_seed(0))
    noise = process.draw_noise((size, *SHAPE), torch.Generator().manual_seed(1), levels.device)
    return levels, process.encode(levels).to(dtype), {name: value.to(dtype) for name, value in noise.items()}


def built(size: float, **config: Any) -> LearnedProcess:
    """A process of the same weights, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return moved(LearnedProcess(width=4, **config), size)


@parametrize_with_checks([built(0.0), built(0.1), built(0.3, depth=1, degree=1)])
def test_conformance(check: Check) -> None:
    check()


# ---- m = x ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["epsilon", "sample", "score", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_m_is_x_all_terms_are_the_vdms(target: str, dtype: torch.dtype) -> None:
    process = learned(target, size=0.0, dtype=dtype)
    levels, x, noise = drawn(process, dtype=dtype)
    s, t = (torch.tensor(times, dtype=dtype) for times in ([0.0, 0.3, 0.5, 0.8], [0.1, 0.4, 0.6, 1.0]))
    found = []
    for one in (process, process.gaussian):
        _, bound = one.bind(x, noise)
        terms = [bound.prior_kl(x), bound.reconstruction(levels, x, noise, network)]
        terms += [bound.transition_kl(x, s, t, noise, network), bound.kl_rate(x, t, noise, network)]
        z, time = bound.sample(x, t, noise), torch.tensor(0.7, dtype=torch.float64)
        prediction = bound.predict(network, z, time)
        step = bound.reverse_step(prediction, z, time - 0.1, time, torch.Generator().manual_seed(2))
        found.append((torch.stack(terms).detach(), z.detach(), *(value.detach() for value in step)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float64 else 1e-5, atol=1e-6)


# ---- m = A(t) x of Gaussian data ------------------------------------------------------------------------------------


class Exponential(Encoder):
    """``m = exp(rate u) x``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def features(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1)

    def basis(self, u: Tensor) -> Tensor:
        return torch.expm1(self.rate * u).unsqueeze(-1)

    def basis_slope(self, u: Tensor) -> Tensor:
        return self.rate * torch.exp(self.rate * u).unsqueeze(-1)


class GaussianData:
    """Data N(0, s^2) of one dimension, their process with ``m = exp(k (gamma - gamma_0)) x``, and the exact denoiser.

    Of quadratic forms in the standard normals behind x and eps the expectation is the sum over unit vectors.
    """

    def __init__(self, k: float, variance: float) -> None:
        self.k, self.variance = k, variance
        vdm = GaussianProcess.from_fields({}, LinearSchedule(*ENDS))
        self.bound = BoundEncoded(EncodedProcess(vdm, Exponential(k * (ENDS[1] - ENDS[0]))).double())
        self.conditioning = vdm.conditioning
        self.x = torch.tensor([[variance**0.5], [0.0]], dtype=torch.float64)
        self.noise = {"marginal": torch.tensor([[0.0], [1.0]], dtype=torch.float64)}

    def scale(self, gamma: Tensor) -> Tensor:
        return torch.exp(self.k * (gamma - ENDS[0]))

    def denoiser(self, z: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        """``(z - alpha E[x|z]) / sigma``."""
        gamma = self.conditioning.inverse(timestep.double()).reshape(-1, 1)
        gain = alpha(gamma) * self.scale(gamma) * self.variance
        x_hat = gain * z / (gain * alpha(gamma) * self.scale(gamma) + sigma(gamma) ** 2)
        return (z - alpha(gamma) * x_hat) / sigma(gamma)

    def transitions(self, number: int) -> float:
        t = torch.arange(1, number + 1, dtype=torch.float64) / number
        kls = [self.bound.transition_kl(self.x, *self._pair(one, number), self.noise, self.denoiser) for one in t]
        return float(torch.stack(kls).sum())

    def _pair(self, t: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return (t - 1 / number).expand(2), t.expand(2)

    def transitions_in_closed_form(self, number: int) -> float:
        """``sum e^{-gamma_s}/(2c) (A_s - (1-c) A_t)^2 var(x|z_t)``."""
        gamma = torch.linspace(*ENDS, number + 1, dtype=torch.float64)
        gamma_s, gamma_t = gamma[:-1], gamma[1:]
        scale_s, scale_t = self.scale(gamma_s), self.scale(gamma_t)
        c = -torch.expm1(gamma_s - gamma_t)
        left = self.variance / (1 + scale_t**2 * self.variance * torch.exp(-gamma_t))
        return float((torch.exp(-gamma_s) / (2 * c) * (scale_s - (1 - c) * scale_t) ** 2 * left).sum())

    def rate(self, gamma: Tensor) -> float:
        """Per unit of gamma."""
        t = ((gamma - ENDS[0]) / (ENDS[1] - ENDS[0])).expand(2)
        rate = self.bound.kl_rate(self.x, t, self.noise, self.denoiser).sum()
        return float(rate.detach()) / (ENDS[1] - ENDS[0])

    def ratios(self) -> list[float]:
        """``R = A^2 s^2 e^{-gamma}`` at both ends."""
        return [self.variance * math.exp((2 * self.k - 1) * gamma - 2 * self.k * ENDS[0]) for gamma in ENDS]

    def continuous(self) -> float:
        """``(1-k)^2/(2 (1-2k)) ln (1 + R_0)/(1 + R_1)``."""
        r_0, r_1 = self.ratios()
        return (1 - self.k) ** 2 / (2 * (1 - 2 * self.k)) * math.log((1 + r_0) / (1 + r_1))

    def surplus(self, diffusion: float) -> float:
        """The bound less the data's entropy, with ``p(x|z_0) = N(z_0/alpha_0, e^{gamma_0})``."""
        ends = torch.tensor([[self.variance**0.5], [-(self.variance**0.5)]], dtype=torch.float64)
        prior = float(self.bound.prior_kl(ends).mean())  # a quadratic, so that two points give its mean
        return 0.5 * ENDS[0] + diffusion + prior - 0.5 * math.log(self.variance)


CASES = [(0.0, 1.0), (0.05, 0.3), (-0.1, 1.0), (-0.4, 2.0), (0.2, 0.5)]


@pytest.mark.parametrize(("k", "variance"), CASES)
def test_a_scaled_gaussian_has_the_closed_form_rate_and_bound(k: float, variance: float) -> None:
    data = GaussianData(k, variance)
    gammas, step = torch.linspace(*ENDS, 201, dtype=torch.float64), (ENDS[1] - ENDS[0]) / 200
    rates = [data.rate(gamma) for gamma in gammas]
    simpson = step / 3 * (rates[0] + 4 * sum(rates[1:-1:2]) + 2 * sum(rates[2:-1:2]) + rates[-1])
    assert simpson == pytest.approx(data.continuous(), rel=1e-6)
    r_0, r_1 = data.ratios()
    if k == 0:
        assert data.continuous() == pytest.approx(0.5 * math.log((1 + r_0) / (1 + r_1)), rel=1e-12)  # VDM's
    decoder = 0.5 * math.log1p(math.exp(ENDS[0]) / variance)
    last = (1 + r_1) / (1 + math.exp(-ENDS[1]))  # the variance of z_1
    drift = k**2 / (2 * (1 - 2 * k)) * math.log((1 + r_0) / (1 + r_1))
    surplus = decoder + 0.5 * (last - math.log(last) - 1) + drift
    assert data.surplus(data.continuous()) == pytest.approx(surplus, abs=1e-9)
    assert surplus > 0  # never below -log p


@pytest.mark.parametrize(("k", "variance"), CASES)
def test_a_scaled_gaussians_transitions_have_their_closed_form_and_limit(k: float, variance: float) -> None:
    data = GaussianData(k, variance)
    errors = []
    for number in (4, 40, 400):
        exact = data.transitions_in_closed_form(number)
        assert data.transitions(number) == pytest.approx(exact, rel=1e-9)
        assert data.surplus(exact) > 0
        errors.append(exact - data.continuous())
    assert abs(errors[2]) < 0.03 * data.continuous()
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.25)  # the first order in 1/T, and a little of the second


# ---- any m, any network ---------------------------------------------------------------------------------------------


class Waves(Encoder):
    """Two features of one dimension, far from linear."""

    def features(self, x: Tensor) -> Tensor:
        return torch.stack([0.7 * torch.sin(2 * x), 0.4 * torch.cos(3 * x)], 1)

    def basis(self, u: Tensor) -> Tensor:
        return torch.stack([u, torch.sin(3 * u)], -1)

    def basis_slope(self, u: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(u), 3 * torch.cos(3 * u)], -1)


def two_levels() -> BoundEncoded:
    schedule = {"name": "linear", "config": {"gamma_min": -4.0, "gamma_max": 3.0}}
    fields = {"num_levels": 2, "noise_schedule": schedule, "prediction_type": "sample"}
    return BoundEncoded(EncodedProcess(GaussianProcess.from_fields(fields), Waves()).double())


def guess(sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
    """No exact denoiser of two levels at -1/2 and 1/2, but one that knows them."""
    return 0.5 * torch.tanh(2 * sample)


GRID = torch.linspace(-9, 9, 1801, dtype=torch.float64)
MASS = torch.exp(-0.5 * GRID**2) / math.sqrt(2 * math.pi) * (GRID[1] - GRID[0])


def exact_probabilities(bound: BoundEncoded, transitions: int) -> list[float]:
    """``p(x)`` of the sampler for both levels of one pixel: z on a grid, its kernels as matrices."""
    density = MASS.clone()
    z = GRID.reshape(-1, 1)
    for i in range(transitions, 0, -1):
        s, t = (torch.full((len(z),), one / transitions, dtype=torch.float64) for one in (i - 1, i))
        kernel = bound.reverse_kernel(bound.predict(guess, z, t), z, s, t)[1]
        standard = (GRID - kernel.mean) / kernel.scale.expand_as(z)  # (z_t, z_s)
        steps = torch.exp(-0.5 * standard**2) / (kernel.scale.expand_as(z) * math.sqrt(2 * math.pi))
        density = density @ steps * (GRID[1] - GRID[0])
    gamma = bound.gamma(torch.zeros((), dtype=torch.float64))
    found = []
    for level in (0, 1):
        levels = torch.full((len(z), 1), level)
        x = bound.process.encode(levels).double()
        noise = {"reconstruction": (z - alpha(gamma) * x) / sigma(gamma)}
        found.append(float((density * torch.exp(-bound.reconstruction(levels, x, noise, guess))).sum()))
    return found


@pytest.mark.parametrize("transitions", [2, 5, 12])
def test_the_bound_is_never_below_the_samplers_own_log_probability(transitions: int) -> None:
    bound = two_levels()
    probabilities = exact_probabilities(bound, transitions)
    assert sum(probabilities) == pytest.approx(1, abs=1e-6)
    for level, probability in enumerate(probabilities):
        total = mean_bound(bound, level, transitions)
        assert -math.log(probability) < total < -math.log(probability) + 3


def mean_bound(bound: BoundEncoded, level: int, transitions: int) -> float:
    """The bound's expectation for one level, nats, by quadrature over eps."""
    levels = torch.full((len(GRID), 1), level)
    x, noise = bound.process.encode(levels).double(), GRID.reshape(-1, 1)
    terms = bound.prior_kl(x) + bound.reconstruction(levels, x, {"reconstruction": noise}, guess)
    for i in range(1, transitions + 1):
        s, t = (torch.full((len(GRID),), one / transitions, dtype=torch.float64) for one in (i - 1, i))
        terms = terms + bound.transition_kl(x, s, t, {"marginal": noise}, guess)
    return float((MASS * terms).sum())


class Guess(torch.nn.Module):
    """`guess` as a network."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (guess(sample, timestep),)


def test_importance_weights_find_the_samplers_own_log_probability() -> None:
    """The mean of the weights is p(x), whatever m: one draw has the bound as its mean, and many find log p(x)."""
    transitions, level, images, chains = 5, 1, 300, 400
    bound = two_levels()
    exact = math.log(exact_probabilities(bound, transitions)[level])
    objective = VDMObjective(Guess(), bound.process, transitions)
    batch = {"levels": torch.full((images, 1), level), "indices": torch.arange(images)}
    method = ImportanceWeighted(transitions=transitions, draws=chains).build(objective, images, seed=0)
    found = -sum(method.measure(batch, 0).terms.values())
    error = float(found.std()) / images**0.5
    assert error < 0.02
    lost = 0.5 * float(found.var())  # to second order, of the logarithm of a mean
    assert float(found.mean()) == pytest.approx(exact - lost, abs=5 * error)
    one = ImportanceWeighted(transitions=transitions, draws=1).build(objective, images, seed=1)
    single = sum(one.measure(batch, 0).terms.values())
    wanted = mean_bound(bound, level, transitions)
    assert float(single.mean()) == pytest.approx(wanted, abs=5 * float(single.std()) / images**0.5)


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
def test_the_transition_is_the_kl_of_the_two_kernels(target: str) -> None:
    process = learned(target)
    _, x, noise = drawn(process)
    bound = process.bind(x, noise)[1]
    s, t = (torch.tensor(times, dtype=torch.float64) for times in ([0.0, 0.3, 0.5, 0.8], [0.1, 0.4, 0.6, 1.0]))
    z = bound.sample(x, t, noise)
    model = bound.reverse_kernel(bound.predict(network, z, t), z, s, t)[1]
    kl = bound.posterior_kernel(x, z, s, t).kl(model)
    torch.testing.assert_close(bound.transition_kl(x, s, t, noise, network), kl, rtol=1e-8, atol=1e-10)


def test_the_posterior_keeps_the_marginals() -> None:
    """It is linear in z_t, so the moments of z_s are exact from two values of the noise."""
    process = learned()
    _, x, _ = drawn(process)
    bound = process.bind(x, {})[1]
    s, t = (torch.tensor(times, dtype=torch.float64) for times in ([0.0, 0.3, 0.5, 0.8], [0.1, 0.4, 0.6, 1.0]))
    at_zero, at_one = (
        bound.posterior_kernel(x, bound.sample(x, t, {"marginal": torch.full_like(x, eps)}), s, t)
        for eps in (0.0, 1.0)
    )
    gamma_s = bound.gamma(s).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(at_zero.mean, alpha(gamma_s) * bound.mean(x, bound.gamma(s)), rtol=1e-10, atol=1e-12)
    variance = (at_one.mean - at_zero.mean) ** 2 + at_zero.scale**2
    torch.testing.assert_close(variance, (sigma(gamma_s) ** 2).expand_as(x), rtol=1e-9, atol=1e-12)


def test_draws_of_a_step_have_the_kernels_mean_and_variance() -> None:
    process = learned(size=0.3)
    _, x, noise = drawn(process, size=1)
    bound = process.bind(None, {})[1]
    s, t = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    z = bound.sample(x, t, noise)
    output = bound.predict(network, z, t)
    x_hat, kernel = bound.reverse_kernel(output, z, s, t)
    many = 20_000
    steps, estimates = bound.reverse_step(
        output.expand(many, *SHAPE), z.expand(many, *SHAPE), s, t, torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(estimates[:1], x_hat)
    scale = kernel.scale.expand_as(kernel.mean)
    assert bool(((steps.mean(0) - kernel.mean[0]).abs() < 5 * scale[0] / many**0.5).all())
    assert bool(((steps.var(0) / scale[0] ** 2 - 1).abs() < 5 * (2 / many) ** 0.5).all())
    vdm = process.gaussian.bind(None, {})[1].reverse_kernel(output, z, s, t)[1]
    assert float((kernel.mean - vdm.mean).detach().abs().max()) > 10 * float(scale.max()) / many**0.5  # m is seen


@pytest.mark.parametrize("schedule", [LinearSchedule(*ENDS), CosineSchedule(*ENDS)])
def test_the_rate_is_the_issues_formula_with_derivatives_by_autograd(schedule: Any) -> None:
    r"""``alpha^2/(2 sigma^2 gamma') |gamma' (m - m_hat) - (d_t m - d_t m_hat)|^2``."""
    process = learned(schedule=schedule)
    _, x, noise = drawn(process)
    bound = process.bind(x, noise)[1]
    t = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    z = bound.sample(x, t, noise)
    x_hat = process.gaussian.x_hat(bound.predict(network, z, t), z, schedule(t))

    def along(function: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.functional.jvp(function, t, torch.ones_like(t))[1]

    gamma, slope = (value.reshape(-1, 1, 1, 1) for value in (schedule(t), along(schedule)))
    delta = bound.mean(x, schedule(t)) - bound.mean(x_hat, schedule(t))
    moving = along(lambda time: bound.mean(x, schedule(time)) - bound.mean(x_hat, schedule(time)))
    formula = alpha(gamma) ** 2 / (2 * sigma(gamma) ** 2 * slope) * (slope * delta - moving) ** 2
    torch.testing.assert_close(bound.kl_rate(x, t, noise, network), formula.flatten(1).sum(1), rtol=1e-8, atol=1e-10)


def test_at_one_gamma_the_rate_is_the_same_along_every_schedule() -> None:
    rates = []
    for schedule in (LinearSchedule(*ENDS), CosineSchedule(*ENDS)):
        process = learned(schedule=schedule)
        process.gaussian.conditioning = learned().gaussian.conditioning
        _, x, noise = drawn(process)
        t = schedule.inverse(torch.tensor([-7.0, -3.0, 0.0, 4.0], dtype=torch.float64))
        rates.append(process.bind(x, noise)[1].kl_rate(x, t, noise, network) / schedule.with_derivative(t)[1])
    torch.testing.assert_close(rates[0], rates[1], rtol=1e-8, atol=1e-10)


def test_the_basis_has_its_slope_and_no_part_at_zero() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    for encoder in (ConvolutionalEncoder(degree=4), Exponential(0.7), Waves()):
        slopes = torch.autograd.functional.jvp(encoder.basis, u, torch.ones_like(u))[1]
        torch.testing.assert_close(encoder.basis_slope(u), slopes)
        assert not bool(encoder.basis(u[:1]).any())


def test_rates_are_the_same_in_threads() -> None:
    process = learned()
    _, x, noise = drawn(process)
    bound = process.bind(x, noise)[1]

    def rate(i: int) -> Tensor:
        t = torch.full((len(x),), (i + 0.5) / 16, dtype=torch.float64)
        loss = bound.kl_rate(x, t, noise, network)
        return torch.stack([loss.sum(), *(one.sum() for one in torch.autograd.grad(loss.sum(), trained))]).detach()

    trained = list(process.encoder.parameters())
    alone = [rate(i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for ours, theirs in zip(pool.map(rate, range(16)), alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
