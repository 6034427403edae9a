"""Schedules whose SNR is infinite at one end and zero at the other, cut in time where they pass two endpoints.

In continuous time the bound of a variational diffusion model depends on a scalar schedule through its endpoints alone,
so two schedules can be compared only between the same ones. A published schedule is therefore run over the part of its
own time ``u`` on which gamma goes from ``gamma_min`` to ``gamma_max``; it is neither clipped nor rescaled.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from vdm_hub import ConfigurationError, NoiseSchedule, check_endpoints

_NEAREST_TO_AN_END = 1e-30  # float32 holds no logarithm of much less


class CutSchedule(NoiseSchedule):
    """``gamma(t) = uncut(u_0 + t (u_1 - u_0))``, with ``u_0`` and ``u_1`` where it is gamma_min and gamma_max.

    Subclasses implement `uncut`, set their own attributes before they call this constructor, and add their arguments
    to `to_config`.

    Args:
        gamma_min: ``gamma(0)``; -13.3 suits 256 levels, -7.87 suits 17.
        gamma_max: ``gamma(1)``.

    Raises:
        ConfigurationError: They are not finite and increasing, or so far out that float32 can't resolve ``u`` there.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        check_endpoints(type(self).__name__, gamma_min, gamma_max)
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)
        # Distances from the nearer end, so that neither cancels: v = 1 - u.
        (self._first, _), (_, self._last) = self._place(self.gamma_min), self._place(self.gamma_max)
        self._span = 1 - self._first - self._last

    @abstractmethod
    def uncut(self, u: Tensor, v: Tensor) -> Tensor:
        """``gamma`` at its own time ``u`` in (0, 1), increasing; ``v = 1 - u`` is given too, as exact near u = 1."""

    def forward(self, t: Tensor) -> Tensor:
        """``gamma`` at times t in [0, 1], shape (B,)."""
        return self.uncut(self._first + t * self._span, self._last + (1 - t) * self._span)

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"gamma_min": self.gamma_min, "gamma_max": self.gamma_max}

    def _place(self, gamma: float) -> tuple[float, float]:
        """``(u, 1 - u)`` at which the uncut schedule is gamma, by bisection in logit(u), float64."""
        low, high = torch.tensor([-700.0, 700.0], dtype=torch.float64)
        for _ in range(80):
            middle = (low + high) / 2
            above = bool(self.uncut(torch.sigmoid(middle), torch.sigmoid(-middle)) > gamma)
            low, high = (low, middle) if above else (middle, high)
        u, v = (float(torch.sigmoid(logit)) for logit in (low, -low))
        if min(u, v) < _NEAREST_TO_AN_END:
            raise ConfigurationError(
                f"{type(self).__name__} reaches gamma = {gamma:g} only at {min(u, v):.1g} from an end of its time, "
                f"which float32 can't resolve: move that endpoint inwards, or widen the schedule."
            )
        return u, v
