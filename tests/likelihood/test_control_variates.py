"""The control variate's mean is exact: expectations over eps by rules that are exact for its features."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import registered
from linear_gaussian import images, objective
from vdm_hub.diffusion.noise_schedules import CosineSchedule, LinearSchedule
from vdm_hub.likelihood.control_variates import KNOTS, ControlVariate, _ridge, fit_coefficients, hat_basis
from vdm_hub.likelihood.image_features import (
    ImageFeatures,
    ImageStatistics,
    StatisticsCollector,
    expected_grid_error,
    grid_error,
)
from vdm_hub.likelihood.proposals import Proposal
from vdm_hub.likelihood.time_grid import TimeGrid

# Small and large images, the second in colour; sequences, short and too long for an eigenbasis; vectors.
SHAPES = [(1, 4, 4), (2, 9, 15), (2, 12), (2, 150), (7,)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
LOCAL = 12  # features that are sums over entries; the others are linear denoisers' quadratic forms
SPACING = 2 / 16


def data(shape: tuple[int, ...], count: int = 3) -> tuple[Tensor, ImageStatistics]:
    x = registered.process(LinearSchedule(), num_levels=16).encode(images(70, shape))
    collector = StatisticsCollector(SPACING)
    for part in x.split(17):
        collector.add(part)
    return x[:count], collector.statistics()


def variate(shape: tuple[int, ...], transitions: int | None = None) -> tuple[Tensor, ControlVariate]:
    """Images, and coefficients at random."""
    x, statistics = data(shape)
    grid = TimeGrid.of(registered.process(CosineSchedule(-8.0, 4.0)), transitions, cells=6)
    count = ImageFeatures(x, statistics).means(0.0).shape[1]
    coefficients = torch.randn(KNOTS, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, ControlVariate(grid, statistics, coefficients)


def directions(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``+-sqrt(D) e_i``, all as likely: their mean of every quadratic in eps ~ N(0, I) is exact."""
    size = torch.zeros(shape).numel()
    one = size**0.5 * torch.eye(size)
    return torch.cat([one, -one]).view(-1, *shape), torch.full((2 * size,), 0.5 / size, dtype=torch.float64)


