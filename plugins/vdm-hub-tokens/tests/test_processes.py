"""Both processes against full enumeration, written out with matrices over all states of a text of five sites."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from naming import naming
from vdm_hub import ConfigurationError, VDMObjective, VDMScheduler
from vdm_hub_tokens import SCHEDULES, AbsorbingProcess, TokenProcess, UniformProcess, build_schedule, kernels
from vdm_hub_tokens.kernels import Level
from vdm_hub_tokens.oracles import MarkovChain, MarkovDenoiser

LENGTH, K = 5, 3
CPU = torch.device("cpu")
schedules = pytest.mark.parametrize("name", SCHEDULES)
processes = pytest.mark.parametrize("process", [AbsorbingProcess(K), UniformProcess(K)], ids=["absorbing", "uniform"])


def states(values: int, length: int = LENGTH) -> Tensor:
    return torch.tensor(list(itertools.product(range(values), repeat=length)))


class Table(torch.nn.Module):
    """A network that is a table of random logits, one row a state: no denoiser of anything."""

    def __init__(self, process: TokenProcess, length: int = LENGTH, scale: float = 1.5) -> None:
        super().__init__()
        self.base = process.num_levels + 1
        generator = torch.Generator().manual_seed(0)
        shape = (self.base**length, length, process.num_levels)
        self.logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def forward(self, sample: Tensor, timestep: Tensor | None = None, return_dict: bool = True) -> tuple[Tensor]:
        powers = self.base ** torch.arange(sample.shape[1])
        return (self.logits[(sample.long() * powers).sum(1)],)

    def bare(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self(sample)[0]


def noise_for(process: TokenProcess, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """The base noise that takes x to z, whatever the time."""
    k = process.num_levels
    changed = torch.where(z == x, 2.0, -1.0).double()
    return {"marginal": changed, "value": ((z - x - 1) % k + 0.5) / max(k - 1, 1)}


def marginal_probability(process: TokenProcess, x: Tensor, z: Tensor, t: float) -> Tensor:
    """``q(z_t|x)`` of whole texts, (B,)."""
    alpha = process.schedule.alpha(torch.tensor(t, dtype=torch.float64))
    stays = (z == x).double()
    if isinstance(process, AbsorbingProcess):
        each = alpha * stays + (1 - alpha) * (z == process.mask_id).double()
    else:
        each = alpha * stays + (1 - alpha) / process.num_levels
    return each.prod(1)


def latents(process: TokenProcess, length: int = LENGTH) -> Tensor:
    return states(process.num_levels + isinstance(process, AbsorbingProcess), length)


def site_kernel(process: TokenProcess, signal: float) -> np.ndarray:
    """``q(z_t|z_s)`` of one site with this alpha_ts, [to, from]."""
    k = process.num_levels
    if isinstance(process, AbsorbingProcess):
        kernel = np.eye(k + 1) * signal
        kernel[k] = [1 - signal] * k + [1]
        return kernel
    return signal * np.eye(k) + (1 - signal) / k


def alphas(transitions: int) -> list[float]:
    return [1 - t / transitions for t in range(transitions + 1)]


def enumerated_bound(process: TokenProcess, data: Tensor, weights: Tensor, table: Table, transitions: int) -> float:
    """``E[log q(z_1:T|z_0) - log p(z_0:T)]`` from pairs of neighbours alone, over all states, by Bayes' rule."""
    k, signal = process.num_levels, alphas(transitions)
    every = latents(process)
    size = every.max() + 1
    now = np.zeros(len(every))
    index = (data * size ** torch.arange(LENGTH).flip(0)).sum(1)
    np.add.at(now, index.numpy(), weights.numpy())
    prior = (
        np.full(len(every), k**-LENGTH) if isinstance(process, UniformProcess) else (every == k).all(1).numpy() * 1.0
    )
    total = 0.0
    for t in range(1, transitions + 1):
        step = site_kernel(process, signal[t] / signal[t - 1])
        whole = functools.reduce(np.kron, [step] * LENGTH)  # [to, from]
        joint = whole.T * now[:, None]  # [z_s, z_t]
        reverse = reverse_kernel(process, every, table, signal[t - 1], signal[t], step)
        seen = joint > 0
        total += (joint[seen] * (np.log(whole.T[seen]) - np.log(reverse[seen]))).sum()
        now = whole @ now
    return float(total - (now[now > 0] * np.log(prior[now > 0])).sum())


