"""Decoders p(x|z_0): distributions over K levels, the factorised one as exact as the textbook form and far smaller."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import mpmath
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import registered
from vdm_hub.diffusion import decoders
from vdm_hub.diffusion.decoders import DDPMDecoder, FactorisedDecoder
from vdm_hub.diffusion.draws import uniform_noise
from vdm_hub.diffusion.scaling import SCALINGS, DataScaling

every_decoder = pytest.mark.parametrize("name", registered.names("decoders"))
every_gamma = pytest.mark.parametrize("gamma_0", [-13.3, -8.7, -3.0, 5.0])
every_k = pytest.mark.parametrize("num_levels", [2, 17, 256])
every_scaling = pytest.mark.parametrize("scaling_name", SCALINGS)


def naive_log_likelihood(levels: Tensor, z_0: Tensor, gamma_0: Tensor, scaling: DataScaling) -> Tensor:
    """``log p(x_i|z_0)`` by a softmax over the (B, D, K) tensor of the textbook, elementwise."""
    alpha = (1 / (1 + gamma_0.exp())).sqrt()
    values = scaling.encode(torch.arange(scaling.num_levels), z_0.dtype)
    logits = -0.5 * torch.exp(-gamma_0).unsqueeze(-1) * ((z_0 / alpha).unsqueeze(-1) - values) ** 2
    return logits.log_softmax(-1).gather(-1, levels.long().unsqueeze(-1)).squeeze(-1)


def draw(scaling: DataScaling, gamma_0: float, shape: tuple[int, ...], near: bool = True) -> tuple[Tensor, Tensor]:
    """Levels, and latents of those levels or of others."""
    generator = torch.Generator().manual_seed(1)
    levels, others = torch.randint(0, scaling.num_levels, (2, *shape), generator=generator).unbind()
    eps = torch.randn(shape, dtype=torch.float64, generator=generator)
    g = torch.tensor(gamma_0, dtype=torch.float64)
    x = scaling.encode(levels if near else others, torch.float64)
    return levels, torch.sigmoid(-g).sqrt() * x + torch.sigmoid(g).sqrt() * eps


def factorised(levels: Tensor, z_0: Tensor, gamma_0: Tensor, scaling: DataScaling) -> Tensor:
    unused = torch.tensor(0.0)
    return FactorisedDecoder().negative_log_likelihood(levels, z_0, gamma_0, unused, lambda: z_0, scaling)


@every_gamma
@every_k
@every_scaling
@pytest.mark.parametrize("near", [True, False])
def test_factorised_equals_the_naive_softmax(gamma_0: float, num_levels: int, scaling_name: str, near: bool) -> None:
    scaling = DataScaling(scaling_name, num_levels)
    levels, z_0 = draw(scaling, gamma_0, (8, 40), near)
    g = torch.full((8,), gamma_0, dtype=torch.float64)
    expected = -naive_log_likelihood(levels, z_0, g[:, None].expand(8, 40), scaling).sum(1)
    torch.testing.assert_close(factorised(levels, z_0, g, scaling), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gamma_0", [-30.0, -13.3, -7.65, -1.0, 5.0])
@every_k
@every_scaling
def test_the_expectation_of_each_level_is_that_of_the_textbook_decoder(
    gamma_0: float, num_levels: int, scaling_name: str
) -> None:
    """By a rule twice as fine or more: both converge geometrically, so they agree to rounding or one is wrong."""
    scaling, g = DataScaling(scaling_name, num_levels), torch.tensor([[gamma_0]], dtype=torch.float64)
    found = FactorisedDecoder().expected_by_level(gamma_0, scaling)
    eps = torch.linspace(-9.5, 9.5, 4001, dtype=torch.float64)
    weights = torch.exp(-0.5 * eps**2) / torch.exp(-0.5 * eps**2).sum()
    for level in {0, 1, num_levels // 2, num_levels - 1}:
        levels = torch.full((len(eps), 1), level)
        z_0 = torch.sigmoid(-g).sqrt() * scaling.encode(levels, torch.float64) + torch.sigmoid(g).sqrt() * eps[:, None]
        exact = -weights @ naive_log_likelihood(levels, z_0, g.expand(len(eps), 1), scaling)[:, 0]
        assert float(found[level]) == pytest.approx(float(exact), rel=1e-10, abs=1e-12)


def test_a_decoder_that_asks_the_network_has_no_expectation_by_level() -> None:
    assert DDPMDecoder().expected_by_level(-13.3, DataScaling("full", 256)) is None


@every_gamma
@every_k
def test_factorised_in_float32_is_right_to_float32(gamma_0: float, num_levels: int) -> None:
    scaling = DataScaling("bin_centers", num_levels)
    levels, z_0 = draw(scaling, gamma_0, (64, 400))
    z_0 = z_0.float()
    g = torch.full((64,), gamma_0)
    exact = -naive_log_likelihood(levels, z_0.double(), g.double()[:, None].expand(64, 400), scaling).mean()
    assert float(factorised(levels, z_0, g, scaling).mean()) / 400 == pytest.approx(float(exact), rel=2e-4, abs=1e-7)


@every_gamma
@every_k
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("levels_visited", ["in reach", "all"])
def test_factorised_values_and_gradients_equal_those_of_the_naive_softmax(
    gamma_0: float, num_levels: int, per_dimension: bool, levels_visited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a gamma that is another one for each datum, or for each dimension too."""
    if levels_visited == "all":  # as on a GPU
        monkeypatch.setattr(decoders, "_moments_in_reach", decoders._moments_of_all)
    scaling = DataScaling("bin_centers", num_levels)
    levels, latent = draw(scaling, gamma_0, (6, 30))
    shape = (6, 30) if per_dimension else (6, 1)
    gamma = gamma_0 + torch.linspace(-2, 2, math.prod(shape), dtype=torch.float64).reshape(shape)

    def values_and_gradients(nll: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        z_0, g = latent.clone().requires_grad_(), gamma.clone().requires_grad_()
        upstream, value = torch.linspace(0.5, 1.5, 6, dtype=torch.float64), nll(z_0, g)
        return value.detach(), *torch.autograd.grad((upstream * value).sum(), (z_0, g))

    actual = values_and_gradients(lambda z_0, g: factorised(levels, z_0, g, scaling))
    naive = values_and_gradients(lambda z_0, g: -naive_log_likelihood(levels, z_0, g.expand(6, 30), scaling).sum(1))
    for mine, theirs in zip(actual, naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10 * float(theirs.abs().max()) + 1e-12)
    for i, inputs in enumerate(((latent.clone().requires_grad_(), gamma), (latent, gamma.clone().requires_grad_()))):
        upstream = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
        (alone,) = torch.autograd.grad((upstream * factorised(levels, *inputs, scaling)).sum(), inputs[i])
        assert torch.equal(alone, actual[1 + i]), "where one of the two is trained alone"


@pytest.mark.parametrize("gamma_0", [-13.3, -8.7, -3.0])
def test_levels_out_of_reach_are_below_the_rounding_of_the_sum(gamma_0: float) -> None:
    scaling, gamma = DataScaling("bin_centers", 256), torch.tensor([[gamma_0]], dtype=torch.float64)
    mean = torch.linspace(-1.1, 1.1, 1001, dtype=torch.float64)[:, None]
    for some, every in zip(
        decoders._moments_in_reach(mean, gamma, scaling, True),
        decoders._moments_of_all(mean, gamma, scaling, True),
        strict=True,
    ):
        torch.testing.assert_close(some, every, rtol=4e-15, atol=1e-14 * float(every.abs().max()))


def test_where_the_noise_hides_all_levels_are_alike_and_where_it_is_no_number_the_bound_is_none() -> None:
    scaling, levels, z_0 = DataScaling("bin_centers", 5), torch.tensor([[0, 4]]), torch.ones(1, 2).double()
    for gamma_0 in (90.0, 101.0, 120.0):
        found = factorised(levels, z_0, torch.tensor([gamma_0]).double(), scaling)
        assert float(found) == pytest.approx(2 * math.log(5), rel=1e-12)
    assert bool(factorised(levels, z_0, torch.tensor([math.nan]).double(), scaling).isnan())


@pytest.mark.parametrize("gamma_0", [-3.0, 0.0, 5.0])
@pytest.mark.parametrize("num_levels", [2, 17])
def test_factorised_gradients_equal_finite_differences(gamma_0: float, num_levels: int) -> None:
    scaling = DataScaling("bin_centers", num_levels)
    levels, z_0 = draw(scaling, gamma_0, (2, 5))
    gamma = torch.full((2,), gamma_0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, g: factorised(levels, z, g, scaling), (z_0.requires_grad_(), gamma), eps=1e-6, atol=1e-6
    )


def peak_bytes(work: Callable[[], Tensor], folder: Path) -> int:
    """The most memory held at once in tensors that ``work`` allocates, from the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    trace = folder / "trace.json"
    record.export_chrome_trace(str(trace))
    del kept
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["args"]["Ev Idx"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("gamma_0", [-13.3, 5.0])
def test_factorised_memory_grows_with_dimensions_not_with_levels(gamma_0: float, tmp_path: Path) -> None:
    """In floats per dimension, forward and backward: one small constant, where the naive form takes several K."""

    def floats_per_dimension(num_levels: int, dimensions: int, naive: bool) -> float:
        scaling = DataScaling("bin_centers", num_levels)
        levels, latent = draw(scaling, gamma_0, (4, dimensions))
        z_0 = latent.float().requires_grad_()
        g = torch.full((4, 1), gamma_0, requires_grad=True)

        def work() -> Tensor:
            if naive:
                loss = -naive_log_likelihood(levels, z_0, g.expand(4, dimensions), scaling).sum()
            else:
                loss = factorised(levels, z_0, g, scaling).sum()
            return torch.autograd.grad(loss, z_0)[0]

        return peak_bytes(work, tmp_path) / (4 * 4 * dimensions)

    for num_levels in (17, 256):
        for dimensions in (1024, 4096):
            assert floats_per_dimension(num_levels, dimensions, naive=False) < 24
    assert floats_per_dimension(256, 1024, naive=True) > 2 * 256


@every_gamma
@every_k
def test_factorised_samples_invert_the_distribution_function(gamma_0: float, num_levels: int) -> None:
    """The uniform behind each draw, got again from the same seed, lies in that level's own interval."""
    scaling = DataScaling("bin_centers", num_levels)
    _, z_0 = draw(scaling, gamma_0, (4, 500))
    g = torch.full((4,), gamma_0, dtype=torch.float64)
    sampled = FactorisedDecoder().sample(z_0, g, lambda: z_0, scaling, torch.Generator().manual_seed(2))
    u = uniform_noise((4, 500), torch.Generator().manual_seed(2), z_0.device, torch.float64)
    every_level = torch.arange(num_levels).expand(4, 500, num_levels)
    log_p = [
        naive_log_likelihood(every_level[..., k], z_0, g[:, None].expand(4, 500), scaling) for k in range(num_levels)
    ]
    cumulative = torch.stack([torch.zeros(4, 500, dtype=torch.float64), *(p.exp() for p in log_p)], -1).cumsum(-1)
    below = cumulative.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    above = cumulative.gather(-1, sampled.unsqueeze(-1) + 1).squeeze(-1)
    assert sampled.dtype == torch.int64
    assert bool(((u >= below - 1e-12) & (u <= above + 1e-12)).all())


@pytest.mark.parametrize(("u", "level"), [(0.0, 0), (1 - 2.0**-24, 1)])
def test_the_least_and_the_greatest_draw_give_the_first_and_the_last_level(
    u: float, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "uniform_noise", lambda shape, *_: torch.full(shape, u))
    z_0 = torch.linspace(-1, 1, 500)[None]
    sampled = FactorisedDecoder().sample(z_0, torch.tensor(5.0), lambda: z_0, DataScaling("bin_centers", 2))
    assert bool((sampled == level).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factorised_samples_follow_the_probabilities(dtype: torch.dtype) -> None:
    scaling, gamma_0, draws = DataScaling("bin_centers", 17), -3.0, 200_000
    z_0 = torch.full((1, draws), 0.8, dtype=dtype)
    g = torch.tensor([gamma_0], dtype=dtype)
    sampled = FactorisedDecoder().sample(z_0, g, lambda: z_0, scaling, torch.Generator().manual_seed(4))
    observed = torch.bincount(sampled.flatten(), minlength=17).double()
    one = torch.full((17,), 0.8, dtype=torch.float64)
    expected = naive_log_likelihood(torch.arange(17), one, g.double().expand(17), scaling).exp() * draws
    common = expected > 5
    rare = torch.stack([observed[~common].sum(), expected[~common].sum()])
    counts = torch.stack([torch.cat([observed[common], rare[:1]]), torch.cat([expected[common], rare[1:]])])
    assert scipy.stats.chisquare(*counts.numpy(), sum_check=False).pvalue > 1e-3


@every_decoder
@every_scaling
@every_k
@pytest.mark.parametrize("gamma_0", [-13.3, -3.0, 5.0])
def test_a_decoder_is_a_distribution_over_the_levels(
    name: str, scaling_name: str, num_levels: int, gamma_0: float
) -> None:
    scaling = DataScaling(scaling_name, num_levels)
    _, latent = draw(scaling, gamma_0, (1, 5))
    levels = torch.arange(num_levels).repeat_interleave(5)[:, None]
    z_0, g = latent.repeat(num_levels, 1).reshape(-1, 1), torch.tensor(gamma_0, dtype=torch.float64)
    nll = registered.build("decoders", name).negative_log_likelihood(
        levels, z_0, g, torch.tensor(0.003, dtype=torch.float64), lambda: z_0, scaling
    )
    total = (-nll).exp().reshape(num_levels, 5).sum(0)
    torch.testing.assert_close(total, torch.ones(5, dtype=torch.float64), rtol=1e-9, atol=0)


@every_decoder
@every_scaling
def test_decoded_levels_are_levels(name: str, scaling_name: str) -> None:
    scaling = DataScaling(scaling_name, 17)
    z_0 = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # far outside of [-1, 1] too
    levels = registered.build("decoders", name).sample(
        z_0, torch.tensor([-7.87, -1.0]), lambda: z_0, scaling, torch.Generator().manual_seed(0)
    )
    assert levels.dtype == torch.int64 and levels.shape == z_0.shape
    assert int(levels.min()) == 0 and int(levels.max()) == 16


@every_decoder
def test_a_list_of_generators_decodes_each_datum_by_its_own(name: str) -> None:
    scaling, decoder = DataScaling("bin_centers", 17), registered.build("decoders", name)
    z_0 = torch.linspace(-1, 1, 40).reshape(1, 40).repeat(3, 1)

    def sample(batch: Tensor, seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        levels = decoder.sample(batch, torch.tensor(-1.0), lambda: batch, scaling, generators)
        assert isinstance(levels, Tensor)
        return levels

    assert torch.equal(sample(z_0, [5, 6, 7])[1], sample(z_0[:1], [6])[0])


def ddpm(levels: Tensor, x_hat: Tensor, variance: float, num_levels: int = 256) -> Tensor:
    scaling = DataScaling("full", num_levels)
    zero = torch.zeros((), dtype=x_hat.dtype)
    return DDPMDecoder().negative_log_likelihood(
        levels, x_hat, zero, torch.tensor(variance, dtype=x_hat.dtype), lambda: x_hat, scaling
    )


@pytest.mark.parametrize("variance", [1e-4, 1e-2, 1.0])
def test_ddpm_is_the_difference_of_erf(variance: float) -> None:
    levels = torch.arange(256)[:, None]
    x = 2 * torch.arange(256, dtype=torch.float64)[:, None] / 255 - 1
    x_hat = (x + math.sqrt(variance) * torch.linspace(-2.5, 2.5, 256, dtype=torch.float64)[:, None]).clamp(-1, 1)
    upper = torch.where(levels == 255, torch.inf, (x + 1 / 255 - x_hat) / math.sqrt(2 * variance))
    lower = torch.where(levels == 0, -torch.inf, (x - 1 / 255 - x_hat) / math.sqrt(2 * variance))
    expected = -torch.log(0.5 * (torch.erf(upper) - torch.erf(lower))).squeeze(1)
    torch.testing.assert_close(ddpm(levels, x_hat, variance), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("deviations", [8.0, 40.0, 300.0])
@pytest.mark.parametrize("side", [-1, 1])
def test_ddpm_tails_equal_arbitrary_precision(deviations: float, side: int) -> None:
    deviation, x = 0.01, 2 * 100 / 255 - 1
    x_hat = x + side * deviations * deviation
    mpmath.mp.dps = 60
    ends = [(mpmath.mpf(side) * (x - x_hat) + w / mpmath.mpf(255)) / mpmath.mpf(deviation) for w in (-1, 1)]
    # In the lower tail: erfc of large arguments keeps its digits.
    mass = mpmath.erfc(-ends[1] / mpmath.sqrt(2)) / 2 - mpmath.erfc(-ends[0] / mpmath.sqrt(2)) / 2
    exact = float(-mpmath.log(mass))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        actual = ddpm(torch.tensor([[100]]), torch.tensor([[x_hat]], dtype=dtype), deviation**2)
        assert float(actual) == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize("x_hat", [-1e4, -3.0, 0.0, 3.0, 1e4])
@pytest.mark.parametrize("variance", [1e-6, 1e-2, 1e4, 1e14])
def test_ddpm_is_finite_with_finite_gradients_in_float32(x_hat: float, variance: float) -> None:
    levels = torch.tensor([[0], [1], [128], [254], [255]])
    mean = torch.full((5, 1), x_hat, requires_grad=True)
    nll = ddpm(levels, mean, variance)
    (gradient,) = torch.autograd.grad(nll.sum(), mean)
    assert bool(torch.isfinite(nll).all()) and bool(torch.isfinite(gradient).all())
    assert float(nll.detach().min()) >= 0


@pytest.mark.parametrize("deviations", [0.5, 30.0, 1000.0, 1e5])
def test_ddpm_gradient_in_the_tail_is_the_distance(deviations: float) -> None:
    """Far out, ``-log p`` is quadratic in the nearer edge of the bin, so its gradient is the distance to that edge."""
    gradients = []
    for dtype in (torch.float64, torch.float32):
        mean = torch.tensor([[2 * 100 / 255 - 1 + 0.01 * deviations]], dtype=dtype, requires_grad=True)
        gradients += torch.autograd.grad(ddpm(torch.tensor([[100]]), mean, 1e-4).sum(), mean)
    assert float(gradients[1]) == pytest.approx(float(gradients[0]), rel=1e-3)
    if deviations >= 30:
        assert float(gradients[0]) * 0.01 == pytest.approx(deviations - 1 / 2.55, rel=2e-3)
