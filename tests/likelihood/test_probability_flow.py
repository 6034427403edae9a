"""The probability-flow likelihood: exact densities of Gaussians and mixtures, divergences, tolerances and draws."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor, nn

import registered
from exact_denoisers import CorrelatedGaussianDenoiser, ExactDenoiser, Mixture, PerPixelSchedule, alpha_sigma
from measured import measured
from naming import naming
from plugin_of_law_7 import ContextSchedule, ResamplingProcess
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.draws import image_generator
from vdm_hub.diffusion.gaussian_process import BoundGaussian, GaussianProcess, scalar_gaussian
from vdm_hub.diffusion.noise_schedules import LinearSchedule, NoiseSchedule
from vdm_hub.errors import ConfigurationError, NonFiniteLossError
from vdm_hub.likelihood import lockstep, probability_flow
from vdm_hub.likelihood.dequantization import dequantization
from vdm_hub.likelihood.methods import ProbabilityFlow
from vdm_hub.likelihood.probability_flow import FlowMeasurement, _probes, draw_flow, flow_density
from vdm_hub.likelihood.protocol import SOLVERS
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.objectives.variational_bound import VDMObjective

NATS = 1e-4
FIRST, LAST = -7.0, 30.0  # so late an end that nothing of the data is left in z_1


@dataclass(frozen=True)
class CorrelatedMixture:
    """A mixture of Gaussians with full covariances, and its exact network; written out in alpha and sigma."""

    means: Tensor
    covariances: Tensor
    weights: Tensor

    @classmethod
    def random(cls, dimensions: int, components: int, seed: int = 0) -> CorrelatedMixture:
        generator = torch.Generator().manual_seed(seed)
        means = torch.rand(components, dimensions, generator=generator, dtype=torch.float64) * 1.6 - 0.8
        factors = torch.randn(components, dimensions, dimensions, generator=generator, dtype=torch.float64) * 0.2
        covariances = factors @ factors.mT + 0.01 * torch.eye(dimensions, dtype=torch.float64)
        weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.2
        return cls(means, covariances, weights / weights.sum())

    def log_density(self, z: Tensor, gamma: Tensor) -> Tensor:
        """``log q(z_t)``, (B,), gamma of shape (B,)."""
        return self._joint(z, gamma)[0].logsumexp(-1)

    def eps_mean(self, z: Tensor, gamma: Tensor) -> Tensor:
        """``E[eps|z]``, from the score: no autograd, so that the flow's own derivative is the only one."""
        joint, whitened = self._joint(z, gamma)
        _, sigma = alpha_sigma(gamma)
        return sigma[:, None] * (joint.softmax(-1)[..., None] * whitened).sum(1)

    def _joint(self, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (v[:, None, None, None] for v in alpha_sigma(gamma))
        covariance = alpha**2 * self.covariances + sigma**2 * torch.eye(z.shape[1], dtype=torch.float64)
        distance = z[:, None] - alpha[..., 0] * self.means
        whitened = torch.linalg.solve(covariance, distance)
        log_normal = -0.5 * ((distance * whitened).sum(-1) + torch.logdet(2 * math.pi * covariance))
        return self.weights.log() + log_normal, whitened


class CorrelatedDenoiser(nn.Module):
    def __init__(self, data: CorrelatedMixture, process: GaussianProcess) -> None:
        super().__init__()
        self.data, self.process = data, process

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        parameterization = self.process.parameterization
        gamma = self.process.conditioning.inverse(timestep)
        z = sample / parameterization.input_scale(gamma)[:, None]
        eps = self.data.eps_mean(z, gamma)
        alpha, sigma = (v[:, None] for v in alpha_sigma(gamma))
        output = parameterization.target((z - sigma * eps) / alpha, eps, gamma)
        return (output / parameterization.output_scale(gamma)[:, None],)

    def bare(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self(sample, timestep)[0]


def bound_of(process: GaussianProcess) -> BoundGaussian:
    return process.bind(None, {})[1]


def points(count: int, dimensions: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, dimensions, generator=generator, dtype=torch.float64) - 1


def first_gamma(count: int, first: float = FIRST) -> Tensor:
    return torch.full((count,), first, dtype=torch.float64)


# ---- exact densities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("population", "target"), registered.crossed([(2, 4), (1, 3), (2, 1), (3, 3)], "parameterizations")
)
def test_the_flow_has_the_density_of_gaussians_and_mixtures(population: tuple[int, int], target: str) -> None:
    dimensions, components = population
    data = CorrelatedMixture.random(dimensions, components)
    process = registered.process(LinearSchedule(FIRST, LAST), target)
    z = points(12, dimensions)
    density = flow_density(bound_of(process), CorrelatedDenoiser(data, process).bare, z, None, tolerance=1e-7)
    expected = data.log_density(z, first_gamma(12))
    assert float(expected.max() - expected.min()) > 1, "points of one density would show nothing"
    assert float((density.log_density - expected).abs().max()) < NATS


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_finds_the_density_of_a_mixture(solver: str) -> None:
    data, process, z = CorrelatedMixture.random(2, 4), registered.process(LinearSchedule(FIRST, LAST)), points(4, 2)
    network = CorrelatedDenoiser(data, process).bare
    density = flow_density(bound_of(process), network, z, None, tolerance=1e-6, solver=solver)
    assert float((density.log_density - data.log_density(z, first_gamma(4))).abs().max()) < NATS


@pytest.mark.parametrize("believed_variance", [0.25, 1.0, 4.0])
def test_a_linear_flow_has_its_closed_form_at_any_endpoints(believed_variance: float) -> None:
    """``z_1 = r z_0``, so ``log p_0 = log N(r z_0; 0, 1) + log r``, far from the density of any data."""
    process = registered.process(LinearSchedule(-4.0, 1.0), "v_prediction")
    network = ExactDenoiser(Mixture.gaussian(believed_variance), process).bare
    z = points(6, 1)

    def deviation(gamma: float) -> float:
        return math.sqrt((believed_variance + math.exp(gamma)) / (1 + math.exp(gamma)))

    ratio = deviation(1.0) / deviation(-4.0)
    # The diffusion of N(0, v) keeps every quantile: deviations scale as the marginal's do.
    base = -0.5 * ((ratio * z[:, 0]) ** 2 + math.log(2 * math.pi))
    density = flow_density(bound_of(process), network, z, None, tolerance=1e-8)
    torch.testing.assert_close(density.base_density, base, rtol=0, atol=1e-6)
    torch.testing.assert_close(density.volume_change, torch.full((6,), math.log(ratio)).double(), rtol=0, atol=1e-6)


def test_the_flow_agrees_with_the_textbook_ode_in_t() -> None:
    """``dz/dt = f z - 1/2 g^2 score`` (SDE eq. 13), transcribed with scipy under a cosine schedule, from its score."""
    schedule = registered.schedule("cosine", gamma_min=-6.0, gamma_max=4.0)
    process = registered.process(schedule)
    data = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([-0.6, 0.5], [0.02, 0.1], [0.4, 0.6])))
    start, end = (math.atan(math.exp(g / 2)) for g in (-6.0, 4.0))

    def right_hand_side(t: float, state: Any) -> list[float]:
        angle = start + t * (end - start)  # alpha = cos, sigma = sin
        alpha, sigma, speed = math.cos(angle), math.sin(angle), end - start
        f = -math.tan(angle) * speed
        g_squared = 2 * sigma * alpha * speed - 2 * f * sigma**2
        joint = []
        for mean, variance, weight in zip(data.means, data.variances, data.weights, strict=True):
            total = alpha**2 * float(variance) + sigma**2
            distance = state[0] - alpha * float(mean)
            joint.append((float(weight) * math.exp(-(distance**2) / (2 * total)) / math.sqrt(total), distance, total))
        mass = sum(j[0] for j in joint)
        score = -sum(w * d / v for w, d, v in joint) / mass
        curvature = sum(w * ((d / v) ** 2 - 1 / v) for w, d, v in joint) / mass - score**2
        return [f * state[0] - 0.5 * g_squared * score, f - 0.5 * g_squared * curvature]

    z = points(5, 1)
    density = flow_density(bound_of(process), ExactDenoiser(data, process).bare, z, None, tolerance=1e-8)
    for i in range(5):
        solution = scipy.integrate.solve_ivp(right_hand_side, (0, 1), [float(z[i]), 0.0], rtol=1e-9, atol=1e-10)
        z_1, volume = solution.y[:, -1]
        assert float(density.base_density[i]) == pytest.approx(scipy.stats.norm.logpdf(z_1), abs=1e-6)
        assert float(density.volume_change[i]) == pytest.approx(volume, abs=1e-6)