def reverse_kernel(
    process: TokenProcess, every: Tensor, table: Table, alpha_s: float, alpha_t: float, step: np.ndarray
) -> np.ndarray:
    """``prod_l sum_{x_l} p(x_l|z_t) q(z_{s,l}|z_{t,l}, x_l)``, [z_s, z_t]."""
    k = process.num_levels
    pi = table(every)[0].softmax(-1).numpy()
    before, until = site_kernel(process, alpha_s), site_kernel(process, alpha_t)
    kernel = np.ones((len(every), len(every)))
    for site in range(LENGTH):
        z = every[:, site].numpy()
        p_x = pi[:, site] * until[z, :k]  # up to a factor, (states, x)
        p_x = p_x / np.maximum(p_x.sum(1, keepdims=True), 1e-300)  # of none where z_t is impossible
        mixture = np.zeros((len(step), len(every)))
        for x in range(k):
            posterior = step[z] * before[:, x] / np.maximum(until[z, x], 1e-300)[:, None]  # (states, z_s)
            mixture += (p_x[:, x, None] * posterior).T
        kernel *= mixture[every[:, site].numpy()]
    return kernel


def bound_of_the_package(
    process: TokenProcess, data: Tensor, weights: Tensor, table: Table, transitions: int
) -> float:
    """The sum of all transition KLs, each an exact sum over all data and latents."""
    every = latents(process)
    x, z = data.repeat_interleave(len(every), 0), every.repeat(len(data), 1)
    possible = marginal_probability(process, x, z, 0.5) > 0
    x, z, of_data = x[possible], z[possible], weights.repeat_interleave(len(every))[possible]
    noise, encoded = noise_for(process, x, z), x.double()
    bound, total = process.bind(encoded, noise)[1], 0.0
    for t in range(1, transitions + 1):
        s_and_t = [torch.full((len(x),), end / transitions, dtype=torch.float64) for end in (t - 1, t)]
        probability = marginal_probability(process, x, z, t / transitions)
        kl = bound.transition_kl(encoded, *s_and_t, noise, table.bare)
        total += float((of_data * probability * kl).sum())
    return total


def some_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    every = states(K)
    chosen = torch.randperm(len(every), generator=generator)[:7]
    return every[chosen], torch.rand(7, generator=generator, dtype=torch.float64).softmax(0)


@processes
@pytest.mark.parametrize("transitions", [1, 4])
def test_the_bound_is_that_of_full_enumeration(process: TokenProcess, transitions: int) -> None:
    """Over all 3^5 states of the uniform process, and all 4^5 of the absorbing one."""
    table, (data, weights) = Table(process), some_data()
    expected = enumerated_bound(process, data, weights, table, transitions)
    assert bound_of_the_package(process, data, weights, table, transitions) == pytest.approx(expected, rel=1e-10)


def integrated_rate(process: TokenProcess, x: Tensor, network: Callable[..., Tensor], points: int = 40) -> Tensor:
    """The bound of each text in continuous time, (B,): quadrature over t, exact over latents; t = u^2 for the ends."""
    every = latents(process, x.shape[1])
    nodes, weights = np.polynomial.legendre.leggauss(points)
    data, z = x.repeat_interleave(len(every), 0), every.repeat(len(x), 1)
    total = torch.zeros(len(x), dtype=torch.float64)
    noise = noise_for(process, data, z)
    bound = process.bind(data.double(), noise)[1]
    for u, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        t = torch.full((len(data),), u**2, dtype=torch.float64)
        rate = bound.kl_rate(data.double(), t, noise, network)
        probability = marginal_probability(process, data, z, u**2)
        total += 2 * u * weight * torch.where(probability > 0, probability * rate, 0).reshape(len(x), -1).sum(1)
    return total


def mean_over_orders(x: Tensor, table: Table, mask_id: int) -> float:
    """``-log p(x|order)``, the mean over all L! orders in which sites may open."""
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        z = torch.full_like(x, mask_id)
        for site in order:
            total -= float(table(z[None])[0][0, site].log_softmax(-1)[x[site]])
            z[site] = x[site]
    return total / math.factorial(LENGTH)


