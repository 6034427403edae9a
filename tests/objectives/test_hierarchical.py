"""The hierarchical VAE's bound against exact answers: a linear-Gaussian chain, and a small alphabet by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_gaussian import Batches
from measured import measured
from naming import naming
from tiny import randomised, seeded
from vdm_hub import HVAEObjective, MarkovianHVAE
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.likelihood.hierarchical import HierarchicalChains, HierarchicalMeasurement
from vdm_hub.likelihood.methods import ImportanceWeighted, build_measurement
from vdm_hub.models.hvae import Normal
from vdm_hub.objectives.hierarchical import JointHVAEObjective, joint_terms, log_density

LEVELS = torch.randint(0, 5, (6, 1, 2, 2), generator=torch.Generator().manual_seed(0))
NO_TIMES = torch.empty(0)


def hvae(depth: int = 1, **arguments: Any) -> MarkovianHVAE:
    fields = {"sample_size": 2, "in_channels": 1, "num_levels": 5, "latent_shapes": [(1,)], "block_out_channels": (8,)}
    model = MarkovianHVAE(**fields | {"norm_num_groups": 4, "depth": depth} | arguments)
    return randomised(model).double().eval()


def exact_log_likelihood(model: MarkovianHVAE, levels: Tensor, nodes: int = 400) -> Tensor:
    """``log p(x)`` by quadrature over latents of one dimension each, (B,): a grid for z_1, and one for each above."""
    grid = torch.linspace(-12, 12, nodes, dtype=torch.float64)
    log_step = math.log(float(grid[1] - grid[0]))
    log_p = -0.5 * grid**2 - 0.5 * math.log(2 * math.pi)  # of z_T
    for t in range(model.depth - 1, 0, -1):
        below = model.decode(t, grid[:, None])
        transition = torch.distributions.Normal(below.mean, below.scale).log_prob(grid[None, :])
        log_p = torch.logsumexp(log_p[:, None] + transition + log_step, 0)
    log_levels = model.decode_levels(grid[:, None])  # (nodes, 1, 2, 2, K)
    picked = [log_levels.gather(-1, x.expand(nodes, *x.shape)[..., None]).flatten(1).sum(1) for x in levels]
    return torch.stack([torch.logsumexp(log_p + one + log_step, 0) for one in picked])


@pytest.mark.parametrize("depth", [1, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (2, 3))])
@torch.no_grad()
def test_the_bound_lies_above_minus_log_p_and_importance_weights_close_the_gap(depth: int) -> None:
    model = hvae(depth)
    exact = -exact_log_likelihood(model, LEVELS)
    objective = HVAEObjective(model)
    batches = Batches(LEVELS)
    bound = measured(HierarchicalMeasurement(objective), batches, 200)
    weighted = measured(HierarchicalChains(objective, draws=256), batches, 8)
    bits = 4 * math.log(2)
    mean = float(exact.mean()) / bits
    assert bound.bits_per_dim > mean - 4 * bound.standard_error
    assert mean - 4 * weighted.standard_error < weighted.bits_per_dim < bound.bits_per_dim
    # 256 weights leave a bias of about their relative variance over 2 x 256 (Burda et al., theorem 1: it falls to 0).
    assert abs(weighted.bits_per_dim - mean) < 0.02 * mean + 4 * weighted.standard_error
    assert weighted.details["importance_weights"]["draws"] == 256


class Linear(nn.Module):
    """``N(gain z + shift, scale^2)``, in one dimension a latent."""

    def __init__(self, gain: float, scale: float, shift: float = 0.0, flat: bool = False) -> None:
        super().__init__()
        self.gain, self.width, self.shift, self.flat = gain, scale, shift, flat

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.gain * (z.flatten(1).mean(1, keepdim=True) if self.flat else z) + self.shift
        return mean, torch.full_like(mean, self.width)


@torch.no_grad()
def test_every_term_has_its_closed_form_where_all_is_linear_and_gaussian() -> None:
    """For z_1 = a x + s e_1, z_2 = b z_1 + t e_2 and p(z_1|z_2) = N(c z_2, u^2) the expectations are quadratic."""
    a, s, b, t, c, u = 0.7, 0.5, 0.8, 0.6, 0.9, 0.4
    model = hvae(2, encoders=[Linear(a, s, flat=True), Linear(b, t)], decoders=[Linear(c, u)])
    x = model.scale(LEVELS, torch.float64).flatten(1).mean(1)
    second = s**2 + (a * x) ** 2  # E z_1^2
    prior = 0.5 * (b**2 * second + t**2 - 1 - math.log(t**2))
    squares = (1 - c * b) ** 2 * second + (c * t) ** 2  # E (z_1 - c z_2)^2
    consistency = 0.5 * (squares / u**2 - 1) + math.log(u / s)
    replicates = 4000
    for objective in (HVAEObjective(model), JointHVAEObjective(model)):
        noise = objective.draw_noise({"levels": LEVELS.repeat(replicates, 1, 1, 1)}, seeded())
        terms = objective.terms(LEVELS.repeat(replicates, 1, 1, 1), [value.double() for value in noise.values()])
        for name, expected in (("prior", prior), ("consistency_1", consistency)):
            each = terms[name].reshape(replicates, len(x))
            error = each.std(0) / math.sqrt(replicates)
            assert bool(((each.mean(0) - expected).abs() < 5 * error + 1e-12).all()), name


@pytest.mark.parametrize("depth", [1, 3])
def test_both_forms_agree_on_the_same_latents_but_for_the_prior(depth: int) -> None:
    model = hvae(depth)
    noise = [torch.randn(len(LEVELS), 1, dtype=torch.float64, generator=seeded()) for _ in range(depth)]
    closed, joint = HVAEObjective(model).terms(LEVELS, noise), JointHVAEObjective(model).terms(LEVELS, noise)
    again = joint_terms(model, LEVELS, model.latents(model.scale(LEVELS, torch.float64), noise))
    assert closed.keys() == joint.keys() == again.keys()
    for name in closed:
        torch.testing.assert_close(joint[name], again[name], rtol=1e-12, atol=1e-12)
        if name != "prior":
            torch.testing.assert_close(closed[name], joint[name], rtol=1e-10, atol=1e-10)


def test_the_vae_has_the_two_terms_of_its_bound() -> None:
    model = hvae(1)
    objective = HVAEObjective(model)
    bound = objective({"levels": LEVELS}, NO_TIMES, objective.draw_noise({"levels": LEVELS}, seeded()))
    assert list(bound.terms) == ["reconstruction", "prior"]
    q = model.encode(1, model.scale(LEVELS, torch.float64))
    normal = torch.distributions.Normal(q.mean, q.scale)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(bound.terms["prior"], expected)


def test_a_log_density_is_that_of_the_normal_distribution() -> None:
    mean, scale, z = (torch.rand(3, 2, 2, generator=seeded(i), dtype=torch.float64) for i in range(3))
    expected = torch.distributions.Normal(mean, scale).log_prob(z).sum((1, 2))
    torch.testing.assert_close(log_density(Normal(mean, scale), z), expected)


def test_an_image_draws_the_same_in_any_batch() -> None:
    model = hvae(2)
    for method in ("bound", ImportanceWeighted(draws=3)):
        measurement = build_measurement(HVAEObjective(model), 6, method)
        whole, parts = (measured(measurement, Batches(LEVELS, size), 2) for size in (6, 1))
        torch.testing.assert_close(whole.per_image, parts.per_image, rtol=1e-5, atol=1e-6)


def test_a_report_says_how_deep_the_hierarchy_is_and_what_was_drawn() -> None:
    objective = HVAEObjective(hvae(2))
    bound = measured(build_measurement(objective, 6, "bound", seed=1), Batches(LEVELS), 2)
    assert (bound.method, bound.is_bound, bound.transitions) == ("bound", True, None)
    assert bound.network_evaluations == 2 * 6 and bound.details["hierarchy"] == {"depth": 2}
    chains = build_measurement(objective, 6, ImportanceWeighted(draws=3), seed=1)
    report = measured(chains, Batches(LEVELS), 2)
    assert (report.method, report.is_bound) == ("importance_weighted", True)
    assert report.network_evaluations == 2 * 6 * 3 and report.details["hierarchy"] == {"depth": 2}
    weights = report.details["importance_weights"]
    assert (weights["over"], weights["draws"]) == ("latents", 3)
    assert 1 <= weights["effective_sample_size_min"] < weights["effective_sample_size_mean"] <= 3
    assert measured(build_measurement(objective, 6), Batches(LEVELS), 2).bits_per_dim != bound.bits_per_dim
    default = build_measurement(objective, 6, "importance_weighted")
    assert (default.seed, default.protocol()["importance_weights"]["draws"]) == (0, 16)
    assert build_measurement(objective, 6).seed == HierarchicalMeasurement(objective).seed == 0
    assert (HierarchicalChains(objective).seed, HierarchicalChains(objective).draws) == (0, 16)


def test_fewer_draws_are_a_part_of_more() -> None:
    """``w_1 + w_2`` twice the mean weight of two, of which one is known: so is the other, and the third likewise."""
    objective = HVAEObjective(hvae(2))
    batch = {"levels": LEVELS, "indices": torch.arange(6)}
    with torch.no_grad():
        sums = []
        for draws in (1, 2, 3):
            terms = HierarchicalChains(objective, draws).measure(batch, 0).terms
            sums.append(draws * torch.exp(-torch.stack(list(terms.values())).sum(0)))
        other = HierarchicalChains(objective, 1).measure(batch, 1).terms
    assert bool((sums[1] > sums[0]).all()) and bool((sums[2] > sums[1]).all())
    assert not torch.equal(other["prior"], HierarchicalChains(objective, 1).measure(batch, 0).terms["prior"])


def test_what_a_hierarchical_vae_has_not_is_refused() -> None:
    objective = HVAEObjective(hvae(1))
    with pytest.raises(ConfigurationError, match=naming("'ode'")):
        build_measurement(objective, 6, "ode")
    with pytest.raises(ConfigurationError, match=naming("draws", 0, 1)):
        build_measurement(objective, 6, {"name": "importance_weighted", "config": {"draws": 0}})
    with pytest.raises(ConfigurationError, match=naming("draws", 0, 1)):
        HierarchicalChains(objective, draws=0)
    for wrong in (5, -1):
        with pytest.raises(DataError, match=naming(min(0, wrong), max(1, wrong), 4)):
            objective({"levels": torch.tensor([[[[0, wrong], [1, 1]]]])}, NO_TIMES, {})
