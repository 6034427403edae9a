r"""Decoders ``p(x|z_0)``: from the least noisy latent to K levels.

The factorised decoder's normaliser runs over K levels per dimension. The textbook (B, D, K) tensor is never built:
levels are visited one after the other, and only those within reach of float precision of the nearest one. Its gradient
is accumulated in the same pass, so memory stays a small multiple of B*D whatever K is. Where looking at gamma_0 would
make the host wait for the device, or break a compiled graph, all K levels are visited, a few at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import uniform_noise
from vdm_hub.diffusion.gaussian import alpha, broadcast, marginal_sample, sum_dimensions
from vdm_hub.diffusion.scaling import DataScaling

Predict = Callable[[], Tensor]

_LEVELS_AT_ONCE = 16
_WEIGHTS_AT_ONCE = 2**13  # of all dimensions together, on a CPU, whose cache holds them
_MOST_LEVELS_UNSEEN = 1024  # beyond, visiting them all costs more than the host's waiting for gamma_0


class Decoder(ABC):
    """``p(x|z_0)`` over K levels per dimension."""

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}

    @abstractmethod
    def negative_log_likelihood(
        self, levels: Tensor, z_0: Tensor, gamma_0: Tensor, variance: Tensor, x_hat: Predict, scaling: DataScaling
    ) -> Tensor:
        """``-log p(x|z_0)`` per datum in nats, (B,).

        Args:
            levels: The data, integers 0..K-1, (B, *data).
            z_0: The first latent, (B, *data).
            gamma_0: Its gamma, (), (B,) or (B, *data).
            variance: Of the last step onto the data, for decoders that take one step there.
            x_hat: Calls the network at z_0 for its estimate of the data; not called where not needed.
            scaling: Where the K levels lie.
        """

    def expected_by_level(self, gamma_0: float, scaling: DataScaling) -> Tensor | None:
        """``E[-log p(x_i|z_0)]`` over ``z_0 ~ q(z_0|x)`` of each level, (K,), nats, float64.

        None where it is not a function of one dimension's level and of gamma_0 alone, as where the network is asked.
        """
        return None

    @abstractmethod
    def sample(
        self, z_0: Tensor, gamma_0: Tensor, x_hat: Predict, scaling: DataScaling, generator: Any = None
    ) -> Tensor:
        """Levels drawn from ``p(x|z_0)``, int64, (B, *data)."""


class FactorisedDecoder(Decoder):
    r"""``p(x_i|z_0) \propto N(z_0/alpha_0; x_i, exp(gamma_0))`` over the K levels (VDM section 3.3, eq. 6 and 7).

    >>> scaling, z_0 = DataScaling("bin_centers", 2), torch.zeros(1, 1)
    >>> nll = FactorisedDecoder().negative_log_likelihood(
    ...     torch.zeros(1, 1, dtype=torch.uint8), z_0, torch.tensor(-2.0), torch.tensor(0.0), lambda: z_0, scaling
    ... )
    >>> round(float(nll), 6)  # half way between two levels: log 2
    0.693147
    """

    def negative_log_likelihood(
        self, levels: Tensor, z_0: Tensor, gamma_0: Tensor, variance: Tensor, x_hat: Predict, scaling: DataScaling
    ) -> Tensor:
        gamma_0 = broadcast(gamma_0, z_0)
        mean = z_0 / alpha(gamma_0)
        log_p: Tensor = _FactorisedLogLikelihood.apply(levels, mean, gamma_0, scaling)  # type: ignore[no-untyped-call]
        return -sum_dimensions(log_p)

    def expected_by_level(self, gamma_0: float, scaling: DataScaling) -> Tensor:
        """The expectation by the trapezoidal rule in eps, which converges geometrically: good to rounding.

        >>> scaling = DataScaling("bin_centers", 256)
        >>> bits = FactorisedDecoder().expected_by_level(-13.3, scaling) / math.log(2)
        >>> [round(value, 6) for value in bits[:3].tolist()]
        [0.005227, 0.010453, 0.010453]
        """
        width = math.exp(0.5 * min(gamma_0, 100.0)) / scaling.spacing  # of the noise, in levels
        step = min(max(0.5 * width, 0.02), 0.25)  # log p has its poles pi * width from the real axis
        eps = torch.arange(-round(10 / step), round(10 / step) + 1, dtype=torch.float64) * step
        weights = torch.exp(-0.5 * eps**2)
        level, edge = torch.arange(scaling.num_levels), math.ceil(20 * min(width, 1e9)) + 1
        # Farther from both ends than any weight reaches, all levels are one.
        alike = (level > edge) & (level < scaling.num_levels - 1 - edge)
        chosen, place = level.masked_fill(alike, edge).unique(return_inverse=True)
        every = chosen.repeat_interleave(len(eps))[:, None]
        gamma = torch.full((len(every),), gamma_0, dtype=torch.float64)
        x = scaling.encode(every, torch.float64)
        z_0 = marginal_sample(x, gamma, eps.repeat(len(chosen))[:, None])
        values = self.negative_log_likelihood(every, z_0, gamma, torch.zeros_like(gamma), lambda: x, scaling)
        return (values.view(len(chosen), -1) @ (weights / weights.sum()))[place]

    def sample(
        self, z_0: Tensor, gamma_0: Tensor, x_hat: Predict, scaling: DataScaling, generator: Any = None
    ) -> Tensor:
        # Inverse distribution function: one uniform a dimension, and two passes over the levels in reach.
        gamma_0 = broadcast(gamma_0, z_0)
        mean = z_0 / alpha(gamma_0)
        total = torch.zeros_like(mean)
        for _, _, weight in _levels_in_reach(mean, gamma_0, scaling):
            total += weight
        remaining = uniform_noise(mean.shape, generator, mean.device, mean.dtype) * total
        chosen = scaling.nearest(mean)
        for level, _, weight in _levels_in_reach(mean, gamma_0, scaling):
            chosen = torch.where((remaining >= 0) & (weight > 0), level, chosen)
            remaining = remaining - weight
        return chosen


class DDPMDecoder(Decoder):
    """A Gaussian around the network's estimate of the data, integrated over each level's bin (DDPM eq. 13).

    The outermost bins reach to infinity. The variance is the posterior's at the second latent, as in the code of DDPM
    and its successors, whose own variance at the first latent would be zero.
    """

    def negative_log_likelihood(
        self, levels: Tensor, z_0: Tensor, gamma_0: Tensor, variance: Tensor, x_hat: Predict, scaling: DataScaling
    ) -> Tensor:
        deviation = broadcast(variance, z_0).sqrt()
        centred = scaling.encode(levels, z_0.dtype) - x_hat()
        upper = (centred + scaling.spacing / 2) / deviation
        lower = (centred - scaling.spacing / 2) / deviation
        upper = torch.where(levels == scaling.num_levels - 1, torch.inf, upper)
        lower = torch.where(levels == 0, -torch.inf, lower)
        return -sum_dimensions(_log_normal_mass(lower, upper))

    def sample(
        self, z_0: Tensor, gamma_0: Tensor, x_hat: Predict, scaling: DataScaling, generator: Any = None
    ) -> Tensor:
        # As DDPM and diffusers do: the last step takes the mean, without noise.
        return scaling.nearest(x_hat())


def _log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """``log(Phi(upper) - Phi(lower))``, taken in the tail where both are smallest, so that neither rounds to one."""
    flip = lower + upper > 0
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_high: Tensor = _LogNormalDistribution.apply(high)  # type: ignore[no-untyped-call]
    log_low: Tensor = _LogNormalDistribution.apply(low)  # type: ignore[no-untyped-call]
    # Differences below float precision mean a bin of no width: the density times the width, never -inf.
    return log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-torch.finfo(low.dtype).tiny)))


class _LogNormalDistribution(torch.autograd.Function):
    """``log Phi`` whose gradient does not cancel: in float32 torch's own is 5 % off at -1,000, and NaN at -100,000."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.special.log_ndtr(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (math.sqrt(2 / math.pi) / torch.special.erfcx(-x / math.sqrt(2)))


