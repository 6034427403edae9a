"""K grey levels and the real numbers that stand for them."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vdm_hub.errors import unknown_name

ScalingName: TypeAlias = Literal["bin_centers", "full", "unit"]
SCALINGS: tuple[str, ...] = get_args(ScalingName)


class DataScaling:
    """An affine map from levels 0..K-1 to the reals.

    ``bin_centers``: ``2 (i + 1/2)/K - 1``, the centres of K bins that fill [-1, 1] (VDM's reference code).
    ``full``: ``2 i/(K-1) - 1``, diffusers' and DDPM's, with the first and last level at -1 and 1.
    ``unit``: ``i/(K-1)``, the VE SDE's (Song et al., arXiv 2011.13456), with them at 0 and 1.

    >>> DataScaling("bin_centers", 256).encode(torch.tensor([0, 255]))
    tensor([-0.9961,  0.9961])
    """

    def __init__(self, name: str, num_levels: int) -> None:
        if name not in SCALINGS:
            raise unknown_name("data scaling", name, SCALINGS)
        self.name, self.num_levels = name, num_levels
        self.spacing = 2 / num_levels if name == "bin_centers" else 2 / (num_levels - 1)
        self.first = -1 + self.spacing / 2 if name == "bin_centers" else -1.0
        if name == "unit":
            self.spacing, self.first = 1 / (num_levels - 1), 0.0

    def encode(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of levels (any integer type), of ``dtype``."""
        return levels.to(dtype) * self.spacing + self.first

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest level of each value, int64."""
        return ((x - self.first) / self.spacing).round().clamp(0, self.num_levels - 1).long()
