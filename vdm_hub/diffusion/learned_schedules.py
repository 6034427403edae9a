"""Noise schedules with parameters, trained with the network and published as a table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_hub.diffusion.noise_schedules import Gamma, NoiseSchedule, check_endpoints, gamma_and_derivative
from vdm_hub.errors import ConfigurationError

_MOST_HIDDEN = 65_536


class LearnedLinearSchedule(NoiseSchedule):
    """``gamma(t) = (1-t) gamma_min + t gamma_max`` with both endpoints trained by the bound (VDM section 4.1).

    Args:
        gamma_min: gamma(0) at the start of training.
        gamma_max: gamma(1), likewise.

    >>> schedule = LearnedLinearSchedule(-8.0, 5.0)
    >>> sorted(name for name, _ in schedule.named_parameters()), schedule.bake().to_config()
    (['gamma_max', 'gamma_min'], {'gammas': [-8.0, 5.0]})
    """

    baked_knots = 2

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        check_endpoints("learned_linear", gamma_min, gamma_max)
        self._initial = {"gamma_min": float(gamma_min), "gamma_max": float(gamma_max)}
        self.gamma_min = nn.Parameter(torch.tensor(float(gamma_min)))
        self.gamma_max = nn.Parameter(torch.tensor(float(gamma_max)))

    def forward(self, t: Tensor) -> Tensor:
        return (1 - t) * self.gamma_min + t * self.gamma_max

    def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self(t), self.gamma_max * torch.ones_like(t) - self.gamma_min  # in the type of t

    def to_config(self) -> dict[str, Any]:
        return dict(self._initial)


class LearnedMonotoneSchedule(NoiseSchedule):
    r"""``gamma = gamma_min + (gamma_max - gamma_min) s(t)``, s a monotone network from 0 to 1 (VDM App. H).

    ``s`` is ``l_1(t) + l_3(sigmoid(l_2(l_1(t))))`` with positive weights, normalised so that s(0) = 0 and s(1) = 1:
    whatever the shape learns, the endpoints stay where the bound put them. The endpoints are trained by the bound, the
    shape by the variance of its estimator (VDM App. I.2).

    Args:
        gamma_min: gamma(0) at the start of training.
        gamma_max: gamma(1), likewise.
        hidden_features: Units of the network s.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, hidden_features: int = 1024) -> None:
        super().__init__()
        check_endpoints("learned_monotone", gamma_min, gamma_max)
        if not (isinstance(hidden_features, int) and 1 <= hidden_features <= _MOST_HIDDEN):
            raise ConfigurationError(
                f"hidden_features is {hidden_features!r}: give a whole number to {_MOST_HIDDEN:,}."
            )
        self._initial = {
            "gamma_min": float(gamma_min),
            "gamma_max": float(gamma_max),
            "hidden_features": hidden_features,
        }
        self.gamma_min = nn.Parameter(torch.tensor(float(gamma_min)))
        self.gamma_max = nn.Parameter(torch.tensor(float(gamma_max)))
        # Positive through softplus; it starts almost linear, with the kinks of the hidden units spread over [0, 1].
        self.slope = nn.Parameter(torch.tensor(0.5413))  # softplus(0.5413) = 1
        self.hidden_weight = nn.Parameter(torch.full((hidden_features,), 5.0))
        self.hidden_bias = nn.Parameter(-5.0 * torch.linspace(0, 1, hidden_features))
        self.output_weight = nn.Parameter(torch.full((hidden_features,), -4.0))

    def variance_parameters(self) -> set[str]:
        return {"slope", "hidden_weight", "hidden_bias", "output_weight"}

    def _unnormalised(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's rising function of t, and its derivative."""
        slope, weight, out = (F.softplus(p) for p in (self.slope, self.hidden_weight, self.output_weight))
        first = slope * t.unsqueeze(-1)
        hidden = torch.sigmoid(weight * first + self.hidden_bias)
        bend = (hidden * (1 - hidden) * weight * out).mean(-1)
        return first.squeeze(-1) + (hidden * out).mean(-1), slope * (1 + bend)

    def forward(self, t: Tensor) -> Tensor:
        return self.with_derivative(t)[0]

    def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
        times = torch.arange(2, dtype=t.dtype, device=t.device)  # there: no copy to wait for
        first, last = self._unnormalised(times)[0]
        value, slope = self._unnormalised(t)
        span = (self.gamma_max - self.gamma_min) / (last - first)
        return self.gamma_min + span * (value - first), span * slope

    def to_config(self) -> dict[str, Any]:
        return dict(self._initial)


class VarianceGradient:
    r"""gamma and gamma' whose shape parameters get the gradient of the estimator's variance (VDM App. I.2).

    The bound's expectation does not depend on the shape, so its variance ``E[L_i^2]`` is lowered instead:
    ``d L_i^2 = 2 L_i dL_i`` needs one backward through the network when the gradient of each sample's
    ``(gamma_i, gamma'_i)`` towards the shape is scaled by ``2 L_i``. gamma is evaluated once with the shape held
    constant and once with the endpoints held constant; only the second is scaled, in the backward pass, when the
    losses are known: they travel backwards as the gradient of a tensor of zeros (see `_Scaled`), so nothing is kept
    aside, and compilers see one graph.

    Raises:
        ConfigurationError: The shape is to be trained, and gamma is not the schedule itself but another function.
    """

    def __init__(self, schedule: NoiseSchedule, gamma: Gamma) -> None:
        self._message: Tensor | None = None
        self._schedule, self._gamma = schedule, gamma
        trained = {name for name, parameter in schedule.named_parameters() if parameter.requires_grad}
        self._names = schedule.variance_parameters() & trained if torch.is_grad_enabled() else set()
        if self._names and gamma is not schedule:
            raise ConfigurationError(
                f"{type(schedule).__name__} binds another gamma than itself, whose variance_parameters "
                f"({', '.join(sorted(self._names))}) can't be told apart: name none, and the bound trains them all."
            )

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(gamma(t), gamma'(t))``, each (B,)."""
        if not self._names:
            return gamma_and_derivative(self._gamma, t)
        by_bound = self._evaluate(t, constant=self._names)
        others = {name for name, _ in self._schedule.named_parameters()} - self._names
        by_variance = self._evaluate(t, constant=others)
        *scaled, self._message = _Scaled.apply(*by_variance)  # type: ignore[no-untyped-call]
        gamma, derivative = (b + (v - v.detach()) for b, v in zip(by_bound, scaled, strict=True))
        return gamma, derivative

    def tell(self, losses: Tensor, dimensions: int) -> Tensor:
        """The same losses, (B,), from which the backward pass learns each ``L_i``, in nats per dimension."""
        if self._message is None:
            return losses
        sent: Tensor = _SendLosses.apply(losses, self._message, dimensions)  # type: ignore[no-untyped-call]
        return sent

    def _evaluate(self, t: Tensor, constant: set[str]) -> tuple[Tensor, Tensor]:
        return gamma_and_derivative(_holding(self._schedule, constant), t)


def _holding(module: Any, constant: set[str], prefix: str = "") -> Any:
    """The module with some of its parameters constant: another object, as threads may share the module."""
    held = object.__new__(type(module))
    held.__dict__.update(module.__dict__)
    held.__dict__["_parameters"] = {
        name: parameter.detach() if prefix + name in constant else parameter
        for name, parameter in module._parameters.items()
    }
    held.__dict__["_modules"] = {
        name: None if child is None else _holding(child, constant, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return held


class _Scaled(torch.autograd.Function):
    """``(gamma, gamma')`` as they are, and zeros (B,), whose gradient multiplies theirs."""

    @staticmethod
    def forward(ctx: Any, gamma: Tensor, derivative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        message = torch.zeros(gamma.shape[0], dtype=gamma.dtype, device=gamma.device)
        return gamma.clone(), derivative.clone(), message

    @staticmethod
    def backward(ctx: Any, gamma: Tensor, derivative: Tensor, message: Tensor) -> tuple[Tensor, Tensor]:
        factor = message.reshape(-1, *(1,) * (gamma.ndim - 1)).to(gamma.dtype)
        return gamma * factor, derivative * factor


class _SendLosses(torch.autograd.Function):
    """The losses as they are; backwards, ``2 L_i`` goes to `_Scaled` by way of the message."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, message: Tensor, dimensions: int) -> Tensor:
        ctx.save_for_backward(losses / dimensions)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (losses,) = ctx.saved_tensors
        return gradient, 2 * losses, None
