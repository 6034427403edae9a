"""Importance-weighted bounds against models whose log p(x) is known: linear-Gaussian chains and exact flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import registered
from exact_denoisers import CorrelatedGaussianDenoiser, ExactDenoiser, Mixture, PerPixelSchedule, alpha_sigma
from measured import measured
from naming import naming
from plugin_of_law_7 import ContextSchedule, ResamplingProcess
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.diffusion.reverse_variances import reverse_variance
from vdm_hub.errors import ConfigurationError, NonFiniteLossError
from vdm_hub.likelihood.importance_weighted import (
    ChainsMeasurement,
    WeightedFlowMeasurement,
    effective_sample_size,
    log_mean_exp,
    weighted,
)
from vdm_hub.likelihood.measurement import Measurement
from vdm_hub.likelihood.methods import ProbabilityFlow
from vdm_hub.likelihood.probability_flow import FlowMeasurement, draw_flow
from vdm_hub.objectives.variational_bound import VDMObjective

LEVELS, FIRST, LAST = 5, -1.5, 3.0
VARIANCE = 0.2


def chain_objective(
    transitions: int | None, target: str = "epsilon", variance: str = "fixed_small", **fields: Any
) -> VDMObjective:
    """A linear-Gaussian reverse model on five levels."""
    process = registered.process(LinearSchedule(FIRST, LAST), target, num_levels=LEVELS, **fields)
    process.variance = reverse_variance(variance)
    return VDMObjective(ExactDenoiser(Mixture.gaussian(VARIANCE), process), process, transitions)


def images(levels: Tensor, size: int | None = None) -> Callable[[], list[dict[str, Tensor]]]:
    parts = torch.arange(len(levels)).split(size or len(levels))
    return lambda: [{"levels": levels[part], "indices": part} for part in parts]


def repeated(level: int, count: int) -> Tensor:
    return torch.full((count, 1), level)


def log_p(level: int, transitions: int, large: bool = False) -> float:
    """``log p(x)`` of the chain, written out in alpha-bar: z_0 is Gaussian, and p(x|z_0) is summed over a grid."""
    bar = [1 / (1 + math.exp(FIRST + (LAST - FIRST) * t / transitions)) for t in range(transitions + 1)]
    variance = 1.0
    for t in range(transitions, 0, -1):
        a = bar[t] / bar[t - 1]
        denoise = math.sqrt(bar[t]) * VARIANCE / (bar[t] * VARIANCE + 1 - bar[t])
        gain = (math.sqrt(a) * (1 - bar[t - 1]) + math.sqrt(bar[t - 1]) * (1 - a) * denoise) / (1 - bar[t])
        variance = gain**2 * variance + (1 - a) * (1.0 if large else (1 - bar[t - 1]) / (1 - bar[t]))
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64) * math.sqrt(variance)
    density = torch.exp(-0.5 * z**2 / variance)
    centres = 2 * (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS - 1
    decoder = (-0.5 * (z[:, None] / math.sqrt(bar[0]) - centres) ** 2 * bar[0] / (1 - bar[0])).log_softmax(1)
    return float(torch.log((density / density.sum()) @ decoder[:, level].exp()))


def exact_bound(objective: VDMObjective, level: int, nodes: int = 201) -> dict[str, float]:
    """Each term of `VDMObjective`'s own finite-T bound, its expectation over t and eps by quadrature."""
    transitions = objective.transitions
    assert transitions is not None
    eps = torch.linspace(-8, 8, nodes)
    weights = torch.exp(-0.5 * eps.double() ** 2)
    weights = (weights / weights.sum()).repeat(transitions) / transitions
    count = nodes * transitions
    noise = {"marginal": eps.repeat(transitions)[:, None], "reconstruction": eps.repeat(transitions)[:, None]}
    times = (torch.arange(transitions).repeat_interleave(nodes) + 0.5) / transitions
    bound = objective({"levels": repeated(level, count)}, times, noise)
    return {name: float(term.double() @ weights) for name, term in bound.terms.items()}


# ---- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "target"),
    registered.crossed([(4, "fixed_small"), (1, "fixed_small"), (4, "fixed_large")], "parameterizations"),
)
def test_one_chain_has_the_finite_bound_as_its_expectation_term_by_term(chain: tuple[int, str], target: str) -> None:
    (transitions, variance), count, level = chain, 6000, 3
    objective = chain_objective(transitions, target, variance)
    report = measured(ChainsMeasurement(objective, 1, seed=transitions), images(repeated(level, count)), 1)
    expected = exact_bound(objective, level)
    for name, term in report.terms_per_image.items():
        error = float(term.std()) / math.sqrt(count)
        assert float(term.mean()) == pytest.approx(expected.get(name, 0.0), abs=5 * error + 1e-5), name
    assert float(report.terms_per_image["diffusion"].std()) > 0.1, "a chain's own terms, not their expectations"


