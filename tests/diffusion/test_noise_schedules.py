"""Law 2, beyond what the conformance kit holds of every schedule: for any endpoints and times, and in the bound."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
from vdm_hub.diffusion.draws import normal_noise
from vdm_hub.diffusion.noise_schedules import (
    BoundGamma,
    CosineSchedule,
    DiscreteBetasSchedule,
    Gamma,
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
    t = grid(2_001, torch.float64)
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
    expected = PchipInterpolator(grid(len(knots), torch.float64).numpy(), knots.numpy())
    value, slope = TabulatedSchedule(knots.tolist()).with_derivative(t)
    torch.testing.assert_close(value, torch.from_numpy(expected(t.numpy())))
    torch.testing.assert_close(slope, torch.from_numpy(expected.derivative()(t.numpy())))
    assert [float(value[0]), float(value[-1])] == [float(knots[0]), float(knots[-1])]


def test_a_table_holds_its_knots_where_a_model_is_sketched_on_the_meta_device() -> None:
    """As diffusers does while it loads a component: knots are no weights that would come later."""
    with torch.device("meta"):
        schedule = TabulatedSchedule([-5.0, 0.0, 3.0])
    assert schedule(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-5.0, 0.0, 3.0]


def test_a_beta_table_gives_each_latent_the_alpha_bar_of_the_float32_product() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    alpha_bar = torch.cumprod(1 - betas, 0).double()
    schedule = DiscreteBetasSchedule(betas.tolist())
    gamma = values(schedule, grid(1000, torch.float64))
    torch.testing.assert_close(1 / (1 + gamma.exp()), alpha_bar, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("betas", "alpha_bar"),
    [(torch.linspace(1e-4, 0.02, 999).tolist(), 2.0**-24), ([0.9, 1 - 2.0**-20, 1 - 2.0**-20], 0.1 * 2.0**-41)],
)
def test_a_beta_table_with_zero_terminal_snr_stays_finite(betas: list[float], alpha_bar: float) -> None:
    schedule = DiscreteBetasSchedule([*betas, 1.0])
    assert schedule.endpoints()[1] == pytest.approx(-math.log(alpha_bar), abs=1e-6)
    assert float(values(schedule, grid(4001, torch.float64)).diff().min()) > 0


@pytest.mark.parametrize("name", ["linear", "cosine", "tabulated", "discrete_betas", "learned_linear"])
def test_the_inverse_finds_the_time_and_none_outside(name: str) -> None:
    schedule = registered.learned(name)
    t = grid(12, torch.float64).reshape(3, 4)
    found = schedule.inverse(values(schedule, t.flatten()).reshape(3, 4))
    torch.testing.assert_close(found, t, rtol=0, atol=1e-12)
    assert (found[0, 0], found[2, 3]) == (0, 1)
    beyond = torch.tensor(schedule.endpoints()) + torch.tensor([-1.0, 1.0])
    assert schedule.inverse(beyond).tolist() == [0, 1] and schedule.inverse(beyond).dtype == torch.float64


def test_schedules_are_what_their_arguments_say() -> None:
    for cls in (LinearSchedule, CosineSchedule):
        assert cls().to_config() == {"gamma_min": -13.3, "gamma_max": 5.0}
    assert LinearSchedule().endpoints() == (-13.3, 5.0) and LinearSchedule().scalar
    assert values(CosineSchedule(-4.0, 4.0), torch.tensor([0.5])).tolist() == pytest.approx([0], abs=1e-6)
    assert values(TabulatedSchedule([-1.0, 1.0]), torch.tensor([0.5])).dtype == torch.float32


class Drawn(NoiseSchedule):
    """A gamma that depends on a draw; of each of two pixels."""

    scalar = False

    def forward(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        return {"own": normal_noise((batch_size,), generator, device)}

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        (own,) = noise["own"].double()
        return {}, lambda t: t[:, None] * torch.tensor([3.0, 5.0]).double() + own

    def to_config(self) -> dict[str, Any]:
        return {}


def test_the_endpoints_of_a_gamma_per_pixel_are_its_means_under_one_fixed_draw() -> None:
    own = float(normal_noise((1,), torch.Generator().manual_seed(0), torch.device("cpu")))
    assert Drawn().endpoints() == pytest.approx((own, own + 4), rel=1e-14)


def test_a_class_with_a_gamma_of_its_own_has_its_own_derivative() -> None:
    class Doubled(LinearSchedule):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * super().forward(t)

    class Known(LinearSchedule):
        def forward(self, t: Tensor) -> Tensor:
            return super().forward(t)

        def with_derivative(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return self(t), torch.zeros_like(t)

    t = torch.tensor([0.5])
    for cls, slope in ((Doubled, 20.0), (Known, 0.0), (type("Named", (LinearSchedule,), {}), 10.0)):
        assert gamma_and_derivative(cls(-6.0, 4.0), t)[1].tolist() == [slope]


def test_any_function_of_time_has_a_derivative_that_carries_gradients() -> None:
    """``p t^3`` for two pixels at once; to p and to t, where they are asked for, and to nothing where they are not."""
    p = torch.tensor([2.0, 5.0], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)

    def gamma(t: Tensor) -> Tensor:
        return p * t[:, None] ** 3

    value, slope = gamma_and_derivative(BoundGamma(gamma, torch.zeros(2, 1)), t)
    torch.testing.assert_close(value, p * t[:, None] ** 3)
    torch.testing.assert_close(slope, 3 * p * t[:, None] ** 2)
    to_p, to_t = torch.autograd.grad(slope.sum(), [p, t], retain_graph=True)
    torch.testing.assert_close(to_p, (3 * t**2).sum().expand(2))
    torch.testing.assert_close(to_t, 6 * p.sum() * t)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), t)[0], 3 * p.sum() * t**2)
    with torch.no_grad():
        found = gamma_and_derivative(gamma, t)
    assert not any(each.requires_grad for each in found)
    torch.testing.assert_close(found, (value.detach(), slope.detach()))
    with torch.inference_mode():
        torch.testing.assert_close(gamma_and_derivative(gamma, t.detach()), found)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("linear", {"gamma_min": 5.0, "gamma_max": -13.3}, ["gamma_min=5.0", "gamma_max=-13.3"]),
        ("cosine", {"gamma_max": math.inf}, ["inf", "finite"]),
        ("learned_linear", {"gamma_min": math.nan}, ["nan", "finite"]),
        ("learned_monotone", {"gamma_min": 7.0}, ["gamma_min=7.0"]),
        ("learned_monotone", {"hidden_features": 65_537}, ["65537", "65,536"]),
        ("learned_monotone", {"hidden_features": 0}, ["65,536"]),
        ("tabulated", {"gammas": [-5.0, 1.0, 0.5, 5.0]}, ["knot 2", "0.5", "1", "increase"]),
        ("tabulated", {"gammas": [-5.0, 1.0, 1.0]}, ["knot 2", "1", "increase"]),
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
