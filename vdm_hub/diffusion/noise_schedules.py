r"""Noise schedules: how much noise at time t, as ``gamma(t) = -log SNR(t)``, increasing on t in [0, 1].

A new schedule is one class: its ``forward`` and its ``to_config``. The derivative, the inverse and the published form
are derived once, here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError

Gamma = Callable[[Tensor], Tensor]
"""A function from times to gamma, the negative log-SNR, of the same shape."""

# diffusers' own floor for the last alpha-bar of a zero-terminal-SNR table (its Euler schedulers use it too).
_ZERO_TERMINAL_ALPHA_BAR = 2.0**-24


def gamma_and_derivative(gamma: Gamma, t: Tensor) -> tuple[Tensor, Tensor]:
    """``(gamma(t), gamma'(t))``, which both carry gradients to the schedule's parameters.

    In closed form where gamma has a method ``with_derivative``, as a `NoiseSchedule` has; else by reverse mode.

    Args:
        gamma: Any function of t, such as a `NoiseSchedule`, bound or not.
        t: Times in [0, 1], shape (B,).

    >>> [round(float(v), 4) for v in gamma_and_derivative(LinearSchedule(-5.0, 5.0), torch.tensor(0.25))]
    [-2.5, 10.0]
    """
    closed_form = getattr(gamma, "with_derivative", None)
    pair: tuple[Tensor, Tensor] = differentiated(gamma, t) if closed_form is None else closed_form(t)
    return pair


@dataclass(frozen=True)
class BoundGamma:
    """Gamma of one batch as a function of t alone, and what the network is told of it beside its mean.

    Attributes:
        gamma: The function.
        context: (B, context_size).
    """

    gamma: Gamma
    context: Tensor

    def __call__(self, t: Tensor) -> Tensor:
        """``gamma(t)``."""
        return self.gamma(t)


def differentiated(gamma: Gamma, t: Tensor) -> tuple[Tensor, Tensor]:
    """`gamma_and_derivative` of any function, by reverse mode: forward mode's levels are the whole process's.

    ``J' u`` is linear in u, and its derivative in u along v is ``J v``: two backward passes find each element's
    derivative, where a datum has many gammas too.
    """
    if torch.compiler.is_compiling():  # which traces forward mode alone, and leaves no level of it to run
        pair: tuple[Tensor, Tensor] = torch.func.jvp(gamma, (t,), (torch.ones_like(t),))  # type: ignore[assignment]
        return pair
    is_kept = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        times = t.clone() if t.requires_grad else t.detach().clone().requires_grad_()
        value = gamma(times)
        weights = torch.zeros_like(value, requires_grad=True)
        (product,) = torch.autograd.grad(value, times, weights, create_graph=True)
        (slope,) = torch.autograd.grad(product, weights, torch.ones_like(product), create_graph=is_kept)
    return (value, slope) if is_kept else (value.detach(), slope.detach())


class NoiseSchedule(nn.Module, ABC):
    """``gamma(t)``, strictly increasing, finite and differentiable on [0, 1].

    Subclasses implement `forward` and `to_config`. Those that depend on the datum also say so by `scalar = False`,
    and may override `draw_noise` and `bind`. Those that know their derivative may override `with_derivative`.
    """

    scalar: bool = True
    """Whether gamma is one number per time, the same for every datum and dimension."""

    context_size: int | None = None
    """Length of the vector ``context`` (B, context_size) that the gamma of `bind` carries for the network, if any."""

    baked_knots: int = 513
    """How many knots a learned schedule is published with."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with a gamma of its own does not inherit the derivative of another's."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and "with_derivative" not in vars(cls):
            cls.with_derivative = NoiseSchedule.with_derivative  # type: ignore[method-assign]

    @abstractmethod
    def forward(self, t: Tensor) -> Tensor:
        """``gamma`` at times ``t`` of shape (B,): of shape (B,), or broadcastable to (B, *data)."""

    def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(gamma(t), gamma'(t))``, of one shape; by reverse mode, unless a class knows better."""
        return differentiated(self, t)

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON values, that rebuild this schedule (weights apart)."""

    def variance_parameters(self) -> set[str]:
        """Names of the parameters that lower the variance of the bound's estimator; the bound trains the rest."""
        return set()

    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        """The base noise that `bind` needs, by name."""
        return {}

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        """Extra bound terms (named, (B,), nats) and gamma as a function of t alone.

        Where the schedule has a `context_size`, gamma has an attribute ``context``: see `BoundGamma`.

        Args:
            x: Data of shape (B, *data) when bounding, ``None`` when sampling.
            noise: What `draw_noise` gave.
        """
        return {}, self

    def endpoints(self) -> tuple[float, float]:
        """``(gamma(0), gamma(1))``; of a gamma per pixel its mean over pixels, as a network is told it.

        Where gamma depends on a context, it is that of one fixed draw.
        """
        with torch.no_grad():
            noise = self.draw_noise(1, torch.Generator().manual_seed(0), _device(self))
            gamma = self if self.scalar else self.bind(None, noise)[1]
            ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=_device(self))
            first, last = (float(gamma(end).mean()) for end in ends)
        return first, last

    def inverse(self, gamma: Tensor) -> Tensor:
        """The time at which a scalar schedule reaches ``gamma``, by bisection, in float64; clamped to [0, 1]."""
        target = gamma.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        with torch.no_grad():
            for _ in range(60):
                middle = 0.5 * (low + high)
                above = self(middle.flatten()).reshape(middle.shape) > target
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            first, last = self(torch.tensor([0.0, 1.0], dtype=torch.float64, device=target.device))
        inside = torch.where(target <= first, torch.zeros_like(low), 0.5 * (low + high))
        return torch.where(target >= last, torch.ones_like(high), inside)

    def bake(self) -> NoiseSchedule:
        """The schedule to publish: itself, or a `TabulatedSchedule` of the same gamma where weights were learned."""
        if not self.scalar or not any(True for _ in self.parameters()):
            return self
        times = torch.linspace(0, 1, self.baked_knots, dtype=torch.float64)
        with torch.no_grad():
            return TabulatedSchedule(self(times.to(_device(self))).double().cpu().tolist())


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def check_endpoints(name: str, gamma_min: float, gamma_max: float) -> None:
    """Refuse endpoints that are not finite and increasing."""
    if not (math.isfinite(gamma_min) and math.isfinite(gamma_max) and gamma_min < gamma_max):
        raise ConfigurationError(
            f"the noise schedule {name!r} got gamma_min={gamma_min} and gamma_max={gamma_max}: give finite values, "
            f"gamma_min < gamma_max, such as -13.3 and 5 for 256 levels."
        )


class LinearSchedule(NoiseSchedule):
    """``gamma(t) = (1-t) gamma_min + t gamma_max``: linear log-SNR (VDM section 4 and fig. 4b).

    Args:
        gamma_min: gamma(0), minus the log-SNR of the least noisy latent.
        gamma_max: gamma(1), that of the noisiest.

    >>> LinearSchedule(-13.3, 5.0)(torch.tensor([0.0, 0.5, 1.0]))
    tensor([-13.3000,  -4.1500,   5.0000])
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        check_endpoints("linear", gamma_min, gamma_max)
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)

    def forward(self, t: Tensor) -> Tensor:
        return (1 - t) * self.gamma_min + t * self.gamma_max

    def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self(t), torch.full_like(t, self.gamma_max - self.gamma_min)

    def to_config(self) -> dict[str, Any]:
        return {"gamma_min": self.gamma_min, "gamma_max": self.gamma_max}


class CosineSchedule(NoiseSchedule):
    """``gamma = 2 log tan(pi u / 2)``, ``u = u_0 + t (u_1 - u_0)``: alpha = cos(pi u / 2), cut to finite endpoints.

    The cosine schedule of Nichol and Dhariwal (arXiv 2102.09672, eq. 17, without its offset) has infinite log-SNR at
    both ends; ``u_0`` and ``u_1`` are the times where it passes ``gamma_min`` and ``gamma_max``.

    Args:
        gamma_min: gamma(0), minus the log-SNR of the least noisy latent.
        gamma_max: gamma(1), that of the noisiest.

    >>> [round(v, 6) for v in CosineSchedule(-13.3, 5.0).endpoints()]
    [-13.3, 5.0]
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        check_endpoints("cosine", gamma_min, gamma_max)
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)
        # Angles from the nearer end, so that neither cancels: pi/2 - angle = atan(exp(-gamma/2)).
        self._first = math.atan(math.exp(gamma_min / 2))
        self._last = math.atan(math.exp(-gamma_max / 2))
        self._span = math.pi / 2 - self._first - self._last

    def forward(self, t: Tensor) -> Tensor:
        angle, complement = self._angles(t)
        return 2 * (torch.log(torch.sin(angle)) - torch.log(torch.sin(complement)))

    def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        cotangents = [1 / torch.tan(angle) for angle in self._angles(t)]
        return self(t), 2 * self._span * (cotangents[0] + cotangents[1])

    def _angles(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._first + t * self._span, self._last + (1 - t) * self._span

    def to_config(self) -> dict[str, Any]:
        return {"gamma_min": self.gamma_min, "gamma_max": self.gamma_max}


class TabulatedSchedule(NoiseSchedule):
    """A monotone cubic (Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5, 1984) through equally spaced ``gammas``.

    It is how a learned schedule is published: knots in the JSON config, float64, exact at the knots.

    Args:
        gammas: The knots, strictly increasing, from t = 0 to t = 1; at least two.

    >>> TabulatedSchedule([-5.0, 0.0, 5.0])(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    tensor([-5.0000, -2.5000,  0.0000,  5.0000])
    """

    knots: Tensor
    slopes: Tensor

    def __init__(self, gammas: Sequence[float]) -> None:
        super().__init__()
        # On the CPU also where a model is sketched on torch's meta device: these are no weights, to be loaded later.
        knots = torch.tensor([float(g) for g in gammas], dtype=torch.float64, device="cpu")
        if knots.numel() < 2 or not bool(torch.isfinite(knots).all()):
            raise ConfigurationError(
                f"a table of gamma needs at least two finite values; this one is {list(gammas)[:5]}."
            )
        falls = (knots.diff() <= 0).nonzero()
        if falls.numel():
            i = int(falls[0])
            raise ConfigurationError(
                f"a table of gamma must strictly increase, but knot {i + 1} is {knots[i + 1].item():g} after "
                f"{knots[i].item():g}. Sort it, or give -log SNR rather than log SNR."
            )
        slopes = _monotone_slopes(knots)
        # Plain attributes: float64 knots must not follow module.to(float16), and nothing here is a weight.
        self._knots, self._slopes = knots, slopes
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # of each device, so that it is copied there once

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = (self._knots.to(device), self._slopes.to(device))
        return self._tables[device]

    @property
    def gammas(self) -> Tensor:
        """The knots, float64, on the CPU."""
        return self._knots

    def forward(self, t: Tensor) -> Tensor:
        return self.with_derivative(t)[0]

    def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        knots, slopes = self._table(t.device)
        position = t.double() * (knots.numel() - 1)
        index = position.detach().floor().long().clamp(0, knots.numel() - 2)
        u = position - index
        left, right, slope_left, slope_right = knots[index], knots[index + 1], slopes[index], slopes[index + 1]
        step = right - left
        cubic = slope_left + slope_right - 2 * step
        quadratic = 3 * step - 2 * slope_left - slope_right
        value = left + u * (slope_left + u * (quadratic + u * cubic))
        slope = slope_left + u * (2 * quadratic + u * 3 * cubic)
        value, slope = (
            torch.where(u == 1, right + (u - 1) * slope_right, value),
            torch.where(u == 1, slope_right, slope),
        )
        return value.to(t.dtype), (slope * (knots.numel() - 1)).to(t.dtype)

    def to_config(self) -> dict[str, Any]:
        return {"gammas": self.gammas.tolist()}


def _monotone_slopes(knots: Tensor) -> Tensor:
    """The cubic's slope at each increasing knot, per spacing: scipy's `PchipInterpolator`, which readers may not have.

    Inside, the harmonic mean of the steps on both sides; at the ends that of a parabola, where it does not fall.
    """
    steps = knots.diff()
    if steps.numel() == 1:
        return steps.repeat(2)
    inside = 2 / (1 / steps[:-1] + 1 / steps[1:])
    first, last = (3 * steps[0] - steps[1]) / 2, (3 * steps[-1] - steps[-2]) / 2
    return torch.cat([first[None], inside, last[None]]).clamp(min=0)


class DiscreteBetasSchedule(NoiseSchedule):
    """Exactly a diffusers beta table: ``gamma(i/(T-1)) = log((1 - abar_i) / abar_i)``, i = 0..T-1.

    ``abar`` is diffusers' own float32 cumulative product, so gamma is that of the noise its schedulers really add.
    Between the T latents a monotone cubic interpolates. A table whose last alpha-bar is zero (zero terminal SNR) is
    given 2^-24 there, as diffusers' Euler schedulers do, or half of the one before where that is less.

    Args:
        betas: The table, each above 0 and at most 1; at least two.

    >>> schedule = DiscreteBetasSchedule(torch.linspace(1e-4, 0.02, 1000).tolist())
    >>> [round(v, 3) for v in schedule.endpoints()]
    [-9.21, 10.118]
    """

    def __init__(self, betas: Sequence[float]) -> None:
        super().__init__()
        self._betas = [float(b) for b in betas]
        table = torch.tensor(self._betas, dtype=torch.float32)
        if table.numel() < 2 or not bool(((table > 0) & (table <= 1)).all()):
            raise ConfigurationError("a beta table needs at least two values, each above 0 and at most 1.")
        alpha_bar = torch.cumprod(1.0 - table, dim=0).double()
        if alpha_bar[0] < 1 and bool((alpha_bar.diff() >= 0)[alpha_bar[1:] > 0].any()):
            raise ConfigurationError(
                "the betas are so small that diffusers' float32 product of them stands still, as in a table that was "
                "derived from a VDM: it serves to sample, but no likelihood comes from it. Take the VDM itself."
            )
        if alpha_bar[-1] == 0:
            alpha_bar = alpha_bar.clamp(min=min(_ZERO_TERMINAL_ALPHA_BAR, float(alpha_bar[alpha_bar > 0].min()) / 2))
        self._interpolation = TabulatedSchedule((torch.log1p(-alpha_bar) - torch.log(alpha_bar)).tolist())

    @property
    def gammas(self) -> Tensor:
        """``gamma`` of each latent, float64."""
        return self._interpolation.gammas

    def forward(self, t: Tensor) -> Tensor:
        return self._interpolation(t)

    def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._interpolation.with_derivative(t)

    def to_config(self) -> dict[str, Any]:
        return {"betas": self._betas}
