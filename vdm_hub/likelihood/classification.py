r"""Classification by the bound: ``p(c|x) \propto p(c) exp(-B_c(x))``, B_c the bound of the network told c.

The candidates c are whatever a network can be told: classes, captions. Sources: Li et al., arXiv 2303.16203 (Diffusion
Classifier), eq. 5, for the posterior and for draws that all candidates share; Clark & Jaini, arXiv 2303.15233, for
dropping candidates while draws are added.

A candidate's bound is a mean over draws of time and noise; all candidates of an image see the same draws, so that what
they have in common cancels in the differences. Draws are added in rounds. After each, the candidates whose paired
difference to the best one is too large to be chance are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import image_generator
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.fields import MAX_SEED, whole_number
from vdm_hub.likelihood.classification_report import ClassificationReport, Standing
from vdm_hub.likelihood.measurement import check_finite
from vdm_hub.likelihood.paired_differences import Comparison, Scatter, compare
from vdm_hub.likelihood.proposals import Proposal, fit_proposal
from vdm_hub.likelihood.protocol import ClassificationEffort
from vdm_hub.likelihood.time_grid import TimeGrid
from vdm_hub.models.calls import counted_calls, evaluating
from vdm_hub.objectives.variational_bound import Batch, Objective, VDMObjective, check_finite_ends

Arguments = Callable[[Tensor], Mapping[str, Tensor]]
"""From the indices of candidates, (M,), to what the network is told of each, by name, (M, ...)."""

_MAIN, _PILOT, _PILOT_IMAGES = (121, 122), (123, 124), 125  # streams of draws: of noise and of times
_GOLDEN = 0.6180339887498949
_PILOT_DRAWS, _PILOT_CANDIDATES = 16, 32  # of an image, at most
_NUMBERS_AT_ONCE = 2**24  # that are kept in memory


class BoundClassifier:
    """The candidates of images by their bounds, from draws that all candidates of an image share.

    What is found of an image depends on the image, its index, the seed and what `fit` found, which `state` and
    `load_state` carry; not on batches, nor on the other images. Draw n of an image is at the time
    ``q^{-1}((o + n g) mod 1)``: g the golden ratio, which stratifies any number of them; o the image's own offset; q
    the density that the pilot found, whose inverse weights keep every difference unbiased. That holds for any number
    of draws that is fixed; where a round ends by what it found, a difference is a little larger than the truth.

    Args:
        objective: The model: a `VDMObjective`, or one whose bound has the term ``objective.integrand`` too.
        arguments: What the network is told of candidates.
        prior: ``p(c)``, (C,): of what the candidates are before the image is seen.
        effort: How many evaluations.
        seed: Of all draws.
        batch_size: Pairs of an image and a candidate in one call of the network, at most.

    Raises:
        ConfigurationError: The model is no diffusion, there are fewer than two candidates, or the budget is too small
            for their first draws.

    >>> from vdm_hub import UNetVDMModel, VDMScheduler
    >>> blocks = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    >>> unet = UNetVDMModel(8, in_channels=1, out_channels=1, num_class_embeds=3, **blocks)
    >>> objective = VDMObjective(unet, VDMScheduler(num_levels=17).process)
    >>> classifier = BoundClassifier(objective, lambda chosen: {"class_labels": chosen}, torch.full((3,), 1 / 3))
    >>> batch = {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long), "indices": torch.arange(2)}
    >>> classifier.classify(batch).differences.shape  # nats
    torch.Size([2, 3])
    """

    def __init__(
        self,
        objective: Objective,
        arguments: Arguments,
        prior: Tensor,
        effort: ClassificationEffort | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if not isinstance(objective, VDMObjective):
            raise ConfigurationError(
                f"{type(objective).__name__} is that of no diffusion, whose draws at single times a classification "
                f"compares: give a diffusion's."
            )
        check_finite_ends(objective.process)
        self.objective, self.arguments, self.log_prior = objective, arguments, prior.double().log()
        self.effort, self.seed = effort or ClassificationEffort(), whole_number("seed", seed, 0, MAX_SEED)
        self.batch_size, self.candidates = whole_number("batch_size", batch_size), len(prior)
        if self.candidates < 2:
            raise ConfigurationError(f"{self.candidates} candidates were given: give at least 2 to choose from.")
        self.budget = self.effort.budget_for(self.candidates)
        self.grid = TimeGrid.of(objective.process, objective.transitions)
        self.proposal, self.scatter = Proposal.even(self.grid), Scatter()
        self.pilot_evaluations = self.network_evaluations = 0
        # What no candidate changes is left out of the differences, where that is known without a draw.
        self._asks_decoder = objective.process.reconstruction_by_level() is None

    def fit(self, batch: Batch) -> None:
        """Run the pilot on some of the images: where times are best drawn, and how much a difference scatters.

        Args:
            batch: The images, with their ``indices``, (N,).
        """
        planned, count = self.effort.pilot_evaluations, len(batch["indices"])
        if not planned:
            return
        told = torch.linspace(0, self.candidates - 1, min(self.candidates, _PILOT_CANDIDATES)).round().long()
        images = min(count, max(planned // (_PILOT_DRAWS * len(told)), 1))
        draws = min(max(planned // (images * len(told)), 4), _PILOT_DRAWS)
        chosen = torch.randperm(count, generator=image_generator(self.seed, _PILOT_IMAGES))[:images]
        alive = torch.zeros(images, self.candidates, dtype=torch.bool).index_fill_(1, told, True)
        # First where times are drawn, then how much differences scatter with times drawn there.
        first, seen = torch.zeros(images, dtype=torch.long), list[tuple[Tensor, Tensor]]()
        for more in (draws // 2, draws - draws // 2):
            with evaluating(self.objective), torch.no_grad():
                pilot = self._draw(_rows(batch, chosen), first, torch.full_like(first, more), alive, _PILOT)
            self.pilot_evaluations += len(pilot.values)
            history = pilot.values.view(images, more, len(told))
            cells = pilot.cells.view(history.shape)[:, :, 0]
            weights = (self.grid.widths / self.proposal.probabilities)[cells]
            seen.append((cells.flatten(), (history.std(2) / weights).flatten()))
            places, spreads = (torch.cat(column) for column in zip(*seen, strict=True))
            self.proposal = fit_proposal(self.grid, places, spreads)
            first = first + more
        self.scatter = Scatter.fit(history, cells)

    def classify(self, batch: Batch) -> Standing:
        """The standing of every candidate of each image.

        Args:
            batch: The images, with their ``indices``, (N,), and whatever else the network is told of each.

        Raises:
            NonFiniteLossError: The integrand of an image is not finite; the message names it.
        """
        most = max(self.budget // 2, self.effort.first_draws)
        at_once = max(_NUMBERS_AT_ONCE // (most * self.candidates), 1)
        with evaluating(self.objective), torch.no_grad():
            parts = [self._classify(_rows(batch, rows)) for rows in torch.arange(len(batch["indices"])).split(at_once)]
        return Standing(*(torch.cat(column) for column in zip(*map(astuple, parts), strict=True)))

    def _classify(self, batch: Batch) -> Standing:
        count = len(batch["indices"])
        history, table = _nothing(count, self.candidates), _Table.of(count, self.candidates)
        done, evaluations = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        while True:
            contested = table.alive.sum(1)
            left = (self.budget - evaluations) // contested
            draws = torch.where(contested > 1, torch.minimum(self._next(done), left), 0)
            if not bool(draws.any()):
                return table.standing((~history.isnan()).sum(1), evaluations)
            history = self._draw(batch, done, draws, table.alive, _MAIN).added_to(history)
            done, evaluations = done + draws, evaluations + draws * contested
            table.update(compare(history, table.alive, self.log_prior, self.scatter), self.effort.confidence)

    def _next(self, done: Tensor) -> Tensor:
        """The draws that the next round adds: a quarter of those that there are, so that rounds are few."""
        return torch.where(done == 0, self.effort.first_draws, (done // 4).clamp(min=1))

    def _draw(self, batch: Batch, first: Tensor, count: Tensor, alive: Tensor, streams: tuple[int, int]) -> _Drawn:
        """The integrand of the candidates that are left on the next draws of each image, all pairs in full batches."""
        rows = torch.arange(len(count)).repeat_interleave(count)
        draws = torch.arange(len(rows)) - (count.cumsum(0) - count - first)[rows]
        times, cells, weights = self._times(batch["indices"][rows].cpu(), draws, streams[1])
        job, candidate = alive[rows].nonzero(as_tuple=True)
        values = torch.empty(len(job), dtype=torch.float64)
        for part in torch.arange(len(job)).split(self.batch_size):
            chosen, place = job[part].unique_consecutive(return_inverse=True)
            images = _rows(batch, rows[chosen])
            keys = zip(images["indices"].tolist(), draws[chosen].tolist(), strict=True)
            noise = self.objective.draw_noise(images, [image_generator(self.seed, *key, streams[0]) for key in keys])
            told = self.arguments(candidate[part])
            pairs = _rows(images, place) | {name: value.to(batch["levels"].device) for name, value in told.items()}
            values[part] = self._integrand(pairs, times[job[part]], weights[job[part]], _rows(noise, place))
        return _Drawn(rows[job], draws[job], candidate, cells[job], values)

    def _times(self, indices: Tensor, draws: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """The times of draws of images, their cells and their weights."""
        own, place = indices.unique(return_inverse=True)
        sources = [image_generator(self.seed, int(index), stream) for index in own]
        offsets = torch.stack([torch.rand((), dtype=torch.float64, generator=source) for source in sources])
        return self.proposal.draw((offsets[place] + draws * _GOLDEN) % 1)

    def _integrand(self, pairs: Batch, times: Tensor, weights: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The part of one draw of the bound that a candidate may change, (pairs,)."""
        with counted_calls(self.objective.network) as calls:
            terms = self.objective.network_terms(
                pairs, times.float().to(pairs["levels"].device), noise, reconstruction=self._asks_decoder
            )
        self.network_evaluations += sum(calls)
        for name, term in terms.items():
            check_finite(name, term, pairs["indices"].cpu())
        whole = {name: term.double().cpu() for name, term in terms.items()}
        return whole.pop(self.objective.integrand) * weights + sum(whole.values())

    def report(self, batch: Batch, names: tuple[str, ...]) -> ClassificationReport:
        """The report on some images: the pilot on some of them, then the rounds on all.

        Args:
            batch: See `classify`.
            names: Of the candidates.

        Raises:
            DataError: There is no image.
            NonFiniteLossError: The integrand of an image is not finite; the message names it.
        """
        if not len(batch["indices"]):
            raise DataError("0 images were given: give at least one.")
        self.fit(batch)
        standing = self.classify(batch)
        details: dict[str, Any] = {"seed": self.seed, "transitions": self.objective.transitions}
        details |= {"effort": asdict(self.effort) | {"budget": self.budget}}
        prior = self.log_prior.exp()
        return ClassificationReport(
            names, prior, standing, self.pilot_evaluations, self.network_evaluations, details=details
        )

    def state(self) -> dict[str, Any]:
        """The pilot's findings, as plain JSON."""
        return {
            "probabilities": self.proposal.probabilities.tolist(),
            "scatter": asdict(self.scatter),
            "pilot_evaluations": self.pilot_evaluations,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, in a classifier of the same model and arguments."""
        self.proposal = Proposal(self.grid, torch.tensor(state["probabilities"], dtype=torch.float64))
        self.scatter = Scatter(**state["scatter"])
        self.pilot_evaluations = int(state["pilot_evaluations"])


@dataclass
class _Table:
    """The candidates that are left, and what the last comparison of each found, against the best one of that time.

    All (N, C), but ``best``, (N,).
    """

    alive: Tensor
    differences: Tensor
    variances: Tensor
    reference: Tensor
    best: Tensor

    @classmethod
    def of(cls, count: int, candidates: int) -> _Table:
        """A table without any draw: each candidate of each image is still possible."""
        zeros = torch.zeros(count, candidates, dtype=torch.float64)
        whole = torch.ones_like(zeros, dtype=torch.bool)
        return cls(whole, zeros, zeros.clone(), torch.zeros_like(whole, dtype=torch.long), whole.sum(1) * 0)

    def update(self, found: Comparison, confidence: float | None) -> None:
        """Take over a comparison, and drop whom it leaves no chance."""
        self.best = found.best
        self.differences = torch.where(self.alive, found.differences, self.differences)
        self.variances = torch.where(self.alive, found.errors**2, self.variances)
        self.reference = torch.where(self.alive, found.best[:, None], self.reference)
        if confidence is not None:
            chance = (1 - confidence) / (self.alive.shape[1] - 1)
            is_best = torch.zeros_like(self.alive).scatter_(1, found.best[:, None], True)
            self.alive = self.alive & ((found.doubt > chance) | is_best)

    def standing(self, draws: Tensor, evaluations: Tensor) -> Standing:
        """The standing of all; the best is as far from one that was dropped as its reference is, and that from it."""
        differences, variances, at = self.differences, self.variances, self.reference
        while bool((at != self.best[:, None]).any()):
            differences = differences + self.differences.gather(1, at)
            variances = variances + self.variances.gather(1, at)
            at = self.reference.gather(1, at)
        decided = self.alive.sum(1) == 1
        return Standing(differences, variances.sqrt(), draws, self.best, decided, evaluations)


@dataclass(frozen=True)
class _Drawn:
    """The values of pairs: of which image, draw and candidate each is, and the cell of its time; all (pairs,)."""

    rows: Tensor
    draws: Tensor
    candidates: Tensor
    cells: Tensor
    values: Tensor

    def added_to(self, history: Tensor) -> Tensor:
        """A history, (N, draws, C), with these draws."""
        count, had, candidates = history.shape
        more = max(int(self.draws.max()) + 1 - had, 0)
        history = torch.cat([history, _nothing(count, candidates, more)], 1)
        history[self.rows, self.draws, self.candidates] = self.values
        return history


def _nothing(count: int, candidates: int, draws: int = 0) -> Tensor:
    """A history without values, (count, draws, candidates)."""
    return torch.full((count, draws, candidates), torch.nan, dtype=torch.float64)


def _rows(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The part of a batch with these rows."""
    return {name: value[rows.to(value.device)] for name, value in batch.items()}
