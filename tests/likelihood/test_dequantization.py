"""Dequantisation: entropies against numeric integration, and the identity that makes them part of a likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from vdm_hub.diffusion.scaling import SCALINGS, DataScaling
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.dequantization import dequantization, draw_of_latents
from vdm_hub.likelihood.protocol import DEQUANTIZATIONS

every_kind = pytest.mark.parametrize("kind", sorted(DEQUANTIZATIONS))
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)
cases = pytest.mark.parametrize(
    ("gamma_0", "num_levels"), [(-13.3, 256), (-8.0, 17), (-4.0, 2), (-20.0, 17), (-5.0, 256)]
)
Density = Callable[[float], float]


def written_out(kind: str, gamma_0: float, scaling: DataScaling, x: float) -> tuple[Density, float, float]:
    """``(q(z_0|x), from, to)``, in the textbook's alpha and sigma; beyond 12 sigma nothing is left to integrate."""
    alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma_0))), math.sqrt(1 / (1 + math.exp(-gamma_0)))
    low, high = alpha * (x - scaling.spacing / 2), alpha * (x + scaling.spacing / 2)
    if kind == "uniform":
        return (lambda z: 1 / (high - low)), low, high
    tau = (high - low) / (2 * sigma)
    normal = scipy.stats.truncnorm(-tau, tau, loc=alpha * x, scale=sigma)
    return (lambda z: float(normal.pdf(z))), max(low, alpha * x - 12 * sigma), min(high, alpha * x + 12 * sigma)


def drawn(
    kind: str, gamma_0: float, scaling: DataScaling, uniform: Tensor, level: int = 1
) -> tuple[Tensor, Tensor, float]:
    """``(z_0, log q, entropy per dimension)`` of one dimension at these quantiles."""
    x = scaling.encode(torch.full((len(uniform), 1), level), torch.float64)
    gamma = torch.tensor(gamma_0, dtype=torch.float64)
    draw = dequantization(kind).draw(x, gamma, scaling.spacing, uniform[:, None])
    return draw.z_0[:, 0], draw.log_q, float(draw.entropy[0])


@every_kind
@every_scaling
@cases
def test_the_entropy_is_that_of_numeric_integration(kind: str, scaling: str, gamma_0: float, num_levels: int) -> None:
    levels = DataScaling(scaling, num_levels)
    q, low, high = written_out(kind, gamma_0, levels, levels.first + levels.spacing)

    def integrand(z: float) -> float:
        value = q(z)
        return -value * math.log(value) if value > 0 else 0.0

    numeric, _ = scipy.integrate.quad(integrand, low, high, epsabs=1e-12, limit=200)
    assert drawn(kind, gamma_0, levels, torch.tensor([0.3]))[2] == pytest.approx(numeric, abs=1e-8)


@every_kind
@every_scaling
@cases
def test_a_draw_has_the_quantile_and_the_density_of_its_bin(
    kind: str, scaling: str, gamma_0: float, num_levels: int
) -> None:
    levels = DataScaling(scaling, num_levels)
    q, low, high = written_out(kind, gamma_0, levels, levels.first + levels.spacing)
    uniform = torch.tensor([0.0, 1e-6, 0.1, 0.5, 0.77, 1 - 1e-9], dtype=torch.float64)
    z, log_q, _ = drawn(kind, gamma_0, levels, uniform)
    tolerance = 1e-12 * (high - low)
    assert float(z.min()) >= low - tolerance and float(z.max()) <= high + tolerance
    assert bool(torch.isfinite(log_q).all()) and float(log_q.min()) > float(log_q.max()) - 50
    assert bool((z.diff() > 0).all())
    for i in range(1, 5):
        assert math.exp(float(log_q[i])) == pytest.approx(q(float(z[i])), rel=1e-7)
        below, _ = scipy.integrate.quad(q, low, float(z[i]), epsabs=1e-13, limit=200)
        assert below == pytest.approx(float(uniform[i]), abs=1e-8)


def test_the_truncation_is_that_of_the_table() -> None:
    z, _, _ = drawn(
        "truncated_normal", -13.3, DataScaling("bin_centers", 256), torch.tensor([0.5, 1 - 1e-15]).double()
    )
    assert float(z.diff()) * math.sqrt(1 + math.exp(13.3)) == pytest.approx(3.0187, abs=5e-5)


@every_kind
def test_terms_are_sums_over_dimensions_and_per_datum(kind: str) -> None:
    x = torch.zeros(2, 3, 2, 2)
    uniform = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gamma = torch.tensor(-6.0)
    whole = dequantization(kind).draw(x, gamma, 0.1, uniform)
    single = dequantization(kind).draw(x.reshape(-1, 1), gamma, 0.1, uniform.reshape(-1, 1))
    assert whole.z_0.shape == x.shape and whole.z_0.dtype == torch.float64
    torch.testing.assert_close(whole.log_q, single.log_q.view(2, 12).sum(1))
    torch.testing.assert_close(whole.entropy, single.entropy.view(2, 12).sum(1))
    torch.testing.assert_close(whole.z_0.flatten(), single.z_0.flatten())


