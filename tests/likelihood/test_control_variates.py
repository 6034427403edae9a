"""The control variate's mean is exact: expectations over eps by a cubature that is exact for quadratics."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import registered
from linear_gaussian import images, objective
from vdm_hub.diffusion.noise_schedules import CosineSchedule, LinearSchedule
from vdm_hub.likelihood.control_variates import ControlVariate, fit_coefficients, hat_basis, regressors
from vdm_hub.likelihood.image_features import MEANS, ImageFeatures, ImageStatistics, StatisticsCollector
from vdm_hub.likelihood.time_grid import TimeGrid

SMALL, LARGE = (1, 4, 4), (2, 9, 15)  # an eigenbasis, and the cosine transform of rectangles in colour
every_shape = pytest.mark.parametrize("shape", [SMALL, LARGE])
KNOTS = 4


def data(shape: tuple[int, ...], count: int = 3) -> tuple[Tensor, ImageStatistics]:
    x = registered.process(LinearSchedule(), num_levels=16).encode(images(40, shape))
    collector = StatisticsCollector()
    for part in x.split(17):
        collector.add(part)
    return x[:count], collector.statistics()


def directions(shape: tuple[int, ...]) -> Tensor:
    """``+-sqrt(D) e_i``: their mean of every quadratic in eps ~ N(0, I) is exact."""
    size = torch.zeros(shape).numel()
    one = size**0.5 * torch.eye(size)
    return torch.cat([one, -one]).view(-1, *shape)


@every_shape
@pytest.mark.parametrize("transitions", [None, 3])
def test_the_integral_is_the_exact_mean_of_the_value(shape: tuple[int, ...], transitions: int | None) -> None:
    x, statistics = data(shape)
    grid = TimeGrid.of(registered.process(CosineSchedule(-8.0, 4.0)), transitions, cells=6)
    coefficients = torch.randn(KNOTS, 2 * MEANS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variate = ControlVariate(grid, statistics, coefficients)
    eps = directions(shape)
    for image in x:
        features = variate.features(image.expand(len(eps), *shape))
        means = [
            float(variate.value(features, torch.full((len(eps),), cell), eps).mean()) for cell in range(len(grid))
        ]
        total = float(torch.tensor(means, dtype=torch.float64) @ grid.widths)
        size = float(torch.tensor(means, dtype=torch.float64).abs() @ grid.widths)
        integral = float(variate.integral(variate.features(image[None])))
        assert total == pytest.approx(integral, abs=2e-4 * size)


@every_shape
def test_a_basis_is_orthonormal_and_its_variances_are_those_of_the_data(shape: tuple[int, ...]) -> None:
    x, statistics = data(shape, 40)
    rotated = statistics.rotate(x - statistics.mean)
    torch.testing.assert_close(rotated.square().sum(1), (x - statistics.mean).square().flatten(1).sum(1))
    torch.testing.assert_close(rotated.var(0, unbiased=False), statistics.variances, rtol=1e-3, atol=1e-5)


@every_shape
def test_a_control_variate_survives_json(shape: tuple[int, ...]) -> None:
    x, statistics = data(shape)
    grid = TimeGrid.of(registered.process(LinearSchedule(-8.0, 4.0)), None)
    coefficients = torch.randn(KNOTS, 2 * MEANS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variate = ControlVariate(grid, statistics, coefficients)
    loaded = ControlVariate.from_json(grid, json.loads(json.dumps(variate.to_json())))
    eps, cell = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 200, 400])
    assert torch.equal(variate.value(variate.features(x), cell, eps), loaded.value(loaded.features(x), cell, eps))
    assert torch.equal(variate.integral(variate.features(x)), loaded.integral(loaded.features(x)))


def test_images_smaller_than_a_window_have_features_all_the_same() -> None:
    x, statistics = data((1, 1, 2))
    features = ImageFeatures(x, statistics)
    assert bool(torch.isfinite(features.means(-3.0)).all())
    assert bool(torch.isfinite(features.deviations(torch.zeros(len(x)), torch.ones_like(x))).all())


def test_a_linear_denoiser_s_loss_is_all_but_explained_on_draws_that_were_not_fitted_to() -> None:
    """The denoiser is that of a diagonal Gaussian, so little but the interpolation between knots is left."""
    model, levels = objective(), images(600)
    x = model.process.encode(levels)
    collector = StatisticsCollector()
    collector.add(x)
    grid = TimeGrid.of(model.process, None)
    generator = torch.Generator().manual_seed(2)
    cell = torch.randint(len(grid), (len(x),), generator=generator)
    noise = model.draw_noise({"levels": levels}, generator)
    times = grid.time_in(cell, torch.full((len(x),), 0.5, dtype=torch.float64))
    with torch.no_grad():
        integrand = model({"levels": levels}, times.float(), noise).terms["diffusion"].double()
    rows = regressors(grid, ImageFeatures(x, collector.statistics()), cell, noise["marginal"], KNOTS * 2)
    _, left = fit_coefficients(rows, integrand, grid, cell)
    profile = hat_basis(grid.positions[cell], 12)
    spread = integrand - profile @ torch.linalg.lstsq(profile, integrand).solution
    assert float(left.square().mean()) < 0.1 * float(spread.square().mean())