def _reach(gamma_0: Tensor, scaling: DataScaling, dtype: torch.dtype) -> int:
    """Levels to either side of the nearest one whose weight is not below the rounding of the sum."""
    deviations = math.sqrt(-2 * math.log(torch.finfo(dtype).eps)) + 1
    gamma = float(gamma_0.detach().max())
    if not gamma < 100:  # NaN too: the bound is then not finite, and whoever asked for it says so
        return scaling.num_levels - 1
    deviation = math.exp(gamma / 2)
    return min(math.ceil(deviations * deviation / scaling.spacing + 0.5), scaling.num_levels - 1)


def _levels_in_reach(mean: Tensor, gamma_0: Tensor, scaling: DataScaling) -> Iterator[tuple[Tensor, float, Tensor]]:
    """Each level in reach, rising, its distance from the nearest level and its weight relative to that one's."""
    nearest = scaling.nearest(mean)
    distance = mean - scaling.encode(nearest, mean.dtype)
    precision = torch.exp(-gamma_0)
    reach = _reach(gamma_0, scaling, mean.dtype)
    for offset in range(-reach, reach + 1):
        level = nearest + offset
        step = offset * scaling.spacing
        weight = torch.exp(precision * step * (distance - 0.5 * step))
        yield level, step, torch.where((level >= 0) & (level < scaling.num_levels), weight, 0.0)


