"""The estimator's laws: exact means whatever the techniques, honest errors, and the same terms wherever measured.

A z-score is (mean - exact) / standard error of 16 independent replicates, so Student's t with 15 degrees of freedom,
which leaves [-4.5, 4.5] with probability 4e-4. Seeds are fixed: what passes once passes always.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

import registered
from exact_denoisers import (
    CorrelatedGaussianDenoiser,
    ExactDenoiser,
    Mixture,
    PerPixelSchedule,
    alphabet_points,
    continuous_diffusion_term,
)
from linear_gaussian import Batches, exact_diffusion, images, objective, z_score
from measured import measured
from naming import naming
from vdm_hub.data.loading import load_split
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.draws import image_generator
from vdm_hub.diffusion.noise_schedules import CosineSchedule, DiscreteBetasSchedule, LinearSchedule, TabulatedSchedule
from vdm_hub.diffusion.reverse_variances import reverse_variance
from vdm_hub.errors import ConfigurationError, DataError, NonFiniteLossError
from vdm_hub.likelihood.estimator import _NOISE, BoundEstimator, _Draws
from vdm_hub.likelihood.measurement import Batches as BatchesOf
from vdm_hub.likelihood.measurement import Measured
from vdm_hub.likelihood.proposals import Proposal
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.consistency import ConsistencyObjective
from vdm_hub.objectives.variational_bound import Batch, VDMObjective

LEVELS, REPLICATES, PILOT = images(150), 16, 400
TECHNIQUES = [
    dict(zip(("stratified", "importance_sampling", "control_variate"), switches, strict=True))
    for switches in itertools.product((False, True), repeat=3)
]
ALL = TECHNIQUES[-1]


def estimate(model: VDMObjective, levels: Tensor = LEVELS, seed: int = 0, **arguments: Any) -> Any:
    arguments = {"pilot_evaluations": PILOT} | arguments
    return measured(BoundEstimator(model, len(levels), seed, **arguments), Batches(levels), REPLICATES)


@pytest.mark.parametrize("transitions", [None, 7])
@pytest.mark.parametrize("techniques", TECHNIQUES, ids=lambda each: "".join(k[0] for k, on in each.items() if on))
def test_every_combination_of_techniques_is_unbiased(techniques: dict[str, bool], transitions: int | None) -> None:
    model = objective(transitions)
    exact = float(exact_diffusion(model.process, LEVELS, transitions).mean())
    assert abs(z_score(estimate(model, **techniques), exact)) < 4.5


@pytest.mark.parametrize(("transitions", "name"), registered.crossed([None, 2, 3000], "noise_schedules"))
def test_all_together_are_unbiased_under_every_schedule(transitions: int | None, name: str) -> None:
    model = objective(transitions, registered.scalar_schedule(name))
    exact = float(exact_diffusion(model.process, LEVELS, transitions).mean())
    assert abs(z_score(estimate(model), exact)) < 4.5


@pytest.mark.parametrize("target", registered.names("parameterizations"))
def test_several_times_of_each_image_are_unbiased_for_every_target(target: str) -> None:
    model = objective(target=target)
    exact = float(exact_diffusion(model.process, LEVELS, None).mean())
    assert abs(z_score(estimate(model, times_per_datum=3), exact)) < 4.5


def test_on_a_finite_alphabet_the_whole_bound_has_its_exact_mean() -> None:
    """Each image holds the letters in their exact proportions, so its diffusion term is that of 20 draws of one."""
    counts = torch.tensor([1, 8, 2, 5, 4])
    generator = torch.Generator().manual_seed(5)
    letters = torch.arange(5).repeat_interleave(counts)
    levels = torch.stack([letters[torch.randperm(20, generator=generator)] for _ in range(140)]).view(-1, 1, 4, 5)
    process = registered.process(LinearSchedule(-6.0, 8.0), num_levels=5)
    population = Mixture.alphabet(process.scaling.encode(torch.arange(5), torch.float64), counts / 20)
    denoiser = ExactDenoiser(population, process)
    exact = 20 * continuous_diffusion_term(process, denoiser.bare, alphabet_points(population), panels=100)
    assert abs(z_score(estimate(VDMObjective(denoiser, process), levels), exact)) < 4.5


@pytest.mark.parametrize("transitions", [None, 5])
def test_the_reconstruction_term_of_the_test_digits_is_exact_in_every_replicate(transitions: int | None) -> None:
    """A function of how often each of the 17 levels occurs: a quadrature, without Monte Carlo error."""
    levels = load_split("digits", "test", num_levels=17).levels
    process = registered.process(LinearSchedule(-7.65, 5.5), num_levels=17)
    model = VDMObjective(ExactDenoiser(Mixture.gaussian(0.3), process), process, transitions)
    report = measured(BoundEstimator(model, len(levels), pilot_evaluations=0), Batches(levels), 2)
    assert report.terms["reconstruction"] == pytest.approx(0.0201977, abs=6e-8)
    assert torch.equal(*report.terms_per_image["reconstruction"])


def test_a_reconstruction_term_that_asks_the_network_is_drawn() -> None:
    process = registered.process(LinearSchedule(-8.0, 4.0), decoder="ddpm", num_levels=16)
    model = VDMObjective(ExactDenoiser(Mixture.gaussian(0.1), process), process, 5)
    terms = measured(BoundEstimator(model, len(LEVELS), pilot_evaluations=0), Batches(LEVELS), 2).terms_per_image
    assert float(terms["reconstruction"].diff(dim=0).abs().max()) > 0.1


# ---- one replicate by hand ------------------------------------------------------------------------------------------

FEW = images(5)


def drawn_by_hand(estimator: BoundEstimator, batch: Batch, replicate: int) -> dict[str, Tensor]:
    """Each image's terms from its own noise, at its own times, with their weights and the control variate."""
    model, index, times = estimator.objective, batch["indices"], estimator.times(replicate)
    sums: dict[str, Any] = dict.fromkeys(("reconstruction", "prior", "diffusion"), 0.0)
    features = estimator.variate and estimator.variate.features(model.process.encode(batch["levels"]))
    for draw in range(times.shape[1]):
        generators = [image_generator(estimator.seed, replicate, int(i), draw, _NOISE) for i in index]
        noise, t = model.draw_noise(batch, generators), times[index, draw]
        terms = {name: term.double() for name, term in model(batch, t.float(), noise).terms.items()}
        cell = (torch.searchsorted(estimator.grid.edges, t, right=True) - 1).clamp(max=len(estimator.grid) - 1)
        weight = (estimator.grid.widths / estimator.proposal.probabilities)[cell]
        terms["diffusion"] = weight * terms["diffusion"]
        if features is not None and estimator.variate is not None:
            known = estimator.variate.value(features, cell, noise["marginal"])
            terms["diffusion"] += estimator.variate.integral(features) - weight * known
        sums = {name: sums[name] + terms[name] / times.shape[1] for name in sums}
    return sums


