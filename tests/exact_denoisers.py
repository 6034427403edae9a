"""Data whose denoiser is known exactly, behind the interface of a network, and quadratures without sampling noise.

Everything here is written out in float64 and in the textbook's alpha and sigma, apart from the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdm_hub.diffusion.forward_process import BoundProcess
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import Gamma, NoiseSchedule


def alpha_sigma(gamma: Tensor) -> tuple[Tensor, Tensor]:
    gamma = gamma.double()
    return (1 / (1 + gamma.exp())).sqrt(), (1 / (1 + (-gamma).exp())).sqrt()


@dataclass(frozen=True)
class Mixture:
    """Independent dimensions, each a mixture of Gaussians; variances of zero make it a finite alphabet."""

    means: Tensor
    variances: Tensor
    weights: Tensor

    @classmethod
    def gaussian(cls, variance: float) -> Mixture:
        return cls(*(torch.tensor([v], dtype=torch.float64) for v in (0.0, variance, 1.0)))

    @classmethod
    def alphabet(cls, values: Tensor, weights: Tensor) -> Mixture:
        return cls(values.double(), torch.zeros_like(values, dtype=torch.float64), weights.double())

    def log_density(self, z: Tensor, gamma: Tensor) -> Tensor:
        """``log q(z_t)``, elementwise."""
        return self._joint(z, gamma)[0].logsumexp(-1)

    def posterior_means(self, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``(E[x|z], E[eps|z])``."""
        joint, distance, variance = self._joint(z, gamma)
        responsibility = joint.softmax(-1)
        alpha, sigma = (v.unsqueeze(-1) for v in alpha_sigma(gamma))
        x = self.means + alpha * self.variances * distance / variance
        eps = sigma * distance / variance
        return (responsibility * x).sum(-1), (responsibility * eps).sum(-1)

    def _joint(self, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = (v.unsqueeze(-1) for v in alpha_sigma(gamma))
        distance = z.double().unsqueeze(-1) - alpha * self.means
        variance = alpha**2 * self.variances + sigma**2
        log_normal = -0.5 * (distance**2 / variance + variance.log() + math.log(2 * math.pi))
        return self.weights.log() + log_normal, distance, variance


class ExactDenoiser(nn.Module):
    """The Bayes-optimal network for a population, in whatever target, scaling and conditioning a process speaks."""

    def __init__(self, population: Mixture, process: GaussianProcess) -> None:
        super().__init__()
        self.population, self.process = population, process

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **_: Any) -> tuple[Tensor]:
        parameterization = self.process.parameterization
        gamma = self.process.conditioning.inverse(timestep.double())
        gamma = gamma.reshape(-1, *(1,) * (sample.ndim - 1)).expand(sample.shape)
        z = sample.double() / parameterization.input_scale(gamma)
        x, eps = self.population.posterior_means(z, gamma)
        output = parameterization.target(x, eps, gamma) / parameterization.output_scale(gamma)
        return (output.to(sample.dtype),)

    def bare(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """As a `Network`: without the tuple."""
        return self(sample, timestep)[0]


class PerPixelSchedule(NoiseSchedule):
    """A gamma per pixel whose mean over pixels is linear in t, and which brings an extra bound term.

    ``gamma_d(t) = (1-t) first + t last + tilt_d (1-t) + bump_d sin(pi t)``, tilts and bumps summing to zero.
    """

    scalar = False

    def __init__(self, first: float, last: float, tilt: Tensor, bump: Tensor, extra: float = 0.0) -> None:
        super().__init__()
        self.first, self.last, self.extra = first, last, extra
        self.tilt, self.bump = tilt - tilt.mean(), bump - bump.mean()

    def forward(self, t: Tensor) -> Tensor:
        t = t.reshape(t.shape + (1,) * self.tilt.ndim)
        tilt, bump = self.tilt.to(t.dtype), self.bump.to(t.dtype)
        return (1 - t) * (self.first + tilt) + t * self.last + bump * torch.sin(math.pi * t)

    def to_config(self) -> dict[str, Any]:
        raise NotImplementedError("a fake for tests")

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        return ({} if x is None else {"auxiliary": torch.full((x.shape[0],), self.extra)}), self


class CorrelatedGaussianDenoiser(nn.Module):
    """The exact denoiser of N(0, S) under a `PerPixelSchedule`: it knows t from the mean gamma that it is told."""

    def __init__(self, covariance: Tensor, process: GaussianProcess) -> None:
        super().__init__()
        self.covariance, self.process = covariance, process

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **_: Any) -> tuple[Tensor]:
        schedule = self.process.schedule
        assert isinstance(schedule, PerPixelSchedule)
        mean_gamma = self.process.conditioning.inverse(timestep.double())
        gamma = schedule((mean_gamma - schedule.first) / (schedule.last - schedule.first))
        alpha, sigma = (v.flatten(1) for v in alpha_sigma(gamma))
        marginal = alpha[:, :, None] * self.covariance * alpha[:, None, :] + torch.diag_embed(sigma**2)
        z = sample.double() / self.process.parameterization.input_scale(gamma)
        whitened = torch.linalg.solve(marginal, z.flatten(1))
        x = (alpha * whitened) @ self.covariance
        eps = sigma * whitened
        output = self.process.parameterization.target(x.view_as(sample), eps.view_as(sample), gamma)
        return ((output / self.process.parameterization.output_scale(gamma)).to(sample.dtype),)

    def bare(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self(sample, timestep)[0]


Points = tuple[Tensor, Tensor, Tensor]
"""``(x (N, D), eps (N, D), weights (N,))``: an expectation over data and noise as a weighted sum."""


def quadratic_points(covariance: Tensor) -> Points:
    """Exact for every quadratic in x ~ N(0, S) and eps ~ N(0, I), hence for the loss of any affine denoiser."""
    d = covariance.shape[0]
    directions = math.sqrt(2 * d) * torch.cat([torch.eye(2 * d), -torch.eye(2 * d)]).double()
    x = directions[:, :d] @ torch.linalg.cholesky(covariance.double()).T
    return x, directions[:, d:], torch.full((4 * d,), 1 / (4 * d), dtype=torch.float64)


def alphabet_points(population: Mixture, nodes: int = 241) -> Points:
    """One dimension: each letter, and the trapezoidal rule in eps, which converges geometrically."""
    eps = torch.linspace(-9, 9, nodes, dtype=torch.float64)
    density = torch.exp(-0.5 * eps**2)
    weights = (population.weights[:, None] * density / density.sum()).flatten()
    x = population.means[:, None].expand(-1, nodes).reshape(-1, 1)
    return x, eps.repeat(len(population.means))[:, None], weights


def unit_interval(panels: int, nodes: int = 4, halvings: int = 8) -> tuple[Tensor, Tensor]:
    """Composite Gauss-Legendre on [0, 1]; the outermost panels are halved towards the ends, for layers there."""
    inner = torch.arange(1, panels, dtype=torch.float64) / panels
    near = 0.5 ** torch.arange(halvings, 0, -1, dtype=torch.float64) / panels
    edges = torch.cat([torch.zeros(1), near, inner, 1 - near.flip(0), torch.ones(1)]).double()
    abscissae, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    times = edges[:-1, None] + edges.diff()[:, None] * 0.5 * (abscissae + 1)
    return times.flatten(), (0.5 * weights * edges.diff()[:, None]).flatten()


def aligned_panels(schedule: NoiseSchedule, least: int) -> int:
    """A number of panels such that no knot of a table, where a derivative jumps, lies inside of one."""
    intervals = schedule.gammas.numel() - 1 if hasattr(schedule, "gammas") else 1
    return int(intervals * math.ceil(least / intervals))


def expected(points: Points, times: Tensor, evaluate: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]) -> Tensor:
    """``E_{x, eps} evaluate(x, t, noise)`` at each time, (T,)."""
    x, eps, weights = points
    count = len(times)
    batch = evaluate(x.repeat(count, 1), times.repeat_interleave(len(x)), {"marginal": eps.repeat(count, 1)})
    return batch.view(count, len(x)) @ weights


@torch.no_grad()
def continuous_diffusion_term(process: GaussianProcess, network: Any, points: Points, panels: int = 250) -> float:
    """The T -> infinity diffusion term of the library's own `kl_rate`, integrated, in nats."""
    bound = _bound(process)
    times, weights = unit_interval(panels)
    return float(expected(points, times, lambda x, t, noise: bound.kl_rate(x, t, noise, network)) @ weights)


@torch.no_grad()
def finite_diffusion_term(process: GaussianProcess, network: Any, points: Points, transitions: int) -> float:
    """The sum of the library's own transition KLs over all transitions, in nats."""
    bound = _bound(process)
    times = torch.arange(1, transitions + 1, dtype=torch.float64) / transitions

    def evaluate(x: Tensor, t: Tensor, noise: dict[str, Tensor]) -> Tensor:
        return bound.transition_kl(x, t - 1 / transitions, t, noise, network)

    return float(expected(points, times, evaluate).sum())


def _bound(process: GaussianProcess) -> BoundProcess:
    return process.bind(None, {})[1]
