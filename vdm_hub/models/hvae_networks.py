"""The default networks of a hierarchical VAE: residual convolutions between any two shapes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError

Shape = tuple[int, ...]
"""The shape of a latent or of the data: (C, H, W), or (D,) for a vector."""

_SMALLEST_SCALE = 1e-3  # of a Gaussian: a smaller one makes the first steps of training diverge
_ONE = math.log(math.expm1(1.0))  # softplus of it is 1


class Trunk(nn.Module):
    """Features on the grid of the finer of two shapes; then those of the other, or the vector, as asked for.

    A vector is spread over the other's grid by a linear map, and gathered from it by one.

    Args:
        source: Shape of the input.
        target: Shape of the output.
        channels: Channels of the output, or its dimensions where the target is a vector.
        width: Channels of the features.
        layers: Residual blocks: half on the grid of the source, half on that of the target.
        groups: Groups of each normalisation.
        dropout: Probability of dropout in each block.
    """

    def __init__(
        self, source: Shape, target: Shape, channels: int, width: int, layers: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        if width % groups:
            raise ConfigurationError(
                f"block_out_channels has {width}, which norm_num_groups = {groups} does not divide: change either."
            )
        self.source, self.target, self.width = source, target, width
        self.start_grid = source[1:] if len(source) == 3 else target[1:]
        self.end_grid = target[1:] if len(target) == 3 else source[1:]
        is_flat = len(source) == len(target) == 1
        if is_flat:
            self.start_grid = self.end_grid = (1, 1)
        if (1, 1) in (self.start_grid, self.end_grid):
            groups = 1  # of one pixel, a group of one channel would be normalised to nothing
        spread = width * math.prod(self.start_grid)
        self.lift: nn.Module = (
            nn.Conv2d(source[0], width, 3, padding=1) if len(source) == 3 else nn.Linear(source[0], spread)
        )
        self.before, self.after = (
            nn.ModuleList(_block(width, groups, dropout) for _ in range(count))
            for count in (layers - layers // 2, layers // 2)
        )
        self.norm = nn.GroupNorm(groups, width)
        gathered = width * math.prod(self.end_grid)
        self.head: nn.Module = (
            nn.Conv2d(width, channels, 3, padding=1) if len(target) == 3 else nn.Linear(gathered, channels)
        )

    def forward(self, z: Tensor) -> Tensor:
        """The features (B, channels, *grid) or (B, channels) of an input (B, *source)."""
        if tuple(z.shape[1:]) != self.source:
            raise ConfigurationError(
                f"a network for the shape {self.source} was given {tuple(z.shape[1:])}: the shapes do not chain."
            )
        h = self.lift(z.to(self.norm.weight.dtype))
        h = h.reshape(z.shape[0], self.width, *self.start_grid)
        for block in self.before:
            h = block(h, None)
        if self.end_grid != self.start_grid:
            h = _resize(h, self.end_grid)
        for block in self.after:
            h = block(h, None)
        h = F.silu(self.norm(h))
        output: Tensor = self.head(h if len(self.target) == 3 else h.flatten(1))
        return output


class GaussianNetwork(nn.Module):
    """A network for a diagonal Gaussian, (B, *source) -> mean and scale, (B, *target); before training near N(0, 1).

    >>> network = GaussianNetwork((1, 8, 8), (10,), width=8, layers=2, groups=4, dropout=0.0)
    >>> mean, scale = network(torch.zeros(2, 1, 8, 8))
    >>> mean.shape, bool((scale > 0).all())
    (torch.Size([2, 10]), True)
    """

    def __init__(self, source: Shape, target: Shape, *, width: int, layers: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.trunk = Trunk(source, target, 2 * target[0], width, layers, groups, dropout)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussian at z."""
        mean, raw = self.trunk(z).chunk(2, dim=1)
        return mean, F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)) + _ONE) + _SMALLEST_SCALE


class LevelNetwork(nn.Module):
    """A network for the logits of K levels of each pixel, (B, *source) -> (B, C, H, W, K)."""

    def __init__(
        self, source: Shape, image: Shape, num_levels: int, *, width: int, layers: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.image, self.num_levels = image, num_levels
        self.trunk = Trunk(source, image, image[0] * num_levels, width, layers, groups, dropout)

    def forward(self, z: Tensor) -> Tensor:
        """The logits at z."""
        logits = self.trunk(z).unflatten(1, (self.image[0], self.num_levels))
        return logits.movedim(2, -1)


def _block(width: int, groups: int, dropout: float) -> nn.Module:
    block: nn.Module = ResnetBlock2D(in_channels=width, temb_channels=None, groups=groups, dropout=dropout)
    return block


def _resize(h: Tensor, grid: Shape) -> Tensor:
    """The features on another grid: averages where it is coarser, repeated values where it is finer."""
    shrinks = grid[0] < h.shape[2] or grid[1] < h.shape[3]
    return F.adaptive_avg_pool2d(h, (grid[0], grid[1])) if shrinks else F.interpolate(h, grid, mode="nearest")
