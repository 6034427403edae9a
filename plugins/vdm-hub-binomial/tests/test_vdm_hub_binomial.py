"""Binomial diffusion against full enumeration, written out from SD15's Table 1 with 2^d x 2^d matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from naming import naming
from vdm_hub import Check, ConfigurationError, VDMScheduler, parametrize_with_checks
from vdm_hub_binomial import BinomialProcess, BoundBinomial, kernels

LogOdds = Callable[[Tensor, float], Tensor]
"""Bits in {-1, 1}, (B, d), and the signal -> log-odds of each bit of the data given all others, (B, d)."""


@parametrize_with_checks([BinomialProcess(), BinomialProcess(exponent=2.0, num_train_timesteps=100)])
def test_conformance(check: Check) -> None:
    check()


# ---- the enumeration: probabilities of states, in numpy, with nothing of the package -----------------------------


def states(bits: int) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=bits)))


def over_bits(kernel: np.ndarray, bits: int) -> np.ndarray:
    """The kernel of one bit, [to, from], for all bits at once."""
    whole = np.ones((1, 1))
    for _ in range(bits):
        whole = np.kron(whole, kernel)
    return whole


def bit_kernel(beta: float) -> np.ndarray:
    """``Bernoulli(x_{t-1} (1 - beta) + beta/2)``, [to, from] (SD15 Table 1)."""
    return np.array([[1 - beta / 2, beta / 2], [beta / 2, 1 - beta / 2]])


class Chain:
    """SD15's forward chain of T steps on d bits: the schedule 1/(T - t + 1), steps and marginals as matrices."""

    def __init__(self, data: np.ndarray, transitions: int) -> None:
        self.bits, self.transitions = int(math.log2(len(data))), transitions
        self.betas = [1 / (transitions - t + 1) for t in range(1, transitions + 1)]
        self.marginals = [data]
        for beta in self.betas:
            self.marginals.append(over_bits(bit_kernel(beta), self.bits) @ self.marginals[-1])

    def step(self, t: int) -> np.ndarray:
        return over_bits(bit_kernel(self.betas[t - 1]), self.bits)

    def bit_marginal(self, t: int) -> np.ndarray:
        """``q(x_t|x_0)`` of one bit, [to, from], as the product of its steps."""
        return np.linalg.multi_dot([np.eye(2), *(bit_kernel(b) for b in reversed(self.betas[:t])), np.eye(2)])

    def bound(self, reverse: Callable[[int], np.ndarray]) -> float:
        """``E[log q(x_1:T|x_0) - log p(x_0:T)]``, from pairs (x_{t-1}, x_t) alone; reverse(t) is p, [x_{t-1}, x_t]."""
        total = self.bits * math.log(2)  # -log p(x_T)
        for t in range(1, self.transitions + 1):
            forward = self.step(t).T  # [x_{t-1}, x_t]
            joint = self.marginals[t - 1][:, None] * forward
            seen = joint > 0
            total += (joint[seen] * (np.log(forward[seen]) - np.log(reverse(t)[seen]))).sum()
        return float(total)

    def exact_reverse(self, t: int) -> np.ndarray:
        """The joint reverse kernel over all 2^d states, by Bayes."""
        return self.step(t).T * self.marginals[t - 1][:, None] / self.marginals[t]

    def factorised_reverse(self, log_odds: LogOdds) -> Callable[[int], np.ndarray]:
        """``prod_i sum_{x_i} p_hat(x_i|x_t) q(x_{t-1,i}|x_{t,i}, x_i)``: SD15's mixture for each bit."""
        all_states = states(self.bits)

        def reverse(t: int) -> np.ndarray:
            signal = 1 - t / self.transitions
            before, step, until = self.bit_marginal(t - 1), bit_kernel(self.betas[t - 1]), self.bit_marginal(t)
            output = log_odds(torch.tensor(2.0 * all_states - 1), signal).numpy()
            kernel = np.ones((len(all_states), len(all_states)))
            for i in range(self.bits):
                now = all_states[:, i]
                given_x = [until[now, x] * np.exp(x * output[:, i]) for x in (0, 1)]
                p_hat = np.array(given_x) / sum(given_x)  # [x, state]
                mixture = np.zeros((2, len(all_states)))
                for x, back in itertools.product((0, 1), repeat=2):
                    mixture[back] += p_hat[x] * step[now, back] * before[back, x] / until[now, x]
                kernel *= mixture[all_states[:, i]]
            return kernel

        return reverse


