"""The laws of classification by the bound, on denoisers whose bounds have closed forms."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import registered
from exact_denoisers import ExactDenoiser, Mixture
from linear_gaussian import SHAPE, exact_diffusion, images
from naming import naming
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.errors import ConfigurationError, DataError, NonFiniteLossError
from vdm_hub.likelihood import classification
from vdm_hub.likelihood.classification import BoundClassifier, _Table
from vdm_hub.likelihood.classification_report import ClassificationReport, Standing, numbered
from vdm_hub.likelihood.paired_differences import Comparison, Scatter, compare
from vdm_hub.likelihood.proposals import Proposal
from vdm_hub.likelihood.protocol import ClassificationEffort
from vdm_hub.objectives.consistency import ConsistencyObjective
from vdm_hub.objectives.variational_bound import VDMObjective

VARIANCES = (0.05, 0.1, 0.4)


class ClassDenoiser(nn.Module):
    """The exact denoiser of each class of a population, by its label."""

    def __init__(self, populations: list[Mixture], process: Any) -> None:
        super().__init__()
        self.classes = nn.ModuleList(ExactDenoiser(population, process) for population in populations)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        outputs = torch.stack([denoiser(sample, timestep)[0] for denoiser in self.classes])
        return (outputs[class_labels, torch.arange(len(sample))],)


def model(populations: list[Mixture], transitions: int | None = None, **process: Any) -> VDMObjective:
    process = registered.process(LinearSchedule(-8.0, 4.0), **{"num_levels": 16} | process)
    return VDMObjective(ClassDenoiser(populations, process), process, transitions)


def gaussians(transitions: int | None = None) -> VDMObjective:
    return model([Mixture.gaussian(variance) for variance in VARIANCES], transitions)


FEW = images(24)


def batch_of(levels: Tensor, indices: Tensor | None = None) -> dict[str, Tensor]:
    return {"levels": levels, "indices": torch.arange(len(levels)) if indices is None else indices}


def labels(candidates: Tensor) -> dict[str, Tensor]:
    return {"class_labels": candidates}


def classifier(objective: VDMObjective, seed: int = 0, batch_size: int = 256, **effort: Any) -> BoundClassifier:
    count = len(objective.network.classes)  # type: ignore[arg-type]
    prior = torch.full((count,), 1 / count)
    return BoundClassifier(objective, labels, prior, ClassificationEffort(**effort), seed, batch_size)


def exact_bounds(objective: VDMObjective, levels: Tensor) -> Tensor:
    process: Any = objective.process
    return torch.stack([exact_diffusion(process, levels, objective.transitions, v) for v in VARIANCES], 1)


@pytest.mark.parametrize("pilot", [0, 256])
@pytest.mark.parametrize("transitions", [None, 7])
def test_differences_have_their_exact_mean(transitions: int | None, pilot: int) -> None:
    objective, found = gaussians(transitions), []
    taught = classifier(objective, pilot_evaluations=pilot, confidence=None)
    taught.fit(batch_of(FEW))
    for seed in range(40):
        one = classifier(objective, seed, budget=9, confidence=None)
        one.load_state(taught.state())
        differences = one.classify(batch_of(FEW)).differences
        found.append(differences - differences[:, :1])
    estimates = torch.stack(found).mean(1)[:, 1:]  # an image's own draws are independent of another's, not stratified
    exact = exact_bounds(objective, FEW)
    z = (estimates.mean(0) - (exact - exact[:, :1]).mean(0)[1:]) / (estimates.std(0) / math.sqrt(len(found)))
    assert float(z.abs().max()) < 4


def test_the_posterior_of_mixtures_is_that_of_bayes_within_the_stated_errors() -> None:
    populations = [
        Mixture(torch.tensor(means).double(), torch.tensor([0.05, 0.1]).double(), torch.tensor([0.6, 0.4]).double())
        for means in ((-0.6, 0.5), (-0.4, 0.3), (0.0, 0.6))
    ]
    objective = model(populations)
    process: Any = objective.process
    generator = torch.Generator().manual_seed(4)
    drawn = torch.cat([_samples(one, 8, generator) for one in populations])
    levels = process.quantise(drawn.float())
    found = classifier(objective, budget=3 * 250, confidence=None).report(batch_of(levels), ("a", "b", "c"))
    x = process.encode(levels, torch.float64)
    clean = torch.tensor(-40.0, dtype=torch.float64)
    exact = torch.stack([-one.log_density(x, clean).flatten(1).sum(1) for one in populations], 1)
    differences = found.standing.differences - found.standing.differences.gather(1, exact.argmin(1, keepdim=True))
    error = (differences - (exact - exact.amin(1, keepdim=True))).abs()
    # z_0 is not the image, which costs all classes nearly the same.
    assert bool((error < 4.5 * found.standing.errors.amax(1, keepdim=True) + 0.2).all())
    assert float((found.posterior - (-exact).softmax(1)).abs().mean()) < 0.05


def _samples(population: Mixture, count: int, generator: torch.Generator) -> Tensor:
    part = torch.multinomial(population.weights, count * math.prod(SHAPE), replacement=True, generator=generator)
    noise = torch.randn(len(part), generator=generator, dtype=torch.float64)
    return (population.means[part] + population.variances[part].sqrt() * noise).view(count, *SHAPE)


def test_an_image_s_standing_depends_on_nothing_but_itself() -> None:
    """Not on the batch size, the order, or which others are there; what the pilot found is carried as JSON."""
    objective = gaussians()
    first = classifier(objective, budget=60)
    first.fit(batch_of(FEW))
    whole, state = first.classify(batch_of(FEW)), json.loads(json.dumps(first.state()))
    order = torch.randperm(len(FEW), generator=torch.Generator().manual_seed(1))
    for rows, size in ((torch.arange(len(FEW)), 7), (order, 64), (order[:5], 256), (order[:1], 1)):
        other = classifier(objective, batch_size=size, budget=60)
        other.load_state(state)
        standing = other.classify(batch_of(FEW[rows], rows))
        torch.testing.assert_close(standing.differences, whole.differences[rows], rtol=1e-6, atol=1e-6)
        for name in ("draws", "best", "decided", "evaluations"):
            assert torch.equal(getattr(standing, name), getattr(whole, name)[rows]), name


def test_another_index_or_seed_has_other_draws() -> None:
    same = batch_of(FEW[:1].expand(2, -1, -1, -1))
    differences = classifier(gaussians(), confidence=None, budget=9).classify(same).differences
    assert not torch.equal(*differences)
    other = classifier(gaussians(), seed=1, confidence=None, budget=9).classify(same).differences
    assert not torch.equal(other, differences)


@pytest.mark.parametrize("budget", [6, 7, 20, 61])
def test_no_image_takes_more_than_its_budget_and_every_call_is_counted(budget: int) -> None:
    one = classifier(gaussians(), batch_size=16, budget=budget, confidence=0.999, pilot_evaluations=100)
    sizes: list[int] = []
    one.objective.network.register_forward_pre_hook(
        lambda module, given: sizes.append(len(given[0]))  # type: ignore[no-untyped-call]
    )
    report = one.report(batch_of(FEW), ("a", "b", "c"))
    standing = report.standing
    assert int(standing.evaluations.max()) <= budget
    assert torch.equal(standing.evaluations, standing.draws.sum(1))
    undecided = ~standing.decided
    left = standing.draws == standing.draws.amax(1, keepdim=True)
    assert bool((budget - standing.evaluations < left.sum(1))[undecided].all()), "one draw more would be too many"
    assert sum(sizes) == report.network_evaluations == int(standing.evaluations.sum()) + report.pilot_evaluations
    rounds = 1 + int(standing.draws.max())
    assert max(sizes) == 16 and sum(size < 16 for size in sizes) <= rounds, "batches are full but for a round's last"


def test_without_a_confidence_all_candidates_have_the_whole_budget() -> None:
    standing = classifier(gaussians(), budget=32, confidence=None).classify(batch_of(FEW))
    assert bool((standing.draws == 10).all()) and not bool(standing.decided.any())


def test_what_is_decided_is_right_as_often_as_was_asked_for() -> None:
    levels, objective = images(300), gaussians()
    one = classifier(objective, budget=300, confidence=0.98)
    one.fit(batch_of(levels))
    standing = one.classify(batch_of(levels))
    wrong = standing.best != exact_bounds(objective, levels).argmin(1)
    assert float(standing.decided.double().mean()) > 0.7
    assert float(wrong[standing.decided].double().mean()) < 0.02 + 3 * math.sqrt(0.02 / 300)
    assert float(standing.evaluations.double().mean()) < 100, "a third of what all would have taken"


def test_shared_draws_are_worth_many_times_as_many_independent_ones() -> None:
    """Evaluations for an equal error go as the variance of a difference."""
    objective = gaussians()
    runs = [
        classifier(objective, seed, budget=9, confidence=None)._draw(
            batch_of(FEW), torch.zeros(24).long(), torch.ones(24).long(), torch.ones(24, 3).bool(), (121, 122)
        )
        for seed in range(60)
    ]
    values = torch.stack([run.values.view(24, 3) for run in runs])
    shared = (values[:, :, 1] - values[:, :, 0]).var(0).mean()
    independent = values[:, :, :2].var(0).sum(1).mean()
    assert float(independent / shared) > 5


def test_a_prior_is_added_to_the_evidence() -> None:
    prior, objective = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), gaussians()
    uniform = classifier(objective, budget=30, confidence=None, pilot_evaluations=0).report(
        batch_of(FEW), tuple("abc")
    )
    effort = ClassificationEffort(budget=30, confidence=None, pilot_evaluations=0)
    report = BoundClassifier(objective, labels, prior, effort).report(batch_of(FEW), tuple("abc"))
    expected = uniform.posterior * prior
    torch.testing.assert_close(report.posterior, expected / expected.sum(1, keepdim=True))
    assert torch.equal(report.predicted, report.posterior.argmax(1))


@pytest.mark.parametrize("confidence", [0.6, 0.9])
def test_who_is_found_has_the_largest_posterior(confidence: float) -> None:
    """Also where one was dropped beside a candidate that was dropped later."""
    report = classifier(gaussians(), budget=90, first_draws=1, confidence=confidence).report(
        batch_of(images(300)), tuple("abc")
    )
    assert torch.equal(report.predicted, report.posterior.argmax(1))


@pytest.mark.parametrize("decoder", ["factorised", "ddpm"])
def test_terms_that_are_left_out_are_those_that_no_candidate_changes(decoder: str) -> None:
    objective = model([Mixture.gaussian(v) for v in VARIANCES], 5, decoder=decoder)
    chain = ConsistencyObjective(objective.network, objective.process, 5)
    asks = objective.process.reconstruction_by_level() is None
    for one in (objective, chain):
        noise = one.draw_noise(batch_of(FEW), torch.Generator().manual_seed(0))
        times, left_out = torch.rand(len(FEW), generator=torch.Generator().manual_seed(1)), []
        for label in range(3):
            told = batch_of(FEW) | labels(torch.full((len(FEW),), label))
            terms, own = one(told, times, noise).terms, one.network_terms(told, times, noise, reconstruction=asks)
            for name, value in own.items():
                assert torch.equal(value, terms[name])
            left_out.append({name: value for name, value in terms.items() if name not in own})
        assert len(left_out[0]) == (1 if asks else 2)
        for name, value in left_out[0].items():
            assert torch.equal(value, left_out[1][name]) and torch.equal(value, left_out[2][name])


@pytest.mark.parametrize("decoder", ["factorised", "ddpm"])
def test_the_integrand_of_two_candidates_differs_as_their_bounds_do(decoder: str) -> None:
    objective = model([Mixture.gaussian(v) for v in VARIANCES], 5, decoder=decoder)
    one, noise = classifier(objective), objective.draw_noise(batch_of(FEW), torch.Generator().manual_seed(0))
    times, weights = torch.rand(len(FEW), generator=torch.Generator().manual_seed(1)), torch.ones(len(FEW)).double()
    own, bounds, heavier = [], [], []
    for label in range(3):
        pairs = batch_of(FEW) | labels(torch.full((len(FEW),), label))
        own.append(one._integrand(pairs, times, weights, noise))
        heavier.append(one._integrand(pairs, times, 3 * weights, noise) - own[-1])
        bounds.append(objective(pairs, times, noise))
        torch.testing.assert_close(heavier[-1], 2 * bounds[-1].terms["diffusion"].double())
    for other in (1, 2):  # a float32 sum of some hundred nats is rounded by 3e-5 of them
        expected = (bounds[other].total - bounds[0].total).double()
        torch.testing.assert_close(own[other] - own[0], expected, rtol=0, atol=2e-4)


# ---- the pilot and the rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planned", "candidates", "count", "images", "draws"),
    [
        (0, 3, 9, 0, 0),  # none
        (8, 2, 9, 1, 4),  # at least four draws of an image
        (30, 3, 9, 1, 10),
        (33, 3, 9, 1, 11),
        (51, 3, 9, 1, 16),  # at most sixteen
        (100, 3, 9, 2, 16),
        (100, 3, 1, 1, 16),
        (400, 40, 9, 1, 12),  # of at most 32 candidates
    ],
)
def test_a_pilot_costs_about_what_was_planned(
    planned: int, candidates: int, count: int, images: int, draws: int, monkeypatch: Any
) -> None:
    """Two halves, each on the draws after the other's; which images is decided by the seed alone."""
    found, halves = [], []
    for seed in (3, 4):
        torch.manual_seed(seed)  # not the classifier's
        one = classifier(
            model([Mixture.gaussian(0.1 + 0.01 * c) for c in range(candidates)]),
            pilot_evaluations=planned,
            budget=10**4,
        )
        draw = one._draw

        def spy(batch: Any, first: Any, more: Any, alive: Any, streams: Any, draw: Any = draw) -> Any:
            halves.append((first.tolist(), more.tolist(), int(alive.sum(1).max()), batch["indices"].tolist()))
            return draw(batch, first, more, alive, streams)

        monkeypatch.setattr(one, "_draw", spy)
        one.fit(batch_of(FEW[:count]))
        found.append(one.state())
    assert (
        found[0] == found[1]
        and halves[:2] == halves[2:]
        and found[0]["pilot_evaluations"] == images * draws * min(candidates, 32)
    )
    assert len(halves) == (4 if images else 0)
    if images:
        (first, more, told, chosen), (second, rest, *same) = halves[:2]
        assert [told, chosen] == same and told == min(candidates, 32) and len(set(chosen)) == images
        assert (first, more) == ([0] * images, [draws // 2] * images)
        assert (second, rest) == (more, [draws - draws // 2] * images)


def test_times_are_drawn_where_the_candidates_integrands_differ(monkeypatch: Any) -> None:
    """By their standard deviation over the candidates, not that of what is weighted by how often a time is drawn."""
    one, drawn, fits = classifier(gaussians(), pilot_evaluations=150), [], []
    integrand, fit = one._integrand, classification.fit_proposal

    def spy(pairs: Any, times: Any, weights: Any, noise: Any) -> Any:
        plain = integrand(pairs, times, torch.ones_like(weights), noise)
        drawn.append(plain.view(-1, 3).std(1))
        return integrand(pairs, times, weights, noise)

    monkeypatch.setattr(one, "_integrand", spy)
    monkeypatch.setattr(
        classification,
        "fit_proposal",
        lambda grid, places, spreads: fits.append(spreads) or fit(grid, places, spreads),
    )
    one.fit(batch_of(FEW))
    assert len(drawn) == len(fits) == 2
    torch.testing.assert_close(fits[1], torch.cat(drawn))
    assert not torch.equal(one.proposal.probabilities, Proposal.even(one.grid).probabilities)


def test_a_round_adds_a_quarter_of_the_draws(monkeypatch: Any) -> None:
    one, rounds = classifier(gaussians(), budget=75, first_draws=2, confidence=None), []

    def spy(history: Tensor, *others: Any) -> Comparison:
        rounds.append(int((~history.isnan()).sum(1).max()))
        return compare(history, *others)

    monkeypatch.setattr(classification, "compare", spy)
    one.classify(batch_of(FEW[:2]))
    assert rounds == [2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 25]


def test_whom_a_comparison_leaves_no_chance_is_dropped() -> None:
    """A half of doubt in all is a quarter for each of the two others."""
    table, zeros = _Table.of(1, 3), torch.zeros(1, 3).double()
    table.update(Comparison(torch.tensor([1]), zeros, zeros, torch.tensor([[0.25, 0.0, 0.26]])), confidence=0.5)
    assert table.alive.tolist() == [[False, True, True]]


def test_a_report_says_what_it_took() -> None:
    report = classifier(gaussians(5), seed=6, budget=33, pilot_evaluations=40).report(batch_of(FEW), tuple("abc"))
    assert report.details["seed"] == 6 and report.details["transitions"] == 5
    effort = asdict(ClassificationEffort(budget=33, pilot_evaluations=40))
    assert report.details["effort"] == effort and report.pilot_evaluations == 39
    default = classifier(gaussians()).report(batch_of(FEW[:1]), tuple("abc"))
    assert default.details["effort"]["budget"] == ClassificationEffort().budget_for(3)


def test_a_decoder_that_asks_the_network_is_part_of_the_difference() -> None:
    objective = model([Mixture.gaussian(v) for v in VARIANCES], 5, decoder="ddpm")
    one = classifier(objective, budget=6, confidence=None, pilot_evaluations=0)
    standing = one.classify(batch_of(FEW))
    assert one.network_evaluations == 2 * int(standing.evaluations.sum())


def test_a_standing_of_two_draws_is_shrunk_to_what_the_pilot_saw() -> None:
    """Two equal differences are no certainty: their own variance is zero."""
    history = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    found = compare(history, torch.ones(1, 2).bool(), torch.zeros(2).double(), Scatter(math.log(4.0), 1.0, 3.0))
    assert float(found.errors[0, 1]) == pytest.approx(math.sqrt(3 * 4.0 / 4 / 2))
    assert 0.1 < float(found.doubt[0, 1]) < 0.4
    assert float(found.errors[0, 0]) == 0 and float(found.doubt[0, 0]) == 0.5, "the best beside itself"


def test_a_prior_gives_a_candidate_more_or_less_of_a_chance() -> None:
    history = torch.tensor([[[0.0, 1.0], [0.0, 1.4]]], dtype=torch.float64)
    alive, chances = torch.ones(1, 2).bool(), ([0.5, 0.5], [0.8, 0.2], [0.4, 0.6])
    doubts = [
        float(compare(history, alive, torch.tensor(one).double().log(), Scatter()).doubt[0, 1]) for one in chances
    ]
    assert doubts[1] < doubts[0] < doubts[2] < 0.5


def test_one_that_was_dropped_is_measured_through_whom_it_was_dropped_beside() -> None:
    """Candidate 2 is dropped beside 0, and 0 later beside 1: what 2 and 1 have in common is not known."""
    table = _Table.of(1, 3)
    for best, differences, doubts in (
        (0, [0.0, 1.0, 8.0], [0.0, 0.4, 0.001]),
        (1, [5.0, 0.0, -3.0], [0.001, 0.0, 0.9]),
    ):
        row, of = torch.tensor([differences]).double(), torch.tensor([best])
        table.update(Comparison(of, row, row.abs().sqrt(), torch.tensor([doubts]).double()), confidence=0.9)
    standing = table.standing(torch.zeros(1, 3).long(), torch.zeros(1).long())
    assert standing.best.tolist() == [1] and bool(standing.decided.all())
    assert standing.differences.tolist() == [[5.0, 0.0, 13.0]]
    assert standing.errors[0].tolist() == pytest.approx([math.sqrt(5), 0, math.sqrt(13)])


def test_a_pilot_finds_how_differences_scatter() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, 2, 40, dtype=torch.float64)
    noise = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    other = sizes[:, None] + (3 * sizes[:, None]).sqrt() * noise
    history, places = torch.stack([torch.zeros(40, 50).double(), other], 2), torch.rand(40, 50, generator=generator)
    scatter = Scatter.fit(history, places)
    assert scatter.strength == 20 and scatter.stratified > 0.9, "no variance of its own, and nothing that time decides"
    expected = 3 * sizes
    ratio = scatter.variance(torch.stack([other.abs().mean(1)])) / expected
    assert float(ratio.min()) > 0.6 and float(ratio.max()) < 1.7
    in_time = history + torch.tensor([0.0, 20.0]).double() * places[:, :, None]
    shared = Scatter.fit(in_time, places)
    assert shared.stratified < 0.9 * scatter.stratified
    assert shared.share(torch.tensor([1, 9])).tolist() == pytest.approx([1, shared.stratified])


@pytest.mark.parametrize("rises", [-1.0, 0.9, 3.0])
@pytest.mark.parametrize(("spread", "trend"), [(0.0, 0.2), (0.25, 0.5), (1.0, 3.0)])
def test_the_line_of_a_pilot_is_that_of_least_squares(rises: float, spread: float, trend: float) -> None:
    """By numpy, of sizes below and above 1; of the best candidates one has no size, and is passed over."""
    draws, rng = 6, np.random.default_rng(5)
    sizes = np.geomspace(1e-1, 1e2, 30)
    deviations = 2e-3 * sizes ** (rises / 2) * rng.lognormal(0, spread, 30)
    other = sizes[:, None] + deviations[:, None] * (rng.standard_normal((30, draws)) + trend * np.arange(draws))
    best = rng.standard_normal((30, draws))
    history = torch.from_numpy(np.stack([best + other, best, best], 2))
    places = torch.from_numpy(np.tile(np.arange(draws) * 1.0, (30, 1)))
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(draws), (30, 1)), axis=1))
    shuffled = history.gather(1, order[:, :, None].expand_as(history))
    scatter = Scatter.fit(shuffled, places.gather(1, order))

    x, y = np.log(np.abs(other).mean(1)), np.log(other.var(1, ddof=1))
    slope = np.clip(np.polyfit(x, y, 1)[0], 0, 2)
    rest = y - slope * x
    assert scatter.slope == pytest.approx(slope) and scatter.intercept == pytest.approx(rest.mean())
    assert scatter.strength == pytest.approx(np.clip(2 / max(rest.var(ddof=1) - 2 / (draws - 1), 1e-3), 4, 20))
    noise = 0.5 * (np.diff(other, axis=1) ** 2).mean(1).sum() / other.var(1, ddof=1).sum()
    assert scatter.stratified == pytest.approx(np.clip(noise, 0.3, 1))
    assert scatter.variance(torch.tensor([0.04])).item() == pytest.approx(math.exp(scatter.intercept) * 0.04**slope)


