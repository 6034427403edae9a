r"""The schedules, each with its source. All are in ``gamma = -log SNR``, with ``alpha^2 = sigmoid(-gamma)``.

``u`` is the source's own time, 0 at the data and 1 at the noise, and ``v = 1 - u``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vdm_hub import ConfigurationError
from vdm_hub_schedules.cut import CutSchedule


class SigmoidSchedule(CutSchedule):
    r"""``alpha^2 = (S(e) - S(w)) / (S(e) - S(s))``, ``w = s + u (e - s)``, S the logistic function.

    Jabri, Fleet and Chen (arXiv 2212.11972), and Chen (arXiv 2301.10972, algorithm 1, `sigmoid_schedule`), with
    ``s = start / temperature`` and ``e = end / temperature``. By ``S(p) - S(q) = sinh((p - q)/2) / (2 cosh(p/2)
    cosh(q/2))`` it is ``gamma = log sinh(h u) - log sinh(h v) + log cosh(e/2) - log cosh(s/2)``, ``h = (e - s)/2``,
    in which nothing cancels.

    Args:
        start: Where on the logistic curve it starts.
        end: Where it ends.
        temperature: The larger, the nearer to a linear alpha^2.
        gamma_min: ``gamma(0)``.
        gamma_max: ``gamma(1)``.

    Raises:
        ConfigurationError: ``start`` is not below ``end``, or ``temperature`` not above zero.

    >>> schedule = SigmoidSchedule()
    >>> [round(float(gamma), 4) for gamma in schedule(torch.tensor([0.0, 0.5, 1.0]))]
    [-13.3, -0.0699, 5.0]
    """

    def __init__(
        self,
        start: float = -3.0,
        end: float = 3.0,
        temperature: float = 1.0,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
    ) -> None:
        if not (math.isfinite(start) and math.isfinite(end) and start < end and 0 < temperature < math.inf):
            raise ConfigurationError(
                f"the sigmoid schedule got start={start}, end={end} and temperature={temperature}: give start < end "
                f"and a temperature above 0, all finite."
            )
        self._own = {"start": float(start), "end": float(end), "temperature": float(temperature)}
        self._half = (end - start) / (2 * temperature)
        self._offset = _log_cosh(end / (2 * temperature)) - _log_cosh(start / (2 * temperature))
        super().__init__(gamma_min, gamma_max)

    def uncut(self, u: Tensor, v: Tensor) -> Tensor:
        return _log_sinh(self._half * u) - _log_sinh(self._half * v) + self._offset

    def to_config(self) -> dict[str, Any]:
        return self._own | super().to_config()


def _log_sinh(value: Tensor) -> Tensor:
    """``log sinh`` of values above zero, which neither overflows nor cancels."""
    return value + torch.log(-torch.expm1(-2 * value)) - math.log(2)


def _log_cosh(value: float) -> float:
    return abs(value) + math.log1p(math.exp(-2 * abs(value))) - math.log(2)


class LaplaceSchedule(CutSchedule):
    """``gamma = -mean + scale sgn(1/2 - u) log(1 - 2 |u - 1/2|)``: log-SNR has a Laplace distribution.

    Hang, Gu, Geng and Guo (arXiv 2407.03297, table 1; their defaults are mean 0 and scale 0.5).

    Args:
        mean: The log-SNR around which it spends its time.
        scale: The width of the distribution.
        gamma_min: ``gamma(0)``.
        gamma_max: ``gamma(1)``.

    Raises:
        ConfigurationError: ``scale`` is not above zero, or too small to reach the endpoints.

    >>> schedule = LaplaceSchedule()
    >>> [round(float(gamma), 4) for gamma in schedule(torch.tensor([0.0, 0.25, 1.0]))]
    [-13.3, -0.3466, 5.0]
    """

    def __init__(
        self, mean: float = 0.0, scale: float = 0.5, gamma_min: float = -13.3, gamma_max: float = 5.0
    ) -> None:
        _require_location_and_scale("laplace", mean, scale)
        self.mean, self.scale = float(mean), float(scale)
        super().__init__(gamma_min, gamma_max)

    def uncut(self, u: Tensor, v: Tensor) -> Tensor:
        distance = torch.log(2 * torch.minimum(u, v))
        return -self.mean + self.scale * torch.where(u < v, distance, -distance)

    def to_config(self) -> dict[str, Any]:
        return {"mean": self.mean, "scale": self.scale} | super().to_config()


class ShiftedCosineSchedule(CutSchedule):
    """``gamma = 2 log tan(pi u / 2) + 2 log(resolution / base_resolution)``.

    Hoogeboom, Heek and Salimans, *simple diffusion* (arXiv 2301.11093, eq. 5): the cosine schedule, whose noise grows
    with the number of pixels that see the same object, so that an image of any resolution, averaged down to the base,
    is as noisy as there.

    Args:
        resolution: Of the images, in pixels a side.
        base_resolution: At which the plain cosine schedule holds; 32 or 64 in the paper.
        gamma_min: ``gamma(0)``.
        gamma_max: ``gamma(1)``.

    Raises:
        ConfigurationError: A resolution is below 1.

    >>> schedule, half = ShiftedCosineSchedule(resolution=128), torch.tensor(0.5)
    >>> round(float(schedule.uncut(half, half)), 4) == round(2 * math.log(2), 4)  # a quarter of the SNR, and 4 pixels
    True
    """

    def __init__(
        self, resolution: int, base_resolution: int = 64, gamma_min: float = -13.3, gamma_max: float = 5.0
    ) -> None:
        if not all(isinstance(pixels, int) and pixels >= 1 for pixels in (resolution, base_resolution)):
            raise ConfigurationError(
                f"the shifted cosine schedule got resolution={resolution!r} and base_resolution={base_resolution!r}: "
                f"give the images' pixels a side, whole numbers of at least 1."
            )
        self.resolution, self.base_resolution = resolution, base_resolution
        super().__init__(gamma_min, gamma_max)

    @classmethod
    def example_config(cls) -> dict[str, Any]:
        """The arguments that the conformance kit builds one with: there is no default resolution."""
        return {"resolution": 256}

    def uncut(self, u: Tensor, v: Tensor) -> Tensor:
        # cos(pi u / 2) = sin(pi v / 2)
        tangent = torch.log(torch.sin(math.pi / 2 * u)) - torch.log(torch.sin(math.pi / 2 * v))
        return 2 * tangent + 2 * math.log(self.resolution / self.base_resolution)

    def to_config(self) -> dict[str, Any]:
        return {"resolution": self.resolution, "base_resolution": self.base_resolution} | super().to_config()


class PolynomialSchedule(CutSchedule):
    """``alpha = 1 - u^power``, so ``gamma = log(1 - alpha^2) - 2 log alpha``.

    Hoogeboom, Satorras, Vignac and Welling (arXiv 2203.17003, appendix B, with power 2). Their offset of 1e-5, which
    keeps the ends finite, is replaced by the endpoints.

    Args:
        power: Of time.
        gamma_min: ``gamma(0)``.
        gamma_max: ``gamma(1)``.

    Raises:
        ConfigurationError: ``power`` is not above zero.

    >>> schedule = PolynomialSchedule(gamma_min=-10.0, gamma_max=10.0)
    >>> [round(float(gamma), 4) for gamma in schedule(torch.tensor([0.0, 1.0]))]
    [-10.0, 10.0]
    """

    def __init__(self, power: float = 2.0, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        if not 0 < power < math.inf:
            raise ConfigurationError(f"the polynomial schedule got power={power}: give a finite number above 0.")
        self.power = float(power)
        super().__init__(gamma_min, gamma_max)

    def uncut(self, u: Tensor, v: Tensor) -> Tensor:
        # 1 - alpha^2 = u^power (2 - u^power), and log u from the nearer end
        log_noise = self.power * torch.where(u < v, torch.log(u), torch.log1p(-v.clamp(max=0.5)))
        return log_noise + torch.log1p(-torch.expm1(log_noise)) - 2 * torch.log(-torch.expm1(log_noise))

    def to_config(self) -> dict[str, Any]:
        return {"power": self.power} | super().to_config()


class EDMLogNormalSchedule(CutSchedule):
    """``gamma = 2 (mean + std Phi^-1(u))``: the noise level ``sigma / alpha`` has EDM's log-normal distribution.

    Karras, Aittala, Aila and Laine (arXiv 2206.00364, table 1: ``ln sigma ~ N(-1.2, 1.2^2)``), read as a schedule
    (VDM++, arXiv 2303.00848, where log-SNR is ``N(2.4, 2.4^2)``): uniform times give the noise levels that EDM trains
    on.

    Args:
        mean: Of ``ln sigma``, the paper's P_mean.
        std: Of ``ln sigma``, the paper's P_std.
        gamma_min: ``gamma(0)``.
        gamma_max: ``gamma(1)``.

    Raises:
        ConfigurationError: ``std`` is not above zero, or too small to reach the endpoints.

    >>> schedule = EDMLogNormalSchedule(gamma_min=-12.4, gamma_max=7.6)  # as far on both sides of the mean
    >>> round(float(schedule(torch.tensor([0.5]))), 4)
    -2.4
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        _require_location_and_scale("edm_lognormal", mean, std)
        self.mean, self.std = float(mean), float(std)
        super().__init__(gamma_min, gamma_max)

    def uncut(self, u: Tensor, v: Tensor) -> Tensor:
        # the quantile from the nearer end
        quantile = torch.special.ndtri(torch.minimum(u, v))
        return 2 * (self.mean + self.std * torch.where(u < v, quantile, -quantile))

    def to_config(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std} | super().to_config()


def _require_location_and_scale(name: str, mean: float, scale: float) -> None:
    if not (math.isfinite(mean) and 0 < scale < math.inf):
        raise ConfigurationError(
            f"the {name} schedule got a mean of {mean} and a width of {scale}: give a finite mean, and a finite width "
            f"above 0."
        )
