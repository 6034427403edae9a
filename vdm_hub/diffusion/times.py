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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``t_i = (u + i/N) mod 1`` for i = start..start+batch_size-1, N = total (VDM App. I.1), in [0, 1).

    One offset u is shared by all processes and accumulation steps; each asks for its own part of the N times, so the
    global batch is stratified as one.

    >>> stratified_times(4, 0.125)
    tensor([0.1250, 0.3750, 0.6250, 0.8750])
    >>> stratified_times(2, 0.125, start=2, total=4)
    tensor([0.6250, 0.8750])
    """
    total = batch_size if total is None else total
    index = torch.arange(start, start + batch_size, dtype=torch.float64, device=device)
    times = ((offset + index / total) % 1).to(dtype)
    return torch.where(times == 1, 0.0, times)  # float32 rounds 1 - 2^-26 up


def times_of_data(data: int, per_datum: int, offsets: Tensor, orders: Tensor) -> Tensor:
    """Uniforms that are stratified over each datum's own and over all data, (data, per_datum), float64.

    ``u_nj = (j + (o_j + pi_j(n)/N) mod 1) / k``: one draw of each datum in each of its k strata, and the N draws of a
    stratum evenly spaced. Each ``u_nj`` alone is uniform on its stratum, so every datum's mean is unbiased.

    Args:
        data: N.
        per_datum: k.
        offsets: o, in [0, 1), (k,).
        orders: pi, a permutation of N for each j, (k, N).

    >>> orders = torch.tensor([[0, 1], [1, 0]])
    >>> times_of_data(2, 2, torch.tensor([0.25, 0.25]), orders).tolist()
    [[0.125, 0.875], [0.375, 0.625]]
    """
    columns = [
        stratified_times(data, offset, dtype=torch.float64)[order]
        for offset, order in zip(offsets.double(), orders, strict=True)
    ]
    return (torch.stack(columns, dim=1) + torch.arange(per_datum, dtype=torch.float64)) / per_datum


def discretise(times: Tensor, transitions: int) -> tuple[Tensor, Tensor]:
    """``(s, t)`` of the transition that a continuous time falls into: t = (floor(t T) + 1)/T, s = t - 1/T.

    >>> discretise(torch.tensor([0.0, 0.99]), 4)
    (tensor([0.0000, 0.7500]), tensor([0.2500, 1.0000]))
    """
    index = (times.double() * transitions).floor().clamp(0, transitions - 1)
    return (index / transitions).to(times.dtype), ((index + 1) / transitions).to(times.dtype)
