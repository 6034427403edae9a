"""A method by its name: which measurement it is, with what was asked for, and what has none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import registered
from exact_denoisers import PerPixelSchedule
from linear_gaussian import objective
from naming import naming
from plugin_of_law_7 import ResamplingProcess
from vdm_hub import HVAEObjective, MarkovianHVAE
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import MAX_SEED
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.hierarchical import HierarchicalChains, HierarchicalMeasurement
from vdm_hub.likelihood.importance_weighted import ChainsMeasurement, WeightedFlowMeasurement
from vdm_hub.likelihood.measurement import Measurement
from vdm_hub.likelihood.methods import build_measurement, check_endpoints
from vdm_hub.likelihood.probability_flow import FlowMeasurement
from vdm_hub.likelihood.protocol import ProbabilityFlow
from vdm_hub.objectives.variational_bound import Objective

FLOW = ProbabilityFlow(tolerance=1e-3)


def hvae() -> Objective:
    fields = {"in_channels": 1, "num_levels": 5, "latent_shapes": [(1,)], "block_out_channels": (8,)}
    return HVAEObjective(MarkovianHVAE(2, **fields, norm_num_groups=4))


@pytest.mark.parametrize(
    ("model", "method", "arguments", "expected"),
    [
        (objective(), "bound", {"seed": 3, "times_per_image": 2, "pilot_evaluations": 300}, BoundEstimator),
        (objective(4), "bound", {"seed": MAX_SEED}, BoundEstimator),
        (objective(), "ode", {"seed": 3, "flow": FLOW}, FlowMeasurement),
        (objective(4), "importance_weighted", {"seed": 3, "draws": 1}, ChainsMeasurement),
        (objective(), "importance_weighted", {"seed": 3, "draws": 5, "flow": FLOW}, WeightedFlowMeasurement),
        (hvae(), "bound", {"seed": 3}, HierarchicalMeasurement),
        (hvae(), "importance_weighted", {"seed": 3, "draws": 5}, HierarchicalChains),
    ],
)
def test_a_method_is_measured_with_what_was_asked_for_and_else_with_its_defaults(
    model: Objective, method: str, arguments: dict[str, Any], expected: type[Measurement]
) -> None:
    built = build_measurement(model, 6, method, **arguments)
    assert type(built) is expected and built.seed == arguments["seed"] and built.method == method
    assert getattr(built, "draws", getattr(built, "chains", None)) == arguments.get("draws")
    assert getattr(built, "flow", None) == arguments.get("flow")
    if isinstance(built, BoundEstimator):
        techniques = built.protocol()["estimator"]
        assert built.num_images == 6 and techniques["times_per_image"] == arguments.get("times_per_image", 1)
        assert techniques["pilot_evaluations"] == arguments.get("pilot_evaluations", 256)
    plain: Any = build_measurement(model, 6, method)
    assert plain.seed == 0 and getattr(plain, "draws", getattr(plain, "chains", 16)) == 16
    assert getattr(plain, "times_per_image", 1) == 1 and getattr(plain, "flow", ProbabilityFlow()) == ProbabilityFlow()


@pytest.mark.parametrize(
    ("model", "method", "arguments", "names"),
    [
        (objective(), "elbo", {}, ("elbo",)),
        (objective(), "bound", {"draws": 0}, ("draws", 0)),
        (objective(), "bound", {"seed": -1}, ("seed", -1)),
        (objective(), "bound", {"seed": MAX_SEED + 1}, ("seed", MAX_SEED + 1)),
        (objective(), "bound", {"times_per_image": 0}, ("times_per_image", 0)),
        (objective(), "ode", {"times_per_image": 2}, ("times_per_image", 2)),
        (objective(), "ode", {"pilot_evaluations": 0}, ("pilot_evaluations", 0)),
        (hvae(), "bound", {"times_per_image": 2}, ("times_per_image", 2)),
        (objective(4), "ode", {}, ("transitions", 4)),
        (None, "bound", {}, ("NoneType",)),
    ],
)
def test_what_has_no_such_likelihood_is_refused(
    model: Any, method: str, arguments: dict[str, Any], names: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigurationError, match=naming(*names)):
        build_measurement(model, 6, method, **arguments)


class Endless(NoiseSchedule):
    """Linear, but for its ends."""

    def __init__(self, first: float, last: float) -> None:
        super().__init__()
        self.ends = first, last

    def forward(self, t: Tensor) -> Tensor:
        first, last = self.ends
        return torch.where(t == 0, first, torch.where(t == 1, last, 10 * t - 5))

    def to_config(self) -> dict[str, Any]:
        return {}


def process_of(schedule: NoiseSchedule) -> Any:
    return registered.process(schedule, conditioning=AffineConditioning(-8.0, 4.0))


@pytest.mark.parametrize(("first", "last", "time"), [(-math.inf, 4.0, 0), (-8.0, math.inf, 1), (-8.0, math.nan, 1)])
def test_a_schedule_without_finite_ends_is_refused(first: float, last: float, time: int) -> None:
    model = objective()
    model.process = process_of(Endless(first, last))
    with pytest.raises(ConfigurationError, match=naming("Endless", f"gamma({time})")):
        build_measurement(model, 6)
    check_endpoints(process_of(Endless(-8.0, 1e39)))  # finite, though not in float32
    check_endpoints(process_of(PerPixelSchedule(first, last, torch.zeros(2), torch.zeros(2))))  # it needs data for one
    check_endpoints(ResamplingProcess())