def constants(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One value everywhere, by the trapezoidal rule: their mean of every sum over entries is exact."""
    eps = torch.linspace(-8, 8, 400, dtype=torch.float64)
    weights = torch.exp(-0.5 * eps**2)
    return eps.float().view(-1, *(1,) * len(shape)).expand(-1, *shape), weights / weights.sum()


@every_shape
@pytest.mark.parametrize("transitions", [None, 3])
@pytest.mark.parametrize("local", [True, False])
def test_the_integral_is_the_exact_mean_of_the_value(
    shape: tuple[int, ...], transitions: int | None, local: bool
) -> None:
    x, found = variate(shape, transitions)
    found.coefficients[:, slice(LOCAL, None) if local else slice(LOCAL)] = 0
    eps, weights = constants(shape) if local else directions(shape)
    for image in x:
        features = found.features(image.expand(len(eps), *shape))
        values = [found.value(features, torch.full((len(eps),), cell), eps) for cell in range(len(found.grid))]
        means = torch.stack(values) @ weights
        size = float(means.abs() @ found.grid.widths)
        integral = float(found.integral(found.features(image[None])))
        assert float(means @ found.grid.widths) == pytest.approx(integral, abs=2e-4 * size)


@every_shape
def test_no_datum_s_control_variate_depends_on_the_others_of_its_batch(shape: tuple[int, ...]) -> None:
    x, found = variate(shape)
    eps, cell = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 5])
    whole, integral = found.value(found.features(x), cell, eps), found.integral(found.features(x))
    for i in range(len(x)):
        alone = found.features(x[i : i + 1])
        torch.testing.assert_close(found.value(alone, cell[i : i + 1], eps[i : i + 1])[0], whole[i])
        torch.testing.assert_close(found.integral(alone)[0], integral[i])


def test_at_a_knot_a_control_variate_is_its_coefficients_times_the_features_there() -> None:
    """With as many cells as knots, each cell's gamma is a knot's."""
    x, statistics = data((1, 4, 4))
    x, eps = x.double(), torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    grid = TimeGrid.of(registered.process(LinearSchedule(-8.1, 4.2)), None, cells=KNOTS)
    found = ControlVariate(grid, statistics, torch.zeros(0))
    features, gammas = found.features(x), found.grid.gammas
    assert gammas is not None
    for k, gamma in enumerate(gammas):
        cell = torch.full((len(x),), k)
        rows = found.regressors(features, cell, eps).unflatten(1, (KNOTS, -1))
        whole = features.means(float(gamma)) + features.deviations(gamma.expand(3), eps, found.grid_errors[cell])
        torch.testing.assert_close(rows[:, k], whole, rtol=1e-12, atol=1e-12)
        assert float(rows[:, torch.arange(KNOTS) != k].abs().max()) < 1e-9


@every_shape
def test_a_basis_is_orthonormal_and_its_variances_are_those_of_the_data(shape: tuple[int, ...]) -> None:
    x, statistics = data(shape, 70)
    everything = statistics.all_data
    rotated = everything.rotate(x - everything.mean)
    torch.testing.assert_close(rotated.square().sum(1), (x - everything.mean).square().flatten(1).sum(1))
    torch.testing.assert_close(rotated.var(0, unbiased=False), everything.variances, rtol=1e-3, atol=1e-5)


@every_shape
def test_a_control_variate_survives_json(shape: tuple[int, ...]) -> None:
    x, found = variate(shape)
    loaded = ControlVariate.from_json(found.grid, json.loads(json.dumps(found.to_json())))
    eps, cell = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 5])
    assert torch.equal(found.value(found.features(x), cell, eps), loaded.value(loaded.features(x), cell, eps))
    assert torch.equal(found.integral(found.features(x)), loaded.integral(loaded.features(x)))


def test_data_smaller_than_a_window_have_features_all_the_same() -> None:
    for shape in ((1, 1, 2), (1, 1), (1,)):
        x, statistics = data(shape)
        features, gamma = ImageFeatures(x, statistics), torch.zeros(len(x))
        assert bool(torch.isfinite(features.means(-3.0)).all())
        deviations = features.deviations(gamma, torch.ones_like(x), expected_grid_error(gamma, SPACING))
        assert bool(torch.isfinite(deviations).all())


@pytest.mark.parametrize("gamma", [-14.0, -9.0, -6.0, -4.0, 0.0])
def test_the_error_of_who_knows_the_levels_is_that_of_the_exact_denoiser_of_many_of_them(gamma: float) -> None:
    """Written out for 401 levels around the datum, all as likely, and its mean by a rule of its own."""
    eps = torch.linspace(-7, 7, 1401, dtype=torch.float64)[:, None]
    noise = torch.exp(torch.tensor(0.5 * gamma))
    levels = SPACING * torch.arange(-200, 201, dtype=torch.float64)
    z = noise * eps
    posterior = (-0.5 * ((z - levels) / noise) ** 2).softmax(1)
    exact = (posterior @ levels / noise) ** 2
    found = grid_error(eps, torch.full((len(eps),), gamma), SPACING)
    torch.testing.assert_close(found[:, 0], exact, rtol=1e-5, atol=1e-6)
    weights = torch.exp(-0.5 * eps[:, 0] ** 2)
    mean = float(exact @ weights / weights.sum())
    assert float(expected_grid_error(torch.tensor([gamma]), SPACING)) == pytest.approx(mean, rel=1e-5, abs=1e-7)


def test_a_linear_denoiser_s_loss_is_all_but_explained_on_draws_that_were_not_fitted_to() -> None:
    """The denoiser is that of a diagonal Gaussian, so little but the interpolation between knots is left."""
    model, levels = objective(), images(600)
    x = model.process.encode(levels)
    collector = StatisticsCollector(SPACING)
    collector.add(x)
    grid = TimeGrid.of(model.process, None)
    generator = torch.Generator().manual_seed(2)
    cell = torch.randint(len(grid), (len(x),), generator=generator)
    noise = model.draw_noise({"levels": levels}, generator)
    times = grid.time_in(cell, torch.full((len(x),), 0.5, dtype=torch.float64))
    with torch.no_grad():
        integrand = model({"levels": levels}, times.float(), noise).terms["diffusion"].double()
    trial = ControlVariate(grid, collector.statistics(), torch.zeros(0))
    rows = trial.regressors(trial.features(x), cell, noise["marginal"])
    found, left = fit_coefficients(rows, integrand, grid, cell)
    assert found is not None
    profile = hat_basis(grid.positions[cell], 12)
    spread = integrand - profile @ torch.linalg.lstsq(profile, integrand).solution
    assert float(left.square().mean()) < 0.1 * float(spread.square().mean())


def test_a_control_variate_of_pure_noise_is_refused_by_the_half_that_was_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = TimeGrid.of(objective().process, None)
    cell = torch.arange(256) * 2
    for seed in range(5):
        values = 20 + torch.randn(256, generator=generator.manual_seed(seed), dtype=torch.float64)
        rows = hat_basis(grid.positions[cell], KNOTS)[:, :, None] * torch.randn(256, 1, 15, dtype=torch.float64)
        coefficients, left = fit_coefficients(rows.flatten(1), values * grid.scale[cell], grid, cell)
        assert coefficients is None
        torch.testing.assert_close(left, values * grid.scale[cell])


def test_a_fit_counts_each_draw_by_its_weight_under_the_proposal_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One regressor, three cells far apart in which the integrand scatters unlike: its coefficient by hand.

    An evaluation that `Proposal.even` drew counts as mass / probability of its cell, over the root mean square there
    that the proposal will follow, or over a thousandth of the largest.
    """
    monkeypatch.setattr("vdm_hub.likelihood.control_variates._PENALTIES", (1e-12,))
    grid = TimeGrid.of(objective().process, None)
    generator = torch.Generator().manual_seed(0)
    cell = torch.tensor([100, 256, 511]).repeat(300)
    uniforms = torch.rand(300, 3, generator=generator, dtype=torch.float64)
    regressor = torch.tensor([1.0, 1.0, 10.0]) * (1 + torch.tensor([1.0, 1e-6, 1.0]) * uniforms)
    target = torch.tensor([1.04, 1.01, 1.0]) * regressor
    rows = torch.zeros(900, KNOTS, dtype=torch.float64)
    rows[:, 4] = regressor.flatten()
    coefficients, left = fit_coefficients(rows, target.flatten() * grid.scale[cell], grid, cell)
    sizes = target.std(0, unbiased=False)
    weight = (grid.mass / Proposal.even(grid).probabilities)[cell[:3]] / sizes.clamp(min=1e-3 * float(sizes.max()))
    expected = float((weight * regressor * target).sum() / (weight * regressor**2).sum())
    assert coefficients is not None and float(coefficients[4, 0]) == pytest.approx(expected, rel=1e-6)
    # What is left of a draw is what the fit to the other half of them leaves.
    assert 0 < float((left / grid.scale[cell] - (target - expected * regressor).flatten()).abs().min())
    torch.testing.assert_close(left / grid.scale[cell], (target - expected * regressor).flatten(), rtol=0, atol=0.1)


def test_a_fit_repeats_itself_and_scales_with_the_integrand() -> None:
    grid = TimeGrid.of(objective().process, None)
    generator = torch.Generator().manual_seed(0)
    cell = torch.arange(256) * 2
    features = torch.randn(256, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(256, generator=generator, dtype=torch.float64)
    rows = (hat_basis(grid.positions[cell], KNOTS)[:, :, None] * features[:, None]).flatten(1)
    values = (features @ torch.tensor([3.0, -1.0]).double() + noise) * grid.scale[cell]
    coefficients, left = fit_coefficients(rows, values, grid, cell)
    again, other = fit_coefficients(rows, values, grid, cell)
    small, little = fit_coefficients(rows, 1e-6 * values, grid, cell)
    assert coefficients is not None and again is not None and small is not None
    assert torch.equal(coefficients, again) and torch.equal(left, other)
    torch.testing.assert_close(small, 1e-6 * coefficients, rtol=1e-9, atol=0)
    torch.testing.assert_close(little, 1e-6 * left, rtol=1e-9, atol=1e-12)
    assert fit_coefficients(0 * rows, values, grid, cell)[0] is None, "it would change nothing"
    assert fit_coefficients(rows, 0 * values, grid, cell)[0] is None, "nothing is lost"


def test_a_ridge_is_where_the_loss_with_its_penalty_is_least() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 2 * KNOTS, generator=generator, dtype=torch.float64)
    target, weight = (torch.rand(200, generator=generator, dtype=torch.float64) for _ in range(2))
    found = _ridge(rows, target, weight, 0.3).requires_grad_()
    loss = (weight / weight.mean() * (rows @ found - target) ** 2).mean()
    by_knot = found.view(KNOTS, 2)
    loss = loss + 0.3 * ((by_knot[1:] - by_knot[:-1]).square().sum() + 0.01 * by_knot.square().sum())
    (slope,) = torch.autograd.grad(loss, found)
    assert float(slope.abs().max()) < 1e-14
