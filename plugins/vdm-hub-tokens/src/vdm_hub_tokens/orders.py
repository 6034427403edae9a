r"""Likelihoods of a masked model that opens its sites in an order.

Where the next site is a function of what is open alone, the sampler that opens it has an exact likelihood,
``-log p(x) = sum over steps of -log p(x_l|open)`` (DUEL, arXiv 2603.01367); with k sites opened at once it is that of
the sampler whose k sites are drawn each for itself. It is another model than the one of random orders, whose
likelihood is a mean over all of them, ``p(x) = E p(x|order)``, and is bounded: by the mean of ``-log p(x|order)``,
which is the bound of masked diffusion, or, closer, by that of ``-log 1/D sum_d p(x|order_d)`` (Burda et al., arXiv
1509.00519, eq. 8).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vdm_hub import (
    Batch,
    ConfigurationError,
    LikelihoodReport,
    Measured,
    Measurement,
    VDMObjective,
    image_generator,
)
from vdm_hub_tokens.texts import MaskedTexts, absorbing_of, ranks_of

_LAST = 1e300  # below which no score of a masked site lies, so that those that are open come after it
_ORDERS = 205  # a stream of draws of its own


class OpeningRule(ABC):
    """Which site opens next: a function of what is open alone, so that a sampler can follow it, too.

    Attributes:
        name: By which reports call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Tensor:
        """The masked site of the highest score opens first, of equal ones the leftmost; (B, L).

        Args:
            z: The ids of the open sites, the mask's for the others, (B, L).
            masked: Which sites are not open, (B, L).
            log_probs: ``log p(x_l|open)`` of all values, (B, L, K).
        """


class LeftToRight(OpeningRule):
    """The leftmost masked site."""

    name = "left_to_right"

    def scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Tensor:
        return -torch.arange(z.shape[1], dtype=log_probs.dtype, device=z.device).expand(z.shape)


class RightToLeft(OpeningRule):
    """The rightmost masked site."""

    name = "right_to_left"

    def scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Tensor:
        return torch.arange(z.shape[1], dtype=log_probs.dtype, device=z.device).expand(z.shape)


class MostConfident(OpeningRule):
    """The site whose likeliest value is the likeliest."""

    name = "most_confident"

    def scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Tensor:
        return log_probs.amax(-1)


class LowestEntropy(OpeningRule):
    """The site whose distribution has the lowest entropy."""

    name = "lowest_entropy"

    def scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Tensor:
        return torch.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)


RULES: dict[str, OpeningRule] = {
    one.name: one for one in (LeftToRight(), RightToLeft(), MostConfident(), LowestEntropy())
}
"""The rules by name."""


