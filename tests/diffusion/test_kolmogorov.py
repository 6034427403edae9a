"""The transition density of every schedule solves Kolmogorov's forward and backward equations, by differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import registered
from exact_denoisers import PerPixelSchedule
from vdm_hub.diffusion.continuous_time import DiffusionSDE
from vdm_hub.diffusion.noise_schedules import Gamma

# Away from 0, 1/2 and 1 and from each other: t - s decides the density's width, and so how large its derivatives are.
PAIRS = [(s, t) for s in (0.13, 0.37, 0.61) for t in (0.79, 0.91)]


def sde_of(name: str) -> DiffusionSDE:
    return DiffusionSDE(registered.learned(name).double())


def derivative(value: Tensor, by: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), by, create_graph=True)
    return gradient


def points(sde: DiffusionSDE, s: float, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, t, z_s, z_t), each (B,) or (B, 1): z_t within two deviations of its mean, where the density is not tiny."""
    generator = torch.Generator().manual_seed(0)
    z_s = torch.randn(8, 1, dtype=torch.float64, generator=generator)
    times = [torch.full((8,), value, dtype=torch.float64) for value in (s, t)]
    with torch.no_grad():
        gammas = [sde.gamma(value).reshape(8, -1)[:, :1] for value in times]
        log_gain = 0.5 * (torch.nn.functional.logsigmoid(-gammas[1]) - torch.nn.functional.logsigmoid(-gammas[0]))
        deviation = (-torch.expm1(2 * log_gain)).sqrt()
    offsets = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    z_t = log_gain.exp() * z_s + deviation * offsets
    return (*(value.requires_grad_() for value in times), z_s.requires_grad_(), z_t.requires_grad_())


