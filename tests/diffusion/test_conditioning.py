"""What the network is told of gamma: fixed, strictly increasing, invertible, in [0, T-1]."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import registered
from vdm_hub import registry
from vdm_hub.diffusion.conditioning import AffineConditioning, Conditioning, TableConditioning
from vdm_hub.diffusion.decoders import FactorisedDecoder
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import DiscreteBetasSchedule, LinearSchedule
from vdm_hub.diffusion.parameterizations import Epsilon
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.errors import ConfigurationError
from vdm_hub.schedulers.configs import derived_betas

every_conditioning = pytest.mark.parametrize("name", registered.names("conditionings"))


def conditioning_class(name: str) -> type[Conditioning]:
    found: type[Conditioning] = registry.lookup("conditionings", name).load()
    return found


every_schedule = pytest.mark.parametrize("schedule", registered.names("noise_schedules"))


@every_conditioning
@every_schedule
def test_strictly_increasing_and_inverted(name: str, schedule: str) -> None:
    conditioning = registered.process(registered.scalar_schedule(schedule), conditioning=name).conditioning
    gamma = torch.linspace(-16, 16, 3001, dtype=torch.float64)  # beyond the ends too: endpoints may be learned
    timestep = conditioning(gamma)
    assert float(timestep.diff().min()) > 0
    torch.testing.assert_close(conditioning.inverse(timestep), gamma, rtol=1e-10, atol=1e-10)


INTEGERS = [name for name in registered.names("conditionings") if conditioning_class(name).integer_timesteps]


@pytest.mark.parametrize("name", INTEGERS)
@every_schedule
def test_a_schedule_starts_inside_the_range_of_timesteps(name: str, schedule: str) -> None:
    process = registered.process(registered.scalar_schedule(schedule), conditioning=name)
    timesteps = process.timestep(torch.linspace(0, 1, 101))
    assert timesteps.dtype == torch.float64 and float(timesteps.diff().min()) > 0
    torch.testing.assert_close(timesteps[[0, -1]], torch.tensor([0.0, 999.0]).double(), rtol=0, atol=2e-3)
    torch.testing.assert_close(process.time(timesteps), torch.linspace(0, 1, 101).double(), rtol=0, atol=1e-5)


@given(st.floats(-20, 0), st.floats(0.5, 25), st.integers(2, 5000))
def test_affine_reaches_both_ends_exactly_in_float32(first: float, width: float, steps: int) -> None:
    first, last = float(torch.tensor(first)), float(torch.tensor(first + width))
    conditioning = AffineConditioning(first, last, steps)
    ends = conditioning(torch.tensor([first, last]))
    assert ends[0] == 0 and float(ends[1]) == pytest.approx(steps - 1, rel=2e-7)


def test_the_default_process_counts_down_from_999_evenly() -> None:
    process = registered.process(LinearSchedule())
    t = 1 - torch.arange(50, dtype=torch.float64) / 50
    torch.testing.assert_close(process.timestep(t), 999 * t, rtol=1e-12, atol=1e-10)


def test_constants_are_those_of_the_config_not_of_float32_parameters() -> None:
    conditioning = AffineConditioning.from_schedule(registered.schedule("learned_linear"), 1000)
    assert (conditioning.gamma_min, conditioning.gamma_max) == (-13.3, 5.0)


def test_a_table_gives_integers_at_the_latents_of_a_beta_table() -> None:
    schedule = DiscreteBetasSchedule(torch.linspace(1e-4, 0.02, 50).tolist())
    conditioning = TableConditioning.from_schedule(schedule, 50)
    torch.testing.assert_close(conditioning(schedule.gammas), torch.arange(50).double(), rtol=0, atol=1e-9)
    timesteps = TableConditioning(schedule.gammas.tolist())(schedule.gammas)
    assert torch.equal(timesteps[:-1], torch.arange(49).double())
    assert float(timesteps[-1]) == pytest.approx(49, abs=1e-9)  # the last is the end of its interval, not a start


@pytest.mark.parametrize(
    "serialised",
    [
        {"name": "affine", "config": {"gamma_min": 5.0, "gamma_max": 5.0}},
        {"name": "table", "config": {"gammas": [0.0, 0.0]}},
        {"name": "table", "config": {"gammas": [0.0]}},
    ],
)
def test_what_does_not_increase_is_refused(serialised: registry.Serialised) -> None:
    with pytest.raises(ConfigurationError):
        registry.build("conditionings", serialised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_timestep_is_as_precise_as_the_sample_and_never_less_than_float32(dtype: torch.dtype) -> None:
    told: list[torch.Tensor] = []

    def network(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        told.append(timestep)
        return sample

    bound = registered.process(LinearSchedule()).bind(None, {})[1]
    t = torch.tensor(0.7, dtype=torch.float64)
    assert bound.predict(network, torch.zeros(2, 3, dtype=dtype), t).dtype == dtype
    assert told[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        told[0].double(), (999 * t).expand(2), rtol=1e-12 if dtype == torch.float64 else 1e-7, atol=0
    )


class _Elsewhere(AffineConditioning):
    integer_timesteps = False


@pytest.mark.parametrize(("conditioning", "is_made"), [(AffineConditioning(), True), (_Elsewhere(), False)])
def test_a_table_for_stock_samplers_is_made_of_integer_timesteps_alone(
    conditioning: AffineConditioning, is_made: bool
) -> None:
    scaling = DataScaling("bin_centers", 256)
    process = GaussianProcess(LinearSchedule(), Epsilon(), conditioning, FactorisedDecoder(), scaling)
    betas = derived_betas(process)
    assert (betas is not None and len(betas) == 1000) if is_made else betas is None