def test_the_flow_depends_on_a_schedule_only_through_its_endpoints() -> None:
    data, z = CorrelatedMixture.random(2, 3), points(4, 2)
    values = []
    for name in ("linear", "cosine", "learned_monotone"):
        schedule = registered.scalar_schedule(name)
        process = registered.process(schedule, conditioning=AffineConditioning(*schedule.endpoints()))
        values.append(flow_density(bound_of(process), CorrelatedDenoiser(data, process).bare, z, None))
    for other in values[1:]:
        torch.testing.assert_close(other.log_density, values[0].log_density, rtol=1e-5, atol=1e-5)
        assert torch.equal(other.steps, values[0].steps), "no step is spent on how steep a schedule is"


# ---- the divergence and the solver ----------------------------------------------------------------------------------


def mixture_flow(z: Tensor, probes: Tensor | None, tolerance: float = 1e-7) -> Tensor:
    data = CorrelatedMixture.random(z.shape[1], 3)
    process = registered.process(LinearSchedule(FIRST, LAST))
    return flow_density(bound_of(process), CorrelatedDenoiser(data, process).bare, z, probes, tolerance).log_density


def test_all_sign_vectors_together_are_the_exact_divergence_and_one_alone_is_not() -> None:
    z = points(4, 3)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    exact = mixture_flow(z, None)
    each = signs.repeat_interleave(4, dim=0)[None]  # every vector for every datum, in one batch
    separately = mixture_flow(z.repeat(8, 1), each).view(8, 4)
    together = mixture_flow(z, signs[:, None].expand(-1, 4, -1))
    assert float((separately - exact).abs().max()) > 0.1
    torch.testing.assert_close(separately.mean(0), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, pytest.param(1.3, marks=pytest.mark.slow)])
