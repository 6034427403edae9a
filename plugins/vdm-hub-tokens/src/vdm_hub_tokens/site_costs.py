r"""A control variate for masked counts: what a site costs, guessed from its value and its neighbours'.

With k of a text's n sites masked, each set alike, and any function c of a text and a site,
``E (1/k) sum over masked of c_l = (1/n) sum over all of c_l``, whatever k: so a guess of the costs can be subtracted
where it was drawn and added back as it is. The guess is a sum of tables, by the value of the site, by it and its left,
by it and its right neighbour, and by all three, hashed to a fixed size; a pilot fills them with the means of what the
model was seen to pay, and fits how much of each is subtracted at which k. No draw of the pilot is in a result, so what
it found is a constant there, and the estimate unbiased however bad the guess is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 8
"""Of u, the root of the share of a text that is masked."""

_BUCKETS = 4096
_PRIMES = (7_919, 104_729, 1_299_709)  # of the left neighbour, the site, the right one
_SHRINKAGE = 4.0  # sites seen elsewhere that a mean of few is averaged with
_RIDGE = 1.0  # the share of a feature's own variance: tables overlap, and a bin has few draws
_DEFENSIVE = 0.1


@dataclass(frozen=True)
class SiteCosts:
    """The guess, and where counts are best drawn.

    Attributes:
        tables: Costs by hashed context, in nats, (4, buckets).
        intercept: Of each bin of u, in nats a site, (bins,).
        slopes: Of each bin and table, (bins, 4).
        probabilities: Of drawing u in each bin, (bins,); they sum to one.
    """

    tables: Tensor
    intercept: Tensor
    slopes: Tensor
    probabilities: Tensor

    @classmethod
    def nothing(cls) -> SiteCosts:
        """No guess, and u drawn uniformly."""
        tables = torch.zeros(len(contexts(torch.zeros(1, 1, dtype=torch.long))), _BUCKETS, dtype=torch.float64)
        zeros = torch.zeros(BINS, dtype=torch.float64)
        return cls(tables, zeros, torch.zeros(BINS, len(tables), dtype=torch.float64), zeros + 1 / BINS)

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """``(u, 1/density)`` by the inverse of the distribution function: stratified ones stay stratified.

        >>> u, weight = SiteCosts.nothing().draw(torch.tensor([0.3, 0.9], dtype=torch.float64))
        >>> [round(value, 6) for value in u.tolist()], weight.tolist()
        ([0.3, 0.9], [1.0, 1.0])
        """
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), self.probabilities.cumsum(0)])
        edges = edges / edges[-1]
        bins = (torch.searchsorted(edges, uniforms.contiguous(), right=True) - 1).clamp(0, BINS - 1)
        width = edges.diff()[bins]
        return (bins + ((uniforms - edges[bins]) / width).clamp(0, 1)) / BINS, 1 / (BINS * width)

    def guess(self, u: Tensor, x: Tensor, masked: Tensor) -> Tensor:
        """The guess of the masked sites' mean cost, (B,), nats, float64."""
        bins = _bins(u)
        return self.intercept[bins] + (self.slopes[bins] * _means(self.tables, x, masked)).sum(1)

    def expected(self, x: Tensor, scored: Tensor) -> Tensor:
        """The guess's expectation over u with density 2u, and over the sites that are masked, (B,)."""
        widths = (torch.arange(BINS + 1, dtype=torch.float64) / BINS).square().diff()
        return widths @ self.intercept + (_means(self.tables, x, scored) * (widths @ self.slopes)).sum(1)

    @classmethod
    def fit(cls, u: Tensor, x: Tensor, masked: Tensor, costs: Tensor, counts: Tensor) -> SiteCosts:
        """The guess from a pilot, a row a draw.

        How much is subtracted is fitted on draws that the tables were not filled with, in two halves, so that what a
        table knows of its own draws alone is not taken for knowledge.

        Args:
            u: Of each draw, (P,).
            x: Its text, (P, L).
            masked: Which sites were, (P, L).
            costs: What they cost, (P, L).
            counts: How many of the text may be, (P,).
        """
        half = torch.arange(len(u)) % 2 == 0
        features = torch.empty(len(u), len(cls.nothing().tables), dtype=torch.float64)
        for part in (half, ~half):
            others = _fill(x[~part], masked[~part], costs[~part])
            features[part] = _means(others, x[part], masked[part])
        seen, bins = costs.sum(1) / masked.sum(1).clamp(min=1), _bins(u)
        intercept, slopes, sizes = [], [], []
        for one in range(BINS):
            rows = (bins == one) & (counts > 0)
            a, b = _regress(features[rows], seen[rows], counts[rows].double() ** 2)
            rest = counts[rows] * 2 * u[rows] * (seen[rows] - a - features[rows] @ b)
            intercept.append(a)
            slopes.append(b)
            sizes.append(float(rest.square().mean().sqrt()) if int(rows.sum()) > 2 else float("nan"))
        tables = _fill(x, masked, costs)
        return cls(tables, torch.stack(intercept), torch.stack(slopes), _probabilities(torch.tensor(sizes).double()))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {name: getattr(self, name).tolist() for name in ("tables", "intercept", "slopes", "probabilities")}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> SiteCosts:
        """The inverse of `to_json`."""
        return cls(**{name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()})


