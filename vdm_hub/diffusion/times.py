"""Times at which the bound is estimated, stratified over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_times(
    batch_size: int,
    offset: float | Tensor,
    start: int = 0,
    total: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """``t_i = (u + i/N) mod 1`` for i = start..start+batch_size-1, N = total (VDM App. I.1), float32, in [0, 1).

    One offset u is shared by all processes and accumulation steps; each asks for its own part of the N times, so the
    global batch is stratified as one.

    >>> stratified_times(4, 0.125)
    tensor([0.1250, 0.3750, 0.6250, 0.8750])
    >>> stratified_times(2, 0.125, start=2, total=4)
    tensor([0.6250, 0.8750])
    """
    total = batch_size if total is None else total
    index = torch.arange(start, start + batch_size, dtype=torch.float64, device=device)
    times = ((offset + index / total) % 1).float()
    return torch.where(times == 1, 0.0, times)  # float32 rounds 1 - 2^-26 up


def discretise(times: Tensor, transitions: int) -> tuple[Tensor, Tensor]:
    """``(s, t)`` of the transition that a continuous time falls into: t = (floor(t T) + 1)/T, s = t - 1/T.

    >>> discretise(torch.tensor([0.0, 0.99]), 4)
    (tensor([0.0000, 0.7500]), tensor([0.2500, 1.0000]))
    """
    index = (times.double() * transitions).floor().clamp(0, transitions - 1)
    return (index / transitions).to(times.dtype), ((index + 1) / transitions).to(times.dtype)