@pytest.mark.parametrize(
    ("images", "draws", "sizes", "fitted"),
    [
        (3, 3, [1.0, 2.0, 5.0], True),
        (3, 2, [1.0, 2.0, 5.0], False),
        (2, 3, [1.0, 2.0], False),
        (3, 9, [2.0, 2.0, 2.0], False),
    ],
)
def test_a_pilot_that_says_nothing_of_the_line_is_not_fitted(
    images: int, draws: int, sizes: list[float], fitted: bool
) -> None:
    noise = torch.arange(draws) - (draws - 1) / 2
    other = torch.tensor(sizes, dtype=torch.float64)[:, None] * (4 + noise / 9)
    history = torch.stack([torch.zeros_like(other), other], 2)
    scatter = Scatter.fit(history, torch.arange(draws).expand(images, draws))
    assert (scatter != Scatter()) == fitted


# ---- the report -----------------------------------------------------------------------------------------------------


def report_of(differences: Tensor, truth: list[int]) -> ClassificationReport:
    zeros, count = torch.zeros_like(differences), differences.shape[1]
    best = differences.argmin(1)
    standing = Standing(differences, zeros, zeros, best, best >= 0, torch.full((len(best),), 4))
    prior = torch.full((count,), 1 / count, dtype=torch.float64)
    return ClassificationReport(tuple("abcd"[:count]), prior, standing, 10, 26).scored(truth)


