"""Images, and a denoiser that is linear, so that every image's diffusion term has a closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import registered
from exact_denoisers import ExactDenoiser, Mixture
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule, NoiseSchedule
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.variational_bound import VDMObjective

VARIANCE, SHAPE = 0.1, (1, 4, 4)


def objective(
    transitions: int | None = None, schedule: NoiseSchedule | None = None, target: str = "epsilon"
) -> VDMObjective:
    process = registered.process(schedule or LinearSchedule(-8.0, 4.0), target, num_levels=16)
    return VDMObjective(ExactDenoiser(Mixture.gaussian(VARIANCE), process), process, transitions)


def images(count: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Unlike each other in contrast, as real ones are."""
    generator = torch.Generator().manual_seed(3)
    contrast = torch.rand(count, *(1,) * len(shape), generator=generator)
    return (7.5 + 8 * contrast * torch.randn(count, *shape, generator=generator)).round().clamp(0, 15).byte()


class Batches:
    """The images in batches of a size, as often as asked."""

    def __init__(self, levels: Tensor, size: int = 128) -> None:
        self.levels, self.size = levels, size

    def __call__(self) -> Iterator[dict[str, Tensor]]:
        for part in torch.arange(len(self.levels)).split(self.size):
            yield {"levels": self.levels[part], "indices": part}


def exact_diffusion(
    process: GaussianProcess, levels: Tensor, transitions: int | None, variance: float = VARIANCE
) -> Tensor:
    """Each image's diffusion term in nats, (N,): ``E|eps - eps_hat|^2 = sum_i a^2 + n x_i^2 / (v + n)^2``.

    With ``n = e^gamma`` and ``a = v / (v + n)``; over gamma, ``a^2`` integrates to ``ln(n / (v + n)) + a`` and
    ``n / (v + n)^2`` to ``-1 / (v + n)``.
    """
    squares, dimensions = process.encode(levels).double().square().flatten(1).sum(1), levels[0].numel()
    v = variance
    if transitions is None:
        n_0, n_1 = (math.exp(gamma) for gamma in process.schedule.endpoints())
        noise = math.log(n_1 / (v + n_1)) + v / (v + n_1) - math.log(n_0 / (v + n_0)) - v / (v + n_0)
        return 0.5 * (dimensions * noise + squares * (1 / (v + n_0) - 1 / (v + n_1)))
    gammas = process.schedule(torch.arange(transitions + 1, dtype=torch.float64) / transitions).double()
    n = gammas[1:].exp()
    error = dimensions * (v / (v + n)) ** 2 + squares[:, None] * n / (v + n) ** 2
    return 0.5 * (torch.expm1(gammas.diff()) * error).sum(1)


def z_score(report: LikelihoodReport, exact: float, term: str = "diffusion") -> float:
    """How many standard errors a term's mean over replicates and images lies above the exact value."""
    replicates = report.terms_per_image[term].mean(1)
    error: Any = replicates.std() / math.sqrt(len(replicates))
    return float((replicates.mean() - exact) / error)
