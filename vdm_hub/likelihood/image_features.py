r"""The regressors of the control variate: what simple denoisers would leave of the noise.

A feature is a function ``A(x, gamma, eps)`` near in shape to ``|eps - eps_hat|^2``, split into its mean over
``eps ~ N(0, I)``, known exactly, and the rest, whose mean is zero:

- local: ``sum_i w_i(x, gamma) eps_i^2``, mean ``sum_i w_i``. In flat parts of an image noise is known, in busy parts
  it is not, so w is ``v / (v + e^gamma)`` with v the variance of x around entry i (Wiener), or marks entries at the
  darkest or the brightest level. The same of ``eps^2 - h(eps)``, where h is the squared error of who knows of x only
  that it lies on one of equally spaced levels, `grid_error`, whose mean is a quadrature in one dimension;
- linear: ``|eps - eps_lin|^2`` of the linear denoiser of Gaussian data whose covariance is diagonal in an orthonormal
  basis U, with eigenvalues l. With ``y = U^T (x - mean)``, ``e = U^T eps``, ``a = l / (l + e^gamma)`` and
  ``b = -e^{gamma/2} y / (l + e^gamma)`` it is ``sum (a e + b)^2``, mean ``sum a^2 + b^2``: of all data, in two
  parts, ``a^2 e^2`` and the rest; and where data are small, of those that are alike, by k-means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WIENER = ((3, 1.0), (3, 0.1), (5, 1.0))  # windows, and factors of e^gamma
_LARGEST_EIGENBASIS = 256
_LARGEST_COSINES = 1024
_MOST_CLUSTERS, _LEAST_MEMBERS, _MOST_ENTRIES = 10, 30, 50_000
_SHRINKAGE = 30  # so many data's worth of the common covariance in that of a cluster


@dataclass(frozen=True)
class Gaussian:
    """Data whose covariance is diagonal in an orthonormal basis.

    Attributes:
        mean: (*data), float32.
        variances: l, in the basis, (D,), float32.
        basis: U, (D, D), where data are small; none for the discrete cosine transform along each axis but channels,
            which nearly diagonalises the covariance of natural images (Ahmed et al., IEEE Trans. Comput. C-23, 1974).
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | None

    @classmethod
    def of_covariance(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """A Gaussian in the eigenbasis of a covariance, (D, D), float64."""
        variances, basis = torch.linalg.eigh(covariance)
        # Contiguous, as one that is loaded: sums of one order.
        return cls(mean.float(), variances.clamp(min=0).float(), basis.float().contiguous())

    def rotate(self, x: Tensor) -> Tensor:
        """The coordinates ``U^T x``, (B, *data) -> (B, D)."""
        return cosine_transform(x).flatten(1) if self.basis is None else x.flatten(1) @ self.basis.to(x)

    def to_json(self) -> dict[str, Any]:
        """The arrays as lists."""
        basis = None if self.basis is None else self.basis.tolist()
        return {"mean": self.mean.tolist(), "variances": self.variances.tolist(), "basis": basis}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Gaussian:
        """The inverse: from what `to_json` gives."""
        basis = None if state["basis"] is None else torch.tensor(state["basis"])
        return cls(torch.tensor(state["mean"]), torch.tensor(state["variances"]), basis)


@dataclass(frozen=True)
class ImageStatistics:
    """The statistics of a data set that the features need, found without the network.

    Attributes:
        all_data: The data as one Gaussian.
        clusters: As several; none where there are few data, or large ones.
        darkest: The smallest value in the data.
        brightest: The largest.
        spacing: Of the levels that data lie on.
    """

    all_data: Gaussian
    clusters: tuple[Gaussian, ...]
    darkest: float
    brightest: float
    spacing: float

    def to_json(self) -> dict[str, Any]:
        """The arrays as lists."""
        clusters = [cluster.to_json() for cluster in self.clusters]
        ends = {"darkest": self.darkest, "brightest": self.brightest, "spacing": self.spacing}
        return {"all_data": self.all_data.to_json(), "clusters": clusters} | ends

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> ImageStatistics:
        """The inverse: from what `to_json` gives."""
        clusters = tuple(Gaussian.from_json(cluster) for cluster in state["clusters"])
        ends = {name: state[name] for name in ("darkest", "brightest", "spacing")}
        return cls(Gaussian.from_json(state["all_data"]), clusters, **ends)


class StatisticsCollector:
    """A collector of `ImageStatistics` from data that come in batches, in float64.

    Args:
        spacing: Of the levels that they lie on.
    """

    def __init__(self, spacing: float) -> None:
        self._spacing, self._images = spacing, 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0
        self._small: list[Tensor] = []
        self._range = (math.inf, -math.inf)

    def add(self, x: Tensor) -> None:
        """Take in data, (B, *data)."""
        x = x.double().cpu()
        self._images += len(x)
        self._sum = self._sum + x.sum(0)
        if x[0].numel() <= _LARGEST_EIGENBASIS:
            self._small.append(x)
        else:
            self._squares = self._squares + cosine_transform(x).square().flatten(1).sum(0)
        self._range = min(self._range[0], float(x.min())), max(self._range[1], float(x.max()))

    def statistics(self) -> ImageStatistics:
        """The statistics of all data that were added."""
        mean = self._sum / self._images
        clusters: tuple[Gaussian, ...] = ()
        if self._small:
            x = torch.cat(self._small)
            all_data = Gaussian.of_covariance(mean, _covariance(x.flatten(1)))
            clusters = _clusters(x)
        else:
            variances = self._squares / self._images - cosine_transform(mean[None]).flatten() ** 2
            all_data = Gaussian(mean.float(), variances.clamp(min=0).float(), None)
        return ImageStatistics(all_data, clusters, *self._range, self._spacing)


class ImageFeatures:
    """The features of one batch of data, (B, *data).

    Args:
        x: The data; around an entry is a square of each channel of images, (B, C, H, W), and else a stretch of the
            last axis.
        statistics: Of all data.
    """

    def __init__(self, x: Tensor, statistics: ImageStatistics) -> None:
        self._x, self._statistics = x, statistics
        self._local = {window: _local_variance(x, window) for window in {window for window, _ in _WIENER}}
        self._linear = [_Linear(x, (statistics.all_data,))]
        if statistics.clusters:
            self._linear.append(_Linear(x, statistics.clusters))
        self._means: dict[float, Tensor] = {}

    def means(self, gamma: float) -> Tensor:
        """The means over eps at one gamma for all data, (B, features), float64; remembered."""
        if gamma not in self._means:
            level = torch.full((len(self._x),), gamma, dtype=self._x.dtype, device=self._x.device)
            known = 1 - float(expected_grid_error(torch.tensor([gamma]), self._statistics.spacing))
            squares = [share * _sum(weights) for share in (1.0, known) for weights in self._weights(level)]
            a, b = self._linear[0].at(level)
            rest = [_sum(a**2 + b**2) for a, b in (part.at(level) for part in self._linear[1:])]
            self._means[gamma] = torch.stack([*squares, _sum(a**2), _sum(b**2), *rest], dim=1)
        return self._means[gamma]

    def deviations(self, gamma: Tensor, eps: Tensor, expected: Tensor) -> Tensor:
        """The features less their means at each datum's gamma and eps: (B,), (B, *data) -> (B, features), float64.

        Args:
            gamma: Of each datum, (B,).
            eps: Its noise.
            expected: `expected_grid_error` at those gammas, (B,).
        """
        squares = eps**2 - 1
        known = squares - (grid_error(eps, gamma, self._statistics.spacing) - _beside(expected.to(eps), eps))
        sums = [_sum(weights * part) for part in (squares, known) for weights in self._weights(gamma)]
        for place, part in enumerate(self._linear):
            a, b = part.at(gamma)
            e = part.rotate(eps)
            pair = [_sum(a**2 * (e**2 - 1)), _sum(2 * a * b * e)]
            sums += pair if place == 0 else [pair[0] + pair[1]]
        return torch.stack(sums, dim=1)

    def _weights(self, gamma: Tensor) -> list[Tensor]:
        noise = _beside(gamma.exp().to(self._x), self._x)
        wiener = [self._local[window] / (self._local[window] + factor * noise) for window, factor in _WIENER]
        ends = [(self._x == end).to(self._x) for end in (self._statistics.darkest, self._statistics.brightest)]
        return [torch.ones_like(self._x), *wiener, *ends]


class _Linear:
    """The linear denoiser of the Gaussian whose mean each datum is nearest to."""

    def __init__(self, x: Tensor, gaussians: tuple[Gaussian, ...]) -> None:
        means = torch.stack([each.mean for each in gaussians]).to(x)
        self._nearest = torch.cdist(x.flatten(1).double(), means.flatten(1).double()).argmin(1)
        self._gaussians = gaussians
        self._rotated = self.rotate(x - means[self._nearest])
        self._variances = torch.stack([each.variances for each in gaussians]).to(x)[self._nearest]

    def rotate(self, x: Tensor) -> Tensor:
        """The coordinates ``U^T x`` of each datum in its own basis, (B, *data) -> (B, D)."""
        if len(self._gaussians) == 1:
            return self._gaussians[0].rotate(x)
        rotated = torch.empty_like(x.flatten(1))
        for place in self._nearest.unique().tolist():
            members = self._nearest == place
            rotated[members] = self._gaussians[place].rotate(x[members])
        return rotated

    def at(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The values ``a`` and ``b`` of each datum at its gamma, (B, D)."""
        noise = gamma.exp()[:, None].to(self._rotated)
        total = self._variances + noise
        return self._variances / total, -noise.sqrt() / total * self._rotated


def grid_error(eps: Tensor, gamma: Tensor, spacing: float) -> Tensor:
    """``(eps - E[eps|x + e^{gamma/2} eps])^2`` for x on any of equally spaced levels, all as likely; elementwise.

    With ``s = spacing e^{-gamma/2}`` the error is ``s`` times the mean j under weights ``exp(-(eps - j s)^2 / 2)``.

    Args:
        eps: (B, *data).
        gamma: (B,).
        spacing: Of the levels.

    >>> wide, narrow = torch.tensor([5.0]), torch.tensor([-20.0])  # noise that hides the levels, and that does not
    >>> [round(float(grid_error(torch.tensor([[1.5]]), gamma, spacing=0.1)), 6) for gamma in (wide, narrow)]
    [2.25, 0.0]
    """
    step = _beside(spacing * torch.exp(-0.5 * gamma), eps).to(eps)
    known = (step >= 1).flatten()  # below, it is eps^2 up to 1e-7
    e, step = eps[known], step[known]
    nearest = (e / step).round()
    distance = e - nearest * step
    total, first = torch.zeros_like(e), torch.zeros_like(e)
    for j in range(-6, 7):
        weight = torch.exp(j * step * (distance - 0.5 * j * step))
        total += weight
        first += weight * (nearest + j)
    squares = eps**2
    squares[known] = (step * first / total) ** 2
    return squares


def expected_grid_error(gamma: Tensor, spacing: float) -> Tensor:
    """The mean of `grid_error` over ``eps ~ N(0, 1)``, (B,) -> (B,), float64, by the trapezoidal rule.

    >>> [round(float(mean), 4) for mean in expected_grid_error(torch.tensor([5.0, -6.0, -20.0]), spacing=0.1)]
    [1.0, 0.9989, 0.0]
    """
    eps = torch.arange(-180, 181, dtype=torch.float64) * 0.05
    weights = torch.exp(-0.5 * eps**2)
    errors = grid_error(eps.expand(len(gamma), -1), gamma.double().cpu(), spacing)
    return errors @ (weights / weights.sum())


def cosine_transform(x: Tensor) -> Tensor:
    """The orthonormal discrete cosine transform (type II) along each axis of data, not over channels of images."""
    for axis in range(2 if x.ndim == 4 else 1, x.ndim):
        if x.shape[axis] <= _LARGEST_COSINES:
            x = (x.movedim(axis, -1) @ _cosines(x.shape[axis]).to(x).T).movedim(-1, axis)
    return x


def _beside(of_datum: Tensor, like: Tensor) -> Tensor:
    """The values of each datum, (B,), ready to multiply (B, *data)."""
    return of_datum.reshape(-1, *(1,) * (like.ndim - 1))


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, dtype=torch.float64).cpu()


def _local_variance(x: Tensor, window: int) -> Tensor:
    """The variance around each entry, zero where a window would not fit."""
    pad, axes = window // 2, 2 if x.ndim == 4 else 1
    lines = x.flatten(0, 1) if x.ndim == 4 else x.flatten(0, -2)
    if min(lines.shape[1:]) <= pad:
        return torch.zeros_like(x)
    pool = F.avg_pool2d if axes == 2 else F.avg_pool1d
    around = F.pad(lines[:, None], (pad,) * (2 * axes), mode="reflect")
    mean = pool(around, window, 1)
    return (pool(around**2, window, 1) - mean**2).clamp(min=0).view_as(x)


def _cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (type II) as a matrix, float64."""
    # Not scipy's: the code that a repository carries needs nothing that diffusers does not bring.
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * k * (n + 0.5) / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def _clusters(x: Tensor) -> tuple[Gaussian, ...]:
    """The data in clusters by k-means (Lloyd's), covariances shrunk to the common one; none for fewer than two."""
    rows = x.flatten(1)
    count = min(_MOST_CLUSTERS, len(rows) // _LEAST_MEMBERS, _MOST_ENTRIES // rows.shape[1] ** 2)
    if count < 2:
        return ()
    centres = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(20):
        nearest = torch.cdist(rows, centres).argmin(1)
        members = [rows[nearest == place] for place in range(count)]
        centres = torch.stack([own.mean(0) if len(own) else old for own, old in zip(members, centres, strict=True)])
    common = torch.stack([_covariance(own) * len(own) for own in members if len(own)]).sum(0) / len(rows)
    return tuple(
        Gaussian.of_covariance(
            own.mean(0).view(x.shape[1:]),
            (_covariance(own) * len(own) + _SHRINKAGE * common) / (len(own) + _SHRINKAGE),
        )
        for own in members
        if len(own)
    )