def test_figures_of_a_report_by_hand() -> None:
    differences = torch.tensor(
        [[0.0, math.log(3)], [0.0, math.log(3)], [math.log(9), 0.0], [0.0, math.log(9)]]
    ).double()
    report = report_of(differences, [0, 1, 1, 0])
    assert report.accuracy == 0.75  # its error: that of a Beta(3.5, 1.5)
    assert report.accuracy_error == pytest.approx(math.sqrt(3.5 * 1.5 / (5**2 * 6)))
    # Two at 0.75, one of them right; two at 0.9, both right.
    assert report.expected_calibration_error == pytest.approx(0.5 * 0.25 + 0.5 * 0.1)
    assert report.confusion.tolist() == [[2, 0], [1, 1]]
    figures = json.loads(json.dumps(report.to_dict()))
    assert figures["confusion"] == [[2, 0], [1, 1]] and figures["evaluations_per_image"] == 4
    assert "uniform" in str(report) and "75.00" in str(report)


def test_calibration_is_compared_within_fifteen_bins() -> None:
    """Two posteriors that share one of 15 bins, and would not one of 16; a candidate of many, in the first bin."""
    logit = torch.tensor([0.61, 0.65]).double().logit()
    report = report_of(torch.stack([torch.zeros(2).double(), logit], 1), [0, 1])
    assert report.expected_calibration_error == pytest.approx(abs(1 - 0.61 - 0.65) / 2)
    many = torch.zeros(1, 20, dtype=torch.float64)
    standing = Standing(many, many, many, torch.tensor([3]), torch.tensor([True]), torch.tensor([20]))
    first = ClassificationReport(tuple("abcdefghijklmnopqrst"), torch.full((20,), 0.05).double(), standing, 0, 20)
    assert first.scored([3]).expected_calibration_error == pytest.approx(0.95)
    assert first.scored([3]).confusion.shape == (20, 20)