def _moments_in_reach(
    mean: Tensor, gamma_0: Tensor, scaling: DataScaling, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over the levels of the weight, and of it times the distance from the nearest level and its square."""
    if 2 * _reach(gamma_0, scaling, mean.dtype) + 1 > scaling.num_levels:  # to visit all takes fewer steps
        at_once = max(2, _WEIGHTS_AT_ONCE // max(1, mean.numel()))
        return _moments_of_all(mean, gamma_0, scaling, needs_gradient, at_once)
    total, first, second = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
    for _, step, weight in _levels_in_reach(mean, gamma_0, scaling):
        total += weight
        if needs_gradient:
            first += weight * step
            second += weight * step**2
    return total, first, second


def _moments_of_all(
    mean: Tensor, gamma_0: Tensor, scaling: DataScaling, needs_gradient: bool, at_once: int = _LEVELS_AT_ONCE
) -> tuple[Tensor, Tensor, Tensor]:
    """`_moments_in_reach` over all levels, without a look at a value: a compiler fuses it whole, and no host waits."""
    nearest = scaling.nearest(mean)
    distance = (mean - scaling.encode(nearest, mean.dtype)).unsqueeze(-1)
    precision = torch.exp(-gamma_0).unsqueeze(-1)
    levels = torch.arange(scaling.num_levels, device=mean.device)
    total, first, second = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
    for some in levels.split(scaling.num_levels if torch.compiler.is_compiling() else at_once):
        step = (some - nearest.unsqueeze(-1)).to(mean.dtype) * scaling.spacing
        weight = torch.exp(precision * step * (distance - 0.5 * step))
        total = total + weight.sum(-1)
        if needs_gradient:
            first = first + (weight * step).sum(-1)
            second = second + (weight * step**2).sum(-1)
    return total, first, second


class _FactorisedLogLikelihood(torch.autograd.Function):
    """The log-likelihood of each dimension; the moments that its gradient needs are summed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, mean: Tensor, gamma_0: Tensor, scaling: DataScaling) -> Tensor:
        needs_gradient = ctx.needs_input_grad[1]  # the mean, z_0 / alpha(gamma_0), depends on both
        nearest = scaling.nearest(mean)
        distance = mean - scaling.encode(nearest, mean.dtype)
        looks = mean.device.type == "cpu" and not torch.compiler.is_compiling()
        moments = _moments_in_reach if looks or scaling.num_levels > _MOST_LEVELS_UNSEEN else _moments_of_all
        total, first, second = moments(mean, gamma_0, scaling, needs_gradient)
        chosen = (levels.long() - nearest).to(mean.dtype) * scaling.spacing
        precision = torch.exp(-gamma_0)
        log_p = precision * chosen * (distance - 0.5 * chosen) - total.log()
        if needs_gradient:
            by_mean = precision * (chosen - first / total)
            # d/dgamma of -(e^-gamma / 2)(mean - x)^2, less its expectation over the levels.
            by_gamma = 0.5 * precision * (chosen**2 - second / total - 2 * distance * (chosen - first / total))
            ctx.save_for_backward(by_mean, by_gamma)
            ctx.gamma_shape = gamma_0.shape
        return log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        by_mean, by_gamma = ctx.saved_tensors
        return None, gradient * by_mean, (gradient * by_gamma).sum_to_size(ctx.gamma_shape), None
