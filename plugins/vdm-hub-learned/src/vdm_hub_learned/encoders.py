r"""The mean m(x, u) of a learned forward process, and its derivative in u, in closed form.

    m(x, u) = x + sum_k b_k(u) f_k(x),   b_k(0) = 0,   d_u m = sum_k b_k'(u) f_k(x),

u in [0, 1] the share of the log-SNR that is gone. The features f_k are functions of the data alone and the b_k of u
alone, so one evaluation of the features gives m at every time, and its derivative there without any differentiation:
forward mode's levels belong to a whole process of the operating system, and fail in threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_hub import ConfigurationError

_REACH = 1.5
_MOST = {"data_channels": 4096, "width": 4096, "depth": 64, "degree": 16}


class Encoder(nn.Module, ABC):
    """``m(x, u) = x + sum_k b_k(u) f_k(x)`` with ``b_k(0) = 0``, so that m(x, 0) is x."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """``f_k(x)``, (B, K, *data), of data (B, *data), in their type."""

    @abstractmethod
    def basis(self, u: Tensor) -> Tensor:
        """``b_k(u)``, (..., K), zero at u = 0, of u of shape (...)."""

    @abstractmethod
    def basis_slope(self, u: Tensor) -> Tensor:
        """``b_k'(u)``, (..., K)."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse data of a shape, without the batch, that it does not take.

        Raises:
            ConfigurationError: Naming both shapes.
        """

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """``m(x, u)``, (B, *data), of u of shape (B,) or ()."""
        return x + combine(self.basis(u), self.features(x))


def combine(weights: Tensor, features: Tensor) -> Tensor:
    """``sum_k w_k f_k``, (B, *data), of weights (B, K) or (K,) and features (B, K, *data), in the features' type.

    >>> combine(torch.tensor([1.0, 10.0]), torch.tensor([[[1.0], [2.0]]])).tolist()
    [[21.0]]
    """
    weights = weights.to(features.dtype).reshape(-1, features.shape[1], *(1,) * (features.ndim - 2))
    return (weights * features).sum(1)


class ConvolutionalEncoder(Encoder):
    """``b_k(u) = u^k``, k = 1..degree, and features by convolutions, residual, which start at zero: m(x, u) = x.

    The features see ``1.5 tanh(x / 1.5)``: data lie in [-1, 1], and a network's first estimates of them far outside.

    Args:
        data_channels: Of the data.
        width: Of the hidden layers.
        depth: Hidden convolutions, 3 x 3 each.
        degree: The number of features, and the largest power of u.

    Raises:
        ConfigurationError: A size is no whole number in its range.

    >>> encoder = ConvolutionalEncoder(width=4)
    >>> x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    >>> torch.equal(encoder(x, torch.tensor(0.7)), x), encoder.basis(torch.tensor(0.5)).tolist()
    (True, [0.5, 0.25, 0.125])
    """

    def __init__(self, data_channels: int = 1, width: int = 16, depth: int = 2, degree: int = 3) -> None:
        super().__init__()
        sizes = {"data_channels": data_channels, "width": width, "depth": depth, "degree": degree}
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= _MOST[name]:
                raise ConfigurationError(f"{name} is {size!r:.100}: give a whole number from 1 to {_MOST[name]:,}.")
        self.data_channels, self.degree = data_channels, degree
        self.sizes = sizes
        self.into = nn.Conv2d(data_channels, width, 3, padding=1)
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.out = nn.Conv2d(width, degree * data_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        seen = _REACH * torch.tanh(x.to(self.out.weight.dtype) / _REACH)
        hidden = self.into(seen)
        for layer in self.hidden:
            hidden = hidden + layer(F.silu(hidden))
        features: Tensor = self.out(F.silu(hidden)).unflatten(1, (self.degree, self.data_channels))
        return features.to(x.dtype)

    def basis(self, u: Tensor) -> Tensor:
        return u.unsqueeze(-1) ** self._powers(u)

    def basis_slope(self, u: Tensor) -> Tensor:
        powers = self._powers(u)
        return powers * u.unsqueeze(-1) ** (powers - 1)

    def _powers(self, u: Tensor) -> Tensor:
        return torch.arange(1, self.degree + 1, dtype=u.dtype, device=u.device)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[0] != self.data_channels:
            raise ConfigurationError(
                f"the learned process was made for images of {self.data_channels} channels, and the data are "
                f"{list(shape)}: give data_channels in its config as (C, H, W) has it."
            )
