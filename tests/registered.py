"""Instances of everything registered, so that a new schedule, target or decoder is under the laws by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from vdm_hub import registry
from vdm_hub.diffusion.conditioning import Conditioning
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.diffusion.parameterizations import Parameterization
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.testing.installed import example_config


def names(kind: str) -> list[str]:
    return list(registry.BUILT_INS[kind])  # plugins bring tests of their own


def crossed(kind: str | Sequence[Any], other: str | Sequence[Any]) -> list[Any]:
    """Each name of two kinds, or value of two lists, with each of the other; slow ones, where neither is the first."""
    first, second = (names(one) if isinstance(one, str) else list(one) for one in (kind, other))
    pairs = [(one, two) for one in first for two in second]
    marks = [() if one == first[0] or two == second[0] else pytest.mark.slow for one, two in pairs]
    return [
        pytest.param(*pair, marks=mark, id="-".join(map(_words, pair)))
        for pair, mark in zip(pairs, marks, strict=True)
    ]


def _words(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def build(kind: str, name: str, **arguments: Any) -> Any:
    """An instance as the conformance kit builds it: with defaults, but for what the constructor requires."""
    registration = registry.lookup(kind, name)
    return registration.load()(**example_config(registration) | arguments)


SMALLER = {"learned_monotone": {"hidden_features": 64}}  # than the default, of 1,024 units, which takes long


def schedule(name: str, **arguments: Any) -> NoiseSchedule:
    built = build("noise_schedules", name, **SMALLER.get(name, {}) | arguments)
    assert isinstance(built, NoiseSchedule)
    return built


def scalar_schedule(name: str, **arguments: Any) -> NoiseSchedule:
    built = schedule(name, **arguments)
    if not built.scalar:
        pytest.skip(f"{name} has a gamma per dimension")
    return built


def learned(name: str, **arguments: Any) -> NoiseSchedule:
    """A schedule after training moved its parameters (if it has any), still monotone."""
    built = scalar_schedule(name, **arguments)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return built


def process(
    schedule: NoiseSchedule,
    parameterization: str | Parameterization = "epsilon",
    conditioning: str | Conditioning = "affine",
    decoder: str = "factorised",
    num_levels: int = 256,
    data_scaling: str = "bin_centers",
) -> GaussianProcess:
    if isinstance(parameterization, str):
        parameterization = build("parameterizations", parameterization)
    if isinstance(conditioning, str):
        cls = registry.lookup("conditionings", conditioning).load()
        assert issubclass(cls, Conditioning)
        conditioning = cls.from_schedule(schedule, 1000)
    scaling = DataScaling(data_scaling, num_levels)
    return GaussianProcess(schedule, parameterization, conditioning, build("decoders", decoder), scaling)