def test_a_printed_report_holds_its_figures() -> None:
    """One class that no image is of, and one that none was taken for."""
    differences = torch.tensor([[0.0, 1, 9], [1, 0, 9], [2, 0, 9], [0, 3, 9]]).double()
    zeros, best = torch.zeros_like(differences), differences.argmin(1)
    standing = Standing(differences, zeros, zeros, best, best > 0, torch.tensor([4, 6, 5, 6]))
    prior = torch.tensor([0.5, 0.25, 0.25]).double()
    report = ClassificationReport(("cat", "a-dog-of-a-long-name", "owl"), prior, standing, 10, 26)
    unknown = str(report)
    assert "accuracy" not in unknown and "owl" not in unknown
    assert "prior: 0.5, 0.25, 0.25" in unknown and "5.2 evaluations" in unknown and "10 of a pilot" in unknown
    assert "50.0 % of images decided" in unknown and report.to_dict()["decided"] == 0.5
    scored = report.scored([0, 0, 2, 0])
    # Found: 0, 1, 1, 0. So class 0 has three images, two found and both right; class 1 none, and two that are others.
    lines = [line.split() for line in str(scored).splitlines()]
    error, calibration = 100 * scored.accuracy_error, 100 * scored.expected_calibration_error
    assert f"accuracy 50.00 ± {error:.2f} %" in str(scored) and f"calibration error {calibration:.2f} %" in str(scored)
    table = [["cat", "3", "66.7", "%", "100.0", "%"], ["a-dog-of-a-long-name", "0", "-", "0.0", "%"]]
    assert lines[-3:] == [*table, ["owl", "1", "0.0", "%", "-"]]
    starts = {len(line) for line in str(scored).splitlines()[-4:]}
    assert len(starts) == 1, "columns are aligned"


