"""A method by its name: which measurement it is, with what was asked for, and what has none."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

import registered
from exact_denoisers import PerPixelSchedule
from linear_gaussian import objective
from naming import naming
from plugin_of_law_7 import ResamplingProcess
from vdm_hub import HVAEObjective, MarkovianHVAE, registry
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import MAX_SEED
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.hierarchical import HierarchicalChains, HierarchicalMeasurement
from vdm_hub.likelihood.importance_weighted import ChainsMeasurement, WeightedFlowMeasurement
from vdm_hub.likelihood.measurement import Measurement
from vdm_hub.likelihood.methods import (
    KIND,
    ImportanceWeighted,
    LikelihoodMethod,
    ProbabilityFlow,
    VariationalBound,
    build_measurement,
    method_of,
)
from vdm_hub.likelihood.probability_flow import FlowMeasurement
from vdm_hub.likelihood.protocol import FlowSettings
from vdm_hub.objectives.variational_bound import Objective, check_finite_ends

FLOW = ProbabilityFlow(tolerance=1e-3)


def hvae() -> Objective:
    fields = {"in_channels": 1, "num_levels": 5, "latent_shapes": [(1,)], "block_out_channels": (8,)}
    return HVAEObjective(MarkovianHVAE(2, **fields, norm_num_groups=4))


@pytest.mark.parametrize(
    ("model", "method", "seed", "expected"),
    [
        (objective(), VariationalBound(times_per_datum=2, pilot_evaluations=300), 3, BoundEstimator),
        (objective(4), VariationalBound(4), MAX_SEED, BoundEstimator),
        (objective(), FLOW, 3, FlowMeasurement),
        (objective(4), ImportanceWeighted(4, draws=1), 3, ChainsMeasurement),
        (objective(), ImportanceWeighted(draws=5, flow=FLOW), 3, WeightedFlowMeasurement),
        (hvae(), VariationalBound(), 3, HierarchicalMeasurement),
        (hvae(), ImportanceWeighted(draws=5), 3, HierarchicalChains),
    ],
    ids=str,
)
def test_a_method_is_measured_with_what_was_asked_for_and_else_with_its_defaults(
    model: Objective, method: LikelihoodMethod, seed: int, expected: type[Measurement]
) -> None:
    built: Any = build_measurement(model, 6, method, seed)
    assert type(built) is expected and built.seed == seed and built.method == method.name
    assert built.options == method.chosen() and built.transitions == method.transitions
    assert getattr(built, "draws", getattr(built, "chains", None)) == getattr(method, "draws", None)
    assert getattr(built, "flow", None) in (method, getattr(method, "flow", None))
    if isinstance(built, BoundEstimator):
        techniques = built.protocol()["estimator"]
        assert built.num_images == 6 and techniques["times_per_datum"] == method.times_per_datum  # type: ignore[attr-defined]
        assert techniques["pilot_evaluations"] == method.chosen().get("pilot_evaluations", 256)
    name = method.name if method.transitions is None else {"name": method.name, "config": {"transitions": 4}}
    plain: Any = build_measurement(model, 6, name)
    assert plain.seed == 0 and getattr(plain, "draws", getattr(plain, "chains", 16)) == 16
    assert getattr(plain, "times_per_datum", 1) == 1 and asdict(getattr(plain, "flow", FlowSettings())) == asdict(
        FlowSettings()
    )


@pytest.mark.parametrize("name", registry.BUILT_INS[KIND])
def test_a_method_is_its_name_its_config_and_its_options(name: str) -> None:
    cls: Any = registry.lookup(KIND, name).load()
    assert cls.name == name and method_of(name) == cls() and cls().chosen() == {}
    for option, one in cls.options().items():
        value = {"int": 300, "float": 0.25}.get(
            str(one.type).removesuffix(" | None"), (one.metadata["choices"] or [0])[0]
        )
        method = cls.from_options({option: value})
        assert method.chosen() == ({} if value == one.default else {option: value})
        assert cls.from_options(method.chosen()) == method == method_of({"name": name, "config": method.to_config()})
        assert method_of(registry.serialise(KIND, method)) == method
        assert one.metadata["help"]
    with pytest.raises(ConfigurationError, match=naming("odd", 3, name)):
        cls.from_options({"odd": 3})
    with pytest.raises(ConfigurationError, match=naming("odd")):
        method_of({"name": name, "config": {"odd": 3}})


@pytest.mark.parametrize(
    ("model", "method", "names"),
    [
        (objective(), "elbo", ("elbo",)),
        (objective(4), "ode", ("transitions", 4)),
        (objective(), VariationalBound(4), ("transitions", 4)),
        (objective(), VariationalBound(pilot_evaluations=255), ("pilot_evaluations", 255)),
        (hvae(), VariationalBound(times_per_datum=2), ("times_per_datum", 2)),
        (hvae(), VariationalBound(pilot_evaluations=0), ("pilot_evaluations", 0)),
        (hvae(), FLOW, ("ode",)),
        (hvae(), ImportanceWeighted(flow=FLOW), ("flow",)),
        (None, "bound", ("NoneType",)),
    ],
    ids=str,
)
def test_what_has_no_such_likelihood_is_refused(
    model: Any, method: LikelihoodMethod | str, names: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigurationError, match=naming(*names)):
        build_measurement(model, 6, method)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 0.5])
def test_a_seed_is_a_whole_number_that_generators_take(seed: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming("seed", seed)):
        build_measurement(objective(), 6, "bound", seed)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        *(
            (VariationalBound, {name: value})
            for name in ("transitions", "times_per_datum")
            for value in (0, 2.5, True)
        ),
        *((VariationalBound, {"pilot_evaluations": value}) for value in (-1, 256.5)),
        (VariationalBound, {"decomposition": "joined"}),
        *((ImportanceWeighted, {"draws": value}) for value in (0, 1.5, "4")),
        (ImportanceWeighted, {"flow": "exact"}),
        (ImportanceWeighted, {"transitions": 4, "flow": FLOW}),
        *((ProbabilityFlow, {"tolerance": value}) for value in (0, 1, math.nan, "small")),
    ],
    ids=str,
)
def test_a_method_that_makes_no_sense_is_refused(cls: type, arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ConfigurationError, match=naming(name, value)):
        cls(**arguments)


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
    check_finite_ends(process_of(Endless(-8.0, 1e39)))  # finite, though not in float32
    check_finite_ends(
        process_of(PerPixelSchedule(first, last, torch.zeros(2), torch.zeros(2)))
    )  # it needs data for one
    check_finite_ends(ResamplingProcess())
