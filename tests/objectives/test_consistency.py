"""The consistency form: another decomposition, the same total, more noise; and what its printed variant is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import registered
from exact_denoisers import ExactDenoiser, Mixture, PerPixelSchedule
from linear_gaussian import Batches, images, objective, z_score
from measured import measured
from naming import naming
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.forward_process import Noise
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.diffusion.reverse_variances import reverse_variance
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.profiles import transition_profile
from vdm_hub.objectives.consistency import ConsistencyObjective
from vdm_hub.objectives.variational_bound import Batch, Bound, VDMObjective

STEPS = ("previous", "current", "next")


def cubature(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Points of one pixel whose mean of every quadratic in these independent normals is exact."""
    count = len(names)
    points = math.sqrt(count) * torch.cat([torch.eye(count), -torch.eye(count)])
    return {name: points[:, i].view(-1, 1, 1, 1) for i, name in enumerate(names)}


def mean_term(model: VDMObjective, level: int, term: str, names: tuple[str, ...], transition: int) -> float:
    """The exact mean of a term that is quadratic in the noise, at one transition."""
    assert model.transitions is not None
    points = cubature(names)
    count = 2 * len(names)
    levels = torch.full((count, 1, 1, 1), level, dtype=torch.uint8)
    every = ("marginal", "reconstruction", "previous", "current", "next", "last")
    noise = {name: points.get(name, torch.zeros(count, 1, 1, 1)) for name in every}
    times = torch.full((count,), (transition + 0.5) / model.transitions)
    with torch.no_grad():
        return float(model({"levels": levels}, times, noise).terms[term].double().mean())