def forward_residual(sde: DiffusionSDE, s: float, t: float, drift_sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """``d_t q + d_z (f z q) - 1/2 g^2 d_z^2 q``, and the size of its largest part; q = q(z_t|z_s)."""
    start, end, z_s, z_t = points(sde, s, t)
    q = sde.log_transition(z_t, z_s, start, end).exp()
    f, g_squared = sde.coefficients(z_t, end)
    in_time = derivative(q, end)[:, None]
    transport = drift_sign * derivative(f * z_t * q, z_t)
    spread = 0.5 * g_squared * derivative(derivative(q, z_t), z_t)
    return in_time + transport - spread, torch.stack([in_time, transport, spread]).abs().amax()


def backward_residual(sde: DiffusionSDE, s: float, t: float, time_sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """``d_s q + f z_s d_{z_s} q + 1/2 g^2 d_{z_s}^2 q``, and the size of its largest part."""
    start, end, z_s, z_t = points(sde, s, t)
    q = sde.log_transition(z_t, z_s, start, end).exp()
    f, g_squared = sde.coefficients(z_s, start)
    in_time = time_sign * derivative(q, start)[:, None]
    slope = derivative(q, z_s)
    transport, spread = f * z_s * slope, 0.5 * g_squared * derivative(slope, z_s)
    return in_time + transport + spread, torch.stack([in_time, transport, spread]).abs().amax()


Residual = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("residual", [forward_residual, backward_residual])
@pytest.mark.parametrize("name", registered.names("noise_schedules"))
def test_the_transition_density_solves_the_equation(name: str, residual: Residual) -> None:
    """Only rounding is left: 1e-9 of the largest part, which after two differentiations is ten times what is seen."""
    sde = sde_of(name)
    for s, t in PAIRS:
        left, size = residual(sde, s, t)
        assert float(left.detach().abs().max()) < 1e-9 * float(size.detach()), (name, s, t)


def test_the_transition_density_integrates_to_one_around_its_mean() -> None:
    """By the trapezoidal rule, which converges geometrically."""
    s, t, z_s = (torch.tensor([value], dtype=torch.float64) for value in (0.37, 0.79, 0.3))
    z_t = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    sde = sde_of("linear")
    density = sde.log_transition(z_t[:, None], z_s, s, t)[:, 0].exp()
    assert float(torch.trapezoid(density, z_t)) == pytest.approx(1, abs=1e-12)
    mean = (torch.sigmoid(-sde.gamma(t)) / torch.sigmoid(-sde.gamma(s))).sqrt() * z_s
    assert float(torch.trapezoid(density * z_t, z_t)) == pytest.approx(float(mean), abs=1e-12)


@pytest.mark.parametrize(
    ("residual", "wrong"), [(forward_residual, {"drift_sign": -1.0}), (backward_residual, {"time_sign": -1.0})]
)
def test_a_wrong_sign_is_found(residual: Residual, wrong: dict[str, float]) -> None:
    """As some lecture notes print the backward equation; the heat kernel then violates it."""
    left, size = residual(sde_of("linear"), 0.37, 0.79, **wrong)
    assert float(left.detach().abs().max()) > 0.1 * float(size.detach())


def elementwise(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The derivative of each element by its own argument, or by its datum's time."""
    slope: Tensor = torch.func.jvp(function, (at,), (torch.ones_like(at),))[1]
    return slope


def test_a_gamma_per_pixel_has_an_equation_per_pixel() -> None:
    generator = torch.Generator().manual_seed(1)
    tilt, bump, *x = (torch.randn(1, 4, 4, dtype=torch.float64, generator=generator) for _ in range(4))
    schedule, z_s = PerPixelSchedule(-8.0, 4.0, tilt, bump), torch.stack(x)
    gamma: Gamma = schedule.bind(z_s, {})[1]
    sde, (s, t) = DiffusionSDE(gamma), (torch.full((2,), value, dtype=torch.float64) for value in (0.35, 0.6))
    z_t = 0.8 * z_s + 0.5 * torch.randn(z_s.shape, dtype=torch.float64, generator=generator)

    def q(to: Tensor = z_t, of: Tensor = z_s, start: Tensor = s, end: Tensor = t) -> Tensor:
        return sde.log_transition(to, of, start, end).exp()

    f, g_squared = sde.coefficients(z_t, t)
    assert f.shape == g_squared.shape == z_t.shape
    transport = elementwise(lambda z: f * z * q(to=z), z_t)
    spread = 0.5 * g_squared * elementwise(lambda z: elementwise(lambda y: q(to=y), z), z_t)
    in_time = elementwise(lambda time: q(end=time), t)
    assert float(in_time.abs().max()) > 0.1
    torch.testing.assert_close(in_time, spread - transport, rtol=1e-9, atol=1e-10)

    f, g_squared = sde.coefficients(z_s, s)
    drift = f * z_s * elementwise(lambda z: q(of=z), z_s)
    spread = 0.5 * g_squared * elementwise(lambda z: elementwise(lambda y: q(of=y), z), z_s)
    torch.testing.assert_close(elementwise(lambda time: q(start=time), s), -drift - spread, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", registered.names("noise_schedules"))
def test_the_reverse_sde_and_the_flow_carry_a_gaussian_s_marginals(name: str) -> None:
    """For data N(0, 4), ``score = -z / v`` and the marginals' variance v(t) solves each equation's own for the second
    moment: back in time ``dv/dt = 2 (f + g^2/v) v - g^2`` for the SDE, ``2 (f + 1/2 g^2/v) v`` for the flow."""
    sde = sde_of(name)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)

    def variance(time: Tensor) -> Tensor:
        gamma = sde.gamma(time)
        return 4 * torch.sigmoid(-gamma) + torch.sigmoid(gamma)

    _, slope = torch.func.jvp(variance, (t,), (torch.ones_like(t),))
    v = variance(t)[:, None]
    z = torch.full_like(v, 3)
    reverse, flow = (drift(z, t, -z / v) / z for drift in (sde.reverse_drift, sde.flow_drift))
    forward = 2 * sde.drift(z, t) / z * v + sde.diffusion_squared(z, t)
    torch.testing.assert_close(forward, slope[:, None], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(2 * reverse * v - sde.diffusion_squared(z, t), slope[:, None], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(2 * flow * v, slope[:, None], rtol=1e-9, atol=1e-9)
