"""Measuring a set of images in stages, on any number of processes, through kills."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub.data.kinds import TOKENS, Units
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.evaluation.journal import Journal
from vdm_hub.evaluation.processes import Processes
from vdm_hub.fields import within
from vdm_hub.likelihood.measurement import Measurement, Results
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.stages import FEWEST_REPLICATES, next_replicates
from vdm_hub.models.calls import evaluating
from vdm_hub.objectives.variational_bound import Batch

Take = Callable[[Tensor], Batch]
"""The function that gives the images with these indices as the network's batch."""


@dataclass(frozen=True)
class ReplicateStages:
    """The plan of independent replicates: a first stage, and more until a standard error is met or a budget ends.

    Attributes:
        replicates: Those of the first stage.
        target: Monte Carlo standard error of the mean over the images, in bits/dim; of texts in bits/byte, or in
            bits/token where there is no figure in those. ``None`` stops after the first stage.
        max_replicates: The most in all.
        max_evaluations: The most network evaluations in all, the pilot's included.

    Raises:
        ConfigurationError: A number is out of range, or too few replicates for a target.
    """

    replicates: int = 8
    target: float | None = None
    max_replicates: int = 256
    max_evaluations: int | None = None

    def __post_init__(self) -> None:
        within(1, 10**6, self, "replicates", "max_replicates")
        within(1, 10**12, self, "max_evaluations")
        if self.target is None:
            return
        if not 0 < self.target < math.inf:
            raise ConfigurationError(
                f"target_standard_error is {self.target}: give a number above 0, in bits/dim (of texts, bits/byte)."
            )
        if not FEWEST_REPLICATES <= self.replicates <= self.max_replicates:
            raise ConfigurationError(
                f"replicates is {self.replicates}, with a target_standard_error and max_replicates "
                f"{self.max_replicates}: give at least {FEWEST_REPLICATES} and at most max_replicates, as the error "
                f"is judged by them."
            )

    def check_budget(self, fewest: int) -> None:
        """Refuse a budget that the first stage would overrun.

        Args:
            fewest: The evaluations that the first stage takes at least.

        Raises:
            ConfigurationError: It is too small; the message names the least.
        """
        if self.target is not None and self.max_evaluations is not None and fewest > self.max_evaluations:
            raise ConfigurationError(
                f"max_evaluations is {self.max_evaluations}, and the first stage of {self.replicates} replicates "
                f"takes {fewest}, the pilot's included: give at least so many, or measure fewer data."
            )

    def next(self, report: LikelihoodReport, pilot: int = 0) -> int | None:
        """The number of replicates in all after the next stage; ``None`` where these are enough, or the budget ends.

        The error falls with the square root of their number; a stage at most doubles it, as the error is itself
        uncertain.

        Args:
            report: Of the replicates so far.
            pilot: How many of its evaluations no further replicate takes.
        """
        done, error = report.replicates, report.leading_error
        if self.target is None or error <= self.target:
            return None
        most = self._most(report, pilot)
        more = next_replicates(done, error, self.target, most)
        return done + more if more else None

    def _most(self, report: LikelihoodReport, pilot: int) -> int:
        """The most replicates that the budget allows."""
        if self.max_evaluations is None:
            return self.max_replicates
        of_one = (report.network_evaluations - pilot) / report.replicates
        return min(self.max_replicates, int((self.max_evaluations - pilot) / max(of_one, 1e-9)))

    def describe(self, report: LikelihoodReport, pilot: int = 0) -> dict[str, object]:
        """The report's record of the target: in which unit, whether it was reached, and if not, what ended it."""
        if self.target is None:
            return {}
        target: dict[str, object] = {"standard_error": self.target, "unit": report.units.leading}
        target |= {"reached": report.leading_error <= self.target}
        target |= {"max_replicates": self.max_replicates, "max_evaluations": self.max_evaluations}
        if not target["reached"]:
            by_evaluations = self._most(report, pilot) < self.max_replicates
            target["ended_by"] = "max_evaluations" if by_evaluations else "max_replicates"
        return {"target": target}


def measure_images(
    measurement: Measurement,
    take: Take,
    num_images: int,
    stages: ReplicateStages,
    *,
    batch_size: int,
    processes: Processes | None = None,
    journal: Journal | None = None,
    progress: bool = True,
    units: Units | None = None,
) -> LikelihoodReport:
    """The report of a method over images, the same on every process.

    Args:
        measurement: The method.
        take: From places among the images, int64 of shape (B,), to their batch: ``levels``, (B, *data), and
            ``indices``, those places, by which draws are made.
        num_images: How many images there are.
        stages: How many replicates.
        batch_size: Images at once, at most.
        processes: Those that share the images; each takes part.
        journal: Where finished images are kept, and found.
        progress: Whether to show a bar with the current estimate.
        units: What bits are counted by; by dimension of an image where not given.

    Raises:
        DataError: There are fewer images than processes.
        NonFiniteLossError: A term of an image is not finite; the message names both.
    """
    processes = processes or Processes()
    if num_images < processes.count:
        data = measurement.objective.kind.data
        raise DataError(
            f"{num_images} {data} for {processes.count} processes: start at most {max(num_images, 1)}, or evaluate "
            f"more {data}."
        )
    first = 1 if measurement.is_deterministic else stages.replicates
    stages.check_budget(measurement.fewest_evaluations(first))
    batches = list(batches_of(num_images, batch_size, processes.count))
    own = batches[processes.rank :: processes.count]
    units = units or Units(per_datum=int(take(own[0][:1])["levels"][0].numel()))
    with (
        evaluating(measurement.objective),
        torch.no_grad(),
        _Bar(torch.cat(own), units, progress and processes.is_main) as bar,
    ):
        worker = _Worker(measurement, take, own, Results(num_images, units.kind), journal, bar)
        fitted = processes.together(lambda: worker.fit(batches) if processes.is_main else None)
        fitted = processes.broadcast(fitted)
        processes.together(lambda: worker.begin(fitted))
        done, goal = 0, first
        while True:
            stage = range(done, goal)
            fresh = processes.together(lambda: worker.run(stage))  # noqa: B023 - called before the next stage
            for found in processes.gather(fresh):
                worker.results.take(found)
            report = worker.results.report(measurement, goal, units)
            following = processes.broadcast(stages.next(report, measurement.pilot_evaluations))
            if following is None:
                break
            done, goal = goal, following
    report.details |= stages.describe(report, measurement.pilot_evaluations)
    if stages.target is not None and units.kind is TOKENS and units.bytes_per_value is None:
        report.with_notes(
            [f"the target standard error is judged in {units.leading}, as there is no figure in bits/byte"]
        )
    if journal is not None:
        report.details["seconds_before"] = round(journal.seconds_before, 3)
    return report


