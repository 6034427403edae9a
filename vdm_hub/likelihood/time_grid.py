r"""The cells of time, by which proposals and control variates know the integral over t.

The diffusion term is ``int_0^1 f(t) dt`` (VDM eq. 17) or, with T transitions, the mean of T steps (VDM eq. 13), the
integral of a step function. Proposals and control variates here are constant within a cell, so their integrals are
sums, and exact, for every schedule. For a scalar Gaussian process in continuous time the cells are equal in log-SNR:
then an estimator's variance does not depend on the schedule's shape, as its mean does not (VDM section 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.noise_schedules import NoiseSchedule

MOST_CELLS = 512


@dataclass(frozen=True)
class TimeGrid:
    """A grid of cells of time, all float64, on the CPU.

    Attributes:
        edges: Where cells begin and end in t, (n + 1,), rising from 0 to 1.
        scale: The factor of ``|eps - eps_hat|^2`` in the integrand, the mean over each cell, (n,): ``gamma'/2``, or
            ``T/2 expm1(gamma_t - gamma_s)``; one for a process without gamma.
        gammas: gamma of the latents of each cell, (n,); none for a process without a scalar gamma.
        transitions: T; none for continuous time.

    >>> from vdm_hub.diffusion.gaussian_process import GaussianProcess
    >>> grid = TimeGrid.of(GaussianProcess.from_fields({"noise_schedule": "linear"}), transitions=4)
    >>> grid.edges.tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    edges: Tensor
    scale: Tensor
    gammas: Tensor | None
    transitions: int | None

    @classmethod
    def of(cls, process: ForwardProcess, transitions: int | None, cells: int = MOST_CELLS) -> TimeGrid:
        """The cells that suit a process: one a transition, or whole numbers of them where there are many."""
        schedule = process.diffused.scalar_gamma
        if transitions is None:
            return _continuous(schedule, cells)
        steps = torch.arange(transitions + 1, dtype=torch.float64)
        bounds = (torch.arange(min(cells, transitions) + 1) * transitions).div(
            min(cells, transitions), rounding_mode="floor"
        )
        edges = steps[bounds] / transitions
        if schedule is None:
            return cls(edges, torch.ones(len(edges) - 1, dtype=torch.float64), None, transitions)
        gammas = _gammas(schedule, steps / transitions)
        weight = 0.5 * transitions * torch.expm1(gammas.diff())
        sums = torch.cat([weight.new_zeros(1), weight.cumsum(0)])[bounds]
        return cls(edges, sums.diff() / bounds.diff(), gammas[bounds[1:]], transitions)

    def __len__(self) -> int:
        return len(self.scale)

    @property
    def widths(self) -> Tensor:
        """The cells' lengths in t, (n,); they sum to one."""
        return self.edges.diff()

    @property
    def mass(self) -> Tensor:
        """The share of each cell in the integral where ``|eps - eps_hat|^2`` is one, (n,)."""
        return self.widths * self.scale

    @property
    def spans(self) -> Tensor:
        """The rise of gamma within each cell, up to a factor, (n,)."""
        if self.transitions is None:
            return self.mass
        return self.widths * torch.log1p(2 * self.scale / self.transitions)  # of several transitions, alike enough

    @property
    def positions(self) -> Tensor:
        """The places of cells in [0, 1] for smooth functions: affine in gamma, or in t without one; (n,)."""
        if self.gammas is None or len(self) == 1:
            return 0.5 * (self.edges[1:] + self.edges[:-1])
        return (self.gammas - self.gammas[0]) / (self.gammas[-1] - self.gammas[0])

    def time_in(self, cell: Tensor, fraction: Tensor) -> Tensor:
        """The time that lies so far into a cell, float64; with T transitions, the middle of the step it falls into.

        The middle, so that rounding to float32 can't move a time into another step.
        """
        t = self.edges[cell] + fraction * self.widths[cell]
        if self.transitions is None:
            return t
        first, last = (self.edges * self.transitions).round()[cell], (self.edges * self.transitions).round()[cell + 1]
        step = torch.minimum(torch.maximum((t * self.transitions).floor(), first), last - 1)
        return (step + 0.5) / self.transitions


def _continuous(schedule: NoiseSchedule | None, cells: int) -> TimeGrid:
    if schedule is None:
        edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        return TimeGrid(edges, torch.ones(cells, dtype=torch.float64), None, None)
    first, last = schedule.endpoints()
    device = next((tensor.device for tensor in (*schedule.parameters(), *schedule.buffers())), torch.device("cpu"))
    targets = torch.linspace(first, last, cells + 1, dtype=torch.float64)
    edges = schedule.inverse(targets.to(device)).cpu()
    edges[0], edges[-1] = 0.0, 1.0
    kept = torch.cat([torch.ones(1, dtype=torch.bool), edges.diff() > 1e-12])
    edges, targets = edges[kept], targets[kept]
    edges[-1] = 1.0
    return TimeGrid(edges, 0.5 * targets.diff() / edges.diff(), 0.5 * (targets[1:] + targets[:-1]), None)


@torch.no_grad()
def _gammas(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    device = next((tensor.device for tensor in (*schedule.parameters(), *schedule.buffers())), torch.device("cpu"))
    gammas: Tensor = schedule(t.to(device)).double().cpu()
    return gammas