class ExactOrderMeasurement(Measurement):
    """The method ``exact_order``: see `vdm_hub_tokens.ExactOrder`.

    The network is told, as the time, the one at which so large a share of the sites that are not given is masked.

    Args:
        objective: The model, of an `AbsorbingProcess`.
        rule: Which sites open next.
        opened_at_once: k.
        seed: Not read: nothing is drawn.
    """

    method = "exact_order"
    is_bound = False
    is_deterministic = True
    objective: VDMObjective

    def __init__(self, objective: VDMObjective, rule: OpeningRule, opened_at_once: int = 1, seed: int = 0) -> None:
        super().__init__(objective, seed)
        absorbing_of(objective)
        self.rule, self.opened_at_once, self._is_checked = rule, opened_at_once, False
        self.steps = _steps(opened_at_once)

    @property
    def transitions(self) -> None:
        """None: the sampler's steps are those of its order."""
        return None

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The term ``order`` of each text of a batch, the same in every replicate."""
        texts = MaskedTexts(self.objective, batch)
        masked = texts.scored.clone()
        total = torch.zeros(len(masked), dtype=torch.float64, device=masked.device)
        evaluations = total.clone()
        self._is_checked = False
        while bool(masked.any()):
            rows = masked.any(1).nonzero().flatten()
            costs, opened = self._step(texts.rows(rows), masked[rows])
            total[rows] += costs
            evaluations[rows] += 1
            masked[rows] &= ~opened
        return Measured({"order": total.cpu()}, {"evaluations": evaluations.cpu()})

    def _step(self, texts: MaskedTexts, masked: Tensor) -> tuple[Tensor, Tensor]:
        """What the sites that open next cost, (B,), and which they are, (B, L)."""
        log_probs = texts.log_probs(masked, masked.sum(1) / texts.counts)
        z = torch.where(masked, texts.process.mask_id, texts.x)
        scores = self._scores(z, masked, log_probs)
        opened = masked & (ranks_of(torch.where(masked, -scores, torch.inf)) < self.opened_at_once)
        each = -log_probs.gather(-1, texts.x.unsqueeze(-1)).squeeze(-1)
        return torch.where(opened, each, 0.0).sum(1), opened

    def _scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Tensor:
        """The rule's scores, float64; each batch's first are asked for twice, as a rule that draws is none."""
        found = self.rule.scores(z, masked, log_probs)
        is_sound = log_probs.isfinite().all(-1) & masked
        wrong = ""
        if not isinstance(found, Tensor) or found.shape != z.shape:
            wrong = f"are {f'of shape {tuple(found.shape)}' if isinstance(found, Tensor) else type(found).__name__}"
        elif not bool(found[is_sound].isfinite().all()):
            wrong = "are not finite"
        elif not self._is_checked:
            again = self.rule.scores(z, masked, log_probs)
            wrong = "" if torch.equal(found[is_sound], again[is_sound]) else "are others at a second call"
        if wrong:
            raise ConfigurationError(
                f"the scores of the rule {self.rule.name!r} {wrong}, and a likelihood is exact only where what opens "
                f"next is a function of what is open: give finite numbers of shape {tuple(z.shape)}, always the same."
            )
        self._is_checked = True
        # Where the network gave what is no number, such a site opens first: the figure is then none, which is said.
        return found.double().nan_to_num(torch.inf, torch.inf, -_LAST)

    def fewest_evaluations(self, replicates: int) -> int:
        """One of each text, at least: how many sites are not given is not known beforehand."""
        return replicates

    def protocol(self) -> dict[str, Any]:
        """The rule, and how many sites open at once."""
        return {"order": {"rule": self.rule.name, "opened_at_once": self.opened_at_once}}

    def notes(self, report: LikelihoodReport) -> list[str]:
        """A note on the kind of number."""
        sites = "one site" if self.opened_at_once == 1 else f"{self.opened_at_once} sites"
        return [
            f"this is the exact likelihood of the sampler that opens {sites} at a time by the rule "
            f"{self.rule.name!r}, another model than that of the bound; nothing is drawn, so there is one replicate"
        ]


class WeightedOrdersMeasurement(Measurement):
    """The method ``weighted_orders``: see `vdm_hub_tokens.WeightedOrders`.

    Terms: ``diffusion``, the mean of ``-log p(x|order)``, and ``importance_weighting``, at most zero: what D orders
    gain over their mean. A network that is told the time is told one at which a draw of the process has so many sites
    masked, so that with one order, opened one by one, the expectation is the continuous bound.

    Args:
        objective: The model, of an `AbsorbingProcess`.
        draws: D. Order d of a text is a function of (seed, replicate, text, d), so fewer are a part of more.
        opened_at_once: k.
        seed: Of all draws.
    """

    method = "weighted_orders"
    objective: VDMObjective

    def __init__(self, objective: VDMObjective, draws: int = 16, opened_at_once: int = 1, seed: int = 0) -> None:
        super().__init__(objective, seed)
        absorbing_of(objective)
        self.draws, self.opened_at_once = draws, opened_at_once
        self.steps = _steps(opened_at_once)

    @property
    def transitions(self) -> None:
        """None: an order's steps are its own."""
        return None

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of D whole orders of each text."""
        texts, index = MaskedTexts(self.objective, batch), batch["indices"].tolist()
        costs = []
        for draw in range(self.draws):
            generators = [image_generator(self.seed, replicate, i, draw, _ORDERS) for i in index]
            costs.append(order_costs(texts, texts.draw_order(generators), self.opened_at_once).cpu())
        log_weights = -torch.stack(costs)
        mean = log_weights.mean(0)
        gain = mean - (log_weights.logsumexp(0) - math.log(self.draws))
        size = torch.exp(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))
        evaluations = self.draws * (texts.counts.cpu().double() / self.opened_at_once).ceil()
        diagnostics = {"evaluations": evaluations, "effective_sample_size": size}
        return Measured({"diffusion": -mean, "importance_weighting": gain}, diagnostics)

    def fewest_evaluations(self, replicates: int) -> int:
        """One of each text and order, at least: how many sites are not given is not known beforehand."""
        return replicates * self.draws

    def protocol(self) -> dict[str, Any]:
        """The number of orders, and how many sites open at once."""
        weights = {"over": "orders", "draws": self.draws, "opened_at_once": self.opened_at_once}
        return {"importance_weights": weights}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The protocol with the effective sample sizes."""
        size = diagnostics["effective_sample_size"]
        sizes = {"effective_sample_size_mean": float(size.mean()), "effective_sample_size_min": float(size.min())}
        return {"importance_weights": self.protocol()["importance_weights"] | sizes}


def _steps(opened_at_once: int) -> str:
    return f"steps of {'one site' if opened_at_once == 1 else f'{opened_at_once} sites'}"


def order_costs(texts: MaskedTexts, uniforms: Tensor, opened_at_once: int) -> Tensor:
    """``-log p(x|order)``, (B,): sites open from the largest uniform to the least, so many at once.

    Args:
        texts: The texts.
        uniforms: See `MaskedTexts.draw_order`.
        opened_at_once: k.
    """
    ranks, rising = ranks_of(uniforms), uniforms.sort(1).values
    left = texts.counts.clone()
    total = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    while bool((left > 0).any()):
        rows = (left > 0).nonzero().flatten()
        still = left[rows].unsqueeze(1)
        costs = texts.rows(rows).costs(ranks[rows] < still, rising[rows].gather(1, still - 1).squeeze(1))
        total[rows] += torch.where(ranks[rows] >= still - opened_at_once, costs, 0.0).sum(1)
        left[rows] = (left[rows] - opened_at_once).clamp(min=0)
    return total