@pytest.mark.parametrize("decoder", ["factorised", "ddpm"])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("transitions", [None, 4])
@torch.no_grad()
def test_a_replicate_is_what_its_draws_give_by_hand(transitions: int | None, fitted: bool, decoder: str) -> None:
    model = objective(transitions)
    model.process.decoder = registered.build("decoders", decoder)
    calls: list[int] = []
    model.network.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    estimator = BoundEstimator(model, 5, seed=3, times_per_datum=2)
    if fitted:
        estimator.fit(Batches(FEW))
        assert estimator.variate is not None and estimator.pilot_evaluations == sum(calls)
    batch = {name: value[[4, 1, 2]] for name, value in next(Batches(FEW)()).items()}
    before = sum(calls)
    found = estimator.measure(batch, 1)
    assert found.diagnostics["evaluations"].tolist() == [(sum(calls) - before) / 3] * 3
    expected = drawn_by_hand(estimator, batch, 1)
    if decoder == "factorised":
        assert sum(calls) - before == 2 * 2 * 3
        # By quadrature instead of one draw: the same in any replicate, and near the mean of draws.
        again = estimator.measure(batch, 2).terms["reconstruction"]
        assert torch.equal(found.terms["reconstruction"], again) and again.dtype == torch.float64
        by_level = model.process.reconstruction_by_level()
        assert by_level is not None
        torch.testing.assert_close(again, by_level[batch["levels"].long()].flatten(1).sum(1))
        expected["reconstruction"] = again
    for name, term in expected.items():
        torch.testing.assert_close(found.terms[name], term, rtol=1e-9, atol=1e-9)
    times = estimator.times(1)[batch["indices"]]
    assert torch.equal(found.diagnostics["time"], times) and found.diagnostics["integrand"].shape == (3, 2)
    assert {value.dtype for value in found.diagnostics.values()} == {torch.float64}
    assert len(model.network._forward_pre_hooks) == 1, "that of this test alone"
    assert not torch.equal(estimator.times(1), estimator.times(2))


