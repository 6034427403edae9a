r"""A control variate for the diffusion term: what simple denoisers lose, whose mean is known.

With the features of `vdm_hub.likelihood.image_features`, means ``m(x, gamma)`` and deviations ``d(x, gamma, eps)``,

    C(x, t, eps) = scale(t) [theta(t) . m(x, t) + phi(t) . d(x, t, eps)],   E_eps C = scale(t) theta(t) . m(x, t),

and ``int E_eps C dt`` is a sum over the cells of a `TimeGrid`, on which scale, theta and m are constant. So
``f - C + int E C`` has the mean of f for every theta and phi that were fixed before f was drawn (Owen, Monte Carlo
theory, section 8.9). theta and phi are linear between knots in gamma, and fitted to a pilot by ridge regression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_hub.likelihood.image_features import MEANS, ImageFeatures, ImageStatistics
from vdm_hub.likelihood.proposals import root_mean_square
from vdm_hub.likelihood.time_grid import TimeGrid

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_FOLDS = 5


@dataclass(frozen=True)
class ControlVariate:
    """See the module.

    Attributes:
        grid: The cells of time; its process is Gaussian with a scalar gamma.
        statistics: Of the data set.
        coefficients: (knots, 2 `MEANS`), float64: theta and phi at each knot.
    """

    grid: TimeGrid
    statistics: ImageStatistics
    coefficients: Tensor

    def features(self, x: Tensor) -> ImageFeatures:
        """The features of a batch, which all its evaluations share."""
        return ImageFeatures(x, self.statistics)

    def integral(self, features: ImageFeatures) -> Tensor:
        """``int E_eps C dt`` of each image, (B,), float64: exact."""
        mass = hat_basis(self.grid.positions, len(self.coefficients)).T @ (self.grid.widths * self.grid.scale)
        means = _means_at_knots(self.grid, features, len(self.coefficients))
        return torch.einsum("k,kj,bkj->b", mass, self.coefficients[:, :MEANS], means)

    def value(self, features: ImageFeatures, cell: Tensor, eps: Tensor) -> Tensor:
        """C at one cell and one noise of each image, (B,), float64."""
        rows = regressors(self.grid, features, cell, eps, len(self.coefficients))
        return self.grid.scale[cell] * (rows @ self.coefficients.flatten())

    def to_json(self) -> dict[str, Any]:
        """As lists."""
        return {"statistics": self.statistics.to_json(), "coefficients": self.coefficients.tolist()}

    @classmethod
    def from_json(cls, grid: TimeGrid, state: Mapping[str, Any]) -> ControlVariate:
        """The inverse of `to_json`, on the same grid."""
        coefficients = torch.tensor(state["coefficients"], dtype=torch.float64)
        return cls(grid, ImageStatistics.from_json(state["statistics"]), coefficients)


def hat_basis(positions: Tensor, knots: int) -> Tensor:
    """Weights of linear interpolation between equally spaced knots on [0, 1], (N,) -> (N, knots).

    >>> hat_basis(torch.tensor([0.25]), 3).tolist()
    [[0.5, 0.5, 0.0]]
    """
    distance = positions[:, None] * (knots - 1) - torch.arange(knots).to(positions)
    return (1 - distance.abs()).clamp(min=0)


def regressors(grid: TimeGrid, features: ImageFeatures, cell: Tensor, eps: Tensor, knots: int) -> Tensor:
    """What the coefficients multiply, (B, knots * 2 MEANS), float64."""
    assert grid.gammas is not None
    basis = hat_basis(grid.positions[cell], knots)
    means = _means_at_knots(grid, features, knots)
    deviations = features.deviations(grid.gammas[cell].to(eps.device), eps)
    both = torch.cat([means, deviations[:, None].expand(-1, knots, -1)], dim=2)
    return (basis[:, :, None] * both).flatten(1)


def _means_at_knots(grid: TimeGrid, features: ImageFeatures, knots: int) -> Tensor:
    assert grid.gammas is not None
    levels = torch.linspace(float(grid.gammas[0]), float(grid.gammas[-1]), knots, dtype=torch.float64)
    return torch.stack([features.means(level) for level in levels.tolist()], dim=1)


def fit_coefficients(rows: Tensor, integrand: Tensor, grid: TimeGrid, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients, and what they leave of the integrand on folds that they were not fitted to.

    Weighted least squares on ``f / scale``, each draw by what it counts under the proposal that its residual will
    have; the ridge is that of the least such error over five folds.

    Args:
        rows: `regressors` of the pilot's draws, (P, R).
        integrand: Its values with respect to dt, (P,), float64, of draws uniform over cells.
        grid: The cells.
        cell: Of the draws, (P,).

    Returns:
        ``(coefficients (R,), residuals (P,))``.
    """
    target, place = integrand / grid.scale[cell], grid.positions[cell]
    size = (grid.widths * grid.scale)[cell] * len(grid)
    profile = hat_basis(place, 12)
    spread = target - profile @ torch.linalg.lstsq(profile, target, driver="gelsd").solution
    weight = size / root_mean_square(place, place, spread).clamp(min=1e-9 * float(target.abs().max()) + 1e-30)
    folds = torch.arange(len(target)) % _FOLDS
    best: tuple[float, Tensor, float] | None = None
    for ridge in _RIDGES:
        left = torch.empty_like(target)
        for fold in range(_FOLDS):
            kept = folds != fold
            left[~kept] = target[~kept] - rows[~kept] @ _ridge(rows[kept], target[kept], weight[kept], ridge)
        error = float((weight * left**2).sum())
        if best is None or error < best[0]:
            best = error, left, ridge
    assert best is not None
    return _ridge(rows, target, weight, best[2]), best[1] * grid.scale[cell]


def _ridge(rows: Tensor, target: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Weighted ridge regression, its penalty in units of each column's own size."""
    root = weight.sqrt()
    columns = rows * root[:, None]
    size = columns.square().mean(0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    columns = columns / size
    gram = columns.T @ columns / len(target) + ridge * torch.eye(columns.shape[1], dtype=rows.dtype)
    return torch.linalg.solve(gram, columns.T @ (root * target) / len(target)) / size