QUANTILES = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
GAMMA_0, FEW_LEVELS, LEVEL = -7.0, DataScaling("bin_centers", 17), 9


def log_density(z: Tensor) -> Tensor:
    """A density over z_0 that is far from flat on a bin."""
    return torch.from_numpy(scipy.stats.norm(0.18, 0.04).logpdf(np.asarray(z)))


def log_mass() -> float:
    alpha = math.sqrt(1 / (1 + math.exp(GAMMA_0)))
    x = FEW_LEVELS.first + LEVEL * FEW_LEVELS.spacing
    normal = scipy.stats.norm(0.18, 0.04)
    low, high = (normal.logcdf(alpha * (x + side * FEW_LEVELS.spacing / 2)) for side in (-1, 1))
    return float(high + math.log1p(-math.exp(low - high)))


@every_kind
def test_the_expectation_is_a_lower_bound_and_the_weights_have_the_mass_as_their_mean(kind: str) -> None:
    """Midpoints of the quantiles stand for the expectation over the draw, without sampling noise."""
    z, log_q, entropy = drawn(kind, GAMMA_0, FEW_LEVELS, QUANTILES, LEVEL)
    bound = float(log_density(z).mean()) + entropy
    assert bound < log_mass() - 0.05
    assert float((log_density(z) - log_q).mean()) == pytest.approx(bound, abs=1e-3)
    weights = (log_density(z) - log_q).logsumexp(0) - math.log(len(z))
    assert float(weights) == pytest.approx(log_mass(), abs=1e-3)


def test_weights_with_the_mean_entropy_in_place_of_log_q_are_caught() -> None:
    z, _, entropy = drawn("truncated_normal", GAMMA_0, FEW_LEVELS, QUANTILES, LEVEL)
    weights = log_density(z).logsumexp(0) - math.log(len(z)) + entropy
    assert abs(float(weights) - log_mass()) > 0.05


def identity_gap(kind: str, error: float = 0.0) -> float:
    """How far ``E log p_0 + H`` is from ``log P`` where ``p_0 = c q`` on the bin, so that Jensen's gap is zero."""
    _, log_q, entropy = drawn(kind, GAMMA_0, FEW_LEVELS, QUANTILES, LEVEL)
    log_c = -2.5
    return abs(float((log_c + log_q).mean()) + entropy + error - log_c)


@every_kind
def test_where_the_density_is_proportional_to_q_the_bound_is_the_mass(kind: str) -> None:
    assert identity_gap(kind) < 1e-5


def test_a_planted_wrong_entropy_term_is_caught() -> None:
    log_alpha, log_sigma = -0.5 * math.log1p(math.exp(GAMMA_0)), -0.5 * math.log1p(math.exp(-GAMMA_0))
    tau = math.exp(log_alpha - log_sigma) / FEW_LEVELS.num_levels
    z = math.erf(tau / math.sqrt(2))
    boundary = tau * math.exp(-0.5 * tau**2) / math.sqrt(2 * math.pi) / z
    planted = {
        "uniform": {"alpha_0 forgotten": -log_alpha, "1/K for 2/K": -math.log(2)},
        "truncated_normal": {
            "ln Z forgotten": -math.log(z),
            "boundary term forgotten": boundary,
            "boundary term added": 2 * boundary,
            "sigma^2 for sigma": log_sigma,
        },
    }
    for kind, errors in planted.items():
        for name, error in errors.items():
            assert identity_gap(kind, error) > 1e-4, name


@pytest.mark.parametrize("gamma_0", [-13.3, 0.5])
def test_a_draw_of_latents_has_the_density_and_the_entropy_of_scipy_s_normal(gamma_0: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, eps = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([0.25, 2.0], dtype=torch.float64)[:, None].expand(3, 2, 4)
    draw = draw_of_latents(mean, scale, torch.tensor(gamma_0, dtype=torch.float64), eps)
    alpha = math.sqrt(1 / (1 + math.exp(gamma_0)))
    q = scipy.stats.norm(alpha * mean.numpy(), alpha * scale.numpy())
    np.testing.assert_allclose(draw.z_0, alpha * (mean + scale * eps), rtol=1e-12)
    np.testing.assert_allclose(draw.log_q, q.logpdf(draw.z_0.numpy()).sum((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(draw.entropy, q.entropy().sum((1, 2)), rtol=1e-12)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="truncated_normal"):
        dequantization("truncated")
