"""The variational bound by Monte Carlo, at as few evaluations of the network as its error allows.

Four techniques, each unbiased: times stratified over all images and over each image's own
(`vdm_hub.diffusion.times`), importance sampling of t (`vdm_hub.likelihood.proposals`), a control variate
(`vdm_hub.likelihood.control_variates`), and the reconstruction term by quadrature, where the decoder allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_hub.diffusion.draws import image_generator
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.times import times_of_data
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.fields import whole_number
from vdm_hub.likelihood.control_variates import ControlVariate, fit_coefficients
from vdm_hub.likelihood.image_features import StatisticsCollector
from vdm_hub.likelihood.measurement import Batches, Measured, Measurement, check_finite
from vdm_hub.likelihood.proposals import Proposal, fit_proposal
from vdm_hub.likelihood.time_grid import TimeGrid
from vdm_hub.models.calls import counted_calls, evaluating
from vdm_hub.objectives.variational_bound import Batch, VDMObjective

_NOISE, _TIMES, _PILOT_NOISE, _PILOT_TIMES = 101, 102, 103, 104  # streams of draws that share no key
_FEWEST_PILOT, _MOST_PILOT = 256, 4096


@dataclass(frozen=True)
class _Draws:
    """Draws of one replicate: float64 times, their cells and importance weights, each (images, times per image)."""

    times: Tensor
    cells: Tensor
    weights: Tensor


class BoundEstimator(Measurement):
    """The variational bound of each image of a set, in independent replicates.

    What is measured of an image depends on the seed, its index, the replicate, the number of images, and what `fit`
    found, which `state` and `load_state` carry to other processes; not on batches. Call `fit` once, or load the state
    that one process found; without either, times are uniform and no control variate is subtracted.

    Times are stratified within a replicate, over images and over each image's own; replicates share nothing but what
    the pilot fixed, so the standard error comes from them. The pilot's draws are in no result.

    Args:
        objective: The model: `VDMObjective`, or any whose bound has the term ``objective.integrand``.
        num_images: How many images are to be measured, all batches together.
        seed: Of all draws.
        stratified: Stratify the times; else each is drawn by itself.
        importance_sampling: Draw times where the pilot saw large values.
        control_variate: Subtract one where an exact one is known: Gaussian processes with a scalar gamma.
        times_per_datum: k, evaluations of each image in each replicate, at stratified times.
        pilot_evaluations: P; by default as many as images, from 256 to 4,096.
        defensive: The share of the uniform in the proposal.

    Raises:
        DataError: There is no image.
        ConfigurationError: A number of evaluations is out of range.

    >>> from vdm_hub import UNetVDMModel, VDMScheduler
    >>> unet = UNetVDMModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    >>> estimator = BoundEstimator(VDMObjective(unet, VDMScheduler(num_levels=17).process), num_images=2)
    >>> batch = {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long), "indices": torch.arange(2)}
    >>> {name: tuple(term.shape) for name, term in estimator.measure(batch, replicate=0).terms.items()}  # nats
    {'reconstruction': (2,), 'prior': (2,), 'diffusion': (2,)}
    """

    objective: VDMObjective

    def __init__(
        self,
        objective: VDMObjective,
        num_images: int,
        seed: int = 0,
        *,
        stratified: bool = True,
        importance_sampling: bool = True,
        control_variate: bool = True,
        times_per_datum: int = 1,
        pilot_evaluations: int | None = None,
        defensive: float = 0.1,
    ) -> None:
        super().__init__(objective, seed)
        if num_images < 1:
            raise DataError(f"{num_images} {objective.kind.data} were given: give at least one.")
        whole_number("times_per_datum", times_per_datum)
        if pilot_evaluations is not None:
            whole_number("pilot_evaluations", pilot_evaluations, 0)
        if pilot_evaluations and pilot_evaluations < _FEWEST_PILOT:
            raise ConfigurationError(
                f"pilot_evaluations is {pilot_evaluations}: give at least {_FEWEST_PILOT}, or 0 for no pilot."
            )
        self.num_images, self.stratified, self.times_per_datum = num_images, stratified, times_per_datum
        self.importance_sampling, self.defensive = importance_sampling, defensive
        self.control_variate = control_variate and _has_control_variate(objective)
        default = min(max(num_images, _FEWEST_PILOT), _MOST_PILOT)
        planned = default if pilot_evaluations is None else pilot_evaluations
        self._planned_pilot = planned if importance_sampling or self.control_variate else 0
        by_level = objective.process.reconstruction_by_level()
        self._reconstruction = None if by_level is None else by_level.cpu()
        self.grid = TimeGrid.of(objective.process, objective.transitions)
        self.proposal = Proposal.uniform(self.grid)
        self.variate: ControlVariate | None = None
        self.pilot_evaluations = 0
        self.network_evaluations = 0
        self._latest: tuple[int, _Draws] | None = None

    def fit(self, batches: Batches) -> None:
        """Run the pilot: the proposal and the control variate's coefficients, from draws that nothing else uses.

        Args:
            batches: Called once or twice; each batch carries ``indices``, (B,), the images' indices.

        Raises:
            NonFiniteLossError: The integrand of an image is not finite; the message names it.
        """
        if self._planned_pilot == 0:
            return
        with evaluating(self.objective), torch.no_grad():
            trial = self._trial(batches()) if self.control_variate else None
            before = self.network_evaluations
            cells, values, rows = self._pilot(batches(), trial)
        self.pilot_evaluations = self.network_evaluations - before
        if trial is not None:
            coefficients, values = fit_coefficients(rows, values, self.grid, cells)
            self.variate = None if coefficients is None else replace(trial, coefficients=coefficients)
        if self.importance_sampling:
            self.proposal = fit_proposal(self.grid, cells, values, self.defensive)
        self._latest = None

    def _trial(self, batches: Iterable[Batch]) -> ControlVariate:
        """A control variate that knows the data, and has no coefficients yet."""
        process = self.objective.process
        assert isinstance(process, GaussianProcess)
        collector = StatisticsCollector(process.scaling.spacing)
        for batch in batches:
            collector.add(process.encode(batch["levels"]))
        return ControlVariate(self.grid, collector.statistics(), torch.zeros(0))

    def _pilot(self, batches: Iterable[Batch], trial: ControlVariate | None) -> tuple[Tensor, Tensor, Tensor]:
        """The pilot's ``(cells, integrand with respect to dt, regressors)``, at times of `Proposal.even`."""
        source = np.random.default_rng([self.seed, 0, _PILOT_TIMES])
        rounds = -(-self._planned_pilot // self.num_images)
        orders = torch.from_numpy(np.stack([source.permutation(self.num_images) for _ in range(rounds)]))
        offsets = torch.from_numpy(source.random(rounds))
        times, cells, _ = Proposal.even(self.grid).draw(times_of_data(self.num_images, rounds, offsets, orders))
        chosen = torch.from_numpy(source.permutation(self.num_images)) < self._planned_pilot - (rounds - 1) * len(
            times
        )
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for batch in batches:
            for part, draw in _repeated(batch, rounds, chosen):
                index = part["indices"].cpu()
                keys = zip(index.tolist(), draw.tolist(), strict=True)
                generators = [image_generator(self.seed, 0, i, d, _PILOT_NOISE) for i, d in keys]
                noise = self.objective.draw_noise(part, generators)
                value = self._terms(part, times[index, draw], noise)[self.objective.integrand]
                check_finite(self.objective.integrand, value, index, self.objective.kind)
                row = torch.zeros(len(index), 0)
                if trial is not None:
                    features = trial.features(self.objective.process.encode(part["levels"]))
                    row = trial.regressors(features, cells[index, draw], noise["marginal"])
                found.append((draw * self.num_images + index, cells[index, draw], value, row))
        places, cells, values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = places.argsort()  # whatever the batches were: the fit's folds go by place
        return cells[order], values[order], rows[order]

    def _terms(self, batch: Batch, times: Tensor, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with counted_calls(self.objective.network) as calls:
            bound = self.objective(batch, times.float().to(batch["levels"].device), noise)
        self.network_evaluations += sum(calls)
        terms = {name: term.double().cpu() for name, term in bound.terms.items()}
        if self._reconstruction is not None:
            terms["reconstruction"] = self._reconstruction[batch["levels"].long().cpu()].flatten(1).sum(1)
        return terms

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of the images of a batch in one replicate, importance weights and control variate included.

        Diagnostics are ``time`` and ``integrand``, (B, k), the term at its own time with its importance weight and
        without control variate, in nats, and ``evaluations``, (B,).
        """
        index, draws, name = batch["indices"].cpu(), self._draws(replicate), self.objective.integrand
        known = None
        if self.variate is not None:
            features = self.variate.features(self.objective.process.encode(batch["levels"]))
            known = self.variate, features, self.variate.integral(features)
        sums: dict[str, Tensor] = {}
        before = self.network_evaluations
        integrand = torch.empty(len(index), self.times_per_datum, dtype=torch.float64)
        for draw in range(self.times_per_datum):
            generators = [image_generator(self.seed, replicate, int(i), draw, _NOISE) for i in index]
            noise = self.objective.draw_noise(batch, generators)
            terms = self._terms(batch, draws.times[index, draw], noise)
            weight = draws.weights[index, draw]
            terms[name] = integrand[:, draw] = weight * terms[name]
            if known is not None:
                variate, features, integral = known
                value = variate.value(features, draws.cells[index, draw], noise["marginal"])
                terms[name] = terms[name] - weight * value + integral
            for term, values in terms.items():
                sums[term] = sums.get(term, 0) + values / self.times_per_datum
        each = (self.network_evaluations - before) / len(index)  # a decoder may call the network, too
        counts = torch.full((len(index),), each, dtype=torch.float64)
        return Measured(sums, {"time": draws.times[index], "integrand": integrand, "evaluations": counts})

    def times(self, replicate: int) -> Tensor:
        """The times of every image in a replicate, (images, times per image), float64."""
        return self._draws(replicate).times

    def _draws(self, replicate: int) -> _Draws:
        if self._latest is None or self._latest[0] != replicate:
            source, k = np.random.default_rng([self.seed, replicate, _TIMES]), self.times_per_datum
            if self.stratified:
                orders = torch.from_numpy(np.stack([source.permutation(self.num_images) for _ in range(k)]))
                uniforms = times_of_data(self.num_images, k, torch.from_numpy(source.random(k)), orders)
            else:
                uniforms = torch.from_numpy(source.random((self.num_images, k)))
            self._latest = replicate, _Draws(*self.proposal.draw(uniforms))
        return self._latest[1]

    def state(self) -> dict[str, Any]:
        """The pilot's findings, as plain JSON."""
        return {
            "probabilities": self.proposal.probabilities.tolist(),
            "control_variate": None if self.variate is None else self.variate.to_json(),
            "pilot_evaluations": self.pilot_evaluations,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, in an estimator of the same model and arguments."""
        self.proposal = Proposal(self.grid, torch.tensor(state["probabilities"], dtype=torch.float64))
        found = state["control_variate"]
        self.variate = None if found is None else ControlVariate.from_json(self.grid, found)
        self.pilot_evaluations = int(state["pilot_evaluations"])
        self._latest = None

    def fewest_evaluations(self, replicates: int) -> int:
        """The evaluations of the pilot, and one at each time of each image; a decoder may take more."""
        return self._planned_pilot + replicates * self.num_images * self.times_per_datum

    def protocol(self) -> dict[str, Any]:
        """The techniques in use, as plain JSON."""
        return {
            "estimator": {
                "stratified": self.stratified,
                "importance_sampling": self.importance_sampling and bool(self._planned_pilot),
                "control_variate": self.control_variate and bool(self._planned_pilot),
                "times_per_datum": self.times_per_datum,
                "pilot_evaluations": self._planned_pilot,
                "defensive": self.defensive,
            }
        }


def _has_control_variate(objective: VDMObjective) -> bool:
    process = objective.process
    if objective.integrand != "diffusion" or not isinstance(process, GaussianProcess) or not process.is_plain:
        return False
    # In continuous time the reverse steps' variance is in no term.
    return objective.transitions is None or process.variance.is_posterior


def _repeated(batch: Batch, rounds: int, chosen: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """A batch's images ``rounds`` times over, the last time only the chosen ones, and which time each is, (B,).

    Few images are repeated within a batch: the network need not be called once for each.
    """
    index = batch["indices"].cpu()
    rows, draws = torch.arange(len(index)).repeat(rounds), torch.arange(rounds).repeat_interleave(len(index))
    kept = (draws < rounds - 1) | chosen[index[rows]]
    for part in kept.nonzero().flatten().split(max(len(index), _FEWEST_PILOT)):
        yield {name: values[rows[part].to(values.device)] for name, values in batch.items()}, draws[part]