@pytest.mark.parametrize(
    ("transitions", "level", "variance"),
    [(1, 4, "fixed_small"), (2, 0, "fixed_small"), (3, 2, "fixed_small"), (3, 2, "fixed_large")],
)
def test_many_chains_find_the_log_likelihood(transitions: int, level: int, variance: str) -> None:
    exact, count, chains = log_p(level, transitions, variance == "fixed_large"), 40, 300
    objective = chain_objective(transitions, variance=variance)
    report = measured(ChainsMeasurement(objective, chains, seed=level), images(repeated(level, count)), 1)
    error = float(report.log_likelihood.std()) / math.sqrt(count)
    assert error < 0.01
    # To second order, the logarithm of a mean lies half of its variance below the logarithm of the expectation.
    lost = 0.5 * float(report.log_likelihood.var())
    assert float(report.log_likelihood.mean()) == pytest.approx(exact - lost, abs=5 * error)
    assert -sum(exact_bound(objective, level).values()) < exact - 0.04, "the bound itself is not there yet"


def rises(few: Tensor, more: Tensor) -> bool:
    """Whether the mean over images rises, beyond five standard errors of the paired differences."""
    difference = more - few
    return float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(len(difference))


def test_the_bound_rises_with_the_number_of_chains_and_never_passes_the_log_likelihood() -> None:
    level, transitions, count = 4, 2, 2500
    objective, exact, values = chain_objective(transitions), log_p(level, transitions), []
    for chains in (1, 4, 16):
        report = measured(ChainsMeasurement(objective, chains, seed=9), images(repeated(level, count)), 1)
        values.append(report.log_likelihood)
        gain = report.terms_per_image["importance_weighting"]
        assert float(gain.max()) <= 1e-12 and (chains == 1) == bool((gain.abs() < 1e-12).all())
        diagnosis = report.to_dict()["importance_weights"]
        assert 1 - 1e-9 <= diagnosis["effective_sample_size_min"] <= diagnosis["effective_sample_size_mean"]
        assert diagnosis["effective_sample_size_mean"] <= chains
    assert rises(values[0], values[1]) and rises(values[1], values[2])
    assert not rises(torch.full((count,), exact), values[2])
    assert rises(torch.full((count,), exact), values[2] + math.log(16)), "without its -log K it would pass"


class Knows(nn.Module):
    """The posterior's own mean: it knows that all data are level 2, x = 0."""

    def __init__(self, objective: VDMObjective) -> None:
        super().__init__()
        self.conditioning = objective.process.conditioning

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        _, sigma = alpha_sigma(self.conditioning.inverse(timestep))
        return (sample / sigma[:, None],)


def test_a_reverse_model_that_is_the_posterior_costs_nothing_on_any_draw() -> None:
    objective = chain_objective(5)
    objective.network = Knows(objective)
    report = measured(ChainsMeasurement(objective, 3), images(repeated(2, 50)), 1)
    assert float(report.terms_per_image["diffusion"].abs().max()) < 1e-12
    assert float(report.terms_per_image["prior"].std()) > 0.01


def test_the_report_counts_every_evaluation_and_does_not_depend_on_the_batch() -> None:
    levels = torch.arange(4)[:, None]
    for decoder, extra in (("factorised", 0), ("ddpm", 1)):
        objective = chain_objective(3, decoder=decoder)
        calls: list[int] = []
        objective.network.register_forward_pre_hook(lambda _, arguments, calls=calls: calls.append(len(arguments[0])))
        whole = measured(ChainsMeasurement(objective, 5), images(levels), 2)
        assert whole.network_evaluations == sum(calls) == 2 * 4 * 5 * (3 + extra)
        assert (whole.method, whole.is_bound, whole.transitions) == ("importance_weighted", True, 3)
        assert list(whole.terms_per_image) == ["reconstruction", "prior", "diffusion", "importance_weighting"]
        weights = whole.details["importance_weights"]
        assert (weights["over"], weights["draws"]) == ("chains", 5)
        assert 1 <= weights["effective_sample_size_min"] < weights["effective_sample_size_mean"] <= 5
        parts = measured(ChainsMeasurement(objective, 5), images(levels, 3), 2)
        for name, term in whole.terms_per_image.items():
            torch.testing.assert_close(parts.terms_per_image[name], term, rtol=1e-9, atol=1e-9)


