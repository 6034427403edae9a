"""The control variate's mean is exact: expectations over eps by rules that are exact for its features."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

import registered
from linear_gaussian import images, objective
from vdm_hub.diffusion.noise_schedules import CosineSchedule, LinearSchedule
from vdm_hub.likelihood.control_variates import KNOTS, ControlVariate, _ridge, fit_coefficients, hat_basis
from vdm_hub.likelihood.image_features import (
    _LARGEST_COSINES,
    _LARGEST_EIGENBASIS,
    _SHRINKAGE,
    Gaussian,
    ImageFeatures,
    ImageStatistics,
    StatisticsCollector,
    _clusters,
    cosine_transform,
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


@pytest.mark.parametrize("gamma", [-14.0, -9.0, -6.0, -5.0, -4.0, 0.0])
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
    mean, expected = float(exact @ weights / weights.sum()), expected_grid_error(torch.tensor([gamma]), SPACING)
    assert float(expected) == pytest.approx(mean, rel=1e-5, abs=1e-7) and expected.dtype == torch.float64


def variance_around(x: Tensor, window: int) -> Tensor:
    """Of each entry's window, with edges reflected; over the last two axes of images, else over the last."""
    axes = (-2, -1) if x.ndim == 4 else (-1,)
    pads = [(window // 2,) * 2 if axis - x.ndim in axes else (0, 0) for axis in range(x.ndim)]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x.numpy(), pads, "reflect"), (window,) * len(axes), axes)
    return torch.from_numpy(windows.var(axes))


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 9, 15), (2, 12), (7,)], ids=str)
def test_the_features_are_what_simple_denoisers_lose_of_the_noise(shape: tuple[int, ...]) -> None:
    x, statistics = data(shape, 70)
    darkest, brightest = x.min(), x.max()
    x = x[x.flatten(1).std(1).argsort(descending=True)[:4]].double()  # in whom both are
    gamma = torch.tensor([-6.0, -2.0, -4.0, 1.0], dtype=torch.float64)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = ImageFeatures(x, statistics)
    means = torch.stack([features.means(float(gamma[i]))[i] for i in range(4)])
    found = means + features.deviations(gamma, eps, expected_grid_error(gamma, SPACING))

    noise = gamma.exp().view(-1, *(1,) * len(shape))
    small, large = variance_around(x, 3), variance_around(x, 5)
    weights = [torch.ones_like(x), small / (small + noise), small / (small + 0.1 * noise), large / (large + noise)]
    weights += [(x == darkest).double(), (x == brightest).double()]
    errors = eps**2, eps**2 - grid_error(eps, gamma, SPACING)
    local = [(weight * error).flatten(1).sum(1) for error in errors for weight in weights]
    assert all(bool(weight.any()) for weight in weights)
    torch.testing.assert_close(found[:, :LOCAL], torch.stack(local, dim=1), rtol=1e-9, atol=1e-9)

    def lost(gaussians: Sequence[Gaussian], share: float) -> Tensor:
        """By the denoiser of the Gaussian that a datum is nearest to, of noise on a share of its distance to it."""
        losses = []
        for datum, own, n in zip(x, eps, gamma.exp(), strict=True):
            nearest = min(gaussians, key=lambda each: float((datum - each.mean).norm()))
            basis = nearest.rotate(torch.eye(datum.numel()).view(-1, *shape)).double()
            total = basis @ torch.diag(nearest.variances.double() + n) @ basis.T
            z = (share * (datum - nearest.mean) + n.sqrt() * own).flatten()
            losses.append((own.flatten() - n.sqrt() * torch.linalg.solve(total, z)).square().sum())
        return torch.stack(losses)

    linear = [lost([statistics.all_data], 0.0), lost([statistics.all_data], 1.0)]
    linear[1] = linear[1] - linear[0]
    assert bool(statistics.clusters) == (shape != (2, 9, 15))
    linear += [lost(statistics.clusters, 1.0)] if statistics.clusters else []
    torch.testing.assert_close(found[:, LOCAL:], torch.stack(linear, dim=1), rtol=1e-4, atol=1e-4)


def test_the_cosine_transform_is_the_orthonormal_one_of_every_axis_but_images_channels() -> None:
    for shape, axes in (((3, 2, 6, 5), (2, 3)), ((3, 2, 7), (1, 2)), ((3, 9), (1,))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=axes, norm="ortho"))
        torch.testing.assert_close(cosine_transform(x), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(1, _LARGEST_COSINES + 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cosine_transform(x), x) and not torch.equal(cosine_transform(x[:, 1:]), x[:, 1:])


@pytest.mark.parametrize("size", [_LARGEST_EIGENBASIS, _LARGEST_EIGENBASIS + 1])
def test_statistics_are_of_all_data_whose_eigenbasis_is_found_up_to_a_size(size: int) -> None:
    x = torch.tensor([-2.0, 3.0, 1.0])[:, None] * torch.eye(size)[:3]
    collector = StatisticsCollector(SPACING)
    for datum in x:
        collector.add(datum[None])
    found = collector.statistics()
    assert (found.darkest, found.brightest) == (-2, 3)
    torch.testing.assert_close(found.all_data.mean, x.mean(0))
    assert (found.all_data.basis is None) == (size > _LARGEST_EIGENBASIS)


@pytest.mark.parametrize(
    ("count", "size", "clusters"), [(59, 2, 0), (60, 2, 2), (400, 2, 10), (100, 158, 2), (100, 159, 0)]
)
def test_there_are_as_many_clusters_as_their_covariances_have_data_for(count: int, size: int, clusters: int) -> None:
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _clusters(x)
    assert len(found) == clusters
    assert all(torch.equal(one.mean, other.mean) for one, other in zip(found, _clusters(x), strict=True))


def test_clusters_are_of_data_that_are_alike_and_share_some_of_their_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(92, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.3])
    group = torch.arange(92) % 3
    x += torch.tensor([[-0.8, 0.0], [0.9, 0.0], [0.8, 0.0]])[group]
    x[group == 1] = x[group == 1].flip(1)
    groups = [x[group == i] for i in (0, 1, 2)]
    own = [torch.cov(each.T, correction=0) for each in groups]
    common = sum(covariance * len(each) for covariance, each in zip(own, groups, strict=True)) / 92
    for found, each, covariance in zip(sorted(_clusters(x), key=lambda c: c.mean[0]), groups, own, strict=True):
        torch.testing.assert_close(found.mean, each.mean(0).float())
        assert found.basis is not None
        shrunk = (len(each) * covariance + _SHRINKAGE * common) / (len(each) + _SHRINKAGE)
        torch.testing.assert_close(found.basis @ torch.diag(found.variances) @ found.basis.T, shrunk.float())


def test_data_that_are_alike_fill_no_more_clusters_than_there_are_of_them() -> None:
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double()[torch.arange(90) % 2]
    found = sorted(_clusters(x), key=lambda cluster: cluster.mean[0])
    assert [each.mean.tolist() for each in found] == x[:2].tolist()
    assert all(float(each.variances.max()) < 1e-6 for each in found)


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
    assert float((left / grid.scale[cell] - (target - expected * regressor).flatten()).abs().min()) > 0
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
