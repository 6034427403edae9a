"""The common parts of every likelihood per image: a method's interface, its draws, its calls, and the results.

A method is a function of a batch and a replicate: `Measurement`. What it finds of an image depends on the seed, the
replicate and the image's index, and on nothing else, so images may be measured in any batches, on any process, before
or after a kill; `Results` holds what was found, and makes the report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdm_hub.data.kinds import IMAGES, DataKind, Units
from vdm_hub.errors import DataError, NonFiniteLossError
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.models.calls import evaluating
from vdm_hub.objectives.variational_bound import Batch, Objective, Terms

Batches = Callable[[], Iterable[Batch]]
"""The function that gives the batches of a pass; each carries ``indices``, (B,), the images' indices."""


@dataclass(frozen=True)
class Measured:
    """The result of one replicate on a batch of images.

    Attributes:
        terms: By name, each (B,), nats; they sum to minus the log-likelihood.
        diagnostics: By name, each (B,) or (B, n): ``evaluations`` of the network; ``time`` and ``integrand``, the
            diffusion term at its own time, where there is one; ``steps`` of an ODE solver; and so on.
    """

    terms: Terms
    diagnostics: Terms = field(default_factory=dict)


class Measurement(ABC):
    """A likelihood method on one model.

    Attributes:
        method: Its name.
        is_bound: Whether its sum bounds minus the log-likelihood from above, in expectation.
        is_deterministic: Whether nothing is drawn: one replicate is all there is, and has no Monte Carlo error.
        pilot_evaluations: Network evaluations that `fit` took.
        steps: In words, such as ``"steps of one site"``, what a method has that has neither transitions nor a
            continuous time; ``None`` of any other.
        options: Of the method, those that were chosen, as plain JSON; the report repeats them.
    """

    method = "bound"
    is_bound = True
    is_deterministic = False
    pilot_evaluations = 0
    steps: str | None = None

    def __init__(self, objective: Objective, seed: int = 0) -> None:
        self.objective, self.seed = objective, seed
        self.options: dict[str, Any] = {}

    @property
    def transitions(self) -> int | None:
        """The number of transitions T; ``None`` for continuous time, or where there are none."""
        return self.objective.transitions

    def fit(self, batches: Batches) -> None:  # noqa: B027 - most need none
        """Run a pilot, where the method has one: its draws never enter a result."""

    def state(self) -> dict[str, Any]:
        """The findings of `fit`, as plain JSON: another process that loads them measures the same."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over a `state` of the same method."""

    @abstractmethod
    def measure(self, batch: Batch, replicate: int) -> Measured:
        """One independent estimate of each image of a batch; a function of (seed, replicate, image) alone."""

    def fewest_evaluations(self, replicates: int) -> int:
        """The least number of network evaluations in so many replicates, as far as can be known beforehand."""
        return 0

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """The settings that decide a result besides the weights, the images and what `fit` finds, as plain JSON."""

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The report's details besides the protocol; each diagnostic is (replicates, images) or (..., n)."""
        return {}

    def notes(self, report: LikelihoodReport) -> list[str]:
        """Notes for a reader of the number, one sentence each."""
        return []