@pytest.mark.parametrize("per_image", [1, 3])
def test_times_are_stratified_unless_that_is_turned_off(per_image: int) -> None:
    strata = 40 * per_image
    for stratified in (True, False):
        estimator = BoundEstimator(
            objective(), 40, times_per_datum=per_image, stratified=stratified, pilot_evaluations=0
        )
        cells = (estimator.times(0).flatten() * strata).long().sort().values
        assert estimator.times(0).shape == (40, per_image)
        assert (cells.tolist() == list(range(strata))) == stratified


@torch.no_grad()
def test_what_the_pilot_finds_does_not_depend_on_batches_and_survives_json() -> None:
    """Of 5 images 256 evaluations: 51 of each, and one more of one of them."""
    states = []
    for size in (5, 2, 1):
        calls: list[list[int]] = []
        model = objective()
        model.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given[0]["indices"].tolist()))
        estimator = BoundEstimator(model, 5, seed=3)
        estimator.fit(Batches(FEW, size))
        assert len(calls) == -(-5 // size), "all draws of a batch's images at once"
        seen = list(itertools.chain.from_iterable(calls))
        assert sorted(seen.count(i) for i in range(5)) == [51, 51, 51, 51, 52]
        states.append(estimator.state())
    for state in states[1:]:
        torch.testing.assert_close(torch.tensor(state["probabilities"]), torch.tensor(states[0]["probabilities"]))
    loaded = BoundEstimator(objective(), 5, seed=3)
    old = loaded.times(0)
    loaded.load_state(json.loads(json.dumps(states[-1])))
    assert loaded.state() == states[-1] and loaded.variate is not None and not torch.equal(loaded.times(0), old)
    assert torch.equal(loaded.times(0), estimator.times(0))


@torch.no_grad()
def test_a_technique_that_is_turned_off_is_not_fitted_and_a_pilot_counts_its_own_evaluations() -> None:
    for sampling, variate in ((True, False), (False, True)):
        estimator = BoundEstimator(objective(), 5, importance_sampling=sampling, control_variate=variate)
        for _ in range(2):
            estimator.fit(Batches(FEW))
        assert (estimator.variate is not None) == variate and estimator.pilot_evaluations == 256
        assert (
            torch.equal(estimator.proposal.probabilities, Proposal.uniform(estimator.grid).probabilities) != sampling
        )


def test_a_pilot_takes_as_many_evaluations_as_images_within_bounds_and_none_that_nothing_needs() -> None:
    def planned(count: int, **arguments: Any) -> tuple[int, bool, bool]:
        estimator = BoundEstimator(objective(), count, **arguments)
        techniques = estimator.protocol()["estimator"]
        assert techniques["pilot_evaluations"] == estimator.fewest_evaluations(0)
        k = techniques["times_per_datum"]
        assert estimator.fewest_evaluations(3) == techniques["pilot_evaluations"] + 3 * count * k
        return techniques["pilot_evaluations"], techniques["importance_sampling"], techniques["control_variate"]

    assert planned(1) == (256, True, True) and planned(300) == (300, True, True)
    assert planned(10**5, times_per_datum=2) == (4096, True, True)
    assert planned(300, pilot_evaluations=256) == (256, True, True)
    assert planned(300, pilot_evaluations=0) == (0, False, False)
    assert planned(300, importance_sampling=False, control_variate=False) == (0, False, False)
    assert planned(300, importance_sampling=False) == (300, False, True)
    assert planned(300, control_variate=False) == (300, True, False)
    plain = BoundEstimator(objective(), 3)
    techniques = plain.protocol()["estimator"]
    assert plain.seed == 0 and plain.method == "bound" and plain.is_bound and plain.network_evaluations == 0
    assert (techniques["defensive"], techniques["times_per_datum"], techniques["stratified"]) == (0.1, 1, True)
    without = BoundEstimator(objective(), 3, pilot_evaluations=0)
    without.fit(lambda: pytest.fail("nothing looks at the images"))
    without.load_state(json.loads(json.dumps(without.state())))
    assert without.variate is None and without.pilot_evaluations == plain.pilot_evaluations == 0


def test_a_control_variate_is_only_of_a_scalar_gamma_and_the_noise_s_weighted_error() -> None:
    def has_one(model: VDMObjective) -> bool:
        return BoundEstimator(model, 3).control_variate

    model, large, flat = objective(4), objective(4), torch.zeros(1, 4, 4)
    large.process.variance = reverse_variance("fixed_large")
    schedule = PerPixelSchedule(-8.0, 4.0, tilt=flat, bump=flat)
    pixels = registered.process(schedule, conditioning=AffineConditioning(-8.0, 4.0))
    assert has_one(model) and not has_one(large) and not has_one(VDMObjective(model.network, pixels))
    assert not has_one(ConsistencyObjective(model.network, model.process, 4))


class WithoutWeights(BoundEstimator):
    """Samples by importance, and forgets the weights."""

    def _draws(self, replicate: int) -> _Draws:
        draws = super()._draws(replicate)
        return _Draws(draws.times, draws.cells, torch.ones_like(draws.weights))


class WithoutTheMean(BoundEstimator):
    """Subtracts the control variate, and adds nothing back."""

    def measure(self, batch: Batch, replicate: int) -> Measured:
        measured = super().measure(batch, replicate)
        assert self.variate is not None
        features = self.variate.features(self.objective.process.encode(batch["levels"]))
        measured.terms["diffusion"] -= self.variate.integral(features)
        return measured


class WithoutDefence(BoundEstimator):
    """Never looks where the pilot saw least."""

    def fit(self, batches: BatchesOf) -> None:
        super().fit(batches)
        mass = self.proposal.probabilities
        kept = torch.where(mass > mass.median(), mass, 0.0)
        self.proposal = Proposal(self.grid, kept / kept.sum())


class ReusesThePilot(BoundEstimator):
    """Replicates that are the pilot: its coefficients were fitted to their very noise, and it knows their errors."""

    def measure(self, batch: Batch, replicate: int) -> Measured:
        return super().measure(batch, 0)


@pytest.mark.parametrize("biased", [WithoutWeights, WithoutTheMean, WithoutDefence])
def test_a_biased_estimator_planted_here_is_caught(biased: type[BoundEstimator]) -> None:
    model = objective()
    # With a control variate, little is left that a wrong density could get wrong.
    planted = biased(model, len(LEVELS), pilot_evaluations=PILOT, control_variate=biased is WithoutTheMean)
    report = measured(planted, Batches(LEVELS), REPLICATES)
    assert abs(z_score(report, float(exact_diffusion(model.process, LEVELS, None).mean()))) > 8


def test_replicates_that_reuse_draws_have_no_error_and_so_are_caught() -> None:
    model = objective()
    planted = ReusesThePilot(model, len(LEVELS), pilot_evaluations=PILOT)
    assert measured(planted, Batches(LEVELS), REPLICATES).standard_error < 1e-12


def test_the_pilot_and_all_replicates_share_no_draw() -> None:
    seen: list[Tensor] = []

    class Recording(VDMObjective):
        def draw_noise(self, batch: Batch, generator: Any) -> dict[str, Tensor]:
            noise = super().draw_noise(batch, generator)
            seen.extend(value.flatten(1)[:, 0] for value in noise.values())
            return noise

    model = objective()
    estimate(Recording(model.network, model.process), times_per_datum=2)
    draws = torch.cat(seen)
    assert len(draws) >= 2 * (PILOT + 2 * REPLICATES * len(LEVELS))
    # Of 10^4 float32 normals some pairs agree by chance; a stream used twice would repeat thousands.
    assert len(draws.unique()) > 0.99 * len(draws)


def test_together_the_techniques_save_evaluations_at_the_same_error() -> None:
    """Variance within an image, whose estimate over 150 images and 16 replicates is good to a few per cent."""
    model = objective()
    variances = {
        name: float(estimate(model, **switches).terms_per_image["diffusion"].var(0).mean())
        for name, switches in {
            "none": TECHNIQUES[0],
            "importance": {"stratified": False, "importance_sampling": True, "control_variate": False},
            "variate": {"stratified": False, "importance_sampling": False, "control_variate": True},
            "all": ALL,
        }.items()
    }
    assert variances["importance"] < 0.8 * variances["none"]
    assert variances["all"] < variances["variate"]
    assert variances["all"] < 0.1 * variances["none"]


def test_stratified_times_lower_the_error_of_the_mean() -> None:
    """Of 150 copies of one image of many pixels: between times it differs by far more than its noise does."""
    model, alike = objective(), images(1, (1, 12, 12)).expand(150, 1, 12, 12)
    means = [
        estimate(model, alike, pilot_evaluations=0, stratified=on).terms_per_image["diffusion"] for on in (False, True)
    ]
    errors = [float(each.mean(1).std()) for each in means]
    assert errors[1] < 0.5 * errors[0]


def test_estimates_of_images_depend_on_the_schedule_s_endpoints_only() -> None:
    """The same draws in log-SNR under every shape, up to the shape's own bend within a cell of gamma."""
    steep = TabulatedSchedule([-8.0, -7.5, -6.0, -1.0, 0.0, 3.5, 4.0])
    found = [
        estimate(objective(schedule=schedule)).terms_per_image["diffusion"].mean(0)
        for schedule in (LinearSchedule(-8.0, 4.0), CosineSchedule(-8.0, 4.0), steep)
    ]
    for other in found[1:]:
        # Of single images, which meet few cells; the mean over them is much closer.
        assert float((other - found[0]).abs().mean()) < 0.02 * float(found[0].mean())
        assert float(other.mean()) == pytest.approx(float(found[0].mean()), rel=3e-3)


@pytest.mark.parametrize("transitions", [None, 5])
def test_terms_depend_neither_on_batches_nor_on_the_process_that_loads_the_state(transitions: int | None) -> None:
    model = objective(transitions)
    fitted = BoundEstimator(model, len(LEVELS), seed=3, times_per_datum=2)
    fitted.fit(Batches(LEVELS, 64))
    loaded = BoundEstimator(model, len(LEVELS), seed=3, times_per_datum=2)
    loaded.load_state(json.loads(json.dumps(fitted.state())))
    assert loaded.pilot_evaluations == fitted.pilot_evaluations == 256 > len(LEVELS)
    with torch.no_grad():
        whole = fitted.measure(next(Batches(LEVELS, 150)()), replicate=4)
        for batch in Batches(LEVELS, 37)():
            part = loaded.measure(batch, replicate=4)
            for name, term in whole.terms.items():
                torch.testing.assert_close(part.terms[name], term[batch["indices"]], rtol=1e-5, atol=1e-5)
            assert torch.equal(part.diagnostics["time"], fitted.times(4)[batch["indices"]])
            assert part.diagnostics["integrand"].shape == (len(batch["indices"]), 2)


def test_every_evaluation_is_counted_the_pilot_s_too() -> None:
    calls = []
    model = objective(transitions=4)
    handle = model.network.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    report = estimate(model, times_per_datum=2)
    handle.remove()
    assert report.network_evaluations == sum(calls) == PILOT + 2 * REPLICATES * len(LEVELS)


def test_a_gamma_per_pixel_has_no_control_variate_and_all_else() -> None:
    pixels = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(2))
    schedule = PerPixelSchedule(-8.0, 4.0, tilt=pixels, bump=0.5 * pixels.flip(-1), extra=2.5)
    process = registered.process(schedule, "v_prediction", AffineConditioning(-8.0, 4.0), num_levels=16)
    denoiser = CorrelatedGaussianDenoiser(0.1 * torch.eye(16, dtype=torch.float64), process)
    model = VDMObjective(denoiser, process, 6)
    estimator = BoundEstimator(model, len(LEVELS), pilot_evaluations=PILOT)
    report = measured(estimator, Batches(LEVELS), REPLICATES)
    assert estimator.variate is None and estimator.pilot_evaluations == PILOT
    plain = estimate(model, seed=1, **TECHNIQUES[0])
    difference = report.bits_per_dim - plain.bits_per_dim
    assert abs(difference) < 4.5 * math.hypot(report.standard_error, plain.standard_error)