def test_gaussian_probes_are_unbiased_and_a_planted_bias_is_caught(spread: float) -> None:
    count = 600
    z = points(1, 2).expand(count, -1)
    probes = torch.randn(1, count, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    estimates = mixture_flow(z, spread * probes, tolerance=1e-5)
    exact = float(mixture_flow(z[:1], None))
    error = float(estimates.mean()) - exact
    within = abs(error) < 5 * float(estimates.std()) / math.sqrt(count)
    assert within == (spread == 1.0)


def test_a_smaller_tolerance_costs_steps_and_buys_digits() -> None:
    data = CorrelatedMixture.random(2, 3)
    process = registered.process(LinearSchedule(FIRST, LAST))
    z = points(8, 2)
    exact = data.log_density(z, first_gamma(8))
    errors, steps = [], []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        density = flow_density(bound_of(process), CorrelatedDenoiser(data, process).bare, z, None, tolerance)
        errors.append(float((density.log_density - exact).abs().max()))
        steps.append(float(density.steps.double().mean()))
    assert steps == sorted(steps) and steps[-1] > 1.5 * steps[0]
    assert errors[0] > 10 * errors[2] > 100 * errors[4]
    assert errors[-1] < NATS


def test_halving_the_tolerance_changes_the_value_by_no_more_than_a_few_tolerances() -> None:
    z = points(8, 2)
    for tolerance in (1e-4, 1e-6):
        change = (mixture_flow(z, None, tolerance) - mixture_flow(z, None, tolerance / 2)).abs()
        assert 0 < float(change.max()) < 100 * tolerance


def test_a_datum_has_the_same_value_and_steps_in_any_batch() -> None:
    data = CorrelatedMixture.random(2, 3)
    process = registered.process(LinearSchedule(FIRST, LAST))
    network = CorrelatedDenoiser(data, process).bare
    z = torch.cat([points(6, 2), torch.tensor([[5.0, -5.0]])]).double()  # the last one is far out, and costs more
    whole = flow_density(bound_of(process), network, z, None, 1e-3)
    assert len(set(whole.steps.tolist())) > 1
    for i in range(7):
        alone = flow_density(bound_of(process), network, z[i : i + 1], None, 1e-3)
        torch.testing.assert_close(alone.log_density, whole.log_density[i : i + 1], rtol=1e-12, atol=1e-12)
        assert int(alone.steps) == int(whole.steps[i])


# ---- images ---------------------------------------------------------------------------------------------------------

LEVELS = 5
EXACT = ProbabilityFlow(divergence="exact", tolerance=1e-6)
ONE_DIMENSION = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([-0.5, 0.45], [0.06, 0.03], [0.4, 0.6])))


def objective_of(data: Mixture = ONE_DIMENSION, schedule: NoiseSchedule | None = None, **fields: Any) -> VDMObjective:
    process = registered.process(schedule or LinearSchedule(-4.0, LAST), num_levels=LEVELS, **fields)
    return VDMObjective(ExactDenoiser(data, process), process)


