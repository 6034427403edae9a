"""The schedules keep all laws, and each is its source's formula, written out in alpha and sigma."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

import vdm_hub_schedules
from vdm_hub import Check, ConfigurationError, VDMScheduler, parametrize_with_checks, registry
from vdm_hub_schedules import CutSchedule

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("sigmoid", {}),
    ("sigmoid", {"start": 0.0, "end": 3.0, "temperature": 0.9}),
    ("laplace", {}),
    ("laplace", {"mean": 1.0, "scale": 2.0}),
    ("shifted_cosine", {"resolution": 256}),
    ("shifted_cosine", {"resolution": 8, "base_resolution": 32, "gamma_min": -7.87}),
    ("polynomial", {}),
    ("polynomial", {"power": 3.0, "gamma_max": 9.0}),
    ("edm_lognormal", {}),
    ("edm_lognormal", {"mean": -0.4, "std": 1.0, "gamma_min": -8.0}),
]
ENTRY_POINTS = {"sigmoid", "laplace", "shifted_cosine", "polynomial", "edm_lognormal"}


def build(name: str, **config: Any) -> CutSchedule:
    form = {"name": name, "config": config, "package": "vdm-hub-schedules"}
    schedule: CutSchedule = registry.build("noise_schedules", form)
    return schedule


@parametrize_with_checks([build(name, **config) for name, config in CONFIGS])
def test_conformance(check: Check) -> None:
    check()


def test_every_schedule_of_the_package_is_under_test() -> None:
    classes = {type(build(name, **config)) for name, config in CONFIGS}
    public = {getattr(vdm_hub_schedules, name) for name in vdm_hub_schedules.__all__} - {CutSchedule}
    assert classes == public
    assert {name for name, _ in CONFIGS} == ENTRY_POINTS


def own_time(schedule: CutSchedule, t: Tensor) -> Tensor:
    """The source's time, for the formulas below: the cut is affine in it."""
    return schedule._first + t * (1 - schedule._first - schedule._last)


def log_snr_of_alpha_squared(alpha_squared: Tensor) -> Tensor:
    return torch.log(alpha_squared / (1 - alpha_squared))


# Each as its paper writes it, in log-SNR, from its own time.
SOURCES: dict[str, Any] = {
    "sigmoid": lambda u, start=-3.0, end=3.0, temperature=1.0: log_snr_of_alpha_squared(
        (torch.sigmoid(torch.tensor(end / temperature)) - torch.sigmoid((u * (end - start) + start) / temperature))
        / (torch.sigmoid(torch.tensor(end / temperature)) - torch.sigmoid(torch.tensor(start / temperature)))
    ),
    "laplace": lambda u, mean=0.0, scale=0.5: mean - scale * torch.sign(0.5 - u) * torch.log(1 - 2 * (u - 0.5).abs()),
    "shifted_cosine": lambda u, resolution, base_resolution=64: (
        -2 * torch.log(torch.tan(math.pi * u / 2)) + 2 * math.log(base_resolution / resolution)
    ),
    "polynomial": lambda u, power=2.0: log_snr_of_alpha_squared((1 - u**power) ** 2),
    "edm_lognormal": lambda u, mean=-1.2, std=1.2: torch.tensor(
        [-2 * NormalDist(mean, std).inv_cdf(float(value)) for value in u], dtype=torch.float64
    ),
}


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=str)
def test_it_is_the_source_s_formula_cut_at_the_endpoints(name: str, config: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        schedule, t = build(name, **config), torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
        own = {key: value for key, value in config.items() if not key.startswith("gamma_")}
        expected = SOURCES[name](own_time(schedule, t), **own)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(-schedule(t), expected, rtol=1e-6, atol=1e-6)
    ends = (config.get("gamma_min", -13.3), config.get("gamma_max", 5.0))
    assert schedule.endpoints() == pytest.approx(ends, abs=1e-9)


def test_the_shift_is_that_of_averaging_pixels() -> None:
    """Twice the resolution is four pixels for one, so a quarter of the SNR at the same time of the cosine schedule."""
    small, large = build("shifted_cosine", resolution=64), build("shifted_cosine", resolution=128)
    u = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(large.uncut(u, 1 - u) - small.uncut(u, 1 - u), torch.full_like(u, math.log(4)))


def test_one_that_is_cut_alike_is_the_cosine_schedule_of_the_core() -> None:
    plain = registry.build("noise_schedules", "cosine")
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(build("shifted_cosine", resolution=64)(t), plain(t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("sigmoid", {"start": 3.0, "end": -3.0}, "start=3.0"),
        ("sigmoid", {"temperature": 0.0}, "temperature=0.0"),
        ("sigmoid", {"gamma_min": 5.0, "gamma_max": -13.3}, "gamma_min=5.0"),
        ("laplace", {"scale": -1.0}, "-1.0"),
        ("laplace", {"scale": 0.01}, "widen the schedule"),
        ("shifted_cosine", {}, "resolution"),
        ("shifted_cosine", {"resolution": 0}, "resolution=0"),
        ("polynomial", {"power": math.inf}, "power=inf"),
        ("edm_lognormal", {"std": math.nan}, "nan"),
        ("edm_lognormal", {"P_std": 1.0}, "unknown argument"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_value(name: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build(name, **config)


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_a_published_scheduler_says_which_package_brings_it(name: str) -> None:
    config = {"resolution": 32} if name == "shifted_cosine" else {}
    scheduler = VDMScheduler(num_levels=17, noise_schedule={"name": name, "config": config})
    form = scheduler.config["noise_schedule"]
    assert (form["name"], form["package"], form["version"]) == (name, "vdm-hub-schedules", "0.1.0")
    again = VDMScheduler.from_config(scheduler.config)
    t = torch.linspace(0, 1, 9)
    assert torch.equal(again.process.schedule(t), scheduler.process.schedule(t))
