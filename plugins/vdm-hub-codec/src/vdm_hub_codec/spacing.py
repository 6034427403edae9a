r"""Where the latents of a VDM's chain lie in time: close together where a wide step costs most.

A step from gamma_t to gamma_s costs ``1/2 expm1(gamma_t - gamma_s) m(gamma_t)`` nats (VDM eq. 14), m the mean of
``|eps - eps_hat|^2``, and continuous time ``1/2 int m dgamma``. To second order the difference is
``1/4 (m + m') (gamma_t - gamma_s)^2``; so of all chains of T steps that one has the shortest files whose steps are as
dense as ``sqrt(m + m')``. It is measured on a few of the data, for `CELLS` equal cells of time, and kept in the file.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vdm_hub import NoiseSchedule, VDMObjective

CELLS = 16
_DATA = 32
_DENSEST = 255
_FEWEST = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Of the mean density: what a cell has at least."""


def measured_spacing(
    objective: VDMObjective, schedule: NoiseSchedule, levels: Tensor, transitions: int
) -> bytes | None:
    """How dense the steps are in each cell of time, 1 to 255; ``None`` where equal steps are as good.

    Args:
        objective: Of the model in continuous time.
        schedule: Its gamma.
        levels: Of the data, of which the first 32 are looked at.
        transitions: T.
    """
    batch = {"levels": levels[:_DATA]}
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(0))
    edges = torch.linspace(0, 1 - 1e-6, CELLS + 1, dtype=torch.float64)
    gamma, slope = (found.detach().double() for found in schedule.with_derivative(edges))
    with torch.no_grad():
        found = [objective(batch, edge.float().expand(len(batch["levels"])), noise) for edge in edges]
    error = torch.stack([bound.terms["diffusion"].double().mean() for bound in found]) / (0.5 * slope)
    cost = (error[1:] * gamma.diff() + error.diff()).clamp(min=0) * gamma.diff()
    density = cost.sqrt() / cost.sqrt().mean()

    def length(spacing: bytes | None) -> float:
        at = np.linspace(0, 1, transitions + 1) if spacing is None else np.array(times_of(spacing, transitions))
        gammas = schedule(torch.from_numpy(at)).detach().double().numpy()
        return float(np.dot(np.expm1(np.diff(gammas)), np.interp(gammas[1:], gamma.numpy(), error.numpy())))

    # Wide steps cost more than the second order says, so that no cell is left too empty.
    shares = [density.clamp(min=fewest) for fewest in _FEWEST]
    spacings = [bytes((one / one.max() * _DENSEST).round().clamp(1).int().tolist()) for one in shares]
    return min([None, *spacings], key=length)


def times_of(spacing: bytes, transitions: int) -> list[float]:
    """The T + 1 times, from 0 to 1.

    >>> times_of(bytes([1, 1]), 4), times_of(bytes([3, 1]), 4)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.16666666666666666, 0.3333333333333333, 0.5, 1.0])
    """
    steps = np.cumsum([0, *spacing]) / math.fsum(spacing) * transitions
    times = np.interp(np.arange(transitions + 1), steps, np.linspace(0, 1, len(spacing) + 1))
    return [0.0, *times[1:-1].tolist(), 1.0]