def images(
    levels: Tensor, size: int | None = None, order: Tensor | None = None
) -> Callable[[], list[dict[str, Tensor]]]:
    index = torch.arange(len(levels)) if order is None else order
    parts = index.split(size or len(levels))
    return lambda: [{"levels": levels[part], "indices": part} for part in parts]


def log_masses(data: Mixture, gamma_0: float = -4.0) -> Tensor:
    """``log P`` of each level of one dimension: the mixture's marginal at gamma_0, integrated over each bin."""
    alpha = math.sqrt(1 / (1 + math.exp(gamma_0)))
    edges = alpha * torch.linspace(-1, 1, LEVELS + 1, dtype=torch.float64)
    deviation = (alpha**2 * data.variances + 1 - alpha**2).sqrt()
    below = torch.special.ndtr((edges[:, None] - alpha * data.means) / deviation) @ data.weights
    return below.diff().log()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", pytest.param("truncated_normal", marks=pytest.mark.slow)])
def test_the_expectation_is_dequantisation_s_own_bound_on_the_mass_of_a_level(kind: str) -> None:
    """Against quadrature over the bin, from the exact density: the whole path from levels to nats."""
    flow = replace(EXACT, dequantization=kind, tolerance=1e-5)
    count = 100
    levels = torch.arange(LEVELS).repeat_interleave(count)[:, None]
    report = measured(FlowMeasurement(objective_of(), flow), images(levels), 1)
    log_p = report.log_likelihood.view(LEVELS, count)
    gamma = torch.tensor(-4.0, dtype=torch.float64)
    alpha, sigma = (float(v) for v in alpha_sigma(gamma))
    for level in range(LEVELS):
        centre, half = alpha * (2 * (level + 0.5) / LEVELS - 1), alpha / LEVELS
        q = (
            scipy.stats.uniform(centre - half, 2 * half)
            if kind == "uniform"
            else scipy.stats.truncnorm(-half / sigma, half / sigma, centre, sigma)
        )

        def integrand(z: float, q: Any = q) -> float:
            log_density = float(ONE_DIMENSION.log_density(torch.tensor([[z]]), gamma))
            return float(q.pdf(z)) * (log_density - float(q.logpdf(z)))

        expected, _ = scipy.integrate.quad(integrand, centre - half, centre + half, epsabs=1e-9)
        error = float(log_p[level].std()) / math.sqrt(count)
        assert float(log_p[level].mean()) == pytest.approx(expected, abs=5 * error + NATS)
        assert expected < float(log_masses(ONE_DIMENSION)[level])


def test_the_report_says_what_its_terms_are_and_what_they_cost() -> None:
    objective = objective_of()
    calls: list[int] = []
    objective.network.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].shape[0]))
    levels = torch.arange(4)[:, None]
    report = measured(FlowMeasurement(objective, EXACT), images(levels, 3), 2)
    assert list(report.terms_per_image) == ["base_density", "volume_change", "dequantization"]
    assert (report.method, report.is_bound, report.transitions, report.num_images) == ("ode", False, None, 4)
    assert report.replicates == 2 and report.dimensions == 1
    assert report.network_evaluations <= sum(calls) < 1.2 * report.network_evaluations, "the rest: data that were done"
    protocol = report.to_dict()["probability_flow"]
    assert protocol["tolerance"] == 1e-6 and protocol["divergence"] == "exact"
    assert protocol["evaluations_per_solve"] < report.network_evaluations / 8, "which counts the second solution, too"
    assert protocol["steps_max"] >= protocol["steps_mean"] > 5
    assert protocol["evaluations_per_solve"] > 6 * protocol["steps_mean"], "each step of rk45 takes six"