def test_chains_call_the_network_outside_of_autocast() -> None:
    dtypes = set()
    objective = chain_objective(2)
    network: Any = nn.Linear(1, 1)
    network.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    objective.network = Called(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ChainsMeasurement(objective, 1).measure(images(repeated(2, 3))()[0], 0)
    assert dtypes == {torch.float32}


class Called(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.layer(sample),)


# ---- flows ----------------------------------------------------------------------------------------------------------

DATA = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([-0.5, 0.45], [0.01, 0.005], [0.4, 0.6])))
GAMMA_0 = -4.0


def flow_objective() -> VDMObjective:
    process = registered.process(LinearSchedule(GAMMA_0, 30.0), num_levels=LEVELS)
    return VDMObjective(ExactDenoiser(DATA, process), process)


def log_mass(level: int) -> float:
    """``log P`` of a level: the marginal's mass in its bin."""
    alpha = math.sqrt(1 / (1 + math.exp(GAMMA_0)))
    edges = alpha * torch.tensor([2 * level / LEVELS - 1, 2 * (level + 1) / LEVELS - 1], dtype=torch.float64)
    deviation = (alpha**2 * DATA.variances + 1 - alpha**2).sqrt()
    return float((torch.special.ndtr((edges[:, None] - alpha * DATA.means) / deviation) @ DATA.weights).diff().log())


def weighted_flows(level: int, count: int, draws: int, kind: str) -> Tensor:
    flow = ProbabilityFlow(kind, "exact", tolerance=1e-4)
    measurement = WeightedFlowMeasurement(flow_objective(), flow, draws, seed=level)
    return measured(measurement, images(repeated(level, count)), 1).log_likelihood


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "truncated_normal"])
def test_many_dequantised_flows_find_the_mass_of_a_level(kind: str) -> None:
    count, level = 160, 0
    found = weighted_flows(level, count, 20, kind)
    error, lost = float(found.std()) / math.sqrt(count), 0.5 * float(found.var())
    assert error < 0.67 / math.sqrt(count)
    assert float(found.mean()) == pytest.approx(log_mass(level) - lost, abs=5 * error + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "truncated_normal"])
@pytest.mark.parametrize("level", [0, 2])
def test_more_dequantised_flows_come_closer_and_never_beyond(level: int, kind: str) -> None:
    count = 500
    one, four, twenty = (weighted_flows(level, count, draws, kind) for draws in (1, 4, 20))
    assert rises(one, four) and four.mean() < twenty.mean()
    assert not rises(torch.full((count,), log_mass(level)), twenty)


@pytest.mark.slow
def test_one_dequantised_flow_has_the_plain_likelihood_as_its_expectation() -> None:
    flow, count, level = ProbabilityFlow("truncated_normal", "exact", tolerance=1e-4), 400, 1
    batches = images(repeated(level, count))
    weighted = measured(WeightedFlowMeasurement(flow_objective(), flow, draws=1), batches, 1)
    plain = measured(FlowMeasurement(flow_objective(), flow), batches, 1)
    difference = weighted.log_likelihood - plain.log_likelihood  # log q against its mean, on the same draws
    assert float(difference.std()) > 0.05
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / math.sqrt(count)


def test_stochastic_divergences_are_noted_as_biased_and_the_exact_one_is_not() -> None:
    levels, notes = torch.tensor([[1]]), {}
    for divergence in ("rademacher", "exact"):
        flow = ProbabilityFlow(divergence=divergence, tolerance=1e-3)
        report = measured(WeightedFlowMeasurement(flow_objective(), flow, draws=2), images(levels), 2)
        notes[divergence] = " ".join(report.to_dict()["notes"])
        assert report.is_bound is False and report.to_dict()["importance_weights"]["draws"] == 2
    assert "biases importance weights" in notes["rademacher"] and "biases" not in notes["exact"]


