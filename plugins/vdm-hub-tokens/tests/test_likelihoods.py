"""The likelihood methods of masked models, on a Markov chain whose exact posterior is the network, and on tables."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from naming import naming
from vdm_hub import (
    ConfigurationError,
    DataError,
    LikelihoodMethod,
    Measurement,
    VariationalBound,
    VDMObjective,
    VDMScheduler,
)
from vdm_hub_tokens import (
    RULES,
    AbsorbingProcess,
    ExactOrder,
    MaskedCounts,
    OpeningRule,
    UniformProcess,
    WeightedOrders,
)
from vdm_hub_tokens.oracles import MarkovChain, MarkovDenoiser
from vdm_hub_tokens.site_costs import SiteCosts, contexts

K, LENGTH, TEXTS = 3, 12, 16
CHAIN = MarkovChain.random(K)
LEVELS = CHAIN.draw(TEXTS, LENGTH, torch.Generator().manual_seed(0))
EXACT = -CHAIN.log_prob(LEVELS)
GIVEN = torch.zeros(TEXTS, LENGTH, dtype=torch.bool)
GIVEN[::2, :5] = True  # a left context of some texts
GIVEN[3, 8:] = True
GIVEN[5] = True  # nothing to score

counts = pytest.mark.parametrize("pilot", [None, 0])


def objective_of(
    process: Any = None, network: nn.Module | None = None, transitions: int | None = None
) -> VDMObjective:
    process = process or AbsorbingProcess(K)
    return VDMObjective(network or MarkovDenoiser(CHAIN, process), process, transitions)


def batch_of(rows: list[int] | None = None, **others: Tensor) -> dict[str, Tensor]:
    batch = {"levels": LEVELS, "indices": torch.arange(TEXTS)} | others
    return batch if rows is None else {name: value[rows] for name, value in batch.items()}


def fitted(method: LikelihoodMethod, objective: VDMObjective, seed: int = 0, **others: Tensor) -> Measurement:
    measurement = method.build(objective, TEXTS, seed)
    with torch.no_grad():
        measurement.fit(lambda: [batch_of(list(range(7)), **others), batch_of(list(range(7, TEXTS)), **others)])
    return measurement


def totals(measurement: Measurement, replicates: int, **others: Tensor) -> Tensor:
    """Nats, (replicates, texts)."""
    with torch.no_grad():
        found = [measurement.measure(batch_of(**others), replicate).terms for replicate in range(replicates)]
    return torch.stack([torch.stack(list(terms.values())).sum(0) for terms in found])


def close_to(found: Tensor, expected: Tensor) -> None:
    """Each text, and their mean, within 4.5 and 4 standard errors (of 17 figures, 4.5 by chance once in 8,000)."""
    each = (found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5 + 1e-9)
    mean = found.mean(1)
    whole = abs(float(mean.mean() - expected.mean())) / (float(mean.std()) / len(found) ** 0.5)
    assert float(each.max()) < 4.5 and whole < 4, (each, whole)


def conditional(given: Tensor) -> Tensor:
    """``-log p(the others|the given)`` of the chain, by a sum over all completions."""
    whole, seen = [], torch.nn.functional.one_hot(LEVELS, K).double()
    for certain in (torch.ones_like(given), given):
        message = CHAIN.initial.expand(TEXTS, -1)
        for site in range(LENGTH):
            message = message * torch.where(certain[:, site, None], seen[:, site], 1.0)
            message = message @ CHAIN.transition if site < LENGTH - 1 else message
        whole.append(message.sum(-1).log())
    return whole[1] - whole[0]


# ---- the Markov chain: every estimator is the exact -log p ----------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [MaskedCounts(), MaskedCounts(pilot_evaluations=0), MaskedCounts(counts_per_text=3), VariationalBound()],
    ids=["counts", "no pilot", "three counts", "bound"],
)
@pytest.mark.parametrize("given", [None, GIVEN], ids=["whole", "given"])
def test_the_bound_of_the_exact_denoiser_is_the_exact_likelihood(
    method: LikelihoodMethod, given: Tensor | None
) -> None:
    others = {} if given is None else {"given": given}
    expected = EXACT if given is None else conditional(given)
    measurement = fitted(method, objective_of(AbsorbingProcess(K, "polynomial")), **others)
    close_to(totals(measurement, 400, **others), expected)
    terms = measurement.measure(batch_of(**others), 0).terms
    assert list(terms) == ["reconstruction", "prior", "diffusion"]


def test_so_is_the_bound_of_uniform_diffusion_on_average() -> None:
    """One site changes at a time in continuous time; of a text alone the bound is above its -log p, on average not."""
    process, every = UniformProcess(K, "polynomial"), torch.tensor(list(itertools.product(range(K), repeat=3)))
    objective = objective_of(process)
    probabilities = CHAIN.log_prob(every).exp()
    measurement = VariationalBound().build(objective, len(every), 0)
    batch = {"levels": every, "indices": torch.arange(len(every))}
    with torch.no_grad():
        measurement.fit(lambda: [batch])
        found = torch.stack([sum(measurement.measure(batch, r).terms.values()) for r in range(600)])  # type: ignore[arg-type]
    mean = (found * probabilities).sum(1)
    entropy = float(-(probabilities * probabilities.log()).sum())
    assert abs(float(mean.mean()) - entropy) < 4 * float(mean.std()) / 600**0.5 < 0.1 * entropy


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [None, GIVEN], ids=["whole", "given"])
def test_any_order_of_the_exact_denoiser_is_the_exact_likelihood(rule: str, given: Tensor | None) -> None:
    others = {} if given is None else {"given": given}
    measurement = ExactOrder(rule).build(objective_of(), TEXTS, 0)
    assert not measurement.is_bound
    measured = measurement.measure(batch_of(**others), 0)
    expected = EXACT if given is None else conditional(given)
    torch.testing.assert_close(measured.terms["order"], expected, rtol=0, atol=1e-10)
    scored = torch.full((TEXTS,), LENGTH) if given is None else (~given).sum(1)
    assert measured.diagnostics["evaluations"].tolist() == scored.tolist()


def test_the_conditional_is_that_of_all_completions() -> None:
    """The oracle itself, by enumeration of a short text."""
    every = torch.tensor(list(itertools.product(range(K), repeat=LENGTH - 5)))
    whole = torch.cat([LEVELS[0, :5].expand(len(every), -1), every], 1)
    marginal = CHAIN.log_prob(whole).logsumexp(0)
    assert float(conditional(GIVEN)[0]) == pytest.approx(float(marginal - CHAIN.log_prob(LEVELS[:1])), rel=1e-10)
    torch.testing.assert_close(conditional(torch.zeros_like(GIVEN)), EXACT, rtol=1e-10, atol=1e-10)
    assert float(conditional(GIVEN)[5]) == 0


@pytest.mark.parametrize("at_once", [1, 5])
def test_weighted_orders_of_the_exact_denoiser_are_exact_one_by_one(at_once: int) -> None:
    """Each order has the same likelihood, so no draw is better than another; several at once are another sampler."""
    measurement = WeightedOrders(draws=3, opened_at_once=at_once).build(objective_of(), TEXTS, 0)
    measured = measurement.measure(batch_of(given=GIVEN), 0)
    found = torch.stack(list(measured.terms.values())).sum(0)
    if at_once == 1:
        torch.testing.assert_close(found, conditional(GIVEN), rtol=0, atol=1e-10)
    else:
        assert bool((found[:5] - conditional(GIVEN)[:5] > 1e-6).any()) and float(found[5]) == 0
    assert measured.diagnostics["evaluations"].tolist() == (3 * ((~GIVEN).sum(1) / at_once).ceil()).tolist()


# ---- a table of random logits: no denoiser of anything, enumerated --------------------------------------------------


class Table(nn.Module):
    """A row of random logits a state; told of the time too, where asked."""

    def __init__(self, length: int, timed: bool = False) -> None:
        super().__init__()
        shape = ((K + 1) ** length, length, K)
        self.logits = 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.timed = timed

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        logits = self.logits[(sample.long() * (K + 1) ** torch.arange(sample.shape[1])).sum(1)]
        told = 1 + 2 * torch.sin(timestep.double() / 200).reshape(-1, 1, 1) if self.timed else 1.0
        return (logits * told,)


def log_p_by_order(x: Tensor, table: Table) -> Tensor:
    """``log p(x|order)`` of one text, of all L! orders."""
    found = []
    for order in itertools.permutations(range(len(x))):
        z, total = torch.full_like(x, K), 0.0
        for site in order:
            total += float(table(z[None], torch.zeros(1))[0][0, site].log_softmax(-1)[x[site]])
            z[site] = x[site]
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


FIVE = torch.tensor([[2, 0, 1, 1, 2], [0, 0, 0, 2, 1]]).repeat(TEXTS // 2, 1)


@counts
def test_counts_are_the_mean_over_all_orders(pilot: int | None) -> None:
    table = Table(5)
    orders = [log_p_by_order(text, table) for text in FIVE[:2]]
    expected = torch.stack([-one.mean() for one in orders]).repeat(TEXTS // 2)
    five = {"levels": FIVE}
    measurement = fitted(MaskedCounts(pilot_evaluations=pilot), objective_of(network=table), **five)
    close_to(totals(measurement, 400, **five), expected)


@pytest.mark.slow
def test_counts_are_the_continuous_bound_of_a_network_that_is_told_the_time() -> None:
    """The time is drawn as it is distributed given k; with the share k/n, say, this is another number."""
    objective, five = objective_of(AbsorbingProcess(K, "polynomial"), Table(5, timed=True)), {"levels": FIVE}
    bound = totals(fitted(VariationalBound(times_per_datum=4), objective, **five), 250, **five).mean(1)
    ours = totals(fitted(MaskedCounts(counts_per_text=4), objective, **five), 250, **five).mean(1)
    one = totals(fitted(WeightedOrders(draws=1), objective, **five), 250, **five).mean(1)
    for other in (ours, one):
        error = float((bound.var() / 250 + other.var() / 250).sqrt())
        assert abs(float(bound.mean() - other.mean())) < 4 * error < 0.06 * float(bound.mean())
    untimed = totals(fitted(MaskedCounts(counts_per_text=4), objective_of(network=Table(5)), **five), 250, **five)
    assert abs(float(untimed.mean() - bound.mean())) > 6 * error  # the network does read it


def test_importance_weights_lie_between_the_bound_and_the_mixture_of_orders() -> None:
    """One order is the bound in expectation; endless ones ``-log E p(x|order)``; more are closer."""
    table, five = Table(5), {"levels": FIVE}
    orders = [log_p_by_order(text, table) for text in FIVE[:2]]
    bound = -float(torch.stack(orders).mean())
    mixture = -float(torch.stack([one.logsumexp(0) - math.log(len(one)) for one in orders]).mean())
    means = []
    for draws in (1, 4, 32):
        found = totals(WeightedOrders(draws).build(objective_of(network=table), TEXTS, 0), 60, **five).mean(1)
        means.append((float(found.mean()), float(found.std()) / 60**0.5))
    assert abs(means[0][0] - bound) < 4 * means[0][1]
    for (more, error), (fewer, other) in itertools.pairwise(means[::-1]):
        assert more < fewer - 4 * (error**2 + other**2) ** 0.5
    assert mixture - 4 * means[2][1] < means[2][0] < mixture + 0.2 * (bound - mixture)


@pytest.mark.parametrize(
    ("scores", "named"),
    [
        (lambda z: torch.full(z.shape, math.nan), "not finite"),
        (lambda z: torch.full(z.shape, math.inf), "not finite"),
        (lambda z: torch.zeros(len(z), 1), "shape"),
        (lambda z: torch.zeros(z.shape[1]), "shape"),
        (lambda z: [1.0], "list"),
        (lambda z: torch.rand(z.shape), "second call"),
    ],
)
def test_a_rule_that_is_no_function_of_what_is_open_is_refused(scores: Any, named: str) -> None:
    class Rule(OpeningRule):
        name = "mine"

        def scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Any:
            return scores(z)

    measurement = ExactOrder(Rule()).build(objective_of(), TEXTS, 0)
    with pytest.raises(ConfigurationError, match=naming("mine", named)):
        measurement.measure(batch_of(), 0)


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_rule_of_ones_own_is_followed_and_its_sampler_has_that_likelihood(at_once: int) -> None:
    """The probabilities of all texts sum to one, for any rule, as a sampler that follows it has them."""

    class OddOnesFirst(OpeningRule):
        name = "odd_ones_first"

        def scores(self, z: Tensor, masked: Tensor, log_probs: Tensor) -> Tensor:
            twos = (z == 2).sum(1, keepdim=True)  # of what is open
            return ((torch.arange(z.shape[1]) + twos) % 2).double() + log_probs[..., 0].exp() / 2

    every = torch.tensor(list(itertools.product(range(K), repeat=4)))
    batch = {"levels": every, "indices": torch.arange(len(every))}
    for rule in (OddOnesFirst(), *RULES):
        measurement = ExactOrder(rule, at_once).build(objective_of(network=Table(4)), len(every), 0)
        found = -measurement.measure(batch, 0).terms["order"]
        assert float(found.logsumexp(0)) == pytest.approx(0, abs=1e-10)
    method = ExactOrder(OddOnesFirst())
    assert method.chosen() == {"rule": "odd_ones_first"}
    with pytest.raises(ConfigurationError, match=naming("'odd_ones_first'")):
        method.to_config()


class Silent(nn.Module):
    """A network whose output is no number."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (torch.full((*sample.shape, K), torch.nan),)