def exact_log_odds(data: np.ndarray) -> LogOdds:
    """``log p(x_i = 1 | the other bits of z) - log p(x_i = -1 | ...)``, by a sum over all data."""
    x = torch.tensor(2.0 * states(int(math.log2(len(data)))) - 1)[data > 0]
    log_data = torch.tensor(data[data > 0]).log()

    def log_odds(z: Tensor, signal: float) -> Tensor:
        each = torch.log((1 + signal * z[:, None, :] * x) / 2)  # (B, states, d)
        columns = []
        for i in range(x.shape[1]):
            others = each.sum(-1) - each[..., i] + log_data
            odds = [torch.logsumexp(others[:, x[:, i] == bit], 1) for bit in (1.0, -1.0)]
            columns.append(odds[0] - odds[1])
        return torch.stack(columns, 1)

    return log_odds


def some_network(bits: int) -> LogOdds:
    """No denoiser of anything, and not even blind to the bit itself."""
    weights = torch.randn(bits, bits, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda z, signal: torch.tanh(z @ weights + signal) * (1 + 2 * signal)


def bound_of_the_package(process: BinomialProcess, data: np.ndarray, log_odds: LogOdds, transitions: int) -> float:
    """The terms of the bound, each as an exact sum over all data and all latents."""
    all_states = torch.tensor(2.0 * states(int(math.log2(len(data)))) - 1)
    support = torch.tensor(data).nonzero().flatten()
    x = all_states[support].repeat_interleave(len(all_states), 0)
    z = all_states.repeat(len(support), 1)
    noise = {"marginal": (z == x).double()}  # 0 flips a bit and 1 keeps it
    bound = process.bind(x, noise)[1]
    total = bound.prior_kl(x) + bound.reconstruction(process.quantise(x), x, noise, lambda *_: z)
    steps = process.num_train_timesteps - 1
    for t in range(1, transitions + 1):
        ends = [torch.full((len(x),), end / transitions, dtype=torch.float64) for end in (t - 1, t)]
        signal = process.signal(ends[1])

        def network(sample: Tensor, timestep: Tensor) -> Tensor:
            each = log_odds(sample[: len(all_states)], 1 - float(timestep[0]) / steps)
            return each.repeat(len(support), 1)

        probability = ((1 + signal[:, None] * z * x) / 2).prod(1)
        total = total + probability * bound.transition_kl(x, *ends, noise, network)
    return float((torch.tensor(data)[support].repeat_interleave(len(all_states)) * total).sum())


def random_data(bits: int, support: int) -> np.ndarray:
    generator = np.random.default_rng(bits)
    data = np.zeros(2**bits)
    data[generator.choice(2**bits, support, replace=False)] = generator.dirichlet(np.ones(support))
    return data


# ---- the oracles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "support", "transitions"), [(1, 2, 5), (2, 3, 5), (3, 8, 2), (6, 20, 4), (10, 16, 5)]
)
def test_the_bound_is_that_of_full_enumeration(bits: int, support: int, transitions: int) -> None:
    data, network = random_data(bits, support), some_network(bits)
    chain = Chain(data, transitions)
    expected = chain.bound(chain.factorised_reverse(network))
    actual = bound_of_the_package(BinomialProcess(), data, network, transitions)
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("bits", "support"), [(2, 3), (10, 40)])
def test_the_joint_reverse_kernel_has_the_entropy_for_its_bound(bits: int, support: int) -> None:
    data = random_data(bits, support)
    chain = Chain(data, 5)
    entropy = -(data[data > 0] * np.log(data[data > 0])).sum()
    last = chain.marginals[-1]
    prior_kl = (last * np.log(last * len(data))).sum()
    assert chain.bound(chain.exact_reverse) == pytest.approx(entropy + prior_kl, rel=1e-9)
    factorised = bound_of_the_package(BinomialProcess(), data, exact_log_odds(data), 5)
    assert factorised > entropy + prior_kl  # five transitions must flip several bits at once