def test_few_images_take_a_pilot_too_and_scatter_less_for_it() -> None:
    def estimate(**techniques: Any) -> LikelihoodReport:
        return measured(BoundEstimator(objective(), 3, **techniques), Batches(LEVELS[:3]), 64)

    plain, fitted = estimate(pilot_evaluations=0), estimate()
    assert plain.network_evaluations == 3 * 64 and fitted.network_evaluations == 256 + 3 * 64
    ratio = plain.standard_error_per_image / fitted.standard_error_per_image
    assert bool((ratio > 2).all()), "an eighth of the evaluations or less would do"
    assert measured(BoundEstimator(objective(), 1), Batches(LEVELS[:1]), 2).num_images == 1


ONE_ALONE = [{switch: name == switch for switch in ALL} for name in ALL]


@pytest.mark.slow
def test_on_chains_of_1000_betas_and_4_images_the_default_is_no_worse_than_any_technique_alone() -> None:
    """Root mean square over 3 sets of 4 images, 32 replicates each: good to 7 %, within the tenth that is allowed."""
    stock = DDPMScheduler(num_train_timesteps=1000)
    model = objective(999, DiscreteBetasSchedule(stock.betas.double().tolist()))

    def error(techniques: dict[str, bool]) -> float:
        found = []
        for seed in range(3):
            levels = LEVELS[4 * seed : 4 * seed + 4]
            found.append(measured(BoundEstimator(model, 4, seed, **techniques), Batches(levels), 32).standard_error)
        return math.hypot(*found)

    assert error({}) < 1.1 * min(error(alone) for alone in ONE_ALONE)


