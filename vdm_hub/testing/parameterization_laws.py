"""The laws of a target: what `Parameterization` promises.

The derived methods are held against their formulas, written out here: with
``z = alpha x + sigma eps``, ``F = a x + b eps`` and ``d = a sigma - b alpha``, ``x_hat = (sigma F - b z) / d`` and
``eps_hat = (a z - alpha F) / d`` (Luo section 4; VDM++ App. D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.decoders import FactorisedDecoder
from vdm_hub.diffusion.gaussian import alpha, sigma
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.diffusion.parameterizations import Epsilon, Parameterization
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.testing.laws import Laws, require
from vdm_hub.testing.subjects import (
    GAMMAS,
    SHAPE,
    json_round_trip,
    require_close,
    require_finite,
    require_registered,
    require_shape,
    seeded,
)

PARAMETERIZATION_LAWS = Laws("parameterizations", Parameterization)

_POINTS = 54  # even: no point at gamma = 0, where many formulas are at their tamest


def _gammas(dtype: torch.dtype = torch.float64, points: int = _POINTS) -> Tensor:
    return torch.linspace(*GAMMAS, points, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class _Case:
    """Random data, noise and output at each gamma, in float64, and the coefficients that the target itself gives."""

    gamma: Tensor
    x: Tensor
    eps: Tensor
    output: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, parameterization: Parameterization) -> _Case:
        gamma = _gammas()
        x, eps, wide = torch.randn(3, _POINTS, 5, generator=seeded(0), dtype=torch.float64).unbind()
        a, b = (c.double().reshape(-1, 1) for c in parameterization.coefficients(gamma))
        return cls(gamma, x, eps, 5 * (a.abs() * wide + b.abs() * wide.flip(0)), a, b)

    @property
    def alpha(self) -> Tensor:
        return alpha(self.gamma)[:, None]

    @property
    def sigma(self) -> Tensor:
        return sigma(self.gamma)[:, None]

    @property
    def z(self) -> Tensor:
        return self.alpha * self.x + self.sigma * self.eps

    @property
    def d(self) -> Tensor:
        return self.a * self.sigma - self.b * self.alpha

    def expect(self, actual: Tensor, first: Tensor, second: Tensor, what: str) -> None:
        """Require a sum of two terms, as precise as their sizes allow."""
        require_close(actual, first + second, what, rtol=1e-7, atol=1e-7 * (first.abs() + second.abs()))


@PARAMETERIZATION_LAWS.add
def coefficients(parameterization: Parameterization) -> None:
    """The coefficients (a, b) are finite, shaped and typed like gamma, and elementwise."""
    for dtype in (torch.float32, torch.float64):
        gamma = _gammas(dtype)
        for name, whole, alone in zip(
            "ab", parameterization.coefficients(gamma), parameterization.coefficients(gamma[7:8]), strict=True
        ):
            require_shape(whole, (_POINTS,), f"the coefficient {name} of {_POINTS} gammas")
            require(whole.dtype == dtype, f"the coefficient {name} of gammas in {dtype} is {whole.dtype}")
            require_finite(whole, f"the coefficient {name} for gamma in {list(GAMMAS)}")
            require_close(whole[7:8], alone, f"the coefficient {name} of one gamma among others, against alone,")


@PARAMETERIZATION_LAWS.add
def invertible(parameterization: Parameterization) -> None:
    """The output and z_t together determine the data: d = a sigma - b alpha never vanishes."""
    gamma = _gammas(points=1001)
    a, b = parameterization.coefficients(gamma)
    share = (a * sigma(gamma) - b * alpha(gamma)) / torch.hypot(a, b)
    worst = int(share.abs().argmin())
    same_sign = bool((share > 0).all() | (share < 0).all())
    require(
        same_sign and abs(float(share[worst])) > 1e-5,
        f"at gamma = {gamma[worst].item():.4g}, a = {a[worst].item():.6g} and b = {b[worst].item():.6g} give "
        f"d = a sigma - b alpha = {(share * torch.hypot(a, b))[worst].item():.3g}: the target is z_t itself there",
    )


@PARAMETERIZATION_LAWS.add
def target(parameterization: Parameterization) -> None:
    """Its `target` is F = a x + b eps."""
    case = _Case.of(parameterization)
    case.expect(parameterization.target(case.x, case.eps, case.gamma), case.a * case.x, case.b * case.eps, "target()")


@PARAMETERIZATION_LAWS.add
def x_hat(parameterization: Parameterization) -> None:
    """Its `x_hat` is (sigma F - b z) / d for any output F."""
    case = _Case.of(parameterization)
    actual = parameterization.x_hat(case.output, case.z, case.gamma)
    case.expect(actual, case.sigma * case.output / case.d, -case.b * case.z / case.d, "x_hat()")


@PARAMETERIZATION_LAWS.add
def eps_hat(parameterization: Parameterization) -> None:
    """Its `eps_hat` is (a z - alpha F) / d for any output F."""
    case = _Case.of(parameterization)
    actual = parameterization.eps_hat(case.output, case.z, case.gamma)
    case.expect(actual, case.a * case.z / case.d, -case.alpha * case.output / case.d, "eps_hat()")


@PARAMETERIZATION_LAWS.add
def score_hat(parameterization: Parameterization) -> None:
    """Its `score_hat` is -eps_hat / sigma for any output F (Luo eq. 151)."""
    case = _Case.of(parameterization)
    actual = parameterization.score_hat(case.output, case.z, case.gamma)
    scale = -1 / (case.sigma * case.d)
    case.expect(actual, scale * case.a * case.z, -scale * case.alpha * case.output, "score_hat()")


@PARAMETERIZATION_LAWS.add
def eps_error(parameterization: Parameterization) -> None:
    """Its `eps_error` is (eps - eps_hat)^2 = (alpha / d)^2 (target - F)^2 for any output F."""
    case = _Case.of(parameterization)
    actual = parameterization.eps_error(case.output, case.x, case.eps, case.gamma)
    error = case.a * case.x + case.b * case.eps - case.output
    require_close(actual, (case.alpha / case.d * error) ** 2, "eps_error()", rtol=1e-7, atol=1e-9)


@PARAMETERIZATION_LAWS.add
def gamma_per_dimension(parameterization: Parameterization) -> None:
    """With a gamma for each pixel, every pixel gets what it gets alone."""
    shape, case = (3, 1, 6, 3), _Case.of(parameterization)
    alone = {name: getattr(case, name)[:, :1] for name in ("x", "eps", "output", "z")}
    pixels = {name: value.reshape(shape) for name, value in alone.items()}
    for name in ("coefficients", "input_scale", "output_scale"):
        one, all_ = (torch.stack([*getattr(parameterization, name)(gamma)]) for gamma in _by_shape(case.gamma, shape))
        require(one.numel() == all_.numel(), f"{name}() of a gamma per pixel has the shape {tuple(all_.shape)}")
        require_close(all_.flatten(), one.flatten(), f"{name}() of a gamma per pixel, against alone,", 1e-9, 1e-12)
    for name, words in (
        ("target", ("x", "eps")),
        ("x_hat", ("output", "z")),
        ("eps_hat", ("output", "z")),
        ("score_hat", ("output", "z")),
        ("eps_error", ("output", "x", "eps")),
    ):
        method, (flat, whole) = getattr(parameterization, name), _by_shape(case.gamma, shape)
        found = method(*(pixels[word] for word in words), whole)
        require_shape(found, shape, f"{name}() of a gamma per pixel")
        wanted = method(*(alone[word] for word in words), flat)
        require_close(found.flatten(), wanted.flatten(), f"{name}() of a gamma per pixel, against alone,", 1e-7, 1e-9)


def _by_shape(gamma: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return gamma, gamma.reshape(shape)


@PARAMETERIZATION_LAWS.add
def scales(parameterization: Parameterization) -> None:
    """Its `input_scale` and `output_scale` are positive and finite, shaped and typed like gamma."""
    for dtype in (torch.float32, torch.float64):
        gamma = _gammas(dtype)
        for name in ("input_scale", "output_scale"):
            scale = getattr(parameterization, name)(gamma)
            require_shape(scale, (_POINTS,), f"{name}() of {_POINTS} gammas")
            require(scale.dtype == dtype, f"{name}() of gammas in {dtype} is {scale.dtype}")
            require_finite(scale, f"{name}() for gamma in {list(GAMMAS)}")
            require((scale > 0).all(), f"{name}() falls to {scale.min().item():.3g}")


@PARAMETERIZATION_LAWS.add
def sizes(parameterization: Parameterization) -> None:
    """What the network reads and emits is of a size that a network can read and emit: at most 4 for unit x and eps.

    Unless its networks see to that themselves (`Parameterization.networks_scale`).
    """
    if parameterization.networks_scale:
        return
    gamma = _gammas()
    a, b = parameterization.coefficients(gamma)
    emitted = (a.abs() + b.abs()) / parameterization.output_scale(gamma)
    read = parameterization.input_scale(gamma) * (alpha(gamma) + sigma(gamma))
    for name, size, method in (("output", emitted, "output_scale"), ("input", read, "input_scale")):
        worst = int(size.argmax())
        require(
            not bool((size > 4).any()),
            f"the network's {name} reaches {size[worst].item():.4g} at gamma = {gamma[worst].item():.4g}: override "
            f"{method}()",
        )


@PARAMETERIZATION_LAWS.add
def one_loss(parameterization: Parameterization) -> None:
    """One denoiser seen through this target gives the loss that it has through epsilon, in float64 and float32."""
    expected, _ = _losses(Epsilon(), torch.float64)
    require_close(_losses(parameterization, torch.float64)[0], expected, "the loss in float64", rtol=1e-6, atol=1e-9)
    actual, weight = _losses(parameterization, torch.float32)
    # The floor, in mean squared error of eps_hat: what the rounding of x and z_t leaves near zero.
    require_close(actual, expected, "the loss in float32", rtol=1e-3, atol=1e-5 * weight.double())


def _losses(parameterization: Parameterization, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rate of the bound for Gaussian data with their exact denoiser, and the weight of ``|eps - eps_hat|^2``.

    The dimensions have variances from 1e-6 to 1, so that at every gamma some can be told from the noise in part.
    """
    schedule, batch = LinearSchedule(), 24
    variance = torch.logspace(-6, 0, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    scaling, conditioning = DataScaling("bin_centers", 256), AffineConditioning()
    process = GaussianProcess(schedule, parameterization, conditioning, FactorisedDecoder(), scaling)

    def network(sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        gamma = conditioning.inverse(timestep.double()).reshape(-1, 1, 1, 1)
        z = sample.double() / parameterization.input_scale(gamma)
        whitened = z / (alpha(gamma) ** 2 * variance + sigma(gamma) ** 2)
        a, b = parameterization.coefficients(gamma)
        f = a * alpha(gamma) * variance * whitened + b * sigma(gamma) * whitened
        return (f / parameterization.output_scale(gamma)).to(sample.dtype)

    x, eps = torch.randn(2, batch, *SHAPE, generator=seeded(3), dtype=torch.float64).unbind()
    x, noise = (variance.sqrt() * x).to(dtype), {"marginal": eps.to(dtype)}
    with torch.no_grad():
        times = torch.linspace(0, 1, batch, dtype=torch.float64).to(dtype)
        rate = process.bind(x, noise)[1].kl_rate(x, times, noise, network)
    slope = schedule.gamma_max - schedule.gamma_min
    return rate, torch.tensor(0.5 * slope * x[0].numel())


@PARAMETERIZATION_LAWS.add
def json_config(parameterization: Parameterization) -> None:
    """Its `to_config` is JSON, and builds the same target again."""
    config = json_round_trip(parameterization.to_config(), "to_config()")
    again = type(parameterization)(**config)
    gamma = _gammas()
    for name in ("coefficients", "input_scale", "output_scale"):
        after, before = (torch.stack([*getattr(one, name)(gamma)]) for one in (again, parameterization))
        require_close(after, before, f"{name}() of the target rebuilt from {config!r:.200}", rtol=0, atol=0)


@PARAMETERIZATION_LAWS.add
def registered(parameterization: Parameterization) -> None:
    """The class is the entry point of an installed package, so that a config can name it."""
    require_registered("parameterizations", type(parameterization))