def contexts(x: Tensor) -> list[Tensor]:
    """The bucket of each site by each table, (B, L): of its value, with its left, its right, and both neighbours."""
    left, right = torch.full_like(x, -1), torch.full_like(x, -1)
    left[:, 1:], right[:, :-1] = x[:, :-1], x[:, 1:]
    a, b, c = ((values + 2) * prime for values, prime in zip((left, x, right), _PRIMES, strict=True))
    return [mixed % _BUCKETS for mixed in (b, a + 3 * b, 5 * b + c, a + 7 * b + 11 * c)]


def _bins(u: Tensor) -> Tensor:
    return (u * BINS).long().clamp(0, BINS - 1)


def _means(tables: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """The mean of each table over the sites that are chosen, (B, tables); zero of none."""
    count = chosen.sum(1).clamp(min=1)
    return torch.stack(
        [torch.where(chosen, table[at], 0.0).sum(1) / count for table, at in zip(tables, contexts(x), strict=True)], 1
    )


def _fill(x: Tensor, masked: Tensor, costs: Tensor) -> Tensor:
    """The tables, each the shrunken mean of what those before it leave."""
    left = torch.where(masked, costs - costs[masked].mean(), 0.0) if bool(masked.any()) else costs
    tables = []
    for at in contexts(x):
        sums = torch.zeros(_BUCKETS, dtype=torch.float64).index_add_(0, at[masked], left[masked])
        tables.append(sums / (torch.bincount(at[masked], minlength=_BUCKETS) + _SHRINKAGE))
        left = torch.where(masked, left - tables[-1][at], 0.0)
    return torch.stack(tables)


def _regress(features: Tensor, seen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of ``seen ~ a + features b``: least squares, a ridge towards b = 1, which the tables are made for."""
    if not len(seen):
        return torch.zeros((), dtype=torch.float64), torch.zeros(features.shape[1], dtype=torch.float64)
    weights = weights / weights.sum()
    centre, level = weights @ features, weights @ seen
    x, y = features - centre, seen - level
    moments = (x * weights[:, None]).T @ x
    ridge = _RIDGE * moments.diagonal() + 1e-12
    off = torch.linalg.solve(moments + torch.diag(ridge), (x * weights[:, None]).T @ (y - x.sum(1)))
    slopes = 1 + off
    return level - centre @ slopes, slopes


def _probabilities(sizes: Tensor) -> Tensor:
    """Drawn as often as the rest is large, smoothed over neighbours; bins without draws as the mean."""
    mean = sizes.nanmean()
    if not float(mean) > 0:
        return torch.full_like(sizes, 1 / len(sizes))
    known = torch.where(sizes.isnan(), mean, sizes)
    padded = torch.cat([known[:1], known, known[-1:]])
    smooth = 0.25 * padded[:-2] + 0.5 * known + 0.25 * padded[2:]
    return (1 - _DEFENSIVE) * smooth / smooth.sum() + _DEFENSIVE / len(sizes)
