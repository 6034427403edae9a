"""What trains a learned schedule: the bound its endpoints, the variance of the bound's estimator its shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import registered
from naming import naming
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.learned_schedules import LearnedLinearSchedule, LearnedMonotoneSchedule, VarianceGradient
from vdm_hub.diffusion.noise_schedules import Gamma, NoiseSchedule, gamma_and_derivative
from vdm_hub.errors import ConfigurationError

BATCH, DIMENSIONS = 6, 12
LEARNED = [n for n in registered.names("noise_schedules") if list(registered.schedule(n).parameters())]


class Network(nn.Module):
    """A small network in float64 that is far from a denoiser, and nonlinear in gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(DIMENSIONS, DIMENSIONS, dtype=torch.float64)
        nn.init.normal_(self.mix.weight, std=0.2, generator=torch.Generator().manual_seed(5))
        nn.init.normal_(self.mix.bias, std=0.2, generator=torch.Generator().manual_seed(6))

    def bare(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.sin(self.mix(sample) + timestep[:, None] / 300)


class OfModules(NoiseSchedule):
    """A shape that is a module's, with parts that may be absent, between endpoints of which one is a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1, bias=False)  # `bias` is a parameter that is None
        nn.init.constant_(self.inner.weight, 0.5)
        self.register_module("absent", None)
        self.first, self.span = -8.0, nn.Parameter(torch.tensor(12.0))

    def variance_parameters(self) -> set[str]:
        return {"inner.weight"}

    def forward(self, t: Tensor) -> Tensor:
        weight = self.inner.weight[0, 0]
        return self.first + self.span * torch.expm1(weight * t) / torch.expm1(weight)

    def to_config(self) -> dict[str, Any]:
        return {}


class PerPixel(OfModules):
    """Another gamma for each pixel."""

    scalar = False

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t)[:, None] * torch.linspace(1, 1.2, DIMENSIONS, dtype=t.dtype)


CLASSES = {"of modules": OfModules, "per pixel": PerPixel}


class Evaluation:
    """One batch, its draws, and the losses L_i in nats per dimension as a function of (gamma, gamma')."""

    def __init__(self, name: str) -> None:
        schedule = CLASSES[name]() if name in CLASSES else registered.learned(name)
        self.schedule: NoiseSchedule = schedule.double()
        self.process: GaussianProcess = registered.process(self.schedule)
        self.network = Network()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(BATCH, DIMENSIONS, dtype=torch.float64, generator=generator) * 2 - 1
        self.eps = torch.randn(BATCH, DIMENSIONS, dtype=torch.float64, generator=generator)
        self.t = torch.rand(BATCH, dtype=torch.float64, generator=generator)

    def library(self) -> Tensor:
        noise = {"marginal": self.eps}
        return self.process.bind(self.x, noise)[1].kl_rate(self.x, self.t, noise, self.network.bare) / DIMENSIONS

    def written_out(self, constant: set[str]) -> Tensor:
        """``L_i = gamma'/2 |eps - eps_hat|^2 / D`` with some of the schedule's parameters held fixed."""
        parameters = {n: p.detach() if n in constant else p for n, p in self.schedule.named_parameters()}

        def gamma_of(t: Tensor) -> Tensor:
            gamma: Tensor = torch.func.functional_call(self.schedule, parameters, (t,))
            return gamma

        gamma, prime = (each.reshape(BATCH, -1) for each in gamma_and_derivative(gamma_of, self.t))
        z = (1 / (1 + gamma.exp())).sqrt() * self.x + (1 / (1 + (-gamma).exp())).sqrt() * self.eps
        eps_hat = self.network.bare(z, self.process.conditioning(gamma.mean(1)))
        return (0.5 * prime * (self.eps - eps_hat) ** 2).mean(1)


@pytest.mark.parametrize("name", [*LEARNED, *CLASSES])
def test_shape_gets_the_gradient_of_the_squared_losses_and_the_rest_that_of_the_bound(name: str) -> None:
    evaluation = Evaluation(name)
    schedule = evaluation.schedule
    shape = schedule.variance_parameters()
    others = {n for n, _ in schedule.named_parameters()} - shape
    assert shape <= {n for n, _ in schedule.named_parameters()}

    losses = evaluation.library()
    losses.mean().backward()
    parameters = dict(schedule.named_parameters())

    plain = evaluation.written_out(constant=shape)
    torch.testing.assert_close(losses, plain, rtol=1e-10, atol=0)
    network = list(evaluation.network.parameters())
    wanted = [parameters[n] for n in sorted(others)]
    expected = torch.autograd.grad(plain.mean(), [*wanted, *network])
    for parameter, gradient in zip([*wanted, *network], expected, strict=True):
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-14)

    if shape:
        squares = (evaluation.written_out(constant=others) ** 2).mean()
        wanted = [parameters[n] for n in sorted(shape)]
        for parameter, gradient in zip(wanted, torch.autograd.grad(squares, wanted), strict=True):
            assert float(gradient.abs().max()) > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-13)


