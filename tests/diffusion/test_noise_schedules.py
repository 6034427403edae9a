"""Law 2, beyond what the conformance kit holds of every schedule: for any endpoints and times, and in the bound."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

import registered
from exact_denoisers import aligned_panels, continuous_diffusion_term, quadratic_points, unit_interval
from vdm_hub import registry
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.noise_schedules import (
    DiscreteBetasSchedule,
    LinearSchedule,
    NoiseSchedule,
    TabulatedSchedule,
    gamma_and_derivative,
)
from vdm_hub.errors import ConfigurationError

NAMES = registered.names("noise_schedules")
every_schedule = pytest.mark.parametrize("name", NAMES)
ENDPOINTS = st.tuples(st.floats(-20, 0), st.floats(0.5, 25)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def grid(points: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64).to(dtype)


def values(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    with torch.no_grad():
        gamma = schedule(t)
    assert isinstance(gamma, Tensor)
    return gamma


@every_schedule
@given(endpoints=ENDPOINTS)
def test_law_2_for_any_endpoints(name: str, endpoints: tuple[float, float]) -> None:
    if "gamma_min" not in registered.schedule(name).to_config():
        pytest.skip(f"{name} has no endpoints to choose")
    schedule = registered.schedule(name, gamma_min=endpoints[0], gamma_max=endpoints[1])
    for dtype in (torch.float32, torch.float64):
        ends = values(schedule, torch.tensor([0.0, 1.0], dtype=dtype)).double()
        torch.testing.assert_close(ends, torch.tensor(endpoints, dtype=torch.float64), rtol=2e-6, atol=2e-6)
    assert float(values(schedule, grid(513, torch.float64)).diff().min()) > 0


@every_schedule
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_law_2_the_derivative_is_that_of_autograd(name: str, times: list[float]) -> None:
    schedule = registered.learned(name)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    gamma = schedule(t)
    (expected,) = torch.autograd.grad(gamma.sum(), t)
    value, derivative = gamma_and_derivative(schedule, t.detach())
    assert torch.equal(value, gamma)
    torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-10)
    assert float(derivative.detach().min()) >= 0


@every_schedule
def test_law_2_the_derivative_integrates_to_the_difference_of_the_endpoints(name: str) -> None:
    schedule = registered.learned(name)
    times, weights = unit_interval(1998)  # a multiple of the panels of both tables
    with torch.no_grad():
        derivative = gamma_and_derivative(schedule, times)[1]
    first, last = schedule.endpoints()
    assert float(derivative @ weights) == pytest.approx(last - first, rel=1e-7)


@given(endpoints=ENDPOINTS)
@pytest.mark.parametrize("name", ["linear", "cosine", "learned_linear", "learned_monotone"])
def test_law_2_json_round_trip_for_any_endpoints(name: str, endpoints: tuple[float, float]) -> None:
    schedule = registered.schedule(name, gamma_min=endpoints[0], gamma_max=endpoints[1])
    again = registry.build("noise_schedules", json.loads(json.dumps(registry.serialise("noise_schedules", schedule))))
    assert torch.equal(values(again, grid(65, torch.float32)), values(schedule, grid(65, torch.float32)))


@every_schedule
def test_law_2_a_learned_schedule_is_published_as_a_table_of_the_same_gamma(name: str) -> None:
    schedule = registered.learned(name)
    baked = schedule.bake()
    if not list(schedule.parameters()):
        assert baked is schedule
        return
    assert not list(baked.parameters())
    published = registry.build("noise_schedules", json.loads(json.dumps(registry.serialise("noise_schedules", baked))))
    t = grid(10_001, torch.float64)
    assert torch.equal(values(published, t), values(baked, t))
    assert published.endpoints() == schedule.endpoints()
    knots = grid(schedule.baked_knots, torch.float64)
    torch.testing.assert_close(values(baked, knots), values(schedule, knots), rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(values(baked, t), values(schedule, t), rtol=0, atol=1e-4)
    assert float(values(baked, t).diff().min()) > 0


class AffineInZ(nn.Module):
    """A network that is no denoiser of anything; it knows gamma only."""

    def __init__(self, conditioning: AffineConditioning) -> None:
        super().__init__()
        self.conditioning = conditioning

    def bare(self, sample: Tensor, timestep: Tensor) -> Tensor:
        gamma = self.conditioning.inverse(timestep)[:, None]
        return torch.tanh(gamma / 3) * sample + 0.3 * torch.sin(gamma)


@every_schedule
def test_law_2_the_continuous_bound_depends_only_on_the_endpoints(name: str) -> None:
    """Any network conditioned on gamma, exact or not: each schedule's integral is the linear schedule's."""
    conditioning = AffineConditioning(-15.0, 15.0)
    network = AffineInZ(conditioning).bare
    points = quadratic_points(torch.tensor([[0.25]]))

    def term(schedule: NoiseSchedule) -> float:
        process = registered.process(schedule, conditioning=conditioning)
        return continuous_diffusion_term(process, network, points, aligned_panels(schedule, 300))

    for schedule in (registered.scalar_schedule(name), registered.learned(name), registered.learned(name).bake()):
        expected = term(LinearSchedule(*schedule.endpoints()))
        assert expected > 1
        assert term(schedule) == pytest.approx(expected, rel=1e-7)


@given(
    st.lists(st.floats(0.01, 5), min_size=1, max_size=40),
    st.floats(-20, 0),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_a_table_is_exact_at_its_knots_and_monotone_between(
    steps: list[float], first: float, times: list[float]
) -> None:
    knots = torch.tensor([first, *steps], dtype=torch.float64).cumsum(0)
    schedule = TabulatedSchedule(knots.tolist())
    torch.testing.assert_close(values(schedule, grid(len(knots), torch.float64)), knots, rtol=1e-13, atol=1e-13)
    assert schedule.endpoints() == (knots[0].item(), knots[-1].item())
    assert float(values(schedule, grid(2001, torch.float64)).diff().min()) > 0
    t = torch.tensor(times, dtype=torch.float64)
    left = (t * (len(knots) - 1)).floor().long().clamp(max=len(knots) - 2)
    gamma = values(schedule, t)
    assert bool(((gamma >= knots[left] - 1e-9) & (gamma <= knots[left + 1] + 1e-9)).all())


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=40))
def test_a_table_is_interpolated_as_scipy_does(steps: list[float]) -> None:
    knots = torch.tensor([-13.3, *steps], dtype=torch.float64).cumsum(0)
    t = grid(501, torch.float64)
    expected = PchipInterpolator(grid(len(knots), torch.float64).numpy(), knots.numpy())(t.numpy())
    torch.testing.assert_close(values(TabulatedSchedule(knots.tolist()), t), torch.from_numpy(expected))


def test_a_beta_table_gives_each_latent_the_alpha_bar_of_the_float32_product() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    alpha_bar = torch.cumprod(1 - betas, 0).double()
    schedule = DiscreteBetasSchedule(betas.tolist())
    gamma = values(schedule, grid(1000, torch.float64))
    torch.testing.assert_close(1 / (1 + gamma.exp()), alpha_bar, rtol=1e-12, atol=0)


def test_a_beta_table_with_zero_terminal_snr_stays_finite() -> None:
    betas = [*torch.linspace(1e-4, 0.02, 999).tolist(), 1.0]
    schedule = DiscreteBetasSchedule(betas)
    assert schedule.endpoints()[1] == pytest.approx(24 * math.log(2), abs=1e-6)
    assert float(values(schedule, grid(4001, torch.float64)).diff().min()) > 0


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("linear", {"gamma_min": 5.0, "gamma_max": -13.3}, ["gamma_min=5.0", "gamma_max=-13.3"]),
        ("cosine", {"gamma_max": math.inf}, ["inf", "finite"]),
        ("learned_linear", {"gamma_min": math.nan}, ["nan", "finite"]),
        ("learned_monotone", {"gamma_min": 7.0}, ["gamma_min=7.0"]),
        ("tabulated", {"gammas": [-5.0, 1.0, 0.5, 5.0]}, ["knot 2", "0.5", "1", "increase"]),
        ("tabulated", {"gammas": [1.0]}, ["at least two"]),
        ("tabulated", {"gammas": [1.0, math.nan]}, ["finite"]),
        ("discrete_betas", {"betas": [0.1, -0.1]}, ["above 0"]),
        ("discrete_betas", {"betas": [0.1, 0.0]}, ["above 0"]),
        ("discrete_betas", {"betas": [0.1, 1.0, 1.0]}, ["increase"]),
        ("discrete_betas", {"betas": [1e-9, 1e-9]}, ["finite"]),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_value(name: str, arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        registry.build("noise_schedules", {"name": name, "config": arguments})
    for word in words:
        assert word in str(caught.value)
