"""Three restrictions turn a Markovian hierarchical VAE into a VDM (Luo section 3), and the bound's forms agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import linear_gaussian
import registered
from linear_gaussian import Batches, images
from measured import measured
from naming import naming
from tiny import seeded, tiny_unet
from vdm_hub import HVAEObjective, MarkovianHVAE, VDMObjective
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.draws import image_generator
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.diffusion.reverse_variances import reverse_variance
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.comparison import compare_decompositions
from vdm_hub.likelihood.hierarchical import HierarchicalMeasurement
from vdm_hub.likelihood.importance_weighted import chain_terms
from vdm_hub.models.calls import CountedNetwork
from vdm_hub.objectives.decompositions import decompositions
from vdm_hub.objectives.hierarchical import joint_terms
from vdm_hub.objectives.restrictions import DenoisingHVAEObjective, ReverseStep, as_hierarchical_vae

SHAPE, SEED = (1, 8, 8), 3
K = 17  # whose values float32 does not hold: both models must start from the same x, in float64
LEVELS = torch.randint(0, K, (4, *SHAPE), generator=torch.Generator().manual_seed(1))
BATCH = {"levels": LEVELS, "indices": torch.arange(4)}


def vdm(transitions: int | None, schedule: str | None = None, variance: str = "fixed_small", **fields: Any) -> Any:
    """Of gentle steps, and a first latent that says little of the level, unless a schedule is asked for."""
    chosen = LinearSchedule(-3.0, 4.0) if schedule is None else registered.scalar_schedule(schedule)
    process = registered.process(chosen, num_levels=K, **fields)
    process.variance = reverse_variance(variance)
    return VDMObjective(tiny_unet().double(), process.double(), transitions)


def chain_latents(objective: VDMObjective) -> list[Tensor]:
    """The latents of `chain_terms`, z_0 first, drawn by the same generators from the end of the chain."""
    process, transitions = objective.process, objective.transitions
    x = process.encode(LEVELS, torch.float64)
    generators = [image_generator(SEED, 0, int(i), 0) for i in BATCH["indices"]]

    def normal() -> Tensor:
        return torch.cat([torch.randn(1, *SHAPE, generator=one, dtype=torch.float64) for one in generators])

    gammas = process.schedule(torch.arange(transitions + 1, dtype=torch.float64) / transitions).double()
    latents = [gaussian.marginal_sample(x, gammas[-1], normal())]
    for i in range(transitions, 0, -1):
        latents.insert(0, ReverseKernel.from_data(latents[0], x, gammas[i - 1], gammas[i]).sample(normal()))
    return latents


@pytest.mark.parametrize("transitions", [1, 2, 7])
@pytest.mark.parametrize(
    "fields",
    [{"parameterization": target} for target in registered.names("parameterizations")]
    + [{"variance": "fixed_large"}, {"data_scaling": "full"}],
    ids=str,
)
@torch.no_grad()
def test_the_restricted_hierarchy_has_the_log_weight_of_the_vdm_on_the_same_draws(
    fields: dict[str, Any], transitions: int
) -> None:
    """``log p(x, z) - log q(z|x)``: one written from the end, as Luo eq. 47; the other as a hierarchy, upwards."""
    objective = vdm(transitions, **fields)
    vdm_terms = chain_terms(objective, BATCH, (SEED, 0), 0, CountedNetwork(objective.network, BATCH))
    expected = torch.stack(list(vdm_terms.values())).sum(0)
    model = as_hierarchical_vae(objective, SHAPE)
    terms = joint_terms(model, LEVELS, chain_latents(objective))
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(0), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["reconstruction"], vdm_terms["reconstruction"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", registered.names("noise_schedules"))
@torch.no_grad()
def test_it_holds_for_every_schedule(schedule: str) -> None:
    objective = vdm(5, schedule)
    vdm_terms = chain_terms(objective, BATCH, (SEED, 0), 0, CountedNetwork(objective.network, BATCH))
    terms = joint_terms(as_hierarchical_vae(objective, SHAPE), LEVELS, chain_latents(objective))
    total, expected = (torch.stack(list(each.values())).sum(0) for each in (terms, vdm_terms))
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)


@torch.no_grad()
def test_its_latents_may_lie_at_other_times() -> None:
    """Equal ones are those of the VDM, and of any others q is the schedule's at those times."""
    objective = vdm(2)
    latents, hierarchies = (
        chain_latents(objective),
        [as_hierarchical_vae(objective, SHAPE, t) for t in (None, [0, 0.5, 1])],
    )
    equal, given = (joint_terms(one, LEVELS, latents) for one in hierarchies)
    assert all(torch.equal(term, given[name]) for name, term in equal.items())
    times, z = [0, 0.3, 1], torch.ones(1, *SHAPE, dtype=torch.float64)
    model = as_hierarchical_vae(objective, SHAPE, times)
    for number, time in enumerate(times, 1):
        z = model.encode(number, z)[0]
        gamma = objective.process.schedule(torch.tensor(time, dtype=torch.float64)).double()
        torch.testing.assert_close(z, gaussian.alpha(gamma).expand_as(z))
    for wrong in ([0, 1], [0, 0.7, 0.7, 1][:3], [0.1, 0.5, 1], [0, 1, 0.5]):
        with pytest.raises(ConfigurationError, match="times"):
            as_hierarchical_vae(objective, SHAPE, wrong)