def test_two_equal_bits() -> None:
    """Five transitions, each bit for itself: -0.949 nats; the joint kernel -0.693."""
    data = np.array([0.5, 0.0, 0.0, 0.5])
    assert -bound_of_the_package(BinomialProcess(), data, exact_log_odds(data), 5) == pytest.approx(-0.949, abs=5e-4)
    assert -Chain(data, 5).bound(Chain(data, 5).exact_reverse) == pytest.approx(-math.log(2), rel=1e-9)


def integrated_rate(exponent: float, data: np.ndarray, log_odds: LogOdds) -> float:
    """The bound in continuous time by Gauss-Legendre quadrature, each point an exact sum over data and latents."""
    process = BinomialProcess(exponent)
    nodes, weights = np.polynomial.legendre.leggauss(100)
    all_states = torch.tensor(2.0 * states(int(math.log2(len(data)))) - 1)
    x, z = all_states.repeat_interleave(len(all_states), 0), all_states.repeat(len(all_states), 1)
    noise = {"marginal": (z == x).double()}
    of_data, total = torch.tensor(data).repeat_interleave(len(all_states)), 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        t = torch.full((len(x),), node, dtype=torch.float64)
        signal = float(process.signal(t)[0])
        probability = ((1 + signal * z * x) / 2).prod(1)
        rate = process.bind(x, noise)[1].kl_rate(x, t, noise, lambda sample, _, at=signal: log_odds(sample, at))
        total += weight * float((of_data * probability * rate).sum())
    return total


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_in_continuous_time_one_bit_flips_at_a_time_so_the_exact_denoiser_reaches_the_entropy(exponent: float) -> None:
    data = np.array([0.4, 0.1, 0.05, 0.2, 0.05, 0.05, 0.05, 0.1])
    entropy = -(data * np.log(data)).sum()
    assert integrated_rate(exponent, data, exact_log_odds(data)) == pytest.approx(entropy, rel=1e-4)


def test_the_continuous_bound_does_not_depend_on_the_exponent_whatever_the_network() -> None:
    data, network = random_data(3, 8), some_network(3)
    bounds = [integrated_rate(exponent, data, network) for exponent in (1.0, 2.0)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)
    assert bounds[0] == pytest.approx(bound_of_the_package(BinomialProcess(), data, network, 2000), rel=2e-3)


def test_the_mixture_is_not_the_posterior_of_a_fractional_estimate() -> None:
    """T = 5, t = 2, x_t = 0, p_hat(x_0 = 1|x_t) = 0.8: the mixture gives x_{t-1} = 1 with 0.453, the other 0.289."""
    chain = Chain(np.array([0.5, 0.5]), 5)
    before, step, until = chain.bit_marginal(1), bit_kernel(chain.betas[1]), chain.bit_marginal(2)
    mixture = sum(p * step[0, 1] * before[1, x] / until[0, x] for x, p in ((0, 0.2), (1, 0.8)))
    fractional = [step[0, back] * (0.2 * before[back, 0] + 0.8 * before[back, 1]) for back in (0, 1)]
    lost = torch.tensor([0.2, 0.4], dtype=torch.float64)
    signal = 1 - float(lost[1])
    log_odds = math.log(0.8 / 0.2) + math.log((1 + signal) / (1 - signal))  # given the other bits: less z_t's own word
    flip = kernels.flip_probability(torch.tensor(-log_odds, dtype=torch.float64), lost[0], lost[1])
    assert float(flip) == pytest.approx(mixture, rel=1e-9)
    assert (mixture, fractional[1] / sum(fractional)) == (
        pytest.approx(0.453, abs=5e-4),
        pytest.approx(0.289, abs=5e-4),
    )


@pytest.mark.parametrize("transitions", [1, 5, 1000])
def test_the_signal_is_that_of_the_schedule_of_the_paper(transitions: int) -> None:
    remaining = np.cumprod([1 - 1 / (transitions - t + 1) for t in range(1, transitions + 1)])
    times = torch.arange(1, transitions + 1, dtype=torch.float64) / transitions
    np.testing.assert_allclose(BinomialProcess().signal(times), remaining, atol=1e-12)


