r"""What simple denoisers would leave of the noise: the regressors of the control variate.

A feature is a function ``A(x, gamma, eps)`` near in shape to ``|eps - eps_hat|^2``, split into its mean over
``eps ~ N(0, I)``, known in closed form, and the rest, whose mean is zero:

- local: ``sum_i w_i(x, gamma) eps_i^2``, mean ``sum_i w_i``. In flat parts of an image the noise is known, in busy
  parts it is not, so w is ``v / (v + e^gamma)`` with v the variance of x around pixel i (Wiener), or marks pixels at
  the darkest or the brightest level;
- global: ``|eps - eps_lin|^2`` of the linear denoiser of Gaussian data whose covariance is diagonal in an orthonormal
  basis U, with eigenvalues l. With ``y = U^T (x - mean)``, ``e = U^T eps``, ``a = l / (l + e^gamma)`` and
  ``b = -e^{gamma/2} y / (l + e^gamma)`` it is ``sum (a e + b)^2``, mean ``sum a^2 + b^2``.
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
MEANS = len(_WIENER) + 4
_LARGEST_EIGENBASIS = 256


@dataclass(frozen=True)
class ImageStatistics:
    """What the features know of the data set, found without the network.

    Attributes:
        mean: (C, H, W), float32.
        variances: l, in the basis, (C, H, W) flattened, float32.
        basis: U, (D, D), where images are small; none for the discrete cosine transform of each channel, which
            nearly diagonalises the covariance of natural images (Ahmed et al., IEEE Trans. Comput. C-23, 1974).
        darkest: The smallest value in the data.
        brightest: The largest.
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | None
    darkest: float
    brightest: float

    def rotate(self, x: Tensor) -> Tensor:
        """``U^T x``, (B, C, H, W) -> (B, D)."""
        if self.basis is not None:
            return x.flatten(1) @ self.basis.to(x)
        rows, columns = _cosines(x.shape[-2]).to(x), _cosines(x.shape[-1]).to(x)
        return (rows @ x @ columns.T).flatten(1)

    def to_json(self) -> dict[str, Any]:
        """As lists."""
        basis = None if self.basis is None else self.basis.tolist()
        ends = {"darkest": self.darkest, "brightest": self.brightest}
        return {"mean": self.mean.tolist(), "variances": self.variances.tolist(), "basis": basis} | ends

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> ImageStatistics:
        """The inverse of `to_json`."""
        basis = None if state["basis"] is None else torch.tensor(state["basis"])
        mean, variances = torch.tensor(state["mean"]), torch.tensor(state["variances"])
        return cls(mean, variances, basis, state["darkest"], state["brightest"])


class StatisticsCollector:
    """`ImageStatistics` of images that come in batches, in float64."""

    def __init__(self) -> None:
        self._images: int = 0
        self._sum: Any = 0.0
        self._second: Any = 0.0
        self._range = (math.inf, -math.inf)

    def add(self, x: Tensor) -> None:
        """Take in images, (B, C, H, W)."""
        x = x.double().cpu()
        self._images += len(x)
        self._sum = self._sum + x.sum(0)
        if x[0].numel() <= _LARGEST_EIGENBASIS:
            self._second = self._second + x.flatten(1).T @ x.flatten(1)
        else:
            rows, columns = _cosines(x.shape[-2]), _cosines(x.shape[-1])
            self._second = self._second + (rows @ x @ columns.T).square().flatten(1).sum(0)
        self._range = min(self._range[0], float(x.min())), max(self._range[1], float(x.max()))

    def statistics(self) -> ImageStatistics:
        """Of all that came in."""
        mean = self._sum / self._images
        if self._second.ndim == 2:
            covariance = self._second / self._images - torch.outer(mean.flatten(), mean.flatten())
            variances, basis = torch.linalg.eigh(covariance)
        else:
            rotated = (_cosines(mean.shape[-2]) @ mean @ _cosines(mean.shape[-1]).T).flatten()
            variances, basis = self._second / self._images - rotated**2, None
        basis = None if basis is None else basis.float().contiguous()  # as one that is loaded: sums of one order
        return ImageStatistics(mean.float(), variances.clamp(min=0).float(), basis, *self._range)


class ImageFeatures:
    """The features of one batch of images, (B, C, H, W)."""

    def __init__(self, x: Tensor, statistics: ImageStatistics) -> None:
        self._x, self._statistics = x, statistics
        self._local = {window: _local_variance(x, window) for window in {window for window, _ in _WIENER}}
        self._rotated = statistics.rotate(x - statistics.mean.to(x))
        self._means: dict[float, Tensor] = {}

    def means(self, gamma: float) -> Tensor:
        """Means over eps at one gamma for all images, (B, `MEANS`), float64; remembered."""
        if gamma not in self._means:
            self._means[gamma] = self._means_at(gamma)
        return self._means[gamma]

    def _means_at(self, gamma: float) -> Tensor:
        level = torch.full((len(self._x),), gamma, dtype=self._x.dtype, device=self._x.device)
        a, b = self._linear(level)
        sums = [*(_sum(weights) for weights in self._weights(level)), _sum(a**2 + b**2)]
        return torch.stack(sums, dim=1)

    def deviations(self, gamma: Tensor, eps: Tensor) -> Tensor:
        """Features less their means at each image's own gamma and eps: (B,), (B, C, H, W) -> (B, `MEANS`)."""
        a, b = self._linear(gamma)
        e = self._statistics.rotate(eps)
        squares = eps**2 - 1
        sums = [*(_sum(weights * squares) for weights in self._weights(gamma))]
        return torch.stack([*sums, _sum(a**2 * (e**2 - 1) + 2 * a * b * e)], dim=1)

    def _weights(self, gamma: Tensor) -> list[Tensor]:
        noise = gamma.exp()[:, None, None, None].to(self._x)
        wiener = [self._local[window] / (self._local[window] + factor * noise) for window, factor in _WIENER]
        ends = [(self._x == end).to(self._x) for end in (self._statistics.darkest, self._statistics.brightest)]
        return [torch.ones_like(self._x), *wiener, *ends]

    def _linear(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        noise, variances = gamma.exp()[:, None].to(self._x), self._statistics.variances.to(self._x)
        return variances / (variances + noise), -noise.sqrt() / (variances + noise) * self._rotated


def _sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, dtype=torch.float64).cpu()


def _local_variance(x: Tensor, window: int) -> Tensor:
    """The variance around each pixel, zero where a window would not fit into the image."""
    pad = window // 2
    if min(x.shape[-2:]) <= pad:
        return torch.zeros_like(x)
    around = F.pad(x, (pad,) * 4, mode="reflect")
    mean = F.avg_pool2d(around, window, 1)
    return (F.avg_pool2d(around**2, window, 1) - mean**2).clamp(min=0)


def _cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (type II) as a matrix, float64."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * k * (n + 0.5) / size)
    matrix[0] /= math.sqrt(2)
    return matrix