@torch.no_grad()
def test_a_restriction_that_is_broken_is_seen() -> None:
    """The test above can fail: one encoder with a hundredth more variance moves the log-weight."""
    objective = vdm(5)
    model, latents = as_hierarchical_vae(objective, SHAPE), chain_latents(objective)
    before = joint_terms(model, LEVELS, latents)
    model.encoders[2].variance *= 1.01
    after = joint_terms(model, LEVELS, latents)
    difference = torch.stack(list(after.values())).sum(0) - torch.stack(list(before.values())).sum(0)
    assert float(difference.abs().min()) > 1e-6


@pytest.mark.parametrize("target", [pytest.param("epsilon", marks=pytest.mark.slow), "v_prediction"])
def test_the_denoising_form_is_the_expectation_of_the_hierarchy_s_log_weight(target: str) -> None:
    """A z-test over independent draws: 4.5 standard errors, exceeded by chance once in 150,000."""
    objective = vdm(4, parameterization=target)
    model = as_hierarchical_vae(objective, SHAPE)
    draws = 600
    levels = LEVELS[:1].repeat(draws, 1, 1, 1)
    forms = decompositions(HVAEObjective(model))
    assert list(forms) == ["denoising_matching", "consistency", "joint"]
    means, errors = {}, {}
    for index, (name, form) in enumerate([*forms.items(), ("vdm", objective)]):
        with torch.no_grad():
            noise = form.draw_noise({"levels": levels}, seeded(index))
            noise = {key: value.double() for key, value in noise.items()}
            times = torch.rand(draws, generator=seeded(9))
            total = form({"levels": levels}, times, noise).total.double()
        means[name], errors[name] = float(total.mean()), float(total.std()) / math.sqrt(draws)
    for name in forms:
        z = (means[name] - means["vdm"]) / math.hypot(errors[name], errors["vdm"])
        assert abs(z) < 4.5, (name, means, errors)


