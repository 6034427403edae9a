r"""Importance sampling of t: a density ``q(t)`` near the one that makes the estimator's variance least.

``int f dt = E_{t~q}[f(t) / q(t)]`` for every q that is positive where f is; the variance is least for
``q \propto sqrt(E f(t)^2)``, with f what is left of the integrand after control variates. That is estimated from a
pilot whose draws are never used again, and mixed with one that knows the schedule alone (Hesterberg, Technometrics
37, 1995), so that no weight is large where the pilot was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_hub.likelihood.time_grid import TimeGrid

_BINS = 24


@dataclass(frozen=True)
class Proposal:
    """A density over t, constant within each cell of a grid.

    Attributes:
        grid: The cells.
        probabilities: Of the cells, (n,), float64; they sum to one.

    >>> from vdm_hub.diffusion.gaussian_process import GaussianProcess
    >>> grid = TimeGrid.of(GaussianProcess.from_fields({}), transitions=2)
    >>> t, cell, weight = Proposal(grid, torch.tensor([0.8, 0.2]).double()).draw(torch.tensor([0.1, 0.9]).double())
    >>> t.tolist(), cell.tolist(), [round(w, 3) for w in weight.tolist()]
    ([0.25, 0.75], [0, 1], [0.625, 2.5])
    """

    grid: TimeGrid
    probabilities: Tensor

    @classmethod
    def uniform(cls, grid: TimeGrid) -> Proposal:
        """The proposal that is uniform in t: all weights are one."""
        return cls(grid, grid.widths)

    @classmethod
    def even(cls, grid: TimeGrid) -> Proposal:
        """The proposal of a pilot: half even in log-SNR, half where unit data would lose most; uniform without one."""
        if grid.gammas is None:
            return cls.uniform(grid)
        spans, lost = grid.spans, grid.mass * torch.sigmoid(-grid.gammas)
        return cls(grid, 0.5 * spans / spans.sum() + 0.5 * lost / lost.sum())

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws ``(t, cell, 1/q(t))`` by the inverse of the distribution function: stratified ones stay stratified.

        Args:
            uniforms: In [0, 1], any shape, float64.
        """
        cumulative = F.pad(self.probabilities.cumsum(0), (1, 0))
        cumulative = cumulative / cumulative[-1]
        cell = (torch.searchsorted(cumulative, uniforms.contiguous(), right=True) - 1).clamp(0, len(self.grid) - 1)
        fraction = (uniforms - cumulative[cell]) / cumulative.diff()[cell]
        weight = self.grid.widths[cell] / cumulative.diff()[cell]
        return self.grid.time_in(cell, fraction), cell, weight


def fit_proposal(grid: TimeGrid, cell: Tensor, integrand: Tensor, defensive: float = 0.1) -> Proposal:
    """The proposal for an integrand of which a pilot gave values.

    The root mean square is smoothed over positions in units of the grid's ``scale``, which the schedule's shape is in.

    Args:
        grid: The cells.
        cell: Of each of the pilot's draws, (P,).
        integrand: Its value there with respect to dt, (P,), float64.
        defensive: The share of `Proposal.even`.

    Raises:
        ValueError: The share is not in (0, 1].
    """
    if not 0 < defensive <= 1:
        raise ValueError(f"the defensive share is {defensive}: it must be positive, and at most 1.")
    size = root_mean_square(grid.positions, grid.positions[cell], integrand / grid.scale[cell])
    mass, even = grid.mass * size, Proposal.even(grid)
    if not float(mass.sum()) > 0:
        return even
    return Proposal(grid, (1 - defensive) * mass / mass.sum() + defensive * even.probabilities)


def root_mean_square(at: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """The function ``sqrt(E values^2)`` of position: see `smoothed_mean`."""
    return smoothed_mean(at, positions, values.double() ** 2).clamp(min=0).sqrt()


def smoothed_mean(at: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """The function ``E values`` of position: smoothed means of bins, linear between their centres.

    Args:
        at: Where it is wanted, in [0, 1].
        positions: Of the values, in [0, 1].
        values: What was seen there.
    """
    index = (positions * _BINS).long().clamp(0, _BINS - 1)
    kernel = torch.exp(-0.5 * (torch.arange(_BINS)[:, None] - torch.arange(_BINS)).double() ** 2)
    sums = kernel @ torch.zeros(_BINS, dtype=torch.float64).index_add_(0, index, values.double())
    counts = kernel @ torch.bincount(index, minlength=_BINS).double()
    centre = sums / counts.clamp(min=1e-12)
    place = (at * _BINS - 0.5).clamp(0, _BINS - 1)
    left = place.floor().long().clamp(max=_BINS - 2)
    part = place - left
    return (1 - part) * centre[left] + part * centre[left + 1]
