"""Law 4: what has an exact answer gets it, through the library's own process and bound.

Expectations over data and noise are weighted sums (see `exact_denoisers`), so nothing below is a Monte Carlo estimate:
tolerances are those of the quadrature in t.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import registered
from exact_denoisers import (
    CorrelatedGaussianDenoiser,
    ExactDenoiser,
    Mixture,
    PerPixelSchedule,
    aligned_panels,
    alphabet_points,
    continuous_diffusion_term,
    finite_diffusion_term,
    quadratic_points,
)
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule, NoiseSchedule, TabulatedSchedule

every_schedule = pytest.mark.parametrize("name", registered.names("noise_schedules"))
every_target = pytest.mark.parametrize("target", registered.names("parameterizations"))


def gaussian_closed_form(variance: float, gamma_0: float, gamma_1: float) -> float:
    """``1/2 ln[(1 + s^2 e^{-gamma_0}) / (1 + s^2 e^{-gamma_1})]``."""
    return 0.5 * math.log((1 + variance * math.exp(-gamma_0)) / (1 + variance * math.exp(-gamma_1)))


def gaussian_term(schedule: NoiseSchedule, variance: float, target: str = "epsilon") -> float:
    process = registered.process(schedule, target)
    network = ExactDenoiser(Mixture.gaussian(variance), process).bare
    points = quadratic_points(torch.tensor([[variance]]))
    return continuous_diffusion_term(process, network, points, aligned_panels(schedule, 300))


@every_target
@pytest.mark.parametrize(("variance", "nats"), [(1.0, 6.6466), (0.25, 5.9560), (4.0, 7.3298)])
def test_gaussian_data_has_the_diffusion_term_of_the_table(variance: float, nats: float, target: str) -> None:
    assert gaussian_closed_form(variance, -13.3, 5.0) == pytest.approx(nats, abs=5e-5)
    assert gaussian_term(LinearSchedule(), variance, target) == pytest.approx(nats, abs=5e-5)


@every_schedule
@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_gaussian_data_has_the_closed_form_under_every_monotone_schedule(name: str, variance: float) -> None:
    for schedule in (registered.scalar_schedule(name), registered.learned(name)):
        expected = gaussian_closed_form(variance, *schedule.endpoints())
        assert gaussian_term(schedule, variance) == pytest.approx(expected, rel=1e-6)


@every_target
@pytest.mark.parametrize("path", [(0.0, 0.0), (2.0, 0.0), (0.0, 1.5), (-2.0, 1.0)])
def test_correlated_gaussian_with_a_gamma_per_pixel(path: tuple[float, float], target: str) -> None:
    """``1/2 ln det(I + S L_0) / det(I + S L_1)``, whatever path each pixel's gamma takes between its ends."""
    pixels = torch.tensor([0.7, -0.2, 1.0, -1.5], dtype=torch.float64)
    schedule = PerPixelSchedule(-8.0, 5.0, tilt=path[0] * pixels, bump=path[1] * pixels.flip(0))
    factor = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = 0.2 * factor @ factor.T + 0.05 * torch.eye(4, dtype=torch.float64)
    process = registered.process(schedule, target, AffineConditioning(-8.0, 5.0))
    network = CorrelatedGaussianDenoiser(covariance, process).bare
    actual = continuous_diffusion_term(process, network, quadratic_points(covariance), panels=60)

    def log_det(t: float) -> Tensor:
        precision = torch.exp(-schedule(torch.tensor([t], dtype=torch.float64))[0])
        return torch.linalg.slogdet(torch.eye(4, dtype=torch.float64) + covariance * precision).logabsdet

    assert actual == pytest.approx(0.5 * float(log_det(0.0) - log_det(1.0)), rel=1e-7)


def alphabet_bound(gamma_0: float, gamma_1: float, transitions: int | None) -> float:
    """The whole bound in nats: prior, reconstruction and diffusion terms, for five grey levels."""
    process = registered.process(LinearSchedule(gamma_0, gamma_1), num_levels=5)
    values = process.scaling.encode(torch.arange(5), torch.float64)
    population = Mixture.alphabet(values, PROBABILITIES)
    network = ExactDenoiser(population, process).bare
    x, eps, weights = points = alphabet_points(population)
    if transitions is None:
        diffusion = continuous_diffusion_term(process, network, points, panels=100)
    else:
        diffusion = finite_diffusion_term(process, network, points, transitions)
    bound = process.bind(x, {})[1]
    levels = process.scaling.nearest(x)
    reconstruction = bound.reconstruction(levels, x, {"reconstruction": eps}, network) @ weights
    return diffusion + float(reconstruction) + float(bound.prior_kl(x) @ weights)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)
ENTROPY = -float(PROBABILITIES @ PROBABILITIES.log())