class Results:
    """The terms of images by replicate, whoever measured them; complete or not.

    >>> results = Results(num_images=2)
    >>> results.add(0, torch.tensor([1]), Measured({"prior": torch.tensor([0.5])}))
    >>> results.missing(0).tolist()
    [0]
    """

    def __init__(self, num_images: int, kind: DataKind = IMAGES) -> None:
        self.num_images, self.kind = num_images, kind
        self._done: dict[int, Tensor] = {}
        self._values: dict[tuple[str, str], dict[int, Tensor]] = {}

    def add(self, replicate: int, indices: Tensor, measured: Measured) -> None:
        """Add the result for the images with these indices.

        Raises:
            NonFiniteLossError: A term is not finite; the message names it and the image.
        """
        indices = indices.cpu()
        for name, term in measured.terms.items():
            check_finite(name, term, indices, self.kind)
        kinds = {"term": measured.terms, "diagnostic": measured.diagnostics}
        for kind, values in kinds.items():
            for name, value in values.items():
                columns = self._values.setdefault((kind, name), {})
                if replicate not in columns:
                    shape = (self.num_images, *value.shape[1:])
                    columns[replicate] = torch.full(shape, torch.nan, dtype=torch.float64)
                columns[replicate][indices] = value.detach().double().cpu()
        self._done.setdefault(replicate, torch.zeros(self.num_images, dtype=torch.bool))[indices] = True

    def take(self, other: Results) -> None:
        """All that another process found, too."""
        for replicate in other._done:
            self.add(replicate, *other.found(replicate))

    def found(self, replicate: int) -> tuple[Tensor, Measured]:
        """The indices of the images that were measured in a replicate, rising, and what was found of them."""
        indices = self._done[replicate].nonzero().flatten()
        parts: dict[str, Terms] = {"term": {}, "diagnostic": {}}
        for (kind, name), columns in self._values.items():
            parts[kind][name] = columns[replicate][indices]
        return indices, Measured(parts["term"], parts["diagnostic"])

    def missing(self, replicate: int) -> Tensor:
        """The indices of images that are not measured in this replicate, rising."""
        if replicate not in self._done:
            return torch.arange(self.num_images)
        return (~self._done[replicate]).nonzero().flatten()

    def totals(self, replicates: Sequence[int]) -> Tensor:
        """The negative log-likelihood in nats, (replicates, images); NaN where it is missing."""
        return torch.stack(list(self._stacked("term", replicates).values())).sum(0)

    def report(self, measurement: Measurement, replicates: int, units: Units) -> LikelihoodReport:
        """The report of the first so many replicates, of all images that were measured in them.

        Args:
            measurement: The method.
            replicates: How many.
            units: What bits are counted by.
        """
        chosen = range(replicates)
        seen = torch.stack([self._done[replicate] for replicate in chosen]).all(0).nonzero().flatten()
        terms = {name: value[:, seen] for name, value in self._stacked("term", chosen).items()}
        diagnostics = {name: value[:, seen] for name, value in self._stacked("diagnostic", chosen).items()}
        report = LikelihoodReport(terms, diagnostics.get("time"), units.per_datum, units=units)
        report.integrand = diagnostics.get("integrand")
        report.method, report.is_bound = measurement.method, measurement.is_bound
        report.is_deterministic = measurement.is_deterministic
        report.transitions = measurement.transitions
        evaluations = diagnostics.get("evaluations", torch.zeros(()))
        report.network_evaluations = int(evaluations.sum()) + measurement.pilot_evaluations
        report.details |= measurement.protocol() | measurement.details(diagnostics)
        if measurement.objective.condition is not None:
            report.details["condition"] = measurement.objective.condition.noun
        if measurement.steps is not None:
            report.details["steps"] = measurement.steps
        if measurement.options:
            report.details["options"] = measurement.options
        return report.with_notes(measurement.notes(report))

    def _stacked(self, kind: str, replicates: Sequence[int]) -> Terms:
        return {
            name: torch.stack([columns[replicate] for replicate in replicates])
            for (found, name), columns in self._values.items()
            if found == kind
        }


def collect(
    measurement: Measurement, batches: Batches, num_images: int, replicates: int, units: Units | None = None
) -> LikelihoodReport:
    """The report of a method over all batches and replicates, in ``eval`` mode and without gradients.

    Args:
        measurement: The method.
        batches: Called once a replicate; each batch carries ``indices``, (B,), the images' indices.
        num_images: How many images all batches hold together.
        replicates: Independent estimates of each image; one, where nothing is drawn.
        units: What bits are counted by; by dimension of an image where not given.

    Raises:
        NonFiniteLossError: A term of an image is not finite; the message names both.
    """
    if num_images < 1 or replicates < 1:
        data = measurement.objective.kind.data
        raise DataError(f"{num_images} {data} and {replicates} replicates were given: give at least one of each.")
    results = Results(num_images, measurement.objective.kind)
    replicates = 1 if measurement.is_deterministic else replicates
    with evaluating(measurement.objective), torch.no_grad():
        measurement.fit(batches)
        for replicate in range(replicates):
            for batch in batches():
                results.add(replicate, batch["indices"], measurement.measure(batch, replicate))
    units = units or Units(per_datum=int(batch["levels"][0].numel()))
    return results.report(measurement, replicates, units)


def check_finite(name: str, term: Tensor, index: Tensor, kind: DataKind = IMAGES) -> None:
    """Refuse a term, (B,), that is not finite, by the name of the first such image, or window.

    Raises:
        NonFiniteLossError: It is not.
    """
    if not bool(torch.isfinite(term).all()):
        image = int(index[(~torch.isfinite(term.cpu())).nonzero()[0, 0]])
        raise NonFiniteLossError(
            f"the {name} term of {kind.datum} {image} is not finite. The model's weights or its schedule's endpoints "
            f"are at fault: evaluate an earlier checkpoint, or look at that {kind.datum}."
        )
