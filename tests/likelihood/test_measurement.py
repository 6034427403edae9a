"""What all methods share, on one whose numbers are known: draws, results in any order, the network's precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_gaussian import Batches, objective
from naming import naming
from vdm_hub.data.conditions import ClassCondition
from vdm_hub.data.kinds import Units
from vdm_hub.diffusion.draws import image_generator
from vdm_hub.errors import DataError, NonFiniteLossError
from vdm_hub.likelihood.measurement import Measured, Measurement, Results, collect
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.models.calls import CountedNetwork
from vdm_hub.objectives.variational_bound import Batch

LEVELS = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
CLASSES = ClassCondition(3)


class Known(Measurement):
    """``10 replicate + index`` and its negative half: whatever the batch."""

    method, is_bound, pilot_evaluations = "known", False, 7

    def __init__(self) -> None:
        super().__init__(objective(transitions=3), seed=2)
        self.objective.train()
        self.fitted = 0

    def fit(self, batches: Any) -> None:
        self.fitted += sum(len(batch["indices"]) for batch in batches())

    def measure(self, batch: Batch, replicate: int) -> Measured:
        assert not torch.is_grad_enabled() and not any(part.training for part in self.objective.modules())
        value = 10 * replicate + batch["indices"].float()
        pair = torch.stack([value, value + 0.5], dim=1)
        counts = torch.full((len(value),), 4.0)
        return Measured({"a": value, "b": -0.5 * value}, {"time": pair, "integrand": -pair, "evaluations": counts})

    def protocol(self) -> dict[str, Any]:
        return {"of": "known"}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"shape": tuple(diagnostics["time"].shape)}

    def notes(self, report: LikelihoodReport) -> list[str]:
        return [f"of {report.num_images} images"]


def test_a_report_holds_what_the_method_says_of_every_image_and_replicate() -> None:
    known = Known()
    report = collect(known, Batches(LEVELS, 2), len(LEVELS), replicates=2)
    values = torch.tensor([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]], dtype=torch.float64)
    assert torch.equal(report.terms_per_image["a"], values) and torch.equal(report.terms_per_image["b"], -0.5 * values)
    assert torch.equal(report.times, torch.stack([values, values + 0.5], dim=2))
    assert torch.equal(report.integrand, -report.times)
    assert (report.method, report.is_bound, report.transitions, report.dimensions) == ("known", False, 3, 16)
    assert report.network_evaluations == 2 * 5 * 4 + 7
    assert report.details["of"] == "known" and report.details["shape"] == (2, 5, 2)
    assert "of 5 images" in report.to_dict()["notes"]
    assert known.fitted == 5 and all(part.training for part in known.objective.modules())


class Silent(Measurement):
    def measure(self, batch: Batch, replicate: int) -> Measured:
        return Measured({"a": batch["indices"].float()})

    def protocol(self) -> dict[str, Any]:
        return {}


def test_a_method_that_says_nothing_of_itself_is_a_bound_without_pilot_or_evaluations() -> None:
    silent = Silent(objective())
    report = collect(silent, Batches(LEVELS), len(LEVELS), replicates=2)
    assert (report.method, report.is_bound, report.network_evaluations) == ("bound", True, 0)
    assert (silent.seed, silent.fewest_evaluations(2), silent.state()) == (0, 0, {})


def test_a_report_says_the_units_the_options_and_what_was_told() -> None:
    known, units = Known(), Units(per_datum=8, bytes_per_value=2.0)
    plain = collect(Known(), Batches(LEVELS), len(LEVELS), 1)
    assert plain.units == Units(per_datum=16) and not {"condition", "steps", "options"} & plain.details.keys()
    known.steps, known.options, known.objective.condition = "steps of one site", {"decomposition": "x"}, CLASSES
    report = collect(known, Batches(LEVELS), len(LEVELS), 1, units)
    assert report.units is units and report.dimensions == 8
    said = {"steps": "steps of one site", "options": {"decomposition": "x"}, "condition": CLASSES.noun}
    assert said.items() <= report.details.items()


def test_what_draws_nothing_is_measured_once() -> None:
    known = Known()
    known.is_deterministic = True
    report = collect(known, Batches(LEVELS), len(LEVELS), replicates=3)
    assert (report.replicates, report.is_deterministic, report.standard_error) == (1, True, 0.0)


@pytest.mark.parametrize(("images", "replicates"), [(0, 1), (1, 0), (-1, 2)])
def test_no_images_and_no_replicates_are_refused(images: int, replicates: int) -> None:
    with pytest.raises(DataError, match=naming(images, replicates)):
        collect(Known(), Batches(LEVELS), images, replicates)
    assert collect(Known(), Batches(LEVELS[:1]), 1, 1).num_images == 1


def test_results_are_the_same_whoever_found_them_and_say_what_is_missing() -> None:
    known, (batch,) = Known(), Batches(LEVELS)()
    parts = []
    with torch.no_grad():
        known.objective.eval()
        for indices in ([3, 1], [4], [0]):
            part = Results(5)
            for replicate in (0, 2):
                chosen = {name: value[indices] for name, value in batch.items()}
                part.add(replicate, chosen["indices"], known.measure(chosen, replicate))
            parts.append(part)
    whole = Results(5)
    for part in parts:
        whole.take(part)
    assert whole.missing(0).tolist() == whole.missing(2).tolist() == [2] and whole.missing(1).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    indices, found = whole.found(2)
    assert indices.tolist() == [0, 1, 3, 4]
    assert found.terms["a"].tolist() == [20, 21, 23, 24] and found.diagnostics["time"][:, 1].tolist() == [
        20.5,
        21.5,
        23.5,
        24.5,
    ]
    totals = whole.totals([2, 0])
    torch.testing.assert_close(
        totals, 0.5 * torch.tensor([[20, 21, math.nan, 23, 24], [0, 1, math.nan, 3, 4]]).double(), equal_nan=True
    )
    whole.take(whole_of_replicate_1(known, batch))
    report = whole.report(known, 3, Units(per_datum=16))
    assert report.terms_per_image["a"][:, 2].tolist() == [3, 13, 23], "of images that all replicates have"


def whole_of_replicate_1(known: Known, batch: Batch) -> Results:
    results = Results(5)
    with torch.no_grad():
        results.add(1, batch["indices"], known.measure(batch, 1))
    return results


def test_the_first_image_that_is_not_finite_is_named() -> None:
    for value in (math.nan, math.inf):
        terms = {"fine": torch.zeros(3), "bad": torch.tensor([0.0, value, value])}
        with pytest.raises(NonFiniteLossError, match=naming("bad", "image 8")):
            Results(10).add(0, torch.tensor([9, 8, 7]), Measured(terms))
    Results(10).add(0, torch.tensor([9]), Measured({"fine": torch.zeros(1)}, {"odd": torch.tensor([math.nan])}))


def test_an_image_s_draws_are_those_of_earlier_reports() -> None:
    """Of numpy's SeedSequence and torch's CPU generator: figures that were reported depend on them."""
    assert image_generator(0, 1, 2).initial_seed() == 1535930435702422785


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.index = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        if dtype is not None:
            self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.seen: dict[str, Any] = {}

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool, **others: Tensor) -> tuple[Tensor, str]:
        assert not return_dict
        self.seen = {"sample": sample.dtype, "timestep": timestep.dtype} | {n: v.dtype for n, v in others.items()}
        return 2 * sample, "whatever else"


@pytest.mark.parametrize(
    ("own", "expected"),
    [(None, "float64"), (torch.float64, "float64"), (torch.float32, "float32"), (torch.bfloat16, "float32")],
    ids=str,
)
@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_a_network_is_called_in_its_precision_and_its_calls_are_counted(
    own: torch.dtype | None, expected: str, given: torch.dtype
) -> None:
    batch = {
        "levels": LEVELS,
        "indices": torch.arange(5),
        "class_labels": torch.arange(5),
        "scale": torch.rand(5).half(),
    }
    network = Network(own)
    counted = CountedNetwork(network, batch)
    sample = torch.arange(80, dtype=given).view(5, 1, 4, 4)
    for _ in range(3):
        output = counted(
            sample, torch.zeros(5, dtype=given), context=torch.zeros(5, dtype=given), which=torch.arange(5)
        )
    assert output.dtype == given and torch.equal(output, 2 * sample)
    computed = getattr(torch, expected)
    floating = dict.fromkeys(("sample", "timestep", "scale", "context"), computed)
    assert network.seen == floating | {"class_labels": torch.int64, "which": torch.int64}
    assert counted.per_image(5).tolist() == [3.0] * 5 and counted.per_image(5).dtype == torch.float64
    assert counted.evaluations == 15