@pytest.mark.parametrize("rule", RULES)
def test_an_order_ends_where_the_network_gives_no_numbers(rule: str) -> None:
    measurement = fitted(ExactOrder(rule), objective_of(network=Silent()))
    assert bool(measurement.measure(batch_of(), 0).terms["order"].isnan().all())


def test_a_network_that_knows_costs_nothing() -> None:
    class Knows(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (300.0 * torch.nn.functional.one_hot(LEVELS[:1].expand(len(sample), -1), K),)

    same = {"levels": LEVELS[:1].repeat(TEXTS, 1)}
    for method in (MaskedCounts(), ExactOrder("most_confident"), WeightedOrders(2), VariationalBound()):
        measurement = fitted(method, objective_of(network=Knows()), **same)
        assert float(totals(measurement, 2, **same).abs().max()) < 1e-9


# ---- the estimator's own laws ---------------------------------------------------------------------------------------


def test_however_bad_the_guess_the_estimate_is_unbiased() -> None:
    measurement = fitted(MaskedCounts(), objective_of(), given=GIVEN)
    generator = torch.Generator().manual_seed(0)
    state = measurement.state()["site_costs"]
    wild = {
        name: torch.randn(torch.tensor(value).shape, generator=generator).tolist() for name, value in state.items()
    }
    wild["probabilities"] = torch.rand(len(state["probabilities"]), generator=generator).softmax(0).tolist()
    measurement.load_state({"site_costs": wild, "pilot_evaluations": 0})
    found = totals(measurement, 1500, given=GIVEN)
    close_to(found, conditional(GIVEN))
    assert float(found.std(0).mean()) > 2 * float(totals(fitted(MaskedCounts(), objective_of()), 50).std(0).mean())


def test_a_pilot_makes_ten_of_one_evaluation_by_independent_times() -> None:
    """N x variance of a replicate's mean: i.i.d. t against counts with a pilot, on the exact denoiser."""
    chain = MarkovChain.random(27, sharpness=1.5)
    levels = chain.draw(64, 64, torch.Generator().manual_seed(1))
    process = AbsorbingProcess(27)
    objective = VDMObjective(MarkovDenoiser(chain, process), process)
    batch = {"levels": levels, "indices": torch.arange(64)}
    measurement = MaskedCounts(pilot_evaluations=1024).build(objective, 64, 0)
    generator, by_time = torch.Generator().manual_seed(2), []
    with torch.no_grad():
        measurement.fit(lambda: [batch])
        ours = torch.stack([measurement.measure(batch, r).terms["diffusion"].mean() for r in range(120)])
        for _ in range(120):
            noise = objective.draw_noise(batch, generator)
            by_time.append(objective(batch, torch.rand(64, generator=generator), noise).total.mean())
    assert float(torch.stack(by_time).var() / ours.var()) > 10  # 16 was seen


@counts
def test_other_batches_and_a_loaded_pilot_give_the_same_figure(pilot: int | None) -> None:
    measurement = fitted(MaskedCounts(2, pilot), objective_of(), given=GIVEN)
    whole = totals(measurement, 1, given=GIVEN)[0]
    other = MaskedCounts(2, pilot).build(objective_of(), TEXTS, 0)
    other.fit(lambda: [batch_of([i], given=GIVEN) for i in reversed(range(TEXTS))])
    assert other.state() == measurement.state()
    assert (measurement.pilot_evaluations > 0) == (pilot is None)
    part = other.measure(batch_of([9, 2, 5], given=GIVEN), 0)
    torch.testing.assert_close(part.terms["diffusion"], whole[[9, 2, 5]], rtol=1e-12, atol=1e-12)
    assert part.diagnostics["evaluations"].tolist() == [2.0] * 3
    assert float(whole[5]) == 0


def test_the_expectation_of_the_guess_is_that_of_its_draws() -> None:
    """Over all sets of k of n sites and all u: by quadrature and enumeration, to rounding."""
    x = LEVELS[:1, :6]
    scored = torch.tensor([[True, True, False, True, True, True]])
    generator = torch.Generator().manual_seed(0)
    nothing = SiteCosts.nothing()
    costs = SiteCosts(
        *(torch.randn(one.shape, generator=generator).double() for one in (nothing.tables, nothing.intercept)),
        torch.randn(nothing.slopes.shape, generator=generator).double(),
        nothing.probabilities,
    )
    sites = scored[0].nonzero().flatten().tolist()
    points, total = 8 * 5 * 400, 0.0  # the bins' edges and those of k in u^2 lie within cells of vanishing weight
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    for k in range(1, 6):
        subsets = list(itertools.combinations(sites, k))
        mean = 0.0
        for subset in subsets:
            masked = torch.zeros_like(scored)
            masked[0, list(subset)] = True
            at = grid[((grid**2 * 5).long() + 1) == k]
            mean = mean + (2 * at * costs.guess(at, x.expand(len(at), -1), masked.expand(len(at), -1))).sum()
        total += float(mean) / len(subsets) / points
    assert total == pytest.approx(float(costs.expected(x, scored)), abs=2e-3)
    assert all(int(at.min()) >= 0 and int(at.max()) < 4096 for at in contexts(LEVELS * 40_000))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [MaskedCounts(), ExactOrder(), WeightedOrders()], ids=lambda method: method.name)