@pytest.mark.parametrize(
    ("target", "variance"),
    [*((target, "fixed_small") for target in registered.names("parameterizations")), ("epsilon", "fixed_large")],
)
@pytest.mark.parametrize("transitions", [1, 2, 5])
@pytest.mark.parametrize("level", [0, 9])
def test_both_forms_have_one_total_for_a_linear_model(
    level: int, transitions: int, target: str, variance: str
) -> None:
    """Every term but the reconstruction, which both share, is quadratic: means are exact, and no draw is random."""
    schedule = LinearSchedule(-3.0, 4.0)
    process = registered.process(schedule, target, num_levels=16)
    process.variance = reverse_variance(variance)
    network = ExactDenoiser(Mixture.gaussian(0.3), process)
    matching = VDMObjective(network, process, transitions)
    consistency = ConsistencyObjective(network, process, transitions)
    steps = range(transitions)
    first = mean_term(matching, level, "prior", ("marginal",), 0)
    first += sum(mean_term(matching, level, "diffusion", ("marginal",), i) for i in steps) / transitions
    second = mean_term(consistency, level, "prior", ("last",), 0)
    second += sum(mean_term(consistency, level, "consistency", STEPS, i) for i in steps) / transitions
    assert second == pytest.approx(first, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("step", [0, 2])
def test_a_draw_s_terms_are_those_of_normal_distributions(step: int) -> None:
    """In float64, of data whose 17 levels float32 doesn't hold."""
    process = registered.process(LinearSchedule(-13.3, 5.0), num_levels=17)
    model = ConsistencyObjective(ExactDenoiser(Mixture.gaussian(0.3), process), process, 3)
    batch = {"levels": torch.tensor([[[[3, 16]]]])}
    noise = model.draw_noise(batch, torch.Generator().manual_seed(step))
    with torch.no_grad():
        bound = model(batch, torch.tensor([(step + 0.5) / 3]), noise)

    gamma = process.schedule(torch.tensor([0, 1, 2, 3], dtype=torch.float64) / 3)
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    x = (2 * batch["levels"] + 1).double() / 17 - 1

    def later(z: Tensor, i: int) -> Normal:
        gain = alpha[i + 1] / alpha[i]
        return Normal(gain * z, (sigma[i + 1] ** 2 - gain**2 * sigma[i] ** 2).sqrt())

    z_r = alpha[step - 1] * x + sigma[step - 1] * noise["previous"].double()
    q = later(z_r, step - 1) if step else Normal(alpha[0] * x, sigma[0])
    z_s = q.mean + q.stddev * noise["current"].double()
    step_t = later(z_s, step)
    z_t = step_t.mean + step_t.stddev * noise["next"].double()
    data = alpha[step + 1] * 0.3 / (alpha[step + 1] ** 2 * 0.3 + sigma[step + 1] ** 2) * z_t  # E[x|z_t]
    gain = alpha[step + 1] / alpha[step]
    precision = 1 / sigma[step] ** 2 + gain**2 / step_t.variance
    p = Normal((alpha[step] * data / sigma[step] ** 2 + gain * z_t / step_t.variance) / precision, precision**-0.5)
    last = later(alpha[2] * x + sigma[2] * noise["last"].double(), 2)
    expected = {
        "consistency": 3 * (q.log_prob(z_s) - p.log_prob(z_s)).sum(),
        "prior": torch.distributions.kl_divergence(last, Normal(0.0 * x, 1.0)).sum(),
    }
    for name, term in expected.items():
        torch.testing.assert_close(bound.terms[name][0], term, rtol=1e-9, atol=1e-12)
    assert bound.dimensions == 2


class Layer(nn.Linear):
    """A network in float32 that remembers what it computed in."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        output = super().forward(sample)
        self.seen = output.dtype
        return (output,)


def test_the_network_is_called_outside_of_autocast() -> None:
    layer = Layer(4, 4)
    model = ConsistencyObjective(layer, objective().process, 3)
    batch = {"levels": images(1)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch, torch.tensor([0.5]), model.draw_noise(batch, torch.Generator().manual_seed(0)))
    assert layer.seen == torch.float32


def test_both_forms_agree_by_monte_carlo_and_the_matching_form_has_less_noise() -> None:
    """In 16 replicates of 150 images; z as in test_estimator. Their spread is compared at every transition."""
    matching, levels = objective(6), images(150)
    consistency = ConsistencyObjective(matching.network, matching.process, 6)
    reports = [
        measured(BoundEstimator(each, len(levels), pilot_evaluations=400), Batches(levels), 16)
        for each in (matching, consistency)
    ]
    assert set(reports[1].terms_per_image) == {"reconstruction", "prior", "consistency"}
    difference = reports[0].bits_per_dim - reports[1].bits_per_dim
    assert abs(difference) < 4.5 * math.hypot(*(report.standard_error for report in reports))

    profiles = [transition_profile(each, {"levels": levels[:40]}, draws=8) for each in (matching, consistency)]
    scale = 16 * math.log(2)
    for profile, report, term in zip(profiles, reports, ("diffusion", "consistency"), strict=True):
        assert profile.times.tolist() == pytest.approx([(i + 1) / 6 for i in range(6)])
        # 40 of the 150 images, which differ by their contrast: the area is near the term, not equal to it.
        assert float(profile.bits_per_dim.mean()) == pytest.approx(report.terms[term], rel=0.3)
    assert bool((profiles[1].spread > profiles[0].spread).all())
    assert abs(z_score(reports[1], scale * reports[1].terms["consistency"], "consistency")) < 1e-6


class Counting(VDMObjective):
    """Its term is ``(1 + image) call``, whatever the data."""

    def forward(self, batch: Batch, times: Tensor, noise: Noise) -> Bound:
        self.seen.append((times, noise["marginal"]))
        value = (1 + torch.arange(len(times))) * float(len(self.seen))
        return Bound({"diffusion": value, "prior": 100 + value}, dimensions=16)


def test_a_profile_is_mean_and_spread_of_the_draws_at_each_transition() -> None:
    model = objective(4)
    counting, levels = Counting(model.network, model.process, 4), images(3)
    counting.seen = []  # type: ignore[assignment]
    counting.train()
    profile = transition_profile(counting, {"levels": levels}, draws=3, seed=1)
    bits = 16 * math.log(2)
    assert profile.times.tolist() == [0.25, 0.5, 0.75, 1.0]
    expected = [2 * (2 + 3 * i) / bits for i in range(4)]  # the mean of 1, 2 and 3 images' share, of three calls
    torch.testing.assert_close(profile.bits_per_dim, torch.tensor(expected).double())
    spread = math.sqrt((1 + 4 + 9) / 3) / bits
    torch.testing.assert_close(profile.spread, torch.full((4,), spread).double())
    times = torch.stack([times for times, _ in counting.seen])
    torch.testing.assert_close(times, ((torch.arange(12) // 3 + 0.5) / 4)[:, None].expand(12, 3))
    noise = torch.cat([draw for _, draw in counting.seen]).flatten(1)[:, 0]
    assert len(noise.unique()) == 36, "every draw of every image has noise of its own"
    before = counting.seen[0][1]
    transition_profile(counting, {"levels": levels}, draws=2, seed=0)
    assert not torch.equal(counting.seen[12][1], before)
    first = counting.seen[12][1]
    transition_profile(counting, {"levels": levels})
    assert torch.equal(counting.seen[20][1], first) and len(counting.seen) == 20 + 4 * 8 and counting.training
    alone = transition_profile(counting, {"levels": levels[:1]}, draws=2)
    assert alone.times.dtype == alone.bits_per_dim.dtype == alone.spread.dtype == torch.float64


def scalar_chain(transitions: int, gain: float = 0.8, variance: float = 0.3, keep: float = 0.7) -> tuple[float, float]:
    """The bound of ``p(x_{t-1}|x_t) = N(gain x_t, variance)`` on ``x_0 = 1``: exact, and as Luo eq. 45 is printed.

    ``q(x_t|x_{t-1}) = N(sqrt(keep) x_{t-1}, 1 - keep)``; all is in second moments of Luo's ``x_0..x_T``.
    """
    second = [keep**t + 1 - keep**t for t in range(transitions + 1)]  # E x_t^2, for x_0 = 1
    root, left = math.sqrt(keep), 1 - keep

    def log_p(square: float) -> float:
        return -0.5 * math.log(2 * math.pi * variance) - 0.5 * square / variance

    log_q = -0.5 * math.log(2 * math.pi * left) - 0.5
    prior = -0.5 * math.log(2 * math.pi) - 0.5 * second[transitions]
    exact = log_p(second[0] - 2 * gain * root * second[0] + gain**2 * second[1]) + prior - log_q
    printed = exact
    for t in range(1, transitions):
        squares = second[t] + gain**2 * second[t + 1]
        exact += log_p(squares - 2 * gain * root * second[t]) - log_q
        # x_t drawn from x_{t-1} anew: E x_t x_{t+1} = sqrt(keep) E[x_{t-1} x_{t+1}] = keep^{3/2} E x_{t-1}^2.
        printed += log_p(squares - 2 * gain * keep * root * second[t - 1]) - log_q
    return exact, printed


@pytest.mark.parametrize("transitions", [2, 3, 4])
def test_luo_s_equation_45_as_printed_is_another_number(transitions: int) -> None:
    """Lower by ``gain sqrt(keep) (1 - keep) / variance`` a term: the covariance that it leaves out.

    The exact one is the evidence lower bound of the definition, ``E[log p(x_0..x_T) - log q(x_1..x_T|x_0)]``, here
    from the covariance of the whole chain.
    """
    gain, variance, keep = 0.8, 0.3, 0.7
    rows = torch.zeros(transitions + 1, transitions + 1, dtype=torch.float64)
    rows[0, 0] = 1.0
    for t in range(1, transitions + 1):
        rows[t] = math.sqrt(keep) * rows[t - 1]
        rows[t, t] = math.sqrt(1 - keep)
    bound = -0.5 * math.log(2 * math.pi) - 0.5 * float(rows[-1] @ rows[-1])
    for t in range(1, transitions + 1):
        residual = rows[t - 1] - gain * rows[t]
        bound += -0.5 * math.log(2 * math.pi * variance) - 0.5 * float(residual @ residual) / variance
        bound += 0.5 * math.log(2 * math.pi * (1 - keep)) + 0.5
    exact, printed = scalar_chain(transitions, gain, variance, keep)
    assert exact == pytest.approx(bound, rel=1e-12)
    missing = (transitions - 1) * gain * math.sqrt(keep) * (1 - keep) / variance
    assert exact - printed == pytest.approx(missing, rel=1e-12) and missing > 0.1


def test_what_has_no_consistency_form_is_refused() -> None:
    model = objective()
    with pytest.raises(ConfigurationError, match=naming("transitions")):
        ConsistencyObjective(model.network, model.process, None)
    flat = PerPixelSchedule(-8.0, 4.0, tilt=torch.zeros(1, 4, 4), bump=torch.zeros(1, 4, 4))
    process = registered.process(flat, conditioning=AffineConditioning(-8.0, 4.0))
    with pytest.raises(ConfigurationError, match="PerPixelSchedule"):
        ConsistencyObjective(model.network, process, 3)
    with pytest.raises(ConfigurationError, match="transitions=None"):
        transition_profile(model, {"levels": images(2)})
    with pytest.raises(ConfigurationError, match="draws=1"):
        transition_profile(objective(2), {"levels": images(2)}, draws=1)