def test_a_monotone_network_starts_as_it_is_documented() -> None:
    """Slope 1, hidden weights softplus(5) whose kinks are spread over [0, 1], output weights softplus(-4)."""
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    weight, out = math.log1p(math.exp(5)), math.log1p(math.exp(-4))
    shape = t + (out * torch.sigmoid(weight * t[:, None] - torch.tensor([0, 2.5, 5]))).mean(1)
    expected = -8 + 12 * (shape - shape[0]) / (shape[-1] - shape[0])
    found = LearnedMonotoneSchedule(-8.0, 4.0, hidden_features=3)(t)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)  # its slope is 1 to four digits
    default = LearnedMonotoneSchedule()
    assert default.endpoints() == pytest.approx((-13.3, 5), rel=1e-6) and len(default.hidden_bias) == 1024
    assert LearnedLinearSchedule().endpoints() == pytest.approx((-13.3, 5), rel=1e-6)


@pytest.mark.parametrize("name", LEARNED)
def test_times_in_float64_lose_nothing(name: str) -> None:
    schedule = registered.learned(name)  # its parameters are float32
    first, last = schedule(torch.arange(2.0, dtype=torch.float64)).tolist()
    ends = {end: float(parameter.detach()) for end, parameter in schedule.named_parameters() if "gamma" in end}
    assert first == ends["gamma_min"]
    assert last == pytest.approx(ends["gamma_max"], abs=1e-6)  # the ends' difference is rounded to float32


@pytest.mark.parametrize("name", LEARNED)
def test_a_time_alone_has_the_gamma_of_a_batch_of_one(name: str) -> None:
    schedule, t = registered.learned(name), torch.tensor([0.3], dtype=torch.float64)
    for alone, one in zip(schedule.with_derivative(t[0]), schedule.with_derivative(t), strict=True):
        torch.testing.assert_close(alone, one[0])


def test_a_shape_of_another_gamma_than_the_schedule_is_refused_where_it_is_trained() -> None:
    class Bound(OfModules):
        def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
            return {}, lambda t: self(t) + 1

    t, schedule = torch.tensor([0.3]), Bound()
    gamma = schedule.bind(None, {})[1]
    with pytest.raises(ConfigurationError, match=naming("inner.weight")):
        VarianceGradient(schedule, gamma)
    with torch.no_grad():
        assert torch.equal(VarianceGradient(schedule, gamma)(t)[0], schedule(t) + 1)
    schedule.inner.requires_grad_(False)  # then it is not trained
    assert torch.equal(VarianceGradient(schedule, gamma)(t)[0], schedule(t) + 1)


def test_the_shape_is_trained_by_something_in_at_least_one_schedule() -> None:
    assert any(registered.schedule(name).variance_parameters() for name in LEARNED)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("frozen", ["all", "endpoints", "shape"])
def test_parameters_may_be_frozen(name: str, frozen: str) -> None:
    evaluation = Evaluation(name)
    shape = evaluation.schedule.variance_parameters()
    for parameter_name, parameter in evaluation.schedule.named_parameters():
        pinned = frozen == "all" or (parameter_name in shape) == (frozen == "shape")
        parameter.requires_grad_(not pinned)
    evaluation.library().mean().backward()
    for parameter in evaluation.schedule.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    assert all(p.grad is not None for p in evaluation.network.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_the_terms_at_the_ends_do_not_move_the_shape(name: str) -> None:
    schedule = registered.learned(name).double()
    ends = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    ends.sum().backward()
    for parameter_name, parameter in schedule.named_parameters():
        if parameter_name in schedule.variance_parameters():
            assert float(parameter.grad.abs().max()) < 1e-10  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LEARNED)
def test_evaluation_and_training_give_the_same_losses(name: str) -> None:
    evaluation = Evaluation(name)
    trained = evaluation.library().detach()
    with torch.no_grad():
        torch.testing.assert_close(evaluation.library(), trained, rtol=1e-12, atol=0)


def test_a_step_against_the_shape_gradient_lowers_the_variance_and_keeps_the_endpoints() -> None:
    name = next(n for n in LEARNED if registered.schedule(n).variance_parameters())
    evaluation = Evaluation(name)
    before = evaluation.schedule.endpoints()
    squares = [float((evaluation.library().detach() ** 2).mean())]
    shape = [p for n, p in evaluation.schedule.named_parameters() if n in evaluation.schedule.variance_parameters()]
    optimizer = torch.optim.SGD(shape, lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        evaluation.library().mean().backward()
        optimizer.step()
        squares.append(float((evaluation.library().detach() ** 2).mean()))
    assert squares == sorted(squares, reverse=True)
    assert evaluation.schedule.endpoints() == pytest.approx(before, abs=1e-12)