def test_only_masked_models_have_these_likelihoods(method: LikelihoodMethod) -> None:
    uniform = objective_of(UniformProcess(K))
    gaussian = VDMObjective(nn.Identity(), VDMScheduler(num_levels=17).process)
    for objective, name in ((uniform, "UniformProcess"), (gaussian, "GaussianProcess")):
        with pytest.raises(ConfigurationError, match=naming(name, "'bound'")):
            method.build(objective, TEXTS, 0)
    with pytest.raises(ConfigurationError, match=naming("remasking", "0.5")):
        method.build(objective_of(AbsorbingProcess(K).with_remasking(0.5)), TEXTS, 0)
    measurement = method.build(objective_of(), TEXTS, 0)
    with pytest.raises(DataError, match="1 to 3"):
        measurement.measure(batch_of(levels=LEVELS + 1), 0)
    with pytest.raises(DataError, match=naming("'given'", "float32")):
        measurement.measure(batch_of(given=GIVEN.float()), 0)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=naming("rule", "'rightmost'", "left_to_right")):
        ExactOrder("rightmost")
    with pytest.raises(ConfigurationError, match="opened_at_once"):
        ExactOrder(opened_at_once=0)
    with pytest.raises(ConfigurationError, match=naming("pilot_evaluations", 7)):
        MaskedCounts(pilot_evaluations=7).build(objective_of(), TEXTS, 0)
    with pytest.raises(DataError, match="0 texts"):
        MaskedCounts().build(objective_of(), 0, 0)
