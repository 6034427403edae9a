"""Threads: models of their own, and one that is shared, give what they give alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

import registered
from exact_denoisers import PerPixelSchedule
from tiny import randomised, sampled, seeded, tiny_pipeline, tiny_unet
from vdm_hub import VariationalBound
from vdm_hub.diffusion.noise_schedules import LinearSchedule, NoiseSchedule, differentiated, gamma_and_derivative
from vdm_hub.diffusion.samplers import SAMPLERS
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.methods import LikelihoodMethod, ProbabilityFlow
from vdm_hub.models.calls import evaluating
from vdm_hub.objectives.variational_bound import VDMObjective

THREADS, ROUNDS = 4, 3


def at_once(call: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """What ``call(i)`` gives in as many threads, which begin together."""
    barrier = Barrier(threads)

    def one(i: int) -> Any:
        barrier.wait()
        return call(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(threads)))


class Squared(NoiseSchedule):
    """Of a user, without a derivative in closed form."""

    def forward(self, t: Tensor) -> Tensor:
        return -5 + 4 * t + 6 * t**2

    def to_config(self) -> dict[str, Any]:
        return {}


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    **{name: lambda name=name: registered.learned(name) for name in registered.names("noise_schedules")},
    "a user's": Squared,
    "per pixel": lambda: PerPixelSchedule(-8.0, 5.0, torch.linspace(-1, 1, 64).view(1, 8, 8), torch.zeros(1, 8, 8)),
}


def objective_of(name: str) -> VDMObjective:
    return VDMObjective(tiny_unet(), registered.process(SCHEDULES[name](), num_levels=17))


def trained(objective: VDMObjective, seed: int) -> dict[str, Tensor]:
    """The gradients of a continuous bound, and its terms."""
    batch = {"levels": torch.randint(0, 17, (4, 1, 8, 8), generator=seeded(seed))}
    bound = objective(batch, torch.linspace(0.05, 0.9, 4), objective.draw_noise(batch, seeded(seed)))
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(bound.loss, parameters, allow_unused=True)
    found = {str(i): value for i, value in enumerate(gradients) if value is not None}
    return found | {name: term.detach() for name, term in bound.terms.items()}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_continuous_bounds_and_their_gradients_are_the_same_in_threads(name: str, shared: bool) -> None:
    objectives = [objective_of(name)] * THREADS if shared else [objective_of(name) for _ in range(THREADS)]
    alone = [trained(objective, i) for i, objective in enumerate(objectives)]
    for _ in range(ROUNDS):
        for found, expected in zip(at_once(lambda i: trained(objectives[i], i)), alone, strict=True):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert all(isinstance(p, nn.Parameter) for objective in objectives for p in objective.process.parameters())


@pytest.mark.parametrize("sampler", ["ancestral", *SAMPLERS])
def test_one_pipeline_samples_in_threads_with_other_numbers_of_steps(sampler: str) -> None:
    pipe, steps = tiny_pipeline(), [10, 37, 12, 25]
    calls = lambda i: sampled(pipe, 2, steps[i], seed=i, sampler=sampler)  # noqa: E731
    alone = [calls(i) for i in range(THREADS)]
    for found, expected in zip(at_once(calls), alone, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_one_pipeline_with_a_stock_sampler_samples_in_threads(stock: Any) -> None:
    pipe, steps = tiny_pipeline(), [10, 37, 12, 25]
    pipe.scheduler = pipe.scheduler.to_diffusers(stock)
    calls = lambda i: sampled(pipe, 2, steps[i], seed=i)  # noqa: E731
    alone = [calls(i) for i in range(THREADS)]
    for found, expected in zip(at_once(calls), alone, strict=True):
        assert torch.equal(found, expected)


def test_a_call_takes_its_grid_once_and_tells_its_own_number_of_steps() -> None:
    """Also where a callback chooses another grid for the scheduler, or another thread is told of other steps."""
    pipe = tiny_pipeline()
    expected = sampled(pipe, steps=5)

    def disturb(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        pipe.scheduler.set_timesteps(100 + step)

    assert torch.equal(sampled(pipe, steps=5, callback_on_step_end=disturb), expected)

    def told(i: int) -> set[int]:
        seen: set[int] = set()
        steps = 5 + 3 * i
        sampled(pipe, 1, steps, callback_on_step_end=lambda pipe, *_: seen.add(pipe.num_timesteps))
        return seen

    assert at_once(told) == [{5 + 3 * i} for i in range(THREADS)]


def test_a_likelihood_in_threads_of_one_pipeline_in_training_mode_is_that_of_one_thread() -> None:
    """Dropout stays off until the last is done, and is on again then."""
    pipe = tiny_pipeline(tiny_unet(dropout=0.5))
    pipe.unet.train()
    images = torch.randint(0, 17, (4, 1, 8, 8), generator=seeded())

    def measured(i: int) -> Tensor:
        return pipe.bits_per_dim(images, replicates=1 + i, method=VariationalBound(pilot_evaluations=0)).per_image

    alone = [measured(i) for i in range(THREADS)]
    for found, expected in zip(at_once(measured), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert all(part.training for part in pipe.unet.modules())


def test_estimators_in_threads_on_one_objective_count_their_own_evaluations() -> None:
    objective = objective_of("linear")
    batch = {"levels": torch.zeros(4, 1, 8, 8, dtype=torch.long), "indices": torch.arange(4)}

    def counted(i: int) -> int:
        estimator = BoundEstimator(objective, 4, pilot_evaluations=0)
        for replicate in range(2 + i):
            estimator.measure(batch, replicate)
        return estimator.network_evaluations

    assert at_once(counted) == [4 * (2 + i) for i in range(THREADS)]


@pytest.mark.slow
@pytest.mark.parametrize("method", [VariationalBound(), ProbabilityFlow(tolerance=1e-3)])
def test_a_likelihood_does_not_depend_on_how_many_threads_torch_has(method: LikelihoodMethod) -> None:
    pipe, images = tiny_pipeline(randomised(tiny_unet())), torch.randint(0, 17, (2, 1, 8, 8), generator=seeded())
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(pipe.log_likelihood(images, method, replicates=2))
        finally:
            torch.set_num_threads(1)
    # 1e-9 bits/dim is what law 8 allows; float32, in which a bound's network computes, rounds by more.
    apart = (found[0].per_image - found[1].per_image).abs().max()
    assert float(apart) < (1e-9 if method == "ode" else 1e-6)


def test_modules_are_put_back_by_the_last_that_evaluates_them() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluating(module):
        with evaluating(module):
            assert not module.training
        assert not module.training and not module[0].training
    assert module.training and module[0].training and not module[1].training


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_forms_are_what_reverse_mode_finds(name: str) -> None:
    schedule, t = SCHEDULES[name]().double(), torch.linspace(0, 1, 33, dtype=torch.float64)
    for found, expected in zip(gamma_and_derivative(schedule, t), differentiated(schedule.forward, t), strict=True):
        assert found.shape == expected.shape
        # A float32 constant, as an endpoint, may be subtracted in float32 by one and in float64 by the other.
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-7, atol=1e-9)


def test_a_gamma_of_a_users_own_does_not_inherit_anothers_derivative() -> None:
    class Bent(LinearSchedule):
        def forward(self, t: Tensor) -> Tensor:
            return super().forward(t**2)

    class Named(LinearSchedule):
        """Of the same gamma, which keeps its derivative."""

    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    torch.testing.assert_close(gamma_and_derivative(Bent(-4.0, 4.0), t)[1], 16 * t)
    assert Named.with_derivative is LinearSchedule.with_derivative