@pytest.mark.parametrize(("tolerance", "second"), [(1e-3, 1e-2), (0.05, 0.5), (0.1, 1e-2), (0.5, 0.05), (0.9, 0.09)])
def test_the_numerical_error_is_the_change_to_another_tolerance_in_the_first_replicate(
    tolerance: float, second: float
) -> None:
    objective, flow = objective_of(), replace(EXACT, tolerance=tolerance)
    batch = images(torch.tensor([[0, 4], [2, 2], [3, 1]]))()[0]
    measurement = FlowMeasurement(objective, flow, seed=2)
    fine = draw_flow(*measurement.model, batch, flow, (2, 0), 0)
    coarse = draw_flow(*measurement.model, batch, replace(flow, tolerance=second), (2, 0), 0)
    found, later = measurement.measure(batch, 0), measurement.measure(batch, 1)
    assert torch.equal(found.terms["dequantization"], -fine.entropy)
    assert torch.equal(found.terms["base_density"], fine.terms["base_density"])
    change = sum(fine.terms.values()) - sum(coarse.terms.values())
    torch.testing.assert_close(found.diagnostics["numerical_change"], change.abs() / (2 * math.log(2)))
    assert float(change.abs().min()) > 0 and later.diagnostics["numerical_change"].tolist() == [0, 0, 0]
    assert torch.equal(found.diagnostics["evaluations"], fine.evaluations + coarse.evaluations)
    assert torch.equal(found.diagnostics["steps"], fine.steps)
    assert torch.equal(
        later.diagnostics["evaluations"], draw_flow(*measurement.model, batch, flow, (2, 1), 0).evaluations
    )
    report = measured(measurement, lambda: [batch], 2)
    told, steps = report.details["probability_flow"], torch.cat([fine.steps, later.diagnostics["steps"]])
    assert told["numerical_error"] == pytest.approx(float(change.abs().mean()) / (2 * math.log(2)))
    assert (told["steps_mean"], told["steps_max"]) == (pytest.approx(float(steps.mean())), int(steps.max()))
    of_both = fine.evaluations.sum() + later.diagnostics["evaluations"].sum()
    assert told["evaluations_per_solve"] == pytest.approx(float(of_both) / 6)
    assert report.network_evaluations == int(of_both + coarse.evaluations.sum())


def test_probes_are_signs_or_normals_that_all_draws_of_a_replicate_share() -> None:
    shape, like = (3, 2, 40), torch.zeros(3, 2, 40)

    def probes(kind: str, count: int = 2) -> Tensor | None:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return _probes(ProbabilityFlow(divergence=kind, probes=count), shape, generators, like)

    signs, normals = probes("rademacher"), probes("gaussian")
    assert signs is not None and normals is not None and probes("exact") is None
    assert signs.shape == normals.shape == (2, *shape) and signs.dtype == normals.dtype == torch.float64
    assert sorted(signs.unique().tolist()) == [-1, 1] and abs(float(signs.mean())) < 0.2
    assert abs(float(normals.mean())) < 0.2 and abs(float(normals.std()) - 1) < 0.1
    assert normals.unique().numel() == normals.numel()
    assert not torch.equal(signs[0], signs[1]) and not torch.equal(normals[0], normals[1])
    assert not torch.equal(signs[:, 0], signs[:, 1])


def test_a_protocol_s_defaults_are_those_of_the_documented_method_and_its_bounds_are_open() -> None:
    flow = FlowMeasurement(objective_of()).flow
    assert (flow.divergence, flow.probes, flow.tolerance, flow.max_steps) == ("rademacher", 1, 1e-5, 1000)
    assert ProbabilityFlow(probes=1, max_steps=1, tolerance=0.999).max_steps == 1
    with pytest.raises(ConfigurationError, match=naming("tolerance", 1)):
        ProbabilityFlow(tolerance=1.0)
    assert FlowMeasurement(objective_of()).seed == 0
    arguments = inspect.signature(flow_density).parameters
    for name in ("tolerance", "max_steps", "solver"):
        assert arguments[name].default == getattr(flow, name)
    process, z = registered.process(LinearSchedule(-4.0, 1.0)), points(2, 2)
    found = flow_density(bound_of(process), ExactDenoiser(ONE_DIMENSION, process).bare, z, None)
    assert found.steps.dtype == found.evaluations.dtype == torch.float64


