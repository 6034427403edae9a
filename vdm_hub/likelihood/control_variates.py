r"""A control variate for the diffusion term: what simple denoisers lose, whose mean is known.

With the features of `vdm_hub.likelihood.image_features`, means ``m(x, gamma)`` and deviations ``d(x, gamma, eps)``,

    C(x, t, eps) = scale(t) theta(t) . [m(x, t) + d(x, t, eps)],   E_eps C = scale(t) theta(t) . m(x, t),

and ``int E_eps C dt`` is a sum over the cells of a `TimeGrid`, on which scale, theta and m are constant. So
``f - C + int E C`` has the mean of f for every theta that was fixed before f was drawn (Owen, Monte Carlo theory,
section 8.9). theta is linear between knots in gamma, and fitted to a pilot by ridge regression, with a penalty on its
steps from knot to knot; half of the pilot, held out, decides how large that is, and whether any control variate is
better than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vdm_hub.likelihood.image_features import ImageFeatures, ImageStatistics, expected_grid_error
from vdm_hub.likelihood.proposals import Proposal, root_mean_square, smoothed_mean
from vdm_hub.likelihood.time_grid import TimeGrid

KNOTS = 12
_PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)


@dataclass(frozen=True)
class ControlVariate:
    """A control variate of the diffusion term: see the module.

    Attributes:
        grid: The cells of time; its process is Gaussian with a scalar gamma.
        statistics: Of the data set.
        coefficients: theta at each knot, (knots, features), float64.
    """

    grid: TimeGrid
    statistics: ImageStatistics
    coefficients: Tensor

    @cached_property
    def grid_errors(self) -> Tensor:
        """The `expected_grid_error` at the gamma of each cell."""
        assert self.grid.gammas is not None
        return expected_grid_error(self.grid.gammas, self.statistics.spacing)

    def features(self, x: Tensor) -> ImageFeatures:
        """The features of a batch, which all its evaluations share."""
        return ImageFeatures(x, self.statistics)

    def integral(self, features: ImageFeatures) -> Tensor:
        """The exact integral ``int E_eps C dt`` of each image, (B,), float64."""
        mass = hat_basis(self.grid.positions, KNOTS).T @ self.grid.mass
        return torch.einsum("k,kj,bkj->b", mass, self.coefficients, self._means_at_knots(features))

    def value(self, features: ImageFeatures, cell: Tensor, eps: Tensor) -> Tensor:
        """The value of C at one cell and one noise of each image, (B,), float64."""
        return self.grid.scale[cell] * (self.regressors(features, cell, eps) @ self.coefficients.flatten())

    def regressors(self, features: ImageFeatures, cell: Tensor, eps: Tensor) -> Tensor:
        """The regressors that the coefficients multiply, (B, knots * features), float64."""
        assert self.grid.gammas is not None
        basis = hat_basis(self.grid.positions[cell], KNOTS)
        deviations = features.deviations(self.grid.gammas[cell].to(eps.device), eps, self.grid_errors[cell])
        return (basis[:, :, None] * (self._means_at_knots(features) + deviations[:, None])).flatten(1)

    def _means_at_knots(self, features: ImageFeatures) -> Tensor:
        assert self.grid.gammas is not None
        levels = torch.linspace(float(self.grid.gammas[0]), float(self.grid.gammas[-1]), KNOTS, dtype=torch.float64)
        return torch.stack([features.means(level) for level in levels.tolist()], dim=1)

    def to_json(self) -> dict[str, Any]:
        """The coefficients and the statistics as lists."""
        return {"statistics": self.statistics.to_json(), "coefficients": self.coefficients.tolist()}

    @classmethod
    def from_json(cls, grid: TimeGrid, state: Mapping[str, Any]) -> ControlVariate:
        """A control variate from `to_json`, on the same grid."""
        coefficients = torch.tensor(state["coefficients"], dtype=torch.float64)
        return cls(grid, ImageStatistics.from_json(state["statistics"]), coefficients)


def hat_basis(positions: Tensor, knots: int) -> Tensor:
    """The weights of linear interpolation between equally spaced knots on [0, 1], (N,) -> (N, knots).

    >>> hat_basis(torch.tensor([0.25]), 3).tolist()
    [[0.5, 0.5, 0.0]]
    """
    distance = positions[:, None] * (knots - 1) - torch.arange(knots).to(positions)
    return (1 - distance.abs()).clamp(min=0)


def fit_coefficients(rows: Tensor, integrand: Tensor, grid: TimeGrid, cell: Tensor) -> tuple[Tensor | None, Tensor]:
    """The coefficients, and what they leave of the integrand on draws that they were not fitted to.

    Weighted least squares on ``f / scale``, each draw by what it counts under the proposal that its residual will
    have. Each half of the pilot is predicted from the other one; the penalty, or no control variate at all, is what
    then leaves the least variance.

    Args:
        rows: `ControlVariate.regressors` of the pilot's draws, (P, R).
        integrand: Its values with respect to dt, (P,), float64, of draws as `Proposal.even` gives them.
        grid: The cells.
        cell: Of the draws, (P,).

    Returns:
        ``(coefficients (knots, features) or none, residuals (P,))``.
    """
    target, place = integrand / grid.scale[cell], grid.positions[cell]
    profile = hat_basis(place, KNOTS)
    spread = target - profile @ torch.linalg.lstsq(profile, target, driver="gelsd").solution
    size = root_mean_square(place, place, spread)
    count = (grid.mass / Proposal.even(grid).probabilities)[cell]
    weight = count / size.clamp(min=1e-3 * float(size.max()) + 1e-30)
    half = (torch.randperm(len(target), generator=torch.Generator().manual_seed(0)) % 2).bool()
    best: tuple[float, float | None, Tensor] = remaining_variance(grid, cell, target), None, target
    for penalty in _PENALTIES:
        left = torch.empty_like(target)
        for held in (half, ~half):
            left[held] = target[held] - rows[held] @ _ridge(rows[~held], target[~held], weight[~held], penalty)
        variance = remaining_variance(grid, cell, left)
        if variance < best[0]:
            best = variance, penalty, left
    _, chosen, left = best
    found = None if chosen is None else _ridge(rows, target, weight, chosen).view(KNOTS, -1)
    return found, left * grid.scale[cell]


def remaining_variance(grid: TimeGrid, cell: Tensor, values: Tensor) -> float:
    """The variance of one evaluation under the best proposal: ``(sum mass rms)^2 - (sum mass mean)^2``.

    Args:
        grid: The cells.
        cell: Of the draws, (P,).
        values: Seen there, over the scale, (P,).
    """
    size = root_mean_square(grid.positions, grid.positions[cell], values)
    mean = smoothed_mean(grid.positions, grid.positions[cell], values)
    return float((grid.mass @ size) ** 2 - (grid.mass @ mean) ** 2)


def _ridge(rows: Tensor, target: Tensor, weight: Tensor, penalty: float) -> Tensor:
    """The weighted least squares with a penalty on coefficients' steps between knots and, slightly, on themselves."""
    # scikit-learn's Ridge has a penalty on each coefficient, and none on the steps between them.
    weight = weight / weight.mean()
    steps = torch.eye(KNOTS).diff(dim=0)
    smooth = steps.T @ steps + 0.01 * torch.eye(KNOTS, dtype=rows.dtype)
    ridge = torch.kron(smooth, torch.eye(rows.shape[1] // KNOTS))
    weighted = rows * weight[:, None]
    gram = weighted.T @ rows / len(target) + penalty * ridge
    return torch.linalg.solve(gram, weighted.T @ target / len(target))