def batches_of(num_images: int, batch_size: int, processes: int = 1) -> Iterable[Tensor]:
    """Image indices in batches of nearly one size, as many for each process: batch b is for process b mod processes.

    >>> [batch.tolist() for batch in batches_of(5, 2)], [len(batch) for batch in batches_of(5, 2, processes=2)]
    ([[0, 1], [2, 3], [4]], [2, 1, 1, 1])
    """
    count = processes * math.ceil(num_images / (processes * batch_size))
    return (batch for batch in torch.arange(num_images).tensor_split(count) if len(batch))


@dataclass(frozen=True)
class _Worker:
    """The part of one process: its batches, and what is known of all images."""

    measurement: Measurement
    take: Take
    batches: list[Tensor]
    results: Results
    journal: Journal | None
    bar: _Bar

    def fit(self, batches: list[Tensor]) -> dict[str, Any]:
        """The pilot's findings, from the journal where it keeps them."""
        if self.journal is not None and self.journal.state is not None:
            return self.journal.state
        self.bar.say("pilot")
        self.measurement.fit(lambda: (self.take(indices) for indices in batches))
        fitted = {"state": self.measurement.state(), "evaluations": self.measurement.pilot_evaluations}
        if self.journal is not None:
            self.journal.keep_state(fitted)
        return fitted

    def begin(self, fitted: dict[str, Any] | None) -> None:
        """Begin with the pilot's findings, and with what is finished already."""
        assert fitted is not None
        self.measurement.load_state(fitted["state"])
        self.measurement.pilot_evaluations = int(fitted["evaluations"])
        if self.journal is not None:
            self.journal.read(self.results)

    def run(self, replicates: range) -> Results:
        """Measure this process's images in some replicates; those that are finished already are left out."""
        fresh = Results(self.results.num_images, self.results.kind)
        self.bar.expect(len(replicates))
        for replicate in replicates:
            missing = self.results.missing(replicate)
            for batch in self.batches:
                indices = batch[torch.isin(batch, missing)]
                if len(indices):
                    measured = self.measurement.measure(self.take(indices), replicate)
                    for results in (fresh, self.results):
                        results.add(replicate, indices, measured)
                    if self.journal is not None:
                        self.journal.write(replicate, indices, measured)
                self.bar.advance(len(batch), replicate, self.results)
            if self.journal is not None:
                self.journal.join(replicate, self.results.num_images)
            self.bar.finish(replicate, self.results)
        return fresh


class _Bar:
    """A progress bar over this process's images, with the estimate so far and its error."""

    def __init__(self, share: Tensor, units: Units, shown: bool) -> None:
        self._share, self._unit = share, units.leading
        self._scale = units.per_datum * (units.bytes_per_value or 1) * math.log(2)
        self._means: list[float] = []
        self._bar = tqdm(total=0, desc="evaluating", unit=units.kind.datum, disable=not shown, leave=False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, words: str) -> None:
        """Show words beside the count."""
        self._bar.set_postfix_str(words)

    def expect(self, replicates: int) -> None:
        """Expect more replicates."""
        if not self._bar.disable:
            self._bar.total = (self._bar.total or 0) + replicates * len(self._share)
            self._bar.refresh()

    def advance(self, images: int, replicate: int, results: Results) -> None:
        """Count finished images; before the first replicate is finished, there is no error to show."""
        if not self._bar.disable and not self._means:
            so_far = results.totals([replicate])[0, self._share].nanmean() / self._scale
            self._bar.set_postfix_str(f"{float(so_far):.4f} {self._unit}", refresh=False)
        self._bar.update(images)

    def finish(self, replicate: int, results: Results) -> None:
        """Show the estimate and its standard error after a finished replicate of this process's images."""
        if self._bar.disable:
            return
        self._means.append(float(results.totals([replicate])[0, self._share].mean() / self._scale))
        means = torch.tensor(self._means, dtype=torch.float64)
        error = f" ± {float(means.std() / math.sqrt(len(means))):.4f}" if len(means) > 1 else ""
        self._bar.set_postfix_str(f"{float(means.mean()):.4f}{error} {self._unit}")