def test_weighted_flows_are_the_draws_of_the_plain_ones_with_their_own_density() -> None:
    flow, batch = ProbabilityFlow(divergence="exact", tolerance=1e-3), images(torch.tensor([[1], [4]]))()[0]
    measurement = WeightedFlowMeasurement(flow_objective(), flow, draws=3, seed=5)
    found = measurement.measure(batch, 1)
    draws = [draw_flow(*measurement.model, batch, flow, (5, 1), k) for k in range(3)]
    totals = torch.stack([sum(draw.terms.values()) + draw.log_q for draw in draws])
    torch.testing.assert_close(sum(found.terms.values()), -log_mean_exp(-totals))
    log_q = torch.stack([draw.log_q for draw in draws]).mean(0)
    torch.testing.assert_close(found.terms["dequantization"], log_q)
    counts = found.diagnostics
    assert torch.equal(counts["steps"], torch.stack([draw.steps for draw in draws], dim=1))
    assert torch.equal(counts["evaluations"], torch.stack([draw.evaluations for draw in draws]).sum(0))
    torch.testing.assert_close(counts["effective_sample_size"], effective_sample_size(-totals))
    report = measured(measurement, lambda: [batch], 2)
    weights = report.details["importance_weights"]
    assert (weights["over"], weights["draws"]) == ("dequantization", 3)
    assert weights["effective_sample_size_min"] < weights["effective_sample_size_mean"] <= 3
    assert report.details["probability_flow"]["divergence"] == "exact"
    plain = WeightedFlowMeasurement(flow_objective()), ChainsMeasurement(chain_objective(2))
    assert (plain[0].draws, plain[0].seed, plain[1].chains, plain[1].seed) == (16, 0, 16, 0)


# ---- weights and refusals -------------------------------------------------------------------------------------------


def test_equal_weights_are_their_own_mean_and_one_that_outweighs_all_counts_once() -> None:
    torch.testing.assert_close(log_mean_exp(torch.full((7, 2), -900.0)), torch.tensor([-900.0, -900.0]))
    weights = torch.tensor([[0.0], [-1e4], [-1e4], [-1e4]])
    assert float(log_mean_exp(weights)) == pytest.approx(-math.log(4))
    assert float(effective_sample_size(weights)) == pytest.approx(1)
    assert float(effective_sample_size(torch.full((7, 1), -900.0, dtype=torch.float64))) == pytest.approx(7)


def test_weighted_terms_are_means_and_their_sum_is_the_logarithm_of_the_mean_weight() -> None:
    draws = [{"a": [1.0, 2.0], "b": [0.5, 0.0]}, {"a": [3.0, 2.0], "b": [1.5, 1.0]}]
    terms, size = weighted([{name: torch.tensor(value).double() for name, value in one.items()} for one in draws])
    assert terms["a"].tolist() == [2, 2] and terms["b"].tolist() == [1, 0.5]
    weights = torch.exp(-torch.tensor([[1.5, 2.0], [4.5, 3.0]]).double())
    torch.testing.assert_close(torch.exp(-sum(terms.values())), weights.mean(0))
    torch.testing.assert_close(size, weights.sum(0) ** 2 / (weights**2).sum(0))
    alone, one = weighted([{"a": torch.tensor([3.0])}])
    assert alone["a"].tolist() == [3] and alone["importance_weighting"].tolist() == [0] and one.tolist() == [1]


def test_noise_in_the_logarithm_of_weights_biases_them_upwards() -> None:
    """Why random-time estimates are refused: unbiased noise of variance v adds v/2 in the limit."""
    noise = 0.8 * torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(log_mean_exp(-1.0 + noise)) == pytest.approx(-1.0 + 0.8**2 / 2, abs=0.02)


def test_random_times_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="whole chains"):
        ChainsMeasurement(chain_objective(None))


@pytest.mark.parametrize("count", [0, -1])
def test_no_draws_are_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match=naming("chains", count)):
        ChainsMeasurement(chain_objective(2), chains=count)
    with pytest.raises(ConfigurationError, match=naming("draws", count)):
        WeightedFlowMeasurement(flow_objective(), draws=count)


