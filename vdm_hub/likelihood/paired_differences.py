r"""Differences between candidates on draws that they share, and how certain they are from few of them.

``d_n = f_n(c) - f_n(b)``, the integrand of candidate c less that of candidate b on draw n, is far less scattered than
either. Two draws say little of its variance, so that of one image is shrunk towards what a pilot saw of differences of
that size: ``v = (nu v_0(s) + sum (d_n - d)^2) / (nu + N - 1)``, as with a scaled inverse chi-squared prior (Gelman et
al., Bayesian Data Analysis, section 2.6); then a difference over its error is Student's t with nu + N - 1 degrees of
freedom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_hub.likelihood.needed_modules import needed_module

_LEAST, _MOST = 4.0, 20.0  # draws that the pilot's word on a variance is worth


@dataclass(frozen=True)
class Scatter:
    """The variance of a paired difference as a function of its scale: ``v_0(s) = e^intercept s^slope``.

    Attributes:
        intercept: Of the logarithm, for differences in nats; by default a draw scatters as widely as it is large.
        slope: Of the logarithm.
        strength: nu, the draws that this is worth.
        stratified: The share of the variance that is left where an image's times are stratified: that of the noise.

    >>> Scatter().variance(torch.tensor([3.0], dtype=torch.float64))
    tensor([9.], dtype=torch.float64)
    """

    intercept: float = 0.0
    slope: float = 2.0
    strength: float = _LEAST
    stratified: float = 1.0

    def variance(self, scale: Tensor) -> Tensor:
        """The variance that is expected of differences whose mean size is ``scale``."""
        return math.exp(self.intercept) * scale.clamp(min=1e-12) ** self.slope

    def share(self, draws: Tensor) -> Tensor:
        """The variance of the mean of so many stratified draws, times their number, as a share of one draw's.

        From the fourth draw on the strata are taken as narrow, which errs on the safe side.
        """
        return 1 - (1 - self.stratified) * (draws - 1).clamp(max=3) / 3

    @classmethod
    def fit(cls, history: Tensor, places: Tensor) -> Scatter:
        """The line through the logarithms of a pilot's variances, and how far they lie from it.

        Args:
            history: The integrand, (images, draws, candidates); differences are those to each image's best candidate.
            places: Where in time each draw is, (images, draws), in any unit that rises with it.
        """
        best, draws = history.mean(1).argmin(1), history.shape[1]
        differences = history - history.gather(2, best[:, None, None].expand(-1, draws, 1))
        scale, variance = differences.abs().mean(1), differences.var(1)
        kept = variance > 0
        x, y = scale[kept].log(), variance[kept].log()
        if len(x) < 3 or draws < 3 or not float(x.var()) > 1e-6:
            return cls()
        slope = min(max(float(torch.cov(torch.stack([x, y]))[0, 1] / x.var()), 0.0), 2.0)
        intercept = float((y - slope * x).mean())
        # The logarithm of a variance of n draws scatters by 2/(n-1) of itself, and of nu by 2/nu.
        beyond = float((y - slope * x).var()) - 2 / (draws - 1)
        strength = min(max(2 / max(beyond, 1e-3), _LEAST), _MOST)
        # Neighbours in time differ by the noise alone (von Neumann, Ann. Math. Stat. 12, 1941).
        ordered = differences.gather(1, places.argsort(1)[:, :, None].expand_as(differences))
        noise = 0.5 * (ordered.diff(dim=1) ** 2).mean(1)[kept].sum() / variance[kept].sum()
        return cls(intercept, slope, strength, min(max(float(noise), 0.3), 1.0))


@dataclass(frozen=True)
class Comparison:
    """Candidates beside the best of their image: see `compare`. All (N, C), but ``best``, (N,)."""

    best: Tensor
    differences: Tensor
    errors: Tensor
    doubt: Tensor


def compare(history: Tensor, alive: Tensor, log_prior: Tensor, scatter: Scatter) -> Comparison:
    """The candidates that are left beside the best of them, on the draws that they share.

    Args:
        history: The integrand, (N, draws, C); NaN where there is no such draw.
        alive: The candidates that are left, (N, C): those of an image have the same draws.
        log_prior: ``log p(c)``, (C,).
        scatter: Of differences.

    Returns:
        The best candidate: that of the largest posterior; of the others ``B_c - B_best`` in nats, its standard error,
        and the probability that c would be better than the best, were there endless draws.
    """
    counts = (~history.isnan()).sum(1)
    best = (history.nansum(1) / counts - log_prior).masked_fill(~alive, math.inf).argmin(1)
    differences = history - history.gather(2, best[:, None, None].expand(-1, history.shape[1], 1))
    mean = differences.nansum(1) / counts
    squares = ((differences - mean[:, None]) ** 2).nansum(1)
    freedom = scatter.strength + counts - 1
    variance = (scatter.strength * scatter.variance(differences.abs().nansum(1) / counts) + squares) / freedom
    errors = (scatter.share(counts) * variance / counts).sqrt().scatter(1, best[:, None], 0.0)
    advantage = mean - log_prior + log_prior[best][:, None]
    stdtr = needed_module("scipy.special", "classification, by Student's t,").stdtr
    doubt = torch.from_numpy(stdtr(freedom.double().numpy(), -(advantage / errors).nan_to_num(0.0).numpy()))
    return Comparison(best, mean, errors, doubt)