def test_the_marginal_is_the_product_of_the_steps() -> None:
    process, size = BinomialProcess(), 100_000
    x = torch.ones(size, 1)
    noise = process.draw_noise((size, 1), torch.Generator().manual_seed(0), torch.device("cpu"))
    for t in (1, 3, 4):
        kept = process.bind(x, noise)[1].sample(x, torch.full((size,), t / 5), noise)
        expected = Chain(np.array([0.5, 0.5]), 5).bit_marginal(t)[1, 1]
        assert float((kept > 0).double().mean()) == pytest.approx(expected, abs=5 * 0.5 / size**0.5)


def test_samples_follow_the_enumerated_model() -> None:
    """Five reverse steps from fair coins, against the product of the enumerated reverse kernels."""
    data, size = np.array([0.45, 0.05, 0.1, 0.4]), 40_000
    chain, log_odds = Chain(data, 5), exact_log_odds(data)
    expected = np.full(4, 0.25)
    for t in range(5, 0, -1):
        expected = chain.factorised_reverse(log_odds)(t) @ expected
    bound, generator = BinomialProcess().bind(None, {})[1], torch.Generator().manual_seed(0)
    z = bound.prior_sample((size, 2), generator, torch.device("cpu"))
    for t in range(5, 0, -1):
        ends = [torch.tensor(end / 5, dtype=torch.float64) for end in (t - 1, t)]
        z, estimate = bound.reverse_step(log_odds(z.double(), 1 - t / 5), z, *ends, generator)
        assert float(estimate.abs().max()) <= 1
    levels = bound.decode(z, lambda *_: z, generator)
    counts = np.bincount((levels * torch.tensor([2, 1])).sum(1).numpy(), minlength=4)
    np.testing.assert_allclose(counts / size, expected, atol=5 * 0.5 / size**0.5)
    assert np.abs(expected - data).max() > 5 * 0.5 / size**0.5  # the model's own, not the data's


def test_the_estimate_is_the_mean_of_the_data_given_the_latent() -> None:
    data, signal = random_data(3, 8), 0.3
    x, log_odds = torch.tensor(2.0 * states(3) - 1), exact_log_odds(data)
    joint = torch.tensor(data)[None] * ((1 + signal * x[:, None] * x[None]) / 2).prod(-1)  # [z, x]
    expected = (joint / joint.sum(1, keepdim=True)) @ x
    actual = kernels.mean_of_data(x, log_odds(x, signal), torch.tensor(1 - signal, dtype=torch.float64))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("lost", [0.0, 1e-7, 1e-3, 0.5, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("logit", [-200.0, -5.0, 0.0, 5.0, 200.0])
def test_float32_stays_finite_and_near_float64(lost: float, logit: float) -> None:
    def values(dtype: torch.dtype) -> Tensor:
        agrees = torch.tensor([True, False]) if lost > 0 else torch.tensor([True, True])
        given = torch.full((2,), logit, dtype=dtype, requires_grad=True)
        at, rate = torch.tensor(lost, dtype=dtype), torch.ones((), dtype=dtype)
        results = [kernels.kl_rate(agrees, given, at, rate)]
        if lost > 0:
            results.append(kernels.transition_kl(agrees, given, at / 2, at))
            results.append(kernels.transition_kl(agrees, given, torch.zeros_like(at), at))
        joined = torch.cat(results)
        (gradient,) = torch.autograd.grad(joined.sum(), given)
        return torch.cat([joined.detach(), gradient]).double()

    single, double = values(torch.float32), values(torch.float64)
    assert bool(torch.isfinite(single).all()) and bool((single[:2] >= -1e-5).all())
    torch.testing.assert_close(single, double, rtol=2e-3, atol=2e-3)


def test_only_bits_are_corrupted() -> None:
    with pytest.raises(ConfigurationError, match=naming("num_levels", 17)):
        VDMScheduler(forward_process="binomial", num_levels=17)
    with pytest.raises(ConfigurationError, match=r"exponent=0\.5"):
        BinomialProcess(0.5)
    scheduler = VDMScheduler(forward_process="binomial", num_levels=2)
    assert isinstance(scheduler.process.bind(None, {})[1], BoundBinomial)
    with pytest.raises(ConfigurationError, match="normal noise"):
        scheduler.add_noise(torch.ones(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.tensor([500.0]))