class Small(nn.Module):
    """A float32 network with dropout, whose output depends on its timestep and on a label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Dropout(), nn.Conv2d(8, 1, 3, padding=1)
        )
        self.modes: set[bool] = set()
        self.dtypes: set[torch.dtype] = set()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool, class_labels: Tensor) -> tuple[Tensor]:
        self.modes.add(self.training)
        self.dtypes |= {sample.dtype, timestep.dtype}
        level = (timestep / 1000 + class_labels)[:, None, None, None].expand_as(sample)
        return (self.layers(torch.cat([sample, level.to(sample.dtype)], dim=1)),)


def small() -> VDMObjective:
    return VDMObjective(Small(), registered.process(LinearSchedule(-8.0, 5.0), num_levels=LEVELS))


def labelled(size: int, order: Tensor) -> Callable[[], list[dict[str, Tensor]]]:
    levels = torch.randint(0, LEVELS, (6, 1, 4, 4), generator=torch.Generator().manual_seed(3))
    batches = images(levels, size, order)()
    return lambda: [batch | {"class_labels": batch["indices"] % 2} for batch in batches]


@pytest.mark.parametrize("divergence", ["rademacher", "gaussian", pytest.param("exact", marks=pytest.mark.slow)])
def test_an_image_s_terms_are_a_function_of_seed_and_index_alone(divergence: str) -> None:
    objective, flow = small().double(), ProbabilityFlow(divergence=divergence, probes=2, tolerance=1e-4)
    whole = measured(FlowMeasurement(objective, flow, seed=4), labelled(6, torch.arange(6)), 2)
    parts = measured(FlowMeasurement(objective, flow, seed=4), labelled(2, torch.tensor([5, 0, 3, 1, 4, 2])), 2)
    for name, term in whole.terms_per_image.items():
        torch.testing.assert_close(parts.terms_per_image[name], term, rtol=1e-9, atol=1e-9)
    other = measured(FlowMeasurement(objective, flow, seed=5), labelled(6, torch.arange(6)), 2)
    assert not torch.allclose(other.log_likelihood, whole.log_likelihood, atol=1e-3)
    assert float((whole.terms_per_image["base_density"].diff(dim=0)).abs().min()) > 1e-6, "replicates differ"


def test_the_network_computes_in_float64_unless_the_protocol_says_float32() -> None:
    objective, order = small(), torch.arange(6)
    seen = objective.network.dtypes  # a copy's, too: sets are copied with it, so each is asked for itself
    objective.network.train()
    measurement = FlowMeasurement(objective, ProbabilityFlow())
    double = measured(measurement, labelled(6, order), 1)
    computed: Any = measurement.model[1]
    assert computed.dtypes == {torch.float64} and seen == set()
    assert computed.modes == {False} and not any(parameter.requires_grad for parameter in computed.parameters())
    assert objective.network.training and objective.network.layers[2].training
    assert {parameter.dtype for parameter in objective.network.parameters()} == {torch.float32}
    single = measured(FlowMeasurement(objective, ProbabilityFlow(dtype="float32")), labelled(6, order), 1)
    assert seen == {torch.float32} and objective.network.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measured(FlowMeasurement(objective), labelled(6, order), 1)
    assert torch.equal(inside.log_likelihood, double.log_likelihood)
    difference = (single.log_likelihood - double.log_likelihood).abs()
    assert 0 < float(difference.max()) < 16 * 1e-4


def test_a_solver_at_the_edge_of_its_stability_does_not_amplify_rounding() -> None:
    """Stiff fields like a network's, whose last bits differ; scipy alone lets them grow to above a millionth."""

    def moved(seed: int, end: Any) -> float:
        inner, outer = np.random.default_rng(seed).normal(size=(2, 8, 8))

        def field(rounding: float) -> Any:
            def slope(t: Any, y: Any) -> Any:
                bends = np.sin(9 * y @ inner + np.reshape(t, (-1, 1))) @ outer
                return (1 + rounding) * (20 * (np.sin(3 * np.reshape(t, (-1, 1))) - y) + 0.9 * bends)

            return slope

        return float(np.abs(end(field(1e-14)) - end(field(0.0))).max())

    def ours(field: Any) -> Any:
        return lockstep.integrate_ode(field, np.full((1, 8), 0.3), (0.0, 5.0), 1e-3, 5000, "rk45")[0].state

    def plain(field: Any) -> Any:
        start = np.full(8, 0.3)
        found = scipy.integrate.solve_ivp(lambda t, y: field(t, y)[0], (0.0, 5.0), start, rtol=1e-3, atol=1e-3)
        return found.y[:, -1]

    assert max(moved(seed, ours) for seed in range(3)) < 1e-9
    assert min(moved(seed, plain) for seed in range(3)) > 1e-6


@pytest.mark.slow
def test_batches_change_no_figure_of_a_rough_network_at_a_coarse_tolerance() -> None:
    """Fourier features of an untrained network make a field that amplifies whatever differs between batches."""
    torch.manual_seed(0)
    size = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "layers_per_block": 1}
    network = UNetVDMModel(**size, norm_num_groups=4, fourier_features=[7, 8]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    objective = VDMObjective(network, registered.process(LinearSchedule(-13.3, 5.0), num_levels=256))
    levels = torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(1))

    def by_batches_of(size: int) -> Tensor:
        batches = [{"levels": levels[part], "indices": part} for part in torch.arange(2).split(size)]
        flow = ProbabilityFlow(tolerance=1e-2)
        return measured(FlowMeasurement(objective, flow), lambda: batches, 1).log_likelihood

    torch.testing.assert_close(by_batches_of(1), by_batches_of(2), rtol=0, atol=1e-9)