@torch.no_grad()
def test_the_denoising_terms_are_the_transitions_kl_of_the_vdm_term_by_term() -> None:
    objective = vdm(3)
    model = as_hierarchical_vae(objective, SHAPE)
    noise = [torch.randn(4, *SHAPE, dtype=torch.float64, generator=seeded(i)) for i in range(4)]
    terms = DenoisingHVAEObjective(model).terms(LEVELS, noise)
    x = objective.process.encode(LEVELS, torch.float64)
    _, bound = objective.process.bind(x, {})
    network = objective.network
    torch.testing.assert_close(terms["prior"], bound.prior_kl(x), rtol=1e-9, atol=1e-12)
    reconstruction = bound.reconstruction(LEVELS, x, {"reconstruction": noise[0]}, network)
    torch.testing.assert_close(terms["reconstruction"], reconstruction, rtol=1e-9, atol=1e-12)
    for t in range(2, 5):
        later = torch.full((4,), (t - 1) / 3, dtype=torch.float64)
        kl = bound.transition_kl(
            x, later - 1 / 3, later, {"marginal": noise[t - 1]}, lambda z, tau: network(z, tau.double()).sample
        )
        torch.testing.assert_close(terms[f"denoising_{t}"], kl, rtol=1e-8, atol=1e-10)


def test_the_hierarchy_is_measured_as_any_other() -> None:
    model = as_hierarchical_vae(vdm(2), SHAPE)
    report = measured(HierarchicalMeasurement(HVAEObjective(model)), Batches(LEVELS), 2)
    assert list(report.terms) == ["reconstruction", "consistency_1", "consistency_2", "prior"]


def test_forms_are_compared_on_the_same_images() -> None:
    """With the exact denoiser the denoising form scatters less, and both have one mean."""
    compared = compare_decompositions(linear_gaussian.objective(6), {"levels": images(4)}, draws=400)
    assert list(compared.bits_per_dim) == ["denoising_matching", "consistency"]
    assert compared.variance["denoising_matching"] < compared.variance["consistency"]
    first, second = compared.bits_per_dim.values()
    assert abs(first - second) < 4.5 * math.hypot(*compared.standard_error.values())
    assert "variance of one evaluation" in str(compared)
    assert list(decompositions(vdm(None))) == ["denoising_matching"]


@pytest.mark.slow
def test_so_are_those_of_the_hierarchy_that_a_vdm_is() -> None:
    hierarchy = HVAEObjective(as_hierarchical_vae(linear_gaussian.objective(6), linear_gaussian.SHAPE))
    # A tenth apart; of 8,000 values a variance is known to 2 %.
    variance = compare_decompositions(hierarchy, {"levels": images(4)}, draws=2000).variance
    assert variance["denoising_matching"] < variance["consistency"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transitions": None}, ("transitions",)),
        ({"transitions": 2, "decoder": "ddpm"}, ("DDPMDecoder", "factorised")),
    ],
)
def test_a_vdm_that_is_no_hierarchy_is_refused(arguments: dict[str, Any], message: Any) -> None:
    objective = vdm(arguments["transitions"])
    if "decoder" in arguments:
        objective.process.decoder = registered.build("decoders", arguments["decoder"])
    with pytest.raises(ConfigurationError, match=naming(*message)):
        as_hierarchical_vae(objective, SHAPE)


def test_the_schedule_is_asked_in_float64_whatever_the_latents_are() -> None:
    objective = vdm(3)
    step, z = ReverseStep(objective, 1 / 3, 2 / 3), torch.zeros(1, *SHAPE)
    assert torch.equal(step(z)[1], step(z.double())[1])


def test_learned_encoders_have_no_denoising_form() -> None:
    partly = as_hierarchical_vae(vdm(2), SHAPE)
    assert list(decompositions(HVAEObjective(partly))) == ["denoising_matching", "consistency", "joint"]
    partly.encoders[1] = torch.nn.Identity()
    with pytest.raises(ConfigurationError, match=naming("q(z_s|z_t, x)")):
        DenoisingHVAEObjective(partly)
    model = MarkovianHVAE(8, 1, 17, latent_shapes=[(4,)], block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ConfigurationError, match=naming("q(z_s|z_t, x)")):
        DenoisingHVAEObjective(model)
    with pytest.raises(ConfigurationError, match=naming("draws", 1, 2)):
        compare_decompositions(HVAEObjective(model), BATCH, draws=1)