@pytest.mark.parametrize("transitions", [None, 999])
def test_a_control_variate_that_does_not_help_is_not_used(transitions: int | None) -> None:
    """The network's error has nothing to do with its noise: what simple denoisers lose would only add to it."""

    class Unlike(VDMObjective):
        def forward(self, batch: Batch, times: Tensor, noise: Any) -> Any:
            bound = super().forward(batch, times, noise)
            odd = (1e4 * noise["marginal"].flatten(1)[:, 0]).frac().abs()
            bound.terms["diffusion"] = bound.terms["diffusion"].new_tensor(100.0) * (0.5 + odd)
            return bound

    base = objective(transitions)
    model = Unlike(base.network, base.process, transitions)
    estimator = BoundEstimator(model, 4)
    with torch.no_grad():
        estimator.fit(Batches(LEVELS[:4]))
    assert estimator.variate is None and estimator.state()["control_variate"] is None


@pytest.mark.parametrize("shape", [(2, 12), (12,), (2, 150)], ids=str)
def test_data_of_other_shapes_have_a_control_variate_that_mixes_no_data(shape: tuple[int, ...]) -> None:
    """Of levels (B, 2, T): the whole estimate against its closed form, and lower in variance for it."""
    model, levels = objective(), images(60, shape)
    exact = float(exact_diffusion(model.process, levels, None).mean())
    estimator = BoundEstimator(model, len(levels), pilot_evaluations=PILOT)
    report = measured(estimator, Batches(levels), REPLICATES)
    assert estimator.variate is not None and abs(z_score(report, exact)) < 4.5
    plain = measured(BoundEstimator(model, len(levels), **TECHNIQUES[0]), Batches(levels), REPLICATES)
    assert float(report.terms_per_image["diffusion"].var(0).mean()) < 0.1 * float(
        plain.terms_per_image["diffusion"].var(0).mean()
    )


def test_nan_in_the_pilot_names_the_image() -> None:
    class Spoiled(VDMObjective):
        def forward(self, batch: Batch, times: Tensor, noise: Any) -> Any:
            bound = super().forward(batch, times, noise)
            bound.terms["diffusion"] = torch.where(batch["indices"] == 77, math.nan, bound.terms["diffusion"])
            return bound

    model = objective()
    with pytest.raises(NonFiniteLossError, match=naming("diffusion", "image 77")):
        estimate(Spoiled(model.network, model.process))


def test_bad_numbers_are_refused() -> None:
    model = objective()
    with pytest.raises(DataError, match="0 images"):
        BoundEstimator(model, 0)
    with pytest.raises(ConfigurationError, match=naming("times_per_datum", 0)):
        BoundEstimator(model, 5, times_per_datum=0)
    for wrong in (255, -1, 300.5):
        with pytest.raises(ConfigurationError, match=naming("pilot_evaluations", wrong)):
            BoundEstimator(model, 5, pilot_evaluations=wrong)  # type: ignore[arg-type]