def test_the_truth_is_known_by_number_or_by_name() -> None:
    names = ("cat", "dog")
    for labels in (["dog", "cat"], ["dog", 0], [1, 0], (1, 0), torch.tensor([1, 0]), np.array([1, 0])):
        assert numbered(labels, names, 2).tolist() == [1, 0]
    with pytest.raises(DataError, match=naming("image", 1, "owl", "cat")):
        numbered(["dog", "owl"], names, 2)
    for wrong in ([0.0, 1.0], [True, False], [None, 1]):
        with pytest.raises(DataError):
            numbered(wrong, names, 2)


def test_a_report_without_labels_has_no_accuracy() -> None:
    report = ClassificationReport(
        *(
            getattr(report_of(torch.zeros(1, 2).double(), [0]), name)
            for name in ("names", "prior", "standing", "pilot_evaluations", "network_evaluations")
        )
    )
    assert "accuracy" not in report.to_dict()
    with pytest.raises(DataError):
        _ = report.accuracy


@pytest.mark.parametrize("wrong", [[0, 2], [0, -1], [0]])
def test_labels_that_are_none_are_refused(wrong: list[int]) -> None:
    with pytest.raises(DataError):
        report_of(torch.zeros(2, 2).double(), wrong)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effort", "value"),
    [({"budget": 5}, "5"), ({"confidence": 1.0}, "1.0"), ({"first_draws": 0}, "0"), ({"pilot_evaluations": -1}, "-1")],
)
def test_an_effort_that_is_none_is_refused_with_its_value(effort: dict[str, Any], value: str) -> None:
    with pytest.raises(ConfigurationError, match=value):
        classifier(gaussians(), **effort)


def test_a_schedule_without_finite_ends_is_refused() -> None:
    objective = gaussians()
    objective.process.schedule.gamma_max = math.inf
    with pytest.raises(ConfigurationError, match=naming("LinearSchedule", "finite")):
        classifier(objective)


def test_fewer_than_two_candidates_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="1"):
        BoundClassifier(gaussians(), labels, torch.ones(1))


def test_an_integrand_that_is_not_finite_names_its_image() -> None:
    objective = gaussians()
    objective.network.classes[1].population = Mixture.gaussian(math.nan)  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteLossError, match="image 7"):
        classifier(objective).classify(batch_of(FEW[:1], torch.tensor([7])))
