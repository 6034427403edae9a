r"""Schedules of the remaining signal alpha(t), which falls from 1 at the data, t = 0, to 0 at t = 1.

Each gives ``lost = 1 - alpha``, alpha, the derivative of lost and the share that a step gives back, all in closed
forms in which nothing cancels: near the data alpha is one and near the prior lost is, and their complements, which
the bound is made of, would keep no digit in float32.

The continuous bound of a masked process does not depend on the schedule (MDLM eq. 11), but the variance of its
estimator does: at t = 0 the rate ``lost'/lost`` is n/t where lost is t^n, of a count that is L t^n on average, so its
second moment is ``int n^2 t^(n-2) dt``: logarithmic for n = 1 (`linear`, `cosine`) and finite above.

Sources: MDLM is Sahoo et al., arXiv 2406.07524; MD4 is Shi et al., arXiv 2406.04329, Table 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from vdm_hub import ConfigurationError

_HALF_PI = math.pi / 2


class SignalSchedule(ABC):
    """The signal that remains at a time; every method is elementwise, times in [0, 1]."""

    name: ClassVar[str]

    @abstractmethod
    def lost(self, t: Tensor) -> Tensor:
        """``1 - alpha(t)``."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The signal that remains, alpha."""

    @abstractmethod
    def lost_rate(self, t: Tensor) -> Tensor:
        """``-alpha'(t)``."""

    @abstractmethod
    def opened(self, s: Tensor, t: Tensor) -> Tensor:
        """``(alpha_s - alpha_t)/(1 - alpha_t)``, what a step from t to s < t gives back of what is lost at t."""

    @abstractmethod
    def opening_rate(self, t: Tensor) -> Tensor:
        """``-alpha'/(1 - alpha)``, `opened` per unit of time in the limit of short steps; finite at t = 0, too."""

    @abstractmethod
    def time(self, lost: Tensor) -> Tensor:
        """The time at which so much is lost: the inverse of `lost`."""


class PolynomialSchedule(SignalSchedule):
    """``alpha = 1 - t^exponent`` (MD4's polynomial); the linear one has exponent 1.

    >>> PolynomialSchedule(2.0).alpha(torch.tensor([0.0, 0.5, 1.0])).tolist()
    [1.0, 0.75, 0.0]
    """

    name = "polynomial"

    def __init__(self, exponent: float = 2.0) -> None:
        is_number = isinstance(exponent, int | float) and not isinstance(exponent, bool)
        if not is_number or not 1 <= exponent < float("inf"):
            raise ConfigurationError(
                f"the schedule 'polynomial' got exponent={exponent!r}: give a number of at least 1."
            )
        self.exponent = float(exponent)

    def lost(self, t: Tensor) -> Tensor:
        return t**self.exponent

    def alpha(self, t: Tensor) -> Tensor:
        return 0.0 - torch.expm1(self.exponent * torch.log(t))

    def lost_rate(self, t: Tensor) -> Tensor:
        return self.exponent * t ** (self.exponent - 1)

    def opened(self, s: Tensor, t: Tensor) -> Tensor:
        return -torch.expm1(self.exponent * torch.log1p((s - t) / t))

    def opening_rate(self, t: Tensor) -> Tensor:
        return self.exponent / t.clamp(min=1e-30)

    def time(self, lost: Tensor) -> Tensor:
        return lost ** (1 / self.exponent)


class LinearSchedule(PolynomialSchedule):
    """``alpha = 1 - t``: sites open at an even pace (MDLM; LLaDA, arXiv 2502.09992).

    >>> LinearSchedule().alpha(torch.tensor([0.0, 0.25, 1.0])).tolist()
    [1.0, 0.75, 0.0]
    """

    name = "linear"

    def __init__(self) -> None:
        super().__init__(1.0)


class CosineSchedule(SignalSchedule):
    """``alpha = 1 - cos(pi/2 (1 - t))`` (MD4): few sites open in the first steps of a sampler, which know least.

    >>> [round(alpha, 4) for alpha in CosineSchedule().alpha(torch.tensor([0.0, 0.5, 1.0])).tolist()]
    [1.0, 0.2929, 0.0]
    """

    name = "cosine"

    def lost(self, t: Tensor) -> Tensor:
        return torch.sin(_HALF_PI * t)

    def alpha(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(_HALF_PI * (1 - t) / 2) ** 2

    def lost_rate(self, t: Tensor) -> Tensor:
        return _HALF_PI * torch.sin(_HALF_PI * (1 - t))

    def opened(self, s: Tensor, t: Tensor) -> Tensor:
        left = (1 - t) + (1 - s)
        return 2 * torch.sin(_HALF_PI * left / 2) * torch.sin(_HALF_PI * (t - s) / 2) / self.lost(t)

    def opening_rate(self, t: Tensor) -> Tensor:
        return self.lost_rate(t) / self.lost(t).clamp(min=1e-30)

    def time(self, lost: Tensor) -> Tensor:
        return torch.asin(lost) / _HALF_PI


class SquaredCosineSchedule(SignalSchedule):
    """``alpha = cos(pi/2 t)^2``: slow at both ends, as the cosine schedule of images is.

    >>> [round(alpha, 4) for alpha in SquaredCosineSchedule().alpha(torch.tensor([0.0, 0.5, 1.0])).tolist()]
    [1.0, 0.5, 0.0]
    """

    name = "squared_cosine"

    def lost(self, t: Tensor) -> Tensor:
        return torch.sin(_HALF_PI * t) ** 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(_HALF_PI * (1 - t)) ** 2

    def lost_rate(self, t: Tensor) -> Tensor:
        return 2 * _HALF_PI * torch.sin(_HALF_PI * t) * torch.sin(_HALF_PI * (1 - t))

    def opened(self, s: Tensor, t: Tensor) -> Tensor:
        nearer = torch.minimum(t + s, (1 - t) + (1 - s))  # to an end, where the sine is zero
        return torch.sin(_HALF_PI * nearer) * torch.sin(_HALF_PI * (t - s)) / self.lost(t)

    def opening_rate(self, t: Tensor) -> Tensor:
        return 2 * _HALF_PI * torch.sin(_HALF_PI * (1 - t)) / torch.sin(_HALF_PI * t).clamp(min=1e-30)

    def time(self, lost: Tensor) -> Tensor:
        return torch.asin(lost.sqrt()) / _HALF_PI


SCHEDULES: dict[str, type[SignalSchedule]] = {
    one.name: one for one in (LinearSchedule, PolynomialSchedule, CosineSchedule, SquaredCosineSchedule)
}
"""The schedules by name."""


def build_schedule(name: str, exponent: float | None = None) -> SignalSchedule:
    """The schedule of a name.

    Args:
        name: One of `SCHEDULES`.
        exponent: Of ``polynomial``, at least 1, where it is 2 if not given; no other has one.

    Raises:
        ConfigurationError: There is no such schedule, or it takes no exponent, or not this one.

    >>> build_schedule("polynomial", 3.0).lost(torch.tensor(0.5))
    tensor(0.1250)
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ConfigurationError(f"schedule is {name!r:.100}: give one of {', '.join(SCHEDULES)}.")
    if exponent is None:
        return SCHEDULES[name]()
    if name != PolynomialSchedule.name:
        raise ConfigurationError(
            f"exponent is {exponent!r}, and the schedule {name!r} has none: leave it out, or choose 'polynomial'."
        )
    return PolynomialSchedule(exponent)
