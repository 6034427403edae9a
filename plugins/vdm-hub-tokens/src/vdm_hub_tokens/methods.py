"""The likelihood methods of masked models as objects: what each measures, and all that may be chosen of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vdm_hub import ConfigurationError, LikelihoodMethod, Measurement, Objective, VDMObjective, check_fields, option
from vdm_hub_tokens.counts import CountsMeasurement
from vdm_hub_tokens.orders import RULES, ExactOrderMeasurement, OpeningRule, WeightedOrdersMeasurement
from vdm_hub_tokens.texts import absorbing_of

_EXAMPLE = {
    "forward_process": {"name": "absorbing", "package": "vdm-hub-tokens"},
    "num_levels": 5,
    "num_train_timesteps": 1000,
}


class MaskedMethod(LikelihoodMethod):
    """A likelihood of a model of masked diffusion."""

    example_fields: ClassVar[Mapping[str, Any]] = _EXAMPLE


@dataclass(frozen=True)
class MaskedCounts(MaskedMethod):
    """The bound of masked diffusion in continuous time, by counts: exactly k of a text's n sites are masked.

    ``n E_k (1/k) sum over masked of -log p(x_l|z)``: the number of `vdm_hub.VariationalBound` without transitions, of
    another variance; k is stratified over the texts of a replicate, and drawn, with a control variate, as a pilot
    found best. See `vdm_hub_tokens.counts`.

    Attributes:
        counts_per_text: Evaluations of each text in each replicate, at stratified counts.
        pilot_evaluations: Draws, in no result, from which it learns what sites cost and where counts are best drawn;
            0 for none. As many as texts, from 256 to 4,096, where not given.

    Raises:
        ConfigurationError: A number is out of range.

    >>> MaskedCounts(counts_per_text=2).chosen()
    {'counts_per_text': 2}
    """

    name = "masked_counts"

    counts_per_text: int = option(
        1, "evaluations of each text in each replicate, at stratified counts", at_least=1, at_most=10**6
    )
    pilot_evaluations: int | None = option(
        None,
        "draws, in no figure, that say what sites cost and where counts are best drawn; 0 for none; without it, as "
        "many as texts, from 256 to 4,096",
        at_least=0,
        at_most=10**9,
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """A `vdm_hub_tokens.counts.CountsMeasurement`."""
        return CountsMeasurement(_masked(objective), num_images, seed, self.counts_per_text, self.pilot_evaluations)


@dataclass(frozen=True)
class ExactOrder(MaskedMethod):
    """The exact likelihood of the sampler that opens sites by a rule (DUEL, arXiv 2603.01367): no bound, no error.

    ``-log p(x) = sum over steps of -log p(x_l|open)``, L evaluations of a text of L sites, or L/k with k opened at
    once. The rule must be a function of what is open.

    Attributes:
        rule: ``left_to_right``, ``right_to_left``, ``most_confident`` or ``lowest_entropy``, or an
            `vdm_hub_tokens.OpeningRule` of one's own.
        opened_at_once: k, sites that open in a step, each drawn for itself.

    Raises:
        ConfigurationError: The rule is unknown, or the number out of range.

    >>> ExactOrder("most_confident", opened_at_once=4).chosen()
    {'rule': 'most_confident', 'opened_at_once': 4}
    """

    name = "exact_order"

    rule: str | OpeningRule = option(  # noqa: RUF009 - a field, as the next
        "left_to_right", "which site opens next: " + ", ".join(RULES)
    )
    opened_at_once: int = option(1, "k, sites that open in a step, each for itself", at_least=1, at_most=10**6)

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.rule, OpeningRule) and self.rule not in RULES:
            raise ConfigurationError(
                f"rule is {self.rule!r:.100}: give one of {', '.join(RULES)}, or an OpeningRule of your own."
            )

    def chosen(self) -> dict[str, Any]:
        """The options that were chosen: see `LikelihoodMethod.chosen`; a rule of one's own by its name."""
        return super().chosen() | ({} if isinstance(self.rule, str) else {"rule": self.rule.name})

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON.

        Raises:
            ConfigurationError: The rule is one's own, which no file can hold.
        """
        if not isinstance(self.rule, str):
            raise ConfigurationError(
                f"the rule {self.rule.name!r} is an object, which no file can hold: give one of {', '.join(RULES)}."
            )
        return {"rule": self.rule, "opened_at_once": self.opened_at_once}

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """A `vdm_hub_tokens.orders.ExactOrderMeasurement`."""
        rule = RULES[self.rule] if isinstance(self.rule, str) else self.rule
        return ExactOrderMeasurement(_masked(objective), rule, self.opened_at_once, seed)


@dataclass(frozen=True)
class WeightedOrders(MaskedMethod):
    """An importance-weighted bound over random orders: ``E -log 1/D sum_d p(x|order_d)`` (arXiv 1509.00519, eq. 8).

    It falls with D, from the bound of masked diffusion at D = 1 to ``-log E p(x|order)``, the likelihood of the model
    that opens its sites in a random order.

    Attributes:
        draws: D, orders a text; it takes D times L evaluations of a text of L sites.
        opened_at_once: k, sites that open in a step, each for itself: L/k evaluations, of that other sampler.

    Raises:
        ConfigurationError: A number is out of range.

    >>> WeightedOrders(draws=4).chosen()
    {'draws': 4}
    """

    name = "weighted_orders"

    draws: int = option(16, "D, orders a text", at_least=1, at_most=10**6)
    opened_at_once: int = option(1, "k, sites that open in a step, each for itself", at_least=1, at_most=10**6)

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """A `vdm_hub_tokens.orders.WeightedOrdersMeasurement`."""
        return WeightedOrdersMeasurement(_masked(objective), self.draws, self.opened_at_once, seed)


def _masked(objective: Objective) -> VDMObjective:
    """The objective itself, of a masked model.

    Raises:
        ConfigurationError: The model is another.
    """
    absorbing_of(objective)
    assert isinstance(objective, VDMObjective)
    return objective