def per_pixel(transitions: int | None, last: float = LAST) -> tuple[VDMObjective, Tensor]:
    """Two correlated Gaussian pixels, a path of noise for each; its exact denoiser, and the data's covariance."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    schedule = PerPixelSchedule(FIRST, last, tilt=torch.tensor([0.5, -0.5]), bump=torch.tensor([1.0, -1.0]))
    process = registered.process(schedule, num_levels=LEVELS, conditioning=AffineConditioning(FIRST, last))
    return VDMObjective(CorrelatedGaussianDenoiser(covariance, process), process, transitions), covariance


def test_chains_of_a_gamma_per_pixel_have_the_finite_bound_as_their_expectation_term_by_term() -> None:
    """Against the library's bound of one transition each: 4.5 standard errors of the difference."""
    objective, _ = per_pixel(3)
    batch = {"levels": torch.tensor([[1, 3]]).expand(4000, 2), "indices": torch.arange(4000)}
    report = measured(ChainsMeasurement(objective, chains=1), lambda: [batch], 1)
    times = (torch.arange(4000) % 3 + 0.5) / 3
    bound = objective(batch, times, objective.draw_noise(batch, torch.Generator().manual_seed(1)))
    for name, term in bound.terms.items():
        found = report.terms_per_image.get(name, torch.zeros(1, 4000))[0]
        error = math.sqrt(float(found.var() + term.double().var()) / 4000)
        assert abs(float(found.mean() - term.double().mean())) <= 4.5 * error + 1e-6, name


def test_weighted_flows_of_a_gamma_per_pixel_find_the_mass_of_a_level() -> None:
    """Of a correlated Gaussian's own marginal at time 0, by quadrature over the two pixels' bins."""
    objective, covariance = per_pixel(None, last=20.0)
    gamma_0 = torch.tensor([FIRST + 0.5, FIRST - 0.5])
    alpha, sigma = alpha_sigma(gamma_0)
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), alpha[:, None] * covariance * alpha + torch.diag(sigma**2)
    )
    levels, draws, count = torch.tensor([[1, 3]]), 6, 60
    x = objective.process.encode(levels, torch.float64)
    offsets = (torch.arange(200, dtype=torch.float64) + 0.5) / 200 - 0.5
    grid = alpha * (x + torch.cartesian_prod(offsets, offsets) * 2 / LEVELS)
    expected = float(marginal.log_prob(grid).exp().mean() * (alpha * 2 / LEVELS).prod())
    flow = ProbabilityFlow(dequantization="uniform", divergence="exact", tolerance=1e-3)
    report = measured(WeightedFlowMeasurement(objective, flow, draws), images(levels.expand(count, 2)), 1)
    masses = report.log_likelihood.exp()  # each the mean of its draws' weights, so unbiased
    error = float(masses.std()) / math.sqrt(count)
    assert float(masses.mean()) == pytest.approx(expected, abs=4.5 * error + 1e-2 * expected)
    assert error < 0.1 * expected, "or it would show nothing"


def test_a_schedule_that_draws_a_latent_has_no_exact_weights_and_is_refused_by_name() -> None:
    process = registered.process(ContextSchedule(2), num_levels=LEVELS)
    with pytest.raises(ConfigurationError, match=naming("ContextSchedule")):
        ChainsMeasurement(VDMObjective(ExactDenoiser(DATA, process), process, 2))
    with pytest.raises(ConfigurationError, match=naming("ContextSchedule")):
        WeightedFlowMeasurement(VDMObjective(ExactDenoiser(DATA, process), process))


def test_a_process_whose_kernels_are_not_gaussian_has_no_chains_and_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=naming("ResamplingProcess")):
        ChainsMeasurement(VDMObjective(nn.Identity(), ResamplingProcess(), 2))


@pytest.mark.parametrize("of_chains", [True, False])
def test_data_of_which_a_part_is_given_have_no_weights(of_chains: bool) -> None:
    measurement: Measurement = WeightedFlowMeasurement(flow_objective())
    if of_chains:
        measurement = ChainsMeasurement(chain_objective(2), 1)
    batch = images(repeated(1, 2))()[0] | {"given": torch.tensor([[True], [False]])}
    with pytest.raises(ConfigurationError, match=naming("'given'", 1)):
        measurement.measure(batch, 0)


class Broken(ExactDenoiser):
    """Infinite for data that end high."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **_: Any) -> tuple[Tensor]:
        (output,) = super().forward(sample, timestep)
        return (torch.where(sample.mean(1, keepdim=True) > 3, torch.inf, output),)


def test_the_image_whose_term_is_not_finite_is_named() -> None:
    objective = chain_objective(2)
    objective.process.schedule = LinearSchedule(-20.0, -18.0)
    objective.process.scaling.first = 0.0
    objective.process.scaling.spacing = 1.0
    objective.network = Broken(Mixture.gaussian(1.0), objective.process)
    with pytest.raises(NonFiniteLossError, match=naming("diffusion", "image 2")):
        measured(ChainsMeasurement(objective, 1), images(torch.tensor([[0], [1], [4]])), 1)