def test_batches_and_threads_change_no_figure() -> None:
    """Of a float32 network, which the default computes in float64; in float32 batches do change it."""
    objective, order = small(), torch.arange(6)

    def by_batches_of(size: int) -> Tensor:
        flow = ProbabilityFlow(tolerance=1e-4)
        return measured(FlowMeasurement(objective, flow), labelled(size, order), 1).log_likelihood

    whole = by_batches_of(6)
    for size in (1, 4):
        torch.testing.assert_close(by_batches_of(size), whole, rtol=0, atol=1e-9)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(by_batches_of, [6, 2, 3]):
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tolerance", [1e-3, pytest.param(1e-5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_stated_numerical_error_is_above_the_true_one_and_not_far(solver: str, tolerance: float) -> None:
    """The true one of the very draws, by a far smaller tolerance."""
    levels = torch.arange(LEVELS).repeat(6)[:, None]

    def report_at(tolerance: float) -> Any:
        flow = replace(EXACT, tolerance=tolerance, solver=solver)
        return measured(FlowMeasurement(objective_of(), flow), images(levels), 1)

    found, exact = report_at(tolerance), report_at(1e-9)
    true = abs(found.bits_per_dim - exact.bits_per_dim)
    stated = found.details["probability_flow"]["numerical_error"]
    assert true <= stated <= 300 * tolerance


# ---- a gamma per pixel ----------------------------------------------------------------------------------------------


