"""The laws of a conditioning: what `Conditioning` promises of the timestep that a network reads."""

from __future__ import annotations

import torch
from torch import Tensor

from vdm_hub.diffusion.conditioning import Conditioning
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.testing.laws import Laws, require
from vdm_hub.testing.subjects import (
    GAMMAS,
    json_round_trip,
    require_close,
    require_finite,
    require_registered,
    require_shape,
)

CONDITIONING_LAWS = Laws("conditionings", Conditioning)


def _gammas(dtype: torch.dtype = torch.float64, points: int = 54) -> Tensor:
    return torch.linspace(*GAMMAS, points, dtype=torch.float64).to(dtype)


@CONDITIONING_LAWS.add
def strictly_increasing(conditioning: Conditioning) -> None:
    """The timestep is finite and increases strictly with gamma, also in float32, in which a network reads it."""
    for dtype, points in ((torch.float64, 3001), (torch.float32, 257)):
        gamma = _gammas(dtype, points)
        timestep = conditioning(gamma)
        require_finite(timestep, "the timestep")
        wrong = (timestep.diff() <= 0).nonzero().flatten().tolist()
        at = wrong[0] if wrong else 0
        values = f"tau({gamma[at].item():.4g}) = {timestep[at].item():.9g}, tau({gamma[at + 1].item():.4g}) = "
        require(not wrong, f"{values}{timestep[at + 1].item():.9g} in {dtype}")


@CONDITIONING_LAWS.add
def elementwise(conditioning: Conditioning) -> None:
    """The timestep keeps gamma's shape and type, and each is that of its gamma alone."""
    for dtype in (torch.float32, torch.float64):
        gamma = _gammas(dtype).reshape(6, 9)
        timestep = conditioning(gamma)
        require_shape(timestep, (6, 9), "the timestep of gammas of shape (6, 9)")
        require(timestep.dtype == dtype, f"the timestep of gammas in {dtype} is {timestep.dtype}")
        require_close(timestep[3, 4], conditioning(gamma[3, 4]), "a timestep among others, against alone,")


@CONDITIONING_LAWS.add
def inverse(conditioning: Conditioning) -> None:
    """Its `inverse` finds the gamma of a timestep."""
    gamma = _gammas()
    require_close(conditioning.inverse(conditioning(gamma)), gamma, "inverse(tau(gamma))", rtol=1e-8, atol=1e-8)


@CONDITIONING_LAWS.add
def json_config(conditioning: Conditioning) -> None:
    """Its `to_config` is JSON, and builds the same conditioning again, bit for bit."""
    config = json_round_trip(conditioning.to_config(), "to_config()")
    after, before = type(conditioning)(**config)(_gammas()), conditioning(_gammas())
    require_close(after, before, f"the timestep of the conditioning rebuilt from {config!r:.200}", rtol=0, atol=0)


@CONDITIONING_LAWS.add
def suits_a_schedule(conditioning: Conditioning) -> None:
    """Its `from_schedule` gives a conditioning of this class for a schedule at the start of training."""
    made = type(conditioning).from_schedule(LinearSchedule(), 1000)
    require(type(made) is type(conditioning), f"from_schedule() gives a {type(made).__name__}")
    timestep = made(torch.tensor([-13.3, 5.0], dtype=torch.float64))
    require(
        timestep.isfinite().all() & (timestep[1] > timestep[0]), f"its timesteps at the ends are {timestep.tolist()}"
    )


@CONDITIONING_LAWS.add
def integer_timesteps(conditioning: Conditioning) -> None:
    """Where it says that the integers from 0 stand for noise levels, they do: for those between data and noise."""
    if not conditioning.integer_timesteps:
        return
    made = type(conditioning).from_schedule(LinearSchedule(), 1000)
    ends = made(torch.tensor([-13.3, 5.0], dtype=torch.float64))
    require(
        float((ends - torch.tensor([0.0, 999.0])).abs().max()) < 0.5,
        f"integer_timesteps is True, and those of a schedule's ends are {ends.tolist()}, not 0 and 999: say False",
    )


@CONDITIONING_LAWS.add
def registered(conditioning: Conditioning) -> None:
    """The class is the entry point of an installed package, so that a config can name it."""
    require_registered("conditionings", type(conditioning))