def test_a_finite_alphabet_with_the_exact_denoiser_tends_to_its_entropy() -> None:
    gaps = [alphabet_bound(*ends, None) - ENTROPY for ends in [(-1.0, 1.0), (-3.0, 4.0), (-6.0, 8.0), (-12.0, 14.0)]]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.02 and gaps[2] > 0
    assert abs(gaps[-1]) < 2e-6


def test_a_finite_alphabet_with_more_transitions_tends_to_its_entropy_from_above() -> None:
    gaps = [alphabet_bound(-12.0, 14.0, transitions) - ENTROPY for transitions in (8, 64, 512)]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < 0.05 < 1 < gaps[0]


def finite_terms(process: GaussianProcess, population: Mixture, counts: list[int]) -> dict[int, float]:
    points = (
        quadratic_points(population.variances[:, None])
        if float(population.variances[0]) > 0
        else alphabet_points(population)
    )
    network = ExactDenoiser(population, process).bare
    return {count: finite_diffusion_term(process, network, points, count) for count in counts}


@every_schedule
@pytest.mark.parametrize("population", ["gaussian", "alphabet"])
def test_whole_multiples_of_the_transitions_never_cost_bits(name: str, population: str) -> None:
    """``L_{kT} <= L_T`` for the exact denoiser, down to the continuous limit."""
    schedule = registered.scalar_schedule(name)
    letters = torch.tensor([-0.8, 0.0, 0.3], dtype=torch.float64)
    data = (
        Mixture.gaussian(0.25)
        if population == "gaussian"
        else Mixture.alphabet(letters, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    )
    terms = finite_terms(registered.process(schedule), data, [1, 2, 3, 4, 6, 8, 9, 12, 18, 24])
    for few, cost in terms.items():
        for many, less in terms.items():
            if many % few == 0:
                assert less <= cost * (1 + 1e-9)
    if population == "gaussian":
        assert terms[24] > gaussian_closed_form(0.25, *schedule.endpoints())


def test_one_more_transition_may_cost_bits() -> None:
    """From T to T + 1 the exact denoiser's term may rise: 2 transitions cut a sharp schedule where it jumps, 3 not."""
    sharp = TabulatedSchedule([-8.0, -7.9, -7.8, -7.7, 0.0, 4.7, 4.8, 4.9, 5.0])
    terms = finite_terms(registered.process(sharp), Mixture.gaussian(1.0), [2, 3, 4])
    assert terms[3] > 1.5 * terms[2] > 1.5 * terms[4]


@pytest.mark.parametrize("transitions", [2, 3, 4])
@pytest.mark.parametrize("believed_variance", [0.25, 0.7])
def test_a_linear_gaussian_reverse_model_has_the_joint_ratio_of_its_chain(
    transitions: int, believed_variance: float
) -> None:
    """Prior and diffusion terms sum to ``E_q[log q(z_0..z_T|x) - log p(z_0..z_T)]``, from the chain's covariance.

    Both chains are written out in alpha-bar (Luo eq. 84), the forward one by its transitions, so this is the
    evidence-lower-bound's own definition, not its decomposition.
    """
    variance = 0.25
    schedule = LinearSchedule(-3.0, 4.0)
    process = registered.process(schedule, "v_prediction")
    network = ExactDenoiser(Mixture.gaussian(believed_variance), process).bare
    points = quadratic_points(torch.tensor([[variance]]))
    diffusion = finite_diffusion_term(process, network, points, transitions)
    x, _, weights = points
    prior = float(process.bind(x, {})[1].prior_kl(x) @ weights)

    bar = [1 / (1 + math.exp(-3.0 + 7.0 * t / transitions)) for t in range(transitions + 1)]
    # Rows: x, z_0, ..., z_T in terms of independent standard normals.
    rows = torch.zeros(transitions + 2, transitions + 2, dtype=torch.float64)
    rows[0, 0] = math.sqrt(variance)
    log_q = 0.0
    for t in range(transitions + 1):
        a = bar[t] if t == 0 else bar[t] / bar[t - 1]
        rows[t + 1] = math.sqrt(a) * rows[t]
        rows[t + 1, t + 1] = math.sqrt(1 - a)
        log_q += -0.5 * math.log(2 * math.pi * (1 - a)) - 0.5
    log_p = -0.5 * math.log(2 * math.pi) - 0.5 * float(rows[-1] @ rows[-1])
    for t in range(1, transitions + 1):
        a = bar[t] / bar[t - 1]
        denoise = math.sqrt(bar[t]) * believed_variance / (bar[t] * believed_variance + 1 - bar[t])
        gain = (math.sqrt(a) * (1 - bar[t - 1]) + math.sqrt(bar[t - 1]) * (1 - a) * denoise) / (1 - bar[t])
        step_variance = (1 - a) * (1 - bar[t - 1]) / (1 - bar[t])
        residual = rows[t] - gain * rows[t + 1]
        log_p += -0.5 * math.log(2 * math.pi * step_variance) - 0.5 * float(residual @ residual) / step_variance
    assert prior + diffusion == pytest.approx(log_q - log_p, rel=1e-9)