def per_pixel() -> tuple[VDMObjective, Tensor]:
    """Two correlated Gaussian pixels whose noise comes at different rates from different ends; their covariance."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    schedule = PerPixelSchedule(-4.0, 20.0, tilt=torch.tensor([1.0, -1.0]), bump=torch.tensor([2.0, -2.0]))
    process = registered.process(schedule, num_levels=LEVELS, conditioning=AffineConditioning(-4.0, 20.0))
    return VDMObjective(CorrelatedGaussianDenoiser(covariance, process), process), covariance


def exact_log_density(covariance: Tensor, z: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(torch.tensor([-3.0, -5.0]))
    marginal = alpha[:, None] * covariance * alpha + torch.diag(sigma**2)
    return torch.distributions.MultivariateNormal(torch.zeros(2).double(), marginal).log_prob(z)


def test_a_gamma_per_pixel_has_the_exact_density_of_a_correlated_gaussian() -> None:
    objective, covariance = per_pixel()
    z = points(8, 2)
    network = objective.network
    density = flow_density(bound_of(objective.process), network.bare, z, None, tolerance=1e-8)
    expected = exact_log_density(covariance, z)
    assert float(expected.max() - expected.min()) > 1
    torch.testing.assert_close(density.log_density, expected, rtol=0, atol=NATS)


def test_a_gamma_per_pixel_flows_from_the_one_end_of_its_schedule_to_the_other() -> None:
    """Of independent pixels: each is scaled as its marginal's deviation is, wherever the schedule ends."""
    variance = torch.tensor([0.25, 4.0], dtype=torch.float64)
    schedule = PerPixelSchedule(-4.0, 1.0, tilt=torch.tensor([1.0, -1.0]), bump=torch.tensor([2.0, -2.0]))
    process = registered.process(schedule, conditioning=AffineConditioning(-4.0, 1.0))
    network, z = CorrelatedGaussianDenoiser(variance.diag(), process).bare, points(4, 2)
    density = flow_density(bound_of(process), network, z, None, tolerance=1e-8)

    def deviation(gamma: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(gamma)
        return (alpha**2 * variance + sigma**2).sqrt()

    ratio = deviation(torch.tensor([1.0, 1.0])) / deviation(torch.tensor([-3.0, -5.0]))
    base = torch.distributions.Normal(0.0, 1.0).log_prob(ratio * z).sum(1)
    torch.testing.assert_close(density.base_density, base, rtol=0, atol=1e-6)
    torch.testing.assert_close(density.volume_change, ratio.log().sum().expand(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "truncated_normal"])
def test_a_gamma_per_pixel_is_dequantised_pixel_by_pixel(kind: str) -> None:
    """Each draw's terms against the exact density of that draw, so without Monte Carlo error."""
    objective, covariance = per_pixel()
    levels = torch.tensor([[0, 4], [2, 2], [3, 1]])
    flow = replace(EXACT, dequantization=kind, tolerance=1e-8)
    draw = draw_flow(objective.process, objective.network, images(levels)()[0], flow, (0, 0), 0)
    uniform = torch.cat(
        [torch.rand((1, 2), generator=image_generator(0, 0, i, 0, 0), dtype=torch.float64) for i in range(3)]
    )
    x = objective.process.encode(levels, torch.float64)
    alone = [  # by hand, each pixel as an image of its own
        dequantization(kind).draw(x[:, [i]], torch.tensor(gamma_0).double(), 2 / LEVELS, uniform[:, [i]])
        for i, gamma_0 in enumerate([-3.0, -5.0])
    ]
    z, log_q = torch.cat([one.z_0 for one in alone], dim=1), sum(one.log_q for one in alone)
    entropy = sum(one.entropy for one in alone)
    torch.testing.assert_close(draw.log_q, log_q)
    torch.testing.assert_close(draw.entropy, entropy)
    found = -sum(draw.terms[name] for name in ("base_density", "volume_change"))
    torch.testing.assert_close(found, exact_log_density(covariance, z), rtol=0, atol=NATS)


def test_a_latent_of_the_schedule_adds_its_term_and_is_a_function_of_the_image_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams: list[tuple[int, ...]] = []

    def opened(*key: int) -> torch.Generator:
        streams.append(key)
        return image_generator(*key)

    monkeypatch.setattr(probability_flow, "image_generator", opened)
    process = registered.process(ContextSchedule(2), num_levels=LEVELS)
    objective = VDMObjective(ExactDenoiser(ONE_DIMENSION, process), process)
    levels = torch.randint(0, LEVELS, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    found, again = (
        measured(FlowMeasurement(objective, ProbabilityFlow(tolerance=1e-3)), images(levels, size), 1)
        for size in (3, 1)
    )
    assert len(set(streams)) == 3 * 3, "latent, dequantisation and probes of an image share no draws"
    mean = process.encode(levels, torch.float64).mean((1, 2, 3))
    torch.testing.assert_close(found.terms_per_image["context"][0], 0.5 * (0.5 * mean) ** 2, rtol=0, atol=1e-12)
    for name, term in found.terms_per_image.items():
        torch.testing.assert_close(again.terms_per_image[name], term, rtol=0, atol=1e-9)


# ---- refusals -------------------------------------------------------------------------------------------------------


class Broken(ExactDenoiser):
    """NaN for data that start out high."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **_: Any) -> tuple[Tensor]:
        (output,) = super().forward(sample, timestep)
        return (torch.where(sample > 0.5, torch.nan, output),)


def test_the_image_whose_flow_is_not_finite_is_named() -> None:
    objective = objective_of()
    objective.network = Broken(ONE_DIMENSION, objective.process)
    levels = torch.tensor([0, 0, 0, 4])[:, None]
    with pytest.raises(NonFiniteLossError, match="image 3 "):
        measured(FlowMeasurement(objective, EXACT), images(levels, 2), 1)


def test_too_few_steps_are_said_to_be_too_few() -> None:
    with pytest.raises(ConfigurationError, match=naming("image 0", 3, "1e-06")):
        measured(FlowMeasurement(objective_of(), replace(EXACT, max_steps=3)), images(torch.zeros(1, 1).long()))


@pytest.mark.parametrize("missing", ["scipy.integrate", "greenlet"])
def test_a_missing_library_is_named_with_its_install_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # an import of it now fails as if it were not there
    with pytest.raises(ConfigurationError, match=naming(f"pip install {missing.partition('.')[0]}")):
        FlowMeasurement(objective_of())


def test_a_process_of_another_kind_is_refused_by_its_name() -> None:
    process = registered.process(LinearSchedule(-4.0, 1.0))
    assert scalar_gaussian(process) is process
    with pytest.raises(ConfigurationError, match=naming("PerPixelSchedule", "bound")):
        scalar_gaussian(per_pixel()[0].process)
    with pytest.raises(ConfigurationError, match=naming("ResamplingProcess", "bound")):
        FlowMeasurement(VDMObjective(nn.Identity(), ResamplingProcess()))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dequantization", "normal", "uniform"),
        ("divergence", "hutchinson", "rademacher"),
        ("probes", 0, "at least 1"),
        ("max_steps", 0, "at least 1"),
        ("solver", "rk46", "rk45"),
        ("dtype", "float16", "float32"),
        ("probes", 1.5, "whole number"),
        ("tolerance", 0.0, "below 1"),
        ("tolerance", math.nan, "below 1"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ProbabilityFlow(**{field: value})
