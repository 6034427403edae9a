r"""The bound of a masked model by counts: exactly k of a text's n sites masked.

Integrating t out of the continuous bound gives ``n E_{k ~ U{1..n}} (1/k) E sum over masked of -log p(x_l|z)``, the
sites being any k, each set alike (ARDM, Hoogeboom et al., arXiv 2110.02037, eq. 6; LLaDA, Nie et al., arXiv
2502.09992, eq. 14). The weight 1/t of an i.i.d. t has a variance that diverges logarithmically; counts have none of
it. A network that is told the time is told one from its distribution given k: ``1 - alpha`` is the k-th least of n
uniforms, Beta(k, n - k + 1), so the number is that of the continuous bound for such networks, too.

``k = floor(u^2 n) + 1`` with u stratified over the texts of a replicate: the mean cost of k sites scatters about as
``k^-1/2``, so u, of density 2u in the share of a text, is near the best there is before anything is known. A pilot
finds a control variate and the density that suits what it leaves: see `site_costs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_hub import (
    Batch,
    Batches,
    ConfigurationError,
    DataError,
    Measured,
    Measurement,
    VDMObjective,
    image_generator,
    stratified_times,
)
from vdm_hub_tokens.site_costs import SiteCosts
from vdm_hub_tokens.texts import MaskedTexts, absorbing_of, ranks_of

_NOISE, _COUNTS, _PILOT_NOISE, _PILOT_COUNTS = 201, 202, 203, 204  # streams of draws that share no key
FEWEST_PILOT, MOST_PILOT = 256, 4096


class CountsMeasurement(Measurement):
    """The method ``masked_counts``: see `vdm_hub_tokens.MaskedCounts`.

    What is measured of a text depends on the seed, its index, the replicate, the number of texts, and what `fit`
    found; not on batches.

    Args:
        objective: The model, of an `AbsorbingProcess`; in continuous time.
        num_texts: How many texts are to be measured, all batches together.
        seed: Of all draws.
        counts_per_text: Evaluations of each text in each replicate.
        pilot_evaluations: P; as many as texts, from 256 to 4,096, where not given; 0 for none.

    Raises:
        ConfigurationError: The model is another, or P too small.
        DataError: There is no text.
    """

    method = "masked_counts"
    objective: VDMObjective

    def __init__(
        self,
        objective: VDMObjective,
        num_texts: int,
        seed: int = 0,
        counts_per_text: int = 1,
        pilot_evaluations: int | None = None,
    ) -> None:
        super().__init__(objective, seed)
        absorbing_of(objective)
        if num_texts < 1:
            raise DataError(f"{num_texts} texts were given: give at least one.")
        if pilot_evaluations and pilot_evaluations < FEWEST_PILOT:
            raise ConfigurationError(
                f"pilot_evaluations is {pilot_evaluations}: give at least {FEWEST_PILOT}, or 0 for no pilot."
            )
        self.num_texts, self.counts_per_text = num_texts, counts_per_text
        default = min(max(num_texts, FEWEST_PILOT), MOST_PILOT)
        self._planned_pilot = default if pilot_evaluations is None else pilot_evaluations
        self.found = SiteCosts.nothing()
        self._latest: tuple[int, tuple[Tensor, Tensor]] | None = None

    @property
    def transitions(self) -> None:
        """None: the bound is that of continuous time."""
        return None

    def fit(self, batches: Batches) -> None:
        """Run the pilot: what sites cost, and where counts are best drawn, from draws that nothing else uses."""
        if not self._planned_pilot:
            return
        source = np.random.default_rng([self.seed, 0, _PILOT_COUNTS])
        rounds = -(-self._planned_pilot // self.num_texts)
        u, _ = self.found.draw(_stratified(self.num_texts, rounds, source))
        last = self._planned_pilot - (rounds - 1) * self.num_texts
        chosen = torch.from_numpy(source.permutation(self.num_texts)) < last
        rows = [row for batch in batches() for row in self._pilot(batch, u, chosen)]
        place, x, masked, costs, counts = (torch.cat(parts) for parts in zip(*rows, strict=True))
        order = place.argsort()  # whatever the batches were
        at = u.T.flatten()[place[order]]
        self.found = SiteCosts.fit(at, x[order], masked[order], costs[order], counts[order])
        self.pilot_evaluations, self._latest = len(place), None

    def _pilot(self, batch: Batch, u: Tensor, chosen: Tensor) -> list[tuple[Tensor, ...]]:
        """What was seen of a batch's texts, ``rounds`` draws of each, the last of the chosen ones alone."""
        index, rounds = batch["indices"].cpu(), u.shape[1]
        rows, draws = torch.arange(len(index)).repeat(rounds), torch.arange(rounds).repeat_interleave(len(index))
        kept = ((draws < rounds - 1) | chosen[index[rows]]).nonzero().flatten()
        texts = MaskedTexts(self.objective, batch)
        found: list[tuple[Tensor, ...]] = []
        for part in kept.split(max(len(index), 32)):
            some, which, draw = texts.rows(rows[part]), index[rows[part]], draws[part]
            keys = zip(which.tolist(), draw.tolist(), strict=True)
            generators = [image_generator(self.seed, 0, i, d, _PILOT_NOISE) for i, d in keys]
            masked, costs = masked_costs(some, some.draw_order(generators), u[which, draw])
            found.append((draw * self.num_texts + which, some.x.cpu(), masked, costs, some.counts.cpu()))
        return found

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of the texts of a batch in one replicate."""
        texts, index = MaskedTexts(self.objective, batch), batch["indices"].cpu()
        x, counts, (u, weights) = texts.x.cpu(), texts.counts.cpu(), self._draws(replicate)
        total = counts * self.found.expected(x, texts.scored.cpu())
        for draw in range(self.counts_per_text):
            generators = [image_generator(self.seed, replicate, int(i), draw, _NOISE) for i in index]
            at = u[index, draw]
            masked, costs = masked_costs(texts, texts.draw_order(generators), at)
            mean = costs.sum(1) / masked.sum(1).clamp(min=1)
            weight = 2 * at * weights[index, draw] / self.counts_per_text
            total = total + counts * weight * (mean - self.found.guess(at, x, masked))
        zero = torch.zeros_like(total)
        evaluations = torch.full((len(index),), float(self.counts_per_text), dtype=torch.float64)
        return Measured({"reconstruction": zero, "prior": zero, "diffusion": total}, {"evaluations": evaluations})

    def _draws(self, replicate: int) -> tuple[Tensor, Tensor]:
        """``(u, 1/density)`` of every text in a replicate, (texts, counts per text)."""
        if self._latest is None or self._latest[0] != replicate:
            source = np.random.default_rng([self.seed, replicate, _COUNTS])
            uniforms = _stratified(self.num_texts, self.counts_per_text, source)
            self._latest = replicate, self.found.draw(uniforms)
        return self._latest[1]

    def state(self) -> dict[str, Any]:
        """The pilot's findings, as plain JSON."""
        return {"site_costs": self.found.to_json(), "pilot_evaluations": self.pilot_evaluations}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, in a measurement of the same model and arguments."""
        self.found, self._latest = SiteCosts.from_json(state["site_costs"]), None
        self.pilot_evaluations = int(state["pilot_evaluations"])

    def fewest_evaluations(self, replicates: int) -> int:
        """The evaluations of the pilot, and those of each text."""
        return self._planned_pilot + replicates * self.num_texts * self.counts_per_text

    def protocol(self) -> dict[str, Any]:
        """The techniques in use, as plain JSON."""
        pilot = self._planned_pilot
        return {
            "estimator": {
                "masked_counts": True,
                "stratified": True,
                "importance_sampling": bool(pilot),
                "control_variate": bool(pilot),
                "counts_per_text": self.counts_per_text,
                "pilot_evaluations": pilot,
            }
        }


def masked_costs(texts: MaskedTexts, uniforms: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Which ``k = floor(u^2 n) + 1`` sites of each text are masked, and what they cost, (B, L), on the CPU.

    Args:
        texts: The texts.
        uniforms: The order in which sites are masked: see `MaskedTexts.draw_order`.
        u: The root of the share that is masked, in [0, 1], (B,).
    """
    counts = texts.counts
    k = ((u.to(counts.device) ** 2 * counts).long() + 1).minimum(counts)
    masked = texts.scored & (ranks_of(uniforms) < k.unsqueeze(1))
    lost = uniforms.sort(1).values.gather(1, (k - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    costs = texts.costs(masked, torch.where(k > 0, lost, 0.0))
    return masked.cpu(), costs.cpu()


def _stratified(texts: int, each: int, source: np.random.Generator) -> Tensor:
    """Uniforms, stratified over a text's own and over all texts, (texts, each), float64."""
    columns = []
    for draw in range(each):
        order = torch.from_numpy(source.permutation(texts))
        columns.append((draw + stratified_times(texts, source.random(), dtype=torch.float64)[order]) / each)
    return torch.stack(columns, 1)