@schedules
def test_the_continuous_bound_is_the_mean_over_all_orders_whatever_the_schedule(name: str) -> None:
    process = AbsorbingProcess(K, name)
    table, x = Table(process), torch.tensor([[2, 0, 1, 1, 2], [0, 0, 0, 2, 1]])
    expected = [mean_over_orders(one, table, process.mask_id) for one in x]
    assert integrated_rate(process, x, table.bare).tolist() == pytest.approx(expected, rel=1e-9)


@schedules
def test_the_uniform_bound_in_continuous_time_is_the_limit_and_does_not_depend_on_the_schedule(name: str) -> None:
    process = UniformProcess(K, name)
    table, x = Table(process), torch.tensor([[2, 0, 1, 1, 2]])
    bound = integrated_rate(process, x, table.bare)
    linear = UniformProcess(K)
    # The rate has a logarithm at t = 0, which the quadrature sees to some 1e-7.
    assert float(bound) == pytest.approx(float(integrated_rate(linear, x, table.bare)), rel=1e-6)
    many = bound_of_the_package(linear, x, torch.ones(1, dtype=torch.float64), table, 400)
    assert float(bound) == pytest.approx(many, rel=2e-3)


@processes
def test_the_exact_denoiser_reaches_the_entropy_of_a_markov_chain(process: TokenProcess) -> None:
    """In continuous time one site changes at a time: the mean bound is the entropy; -log p(x) itself if masked."""
    chain, every = MarkovChain.random(K), states(K, 4)
    denoiser = MarkovDenoiser(chain, process)
    bounds = integrated_rate(process, every, lambda sample, timestep: denoiser(sample, timestep)[0])
    exact = -chain.log_prob(every)
    if isinstance(process, AbsorbingProcess):
        torch.testing.assert_close(bounds, exact, rtol=1e-9, atol=0)
    probabilities = (-exact).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert float((probabilities * bounds).sum()) == pytest.approx(float((probabilities * exact).sum()), rel=1e-6)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_uniform_diffusion_of_two_values_is_binomial_diffusion_term_by_term(exponent: float) -> None:
    binomial_package = pytest.importorskip(
        "vdm_hub_binomial", reason="vdm-hub-binomial is not installed: K = 2 is not compared"
    )
    binomial, uniform = binomial_package.BinomialProcess(exponent), UniformProcess(2, "polynomial", exponent)
    levels = torch.randint(0, 2, (64, 9), generator=torch.Generator().manual_seed(0))
    noise = uniform.draw_noise(tuple(levels.shape), torch.Generator().manual_seed(1), CPU)
    noise = {name: value.double() for name, value in noise.items()}
    weights = torch.randn(9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def log_odds(bits: Tensor, timestep: Tensor) -> Tensor:
        return 3 * torch.tanh(bits.double() @ weights + timestep[:, None] / 999)

    def logits(ids: Tensor, timestep: Tensor) -> Tensor:
        half = log_odds(2.0 * ids - 1, timestep) / 2
        return torch.stack([-half, half], -1)

    signs, ids = (one.encode(levels).double() for one in (binomial, uniform))
    bits, tokens = binomial.bind(signs, noise)[1], uniform.bind(ids, noise)[1]
    for end in (0.001, 0.3, 0.7, 1.0):
        t = torch.full((64,), end, dtype=torch.float64)
        assert torch.equal(bits.sample(signs, t, noise), 2 * tokens.sample(ids, t, noise) - 1)
        for s in (t * 0, t / 2, t * 0.999):
            ours, theirs = (
                tokens.transition_kl(ids, s, t, noise, logits),
                bits.transition_kl(signs, s, t, noise, log_odds),
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        if end < 1:
            rates = tokens.kl_rate(ids, t, noise, logits), bits.kl_rate(signs, t, noise, log_odds)
            torch.testing.assert_close(*rates, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(uniform.timestep(t), binomial.timestep(t), rtol=1e-12, atol=1e-12)


@processes
def test_a_network_that_knows_the_text_pays_nothing_and_neither_does_one_value(process: TokenProcess) -> None:
    x = torch.randint(0, K, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    sure = 200.0 * torch.nn.functional.one_hot(x, K).double()
    for levels, certain, values in ((x, process, sure), (0 * x, type(process)(1), torch.zeros(6, LENGTH, 1).double())):
        noise = certain.draw_noise((6, LENGTH), torch.Generator().manual_seed(1), CPU)
        bound = certain.bind(levels.double(), noise)[1]
        t = torch.linspace(0.1, 1, 6, dtype=torch.float64)
        network: Any = lambda *_, values=values: values  # noqa: E731
        for term in (
            bound.transition_kl(levels.double(), t / 2, t, noise, network),
            bound.kl_rate(levels.double(), t, noise, network),
        ):
            torch.testing.assert_close(term, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_samples_follow_the_enumerated_model() -> None:
    """Three reverse steps of each process, against the product of the enumerated reverse kernels."""
    size, steps = 40_000, 3
    for process in (AbsorbingProcess(K), UniformProcess(K)):
        table, every, k = Table(process, scale=4.0), latents(process), process.num_levels
        now = (
            np.full(len(every), k**-LENGTH)
            if isinstance(process, UniformProcess)
            else (every == k).all(1).numpy() * 1.0
        )
        signal = alphas(steps)
        for t in range(steps, 0, -1):
            step = site_kernel(process, signal[t] / signal[t - 1])
            now = reverse_kernel(process, every, table, signal[t - 1], signal[t], step) @ now
        bound, generator = process.bind(None, {})[1], torch.Generator().manual_seed(0)
        z = bound.prior_sample((size, LENGTH), generator, CPU)
        for t in range(steps, 0, -1):
            ends = [torch.tensor(end / steps, dtype=torch.float64) for end in (t - 1, t)]
            z, _ = bound.reverse_step(table.bare(z, z), z, *ends, generator)
        levels = bound.decode(z, table.bare, generator)
        base = int(every.max()) + 1
        found = (
            np.bincount((levels * base ** torch.arange(LENGTH).flip(0)).sum(1).numpy(), minlength=len(every)) / size
        )
        np.testing.assert_allclose(found, now, atol=6 * (now.max() / size) ** 0.5)
        uniform = np.where(now > 0, 1 / (now > 0).sum(), 0)
        assert np.abs(now - uniform).max() > 12 * (now.max() / size) ** 0.5  # the model's own


# ---- what is given -------------------------------------------------------------------------------------------------


@processes
@pytest.mark.parametrize("transitions", [None, 4])
def test_the_bound_of_the_others_given_a_part_is_that_of_the_shorter_text(
    process: TokenProcess, transitions: int | None
) -> None:
    """A network that sees all: sites that are given cost nothing, and a wrong value there is never asked for."""
    levels = torch.randint(0, K, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    given = torch.zeros(8, LENGTH, dtype=torch.bool)
    given[:, [0, 3]] = True
    seen = []

    class Listening(Table):
        def forward(self, sample: Tensor, timestep: Tensor | None = None, return_dict: bool = True) -> tuple[Tensor]:
            seen.append(sample)
            return (torch.where(given[..., None], torch.nan, super().forward(sample)[0]),)

    objective = VDMObjective(Listening(process), process, transitions)
    batch = {"levels": levels, "given": given}
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(1))
    terms = objective(batch, torch.linspace(0.1, 0.95, 8), noise).terms
    assert torch.equal(seen[0][given], levels[given]) and seen[0].dtype == torch.int64
    if isinstance(process, AbsorbingProcess):
        assert bool(torch.isfinite(terms["diffusion"]).all())
    objective = VDMObjective(Table(process), process, transitions)
    bound = objective(batch, torch.linspace(0.1, 0.95, 8), noise).terms["diffusion"]
    others = {"levels": levels, "given": ~given}
    both = bound + objective(others, torch.linspace(0.1, 0.95, 8), noise).terms["diffusion"]
    assert bool((bound >= 0).all() & (both >= bound).all()) and 0 < float(bound.sum()) < float(both.sum())
    everything = objective(batch | {"given": torch.ones_like(given)}, torch.linspace(0.1, 0.95, 8), noise)
    assert float(everything.total.abs().max()) == 0


@processes
def test_infilling_keeps_what_is_given_and_draws_the_rest_from_what_it_implies(process: TokenProcess) -> None:
    chain, size, steps = MarkovChain.random(K), 20_000, 64
    x = torch.tensor([[1, 0, 2]]).expand(size, 3).float()
    given = torch.tensor([[True, False, True]]).expand(size, 3)
    # What is given is certain: the exact denoiser of uniform diffusion would take it for noised.
    posterior = chain.posterior(torch.where(given[..., None], torch.nn.functional.one_hot(x.long(), K), 1).double())
    bound, generator = process.bind_given(x, {}, given)[1], torch.Generator().manual_seed(0)
    z = bound.prior_sample((size, 3), generator, CPU)
    for t in range(steps, 0, -1):
        ends = [torch.tensor(end / steps, dtype=torch.float64) for end in (t - 1, t)]
        z, _ = bound.reverse_step(posterior, z, *ends, generator)
    assert torch.equal(z[:, [0, 2]], x[:, [0, 2]])
    middle = (chain.transition[1] * chain.transition[:, 2]) / (chain.transition[1] * chain.transition[:, 2]).sum()
    found = torch.bincount(z[:, 1].long(), minlength=K) / size
    torch.testing.assert_close(found.double(), middle, rtol=0, atol=6 * 0.5 / size**0.5)


# ---- remasking -----------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize(("share", "cap"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.04), (0.0, 1.0)])
def test_remasking_leaves_the_marginals_right(name: str, share: float, cap: float) -> None:
    """``alpha_s = alpha_t (1 - sigma) + (1 - alpha_t) opening``, and all are probabilities."""
    process = AbsorbingProcess(K, name).with_remasking(share, cap)
    t = torch.linspace(0.05, 1, 39, dtype=torch.float64)
    for s in (t * 0, t / 2, t - 0.05):
        bound = process.bind(None, {})[1]
        opening, closing, alpha = bound.opening(s, t), bound.closing(s, t), process.schedule.alpha
        torch.testing.assert_close(alpha(s), alpha(t) * (1 - closing) + process.schedule.lost(t) * opening)
        assert bool(((opening >= 0) & (opening <= 1 + 1e-12) & (closing >= 0) & (closing <= cap)).all())


def test_a_chain_that_remasks_ends_in_the_data_and_its_bound_is_its_own() -> None:
    process = AbsorbingProcess(K).with_remasking(0.8)
    size, steps = 40_000, 6
    bound, generator = process.bind(None, {})[1], torch.Generator().manual_seed(0)
    data = torch.randint(0, K, (size, 2), generator=generator)
    known = 60.0 * torch.nn.functional.one_hot(data, K).double()
    z, again = bound.prior_sample((size, 2), generator, CPU), 0
    for t in range(steps, 0, -1):
        ends = [torch.tensor(end / steps, dtype=torch.float64) for end in (t - 1, t)]
        before = z
        z, _ = bound.reverse_step(known, z, *ends, generator)
        masked = float((z == K).double().mean())
        assert masked == pytest.approx((t - 1) / steps, abs=6 * 0.5 / (2 * size) ** 0.5)
        again += int(((before != K) & (z == K)).sum())
    assert torch.equal(z.long(), data) and again > size / 10
    x, t = data[:100].double(), torch.full((100,), 0.5, dtype=torch.float64)
    noise = process.draw_noise((100, 2), torch.Generator().manual_seed(1), CPU)
    plain = AbsorbingProcess(K).bind(x, noise)[1].transition_kl(x, t / 2, t, noise, lambda *_: 0 * known[:100])
    ours = process.bind(x, noise)[1].transition_kl(x, t / 2, t, noise, lambda *_: 0 * known[:100])
    # alpha_s = 3/4, alpha_t = 1/2, sigma = 0.8/2: (0.75 - 0.6 * 0.5)/0.5 against (0.75 - 0.5)/0.5.
    torch.testing.assert_close(ours, plain * 0.9 / 0.5)
    with pytest.raises(ConfigurationError, match=naming("remasking", "transitions")):
        process.bind(x, noise)[1].kl_rate(x, t, noise, lambda *_: known[:100])


# ---- schedules and numerics ----------------------------------------------------------------------------------------


@schedules
def test_a_schedule_falls_from_one_to_zero_and_its_closed_forms_agree(name: str) -> None:
    schedule = build_schedule(name)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(ends), 1 - ends, rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.lost(ends), ends, rtol=0, atol=1e-15)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) + schedule.lost(t), torch.ones_like(t), rtol=0, atol=1e-14)
    assert bool((schedule.alpha(t).diff() < 0).all())
    slope = torch.autograd.functional.jacobian(lambda u: schedule.alpha(u).sum(), t)
    torch.testing.assert_close(schedule.lost_rate(t), -slope, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(schedule.opening_rate(t), schedule.lost_rate(t) / schedule.lost(t))
    torch.testing.assert_close(schedule.time(schedule.lost(t)), t)
    for s in (t * 0, t / 3):
        expected = (schedule.alpha(s) - schedule.alpha(t)) / schedule.lost(t)
        torch.testing.assert_close(schedule.opened(s, t), expected, rtol=1e-10, atol=0)


@schedules
def test_nothing_cancels_in_float32(name: str) -> None:
    """Near both ends and for short steps, float32 is float64 to a few units in the last place of its inputs."""
    schedule = build_schedule(name)
    t = torch.tensor([1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-20])
    s = t * (1 - 2.0**-10)
    for single, double in (
        (schedule.alpha(t), schedule.alpha(t.double())),
        (schedule.lost(t), schedule.lost(t.double())),
        (schedule.lost_rate(t), schedule.lost_rate(t.double())),
        (schedule.opening_rate(t), schedule.opening_rate(t.double())),
        (schedule.opened(s, t), schedule.opened(s.double(), t.double())),
    ):
        torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=0)


@pytest.mark.parametrize("lost", [1e-7, 1e-3, 0.5, 1 - 2.0**-20])
@pytest.mark.parametrize("sharp", [0.01, 1.0, 30.0, 300.0])
def test_kls_in_float32_are_finite_never_negative_and_those_of_float64(lost: float, sharp: float) -> None:
    """Of near and far predictions; relative to the KL where it is large, to 1e-6 nats where it is small."""
    k = 7
    logits = sharp * torch.randn(4, 50, k, generator=torch.Generator().manual_seed(0))
    x, z = (torch.randint(0, k, (4, 50), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    z[:2] = x[:2]

    def values(dtype: torch.dtype) -> Tensor:
        given = logits.to(dtype).requires_grad_()
        at_t = Level(torch.tensor(1 - lost, dtype=dtype), torch.tensor(lost, dtype=dtype))
        results = [kernels.kl_rate(x, z, given, at_t, torch.ones((), dtype=dtype))]
        for share in (0.5, 0.0):
            at_s = Level(1 - share * at_t.lost, share * at_t.lost)
            results.append(kernels.transition_kl(x, z, given, at_s, at_t, torch.tensor(1 - share, dtype=dtype)))
        joined = torch.stack(results)
        (gradient,) = torch.autograd.grad(joined.sum(), given)
        assert bool(torch.isfinite(gradient).all()) and bool((joined >= 0).all())
        return joined.detach().double()

    single, double = values(torch.float32), values(torch.float64)
    torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-6)


NUMBERS = ("num_levels", "num_train_timesteps")


def test_what_is_wrong_is_refused() -> None:
    for arguments, words in (
        ({"schedule": "lineer"}, ("schedule", "'lineer'", "linear")),
        ({"exponent": 2.0}, ("exponent", 2.0, "'linear'")),
        ({"schedule": "polynomial", "exponent": 0.5}, ("exponent", 0.5)),
        ({"remasking": 1.5}, ("remasking", 1.5)),
        ({"remasking": "1"}, ("remasking", "'1'")),
        ({"remasking_cap": True}, ("remasking_cap", "True")),
        ({"schedule": None}, ("schedule", "None", "linear")),
        ({"schedule": ["linear"]}, ("schedule", "linear")),
        ({"schedule": "polynomial", "exponent": "2"}, ("exponent", "'2'")),
        *(({name: one}, (name, repr(one))) for name in NUMBERS for one in (0, -1, 1.5, "3", None, True, 10**9)),
        ({"num_train_timesteps": 1}, ("num_train_timesteps", 1)),
    ):
        with pytest.raises(ConfigurationError, match=naming(*words)):
            AbsorbingProcess(**arguments)  # type: ignore[arg-type]
    assert AbsorbingProcess(np.int64(3), num_train_timesteps=2).num_levels == 3


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_a_scheduler_builds_it_by_name_and_keeps_its_config(name: str) -> None:
    config = {"schedule": "polynomial", "exponent": 2.0}
    form = {"name": name, "package": "vdm-hub-tokens", "config": config}
    scheduler = VDMScheduler(forward_process=form, num_levels=K)
    process = scheduler.process
    assert isinstance(process, TokenProcess) and process.num_levels == K and process.exponent == 2.0
    again = VDMScheduler.from_config(scheduler.config)
    assert again.process.fields() == process.fields()
