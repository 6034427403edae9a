"""The bound of a latent VDM: a first stage with known densities, an exact denoiser of its latents, and quadratures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from naming import naming
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.draws import normal_noise
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.latent_process import LatentProcess, describe_latents
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.comparison import compare_decompositions
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.importance_weighted import WeightedFlowMeasurement
from vdm_hub.likelihood.methods import ProbabilityFlow
from vdm_hub.likelihood.probability_flow import FlowMeasurement, draw_flow
from vdm_hub.likelihood.protocol import DEQUANTIZATIONS
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.consistency import ConsistencyObjective
from vdm_hub.objectives.decompositions import decompositions
from vdm_hub.objectives.variational_bound import VDMObjective

K, VARIANCE = 9, 1.7
SCALING = DataScaling("bin_centers", K)


class OnePixel(nn.Module):
    """``q(y|x) = N(gain x + offset, deviation^2)`` of one pixel, ``p(x|y)`` a softmax over K levels; in float64."""

    image_shape, latent_shape, num_levels = (1, 1, 1), (1,), K

    def __init__(self, gain: float = 1.3, offset: float = 0.2, deviation: float = 0.3, noise: float = 0.4) -> None:
        super().__init__()
        self.gain, self.offset, self.deviation, self.noise = gain, offset, deviation, noise

    def scale(self, levels: Tensor) -> Tensor:
        return SCALING.encode(levels, torch.float64)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.gain * x.flatten(1) + self.offset
        return mean, torch.full_like(mean, self.deviation)

    def log_p(self, y: Tensor) -> Tensor:
        """``log p(x|y)`` of all levels, (B,) -> (B, K)."""
        x = SCALING.encode(torch.arange(K), torch.float64)
        return (-0.5 * ((y[:, None] - self.gain * x) / self.noise) ** 2).log_softmax(1)

    def log_likelihood(self, levels: Tensor, y: Tensor) -> Tensor:
        return self.log_p(y.flatten()).gather(1, levels.long().reshape(-1, 1)).squeeze(1)

    def draw_levels(self, y: Tensor, generator: object = None) -> Tensor:
        return self.log_p(y.flatten()).exp().multinomial(1).reshape(-1, 1, 1, 1)

    def likeliest_levels(self, y: Tensor) -> Tensor:
        return self.log_p(y.flatten()).argmax(1).reshape(-1, 1, 1, 1)


class Pictures(nn.Module):
    """Latents of two channels, all of whose places differ, with dropout in training; "levels" are what was decoded."""

    image_shape, latent_shape, num_levels = (1, 1, 1), (2, 2, 3), K

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def scale(self, levels: Tensor) -> Tensor:
        return SCALING.encode(levels, torch.float64)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(1, 13, dtype=torch.float64).reshape(2, 2, 3) / 4
        return self.dropout(x * places + places), 0.1 * places * (2 + x)

    def draw_levels(self, y: Tensor, generator: object = None) -> Tensor:
        return y


class Exact(nn.Module):
    """``E[eps|z]`` for latents N(0, variance): told gamma itself by the identity conditioning below."""

    def __init__(self, variance: float = VARIANCE, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.variance, self.shift, self.scale = variance / scale**2, shift / scale, scale

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        gamma = (timestep.double() / 999 * 17 - 12).reshape(-1, 1, 1, 1)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        centred = sample + alpha * self.shift  # the latents' mean is -shift after shifting
        return (sigma * centred / (alpha**2 * self.variance + sigma**2),)


def process(stage: nn.Module, shift: Any = 0.0, scale: Any = 1.0, gamma_min: float = -12.0) -> LatentProcess:
    schedule = {"name": "linear", "config": {"gamma_min": gamma_min, "gamma_max": 5.0}}
    return LatentProcess(
        stage, GaussianProcess.from_fields({"noise_schedule": schedule, "num_levels": K}), shift, scale
    )


def levels() -> Tensor:
    return torch.arange(K).reshape(K, 1, 1, 1)


def expected_terms(stage: OnePixel) -> dict[str, Tensor]:
    """Each term of each level's bound by quadrature, written out apart from the library."""
    x = SCALING.encode(torch.arange(K), torch.float64)
    mean, deviation = stage.gain * x + stage.offset, stage.deviation
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(80))
    weights = weights / weights.sum()
    y = mean[:, None] + deviation * nodes
    log_p = torch.stack([stage.log_p(column) for column in y.T])  # (nodes, K given, K)
    reconstruction = -(weights[:, None] * log_p.diagonal(dim1=1, dim2=2)).sum(0)
    square = mean**2 + deviation**2
    gamma = torch.linspace(-12, 5, 200_001, dtype=torch.float64)
    alpha2, sigma2 = torch.sigmoid(-gamma), torch.sigmoid(gamma)
    total = alpha2 * VARIANCE + sigma2
    error = (1 - sigma2 / total) ** 2 + sigma2 * alpha2 * square[:, None] / total**2
    last_alpha2, last_sigma2 = 1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))
    return {
        "reconstruction": reconstruction,
        "prior": 0.5 * (last_sigma2 + last_alpha2 * square - 1 - math.log(last_sigma2)),
        "diffusion": 0.5 * torch.trapezoid(error, gamma, dim=1),
        "latent": torch.full((K,), 0.5 * -12 - math.log(deviation), dtype=torch.float64),
    }


def test_every_term_is_that_of_the_quadrature() -> None:
    stage = OnePixel()
    objective = VDMObjective(Exact(), process(stage)).double()
    draws = 4000
    batch = {"levels": levels().repeat_interleave(draws, 0)}
    times = (torch.arange(draws, dtype=torch.float64) + 0.5).div(draws).repeat(K)
    generator = torch.Generator().manual_seed(0)
    noise = {name: each.double() for name, each in objective.draw_noise(batch, generator).items()}
    terms = objective(batch, times, noise).terms
    for name, expected in expected_terms(stage).items():
        each = terms[name].reshape(K, draws)
        # 4.5 standard errors, of times that are stratified: these overstate the error; float32 endpoints of gamma.
        error = 4.5 * each.std(1) / math.sqrt(draws) + 1e-6
        assert bool(((each.mean(1) - expected).abs() < error).all()), name


def test_the_bound_is_above_the_negative_log_likelihood_by_brute_force_and_tight_where_q_is_the_posterior() -> None:
    """p(x) = int p(x|y) N(y; 0, variance) dy; the exact denoiser and gamma_0 = -12 make the VDM this very prior."""
    y = torch.linspace(-14, 14, 60_001, dtype=torch.float64)
    prior = torch.exp(-0.5 * y**2 / VARIANCE) / math.sqrt(2 * math.pi * VARIANCE)
    gaps = []
    for stage in (OnePixel(), OnePixel(1.3, 0.0, 0.12), OnePixel(1.0, -0.7, 0.9)):
        evidence = torch.trapezoid(stage.log_p(y).exp() * prior[:, None], y, dim=0)
        assert float(evidence.sum()) == pytest.approx(1, abs=1e-9)
        total = sum(expected_terms(stage).values())
        assert isinstance(total, Tensor)
        gaps.append(total + evidence.log())
        assert bool((gaps[-1] > 0).all())
    # Where the mode of the posterior is, and how wide: q's best Gaussian for the middle level.
    stage = OnePixel()
    density = stage.log_p(y).exp()[:, K // 2] * prior
    density = density / torch.trapezoid(density, y)
    mean = float(torch.trapezoid(y * density, y))
    best = OnePixel(1.3, mean, float(torch.trapezoid((y - mean) ** 2 * density, y).sqrt()))
    evidence = torch.trapezoid(best.log_p(y).exp() * prior[:, None], y, dim=0)
    total = sum(expected_terms(best).values())
    assert isinstance(total, Tensor)
    gap = float(total[K // 2] + evidence[K // 2].log())
    # The true posterior is not quite Gaussian; gamma_0 = -12 and gamma_1 = 5 leave less than 1e-3.
    assert 0 < gap < 5e-3
    assert gap < 0.2 * float(gaps[0][K // 2])


def test_shift_and_scale_leave_the_bound_where_it_is() -> None:
    """Exactly, draw by draw: the same latents in other units, and the denoiser that sees them in these."""
    stage = OnePixel()

    class InUnits(OnePixel):
        def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, scale = super().posterior(x)
            return 10 * mean + 3, 10 * scale

        def log_likelihood(self, levels: Tensor, y: Tensor) -> Tensor:
            return super().log_likelihood(levels, (y - 3) / 10)

    plain = VDMObjective(Exact(), process(stage)).double()
    scaled = VDMObjective(Exact(), process(InUnits(), 3.0, 10.0)).double()
    batch = {"levels": levels()}
    noise = {name: each.double() for name, each in plain.draw_noise(batch, torch.Generator().manual_seed(1)).items()}
    times = torch.linspace(0, 1, K, dtype=torch.float64)
    for (name, one), other in zip(
        plain(batch, times, noise).terms.items(), scaled(batch, times, noise).terms.values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=name)


def test_a_chain_of_the_consistency_form_begins_at_the_latents() -> None:
    stage, latent = OnePixel(), process(OnePixel())
    model, batch = ConsistencyObjective(Exact(), latent, 3).double(), {"levels": levels()}
    noise = {name: z.double() for name, z in model.draw_noise(batch, torch.Generator().manual_seed(0)).items()}
    found = model(batch, torch.full((K,), 0.5), noise).terms["prior"]
    mean, deviation = stage.posterior(stage.scale(levels()))
    gamma_s, gamma_t = latent.gaussian.schedule(torch.tensor([2 / 3, 1.0], dtype=torch.float64))
    z_s = torch.sigmoid(-gamma_s).sqrt() * (mean + deviation * noise["latent"].view(K, 1))
    z_s += torch.sigmoid(gamma_s).sqrt() * noise["last"].view(K, 1)
    gain = (torch.sigmoid(-gamma_t) / torch.sigmoid(-gamma_s)).sqrt()
    last = torch.distributions.Normal(gain * z_s, (torch.sigmoid(gamma_t) - gain**2 * torch.sigmoid(gamma_s)).sqrt())
    expected = torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0 * z_s, 1.0))
    torch.testing.assert_close(found, expected.flatten())


def test_both_decompositions_of_the_prior_have_one_mean() -> None:
    objective = VDMObjective(Exact(), process(OnePixel()), transitions=40).double()
    assert list(decompositions(objective)) == ["denoising_matching", "consistency"]
    forms = compare_decompositions(objective, {"levels": levels()}, draws=600)
    means, errors = forms.bits_per_dim, forms.standard_error
    difference = abs(means["denoising_matching"] - means["consistency"])
    assert difference < 4 * math.hypot(*errors.values())
    assert forms.variance["consistency"] > forms.variance["denoising_matching"]


def test_the_estimator_gives_the_same_bound_with_importance_sampling() -> None:
    stage = OnePixel()
    objective = VDMObjective(Exact(), process(stage)).double()
    batch = {"levels": levels().repeat(40, 1, 1, 1), "indices": torch.arange(40 * K)}
    estimator = BoundEstimator(objective, 40 * K, pilot_evaluations=512)
    estimator.fit(lambda: [batch])
    assert estimator.variate is None  # known only of what x itself is diffused to
    measured = [estimator.measure(batch, replicate).terms for replicate in range(24)]
    totals = torch.stack([torch.stack(list(terms.values())).sum(0).mean() for terms in measured])
    expected = sum(expected_terms(stage).values())
    assert isinstance(expected, Tensor)
    assert abs(float(totals.mean() - expected.mean())) < 4 * float(totals.std()) / math.sqrt(24)


@pytest.mark.parametrize("gamma_0", [-12.0, -1.0])
def test_samples_have_the_model_s_distribution(gamma_0: float) -> None:
    """``z_0 / alpha_0`` and the noise of ``p(y|z_0)`` add up: y is N(0, variance + 2 exp(gamma_0))."""
    stage = OnePixel()
    latent = process(stage, gamma_min=gamma_0)
    _, bound = latent.bind(None, {})
    generator = torch.Generator().manual_seed(0)
    # z_0 of the exact reverse process is N(0, alpha_0^2 variance + sigma_0^2).
    alpha2, sigma2 = 1 / (1 + math.exp(gamma_0)), 1 / (1 + math.exp(-gamma_0))
    z_0 = math.sqrt(alpha2 * VARIANCE + sigma2) * torch.randn(20_000, 1, 1, 1, generator=generator)
    torch.manual_seed(0)
    drawn = torch.bincount(bound.decode(z_0, Exact(), generator).flatten(), minlength=K) / 20_000
    y = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    variance = VARIANCE + 2 * math.exp(gamma_0)
    prior = torch.exp(-0.5 * y**2 / variance) / math.sqrt(2 * math.pi * variance)
    evidence = torch.trapezoid(stage.log_p(y).exp() * prior[:, None], y, dim=0)
    assert bool(((drawn - evidence).abs() < 4.5 * (evidence * (1 - evidence) / 20_000).sqrt()).all())


def test_latents_are_measured_and_normalised() -> None:
    stage = OnePixel(gain=9.0, offset=4.0)
    latent = process(stage)
    said = latent.prepare([levels(), levels()])
    assert said == (
        f"over {2 * K} images the latents have means {float(latent.shift):.3g} and standard deviations "
        f"{float(latent.scale):.3g}: they are shifted and scaled to 0 and 1, channel by channel."
    )
    assert float(latent.shift) == pytest.approx(4, abs=0.3)
    assert float(latent.scale) == pytest.approx(9 * math.sqrt((1 - 1 / K**2) / 3), rel=0.1)
    latent.normalises = False
    kept = latent.scaling()
    said = latent.prepare([levels()])
    assert said.startswith("warning: the first stage's latents are not normalised: over 9 images")
    assert said.endswith("leave scale_latents at true.")
    assert latent.scaling() == kept
    latent = process(OnePixel(gain=1.0, deviation=0.5))
    latent.normalises = False
    assert not latent.prepare([levels()]).startswith("warning")
    with pytest.raises(ConfigurationError, match=naming("latents", "1e-06")):
        process(OnePixel(gain=0.0, deviation=0.0)).prepare([levels()])


@pytest.mark.parametrize(
    ("mean", "deviation", "fits"),
    [
        ([0.0, 0.0], [1.0, 1.0], True),
        ([0.5, -2.0], [0.5, 2.0], True),  # the farthest that do
        ([0.0, 1.1], [1.0, 1.0], False),
        ([0.0, 0.0], [0.4, 1.0], False),
        ([0.0, 0.0], [1.0, 2.5], False),
    ],
)
def test_latents_suit_the_prior_where_all_channels_do(mean: list[float], deviation: list[float], fits: bool) -> None:
    assert describe_latents(torch.tensor(mean), torch.tensor(deviation), 5)[1] == fits


def test_latents_are_drawn_bound_and_decoded_in_the_coordinates_of_the_diffusion() -> None:
    latent = process(stage := Pictures().eval(), [1.0, 2.0], [3.0, 4.0], gamma_min=-12.3)
    shift, scale = (torch.tensor(each, dtype=torch.float64).reshape(2, 1, 1) for each in ([1, 2], [3, 4]))
    x, eps = stage.scale(levels()), torch.randn(K, 2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    extras, bound = latent.bind(x, {"latent": eps})
    mean, deviation = stage.posterior(x)
    torch.testing.assert_close(bound.origin(x), (mean + deviation * eps - shift) / scale)
    expected = (0.5 * -12.3 - (deviation / scale).log()).flatten(1).sum(1)
    torch.testing.assert_close(extras["latent"], expected, rtol=1e-12, atol=0)
    z_0, generators = eps, [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = normal_noise(z_0.shape, generators[0], z_0.device, z_0.dtype)
    y = z_0 * math.sqrt(1 + math.exp(-12.3)) + math.exp(0.5 * -12.3) * drawn
    decoded = latent.bind(None, {})[1].decode(z_0, Exact(), generators[1])
    torch.testing.assert_close(decoded, y * scale + shift)


def test_latents_are_examined_channel_by_channel_without_dropout() -> None:
    latent = process(stage := Pictures(), [1.0, 2.0], [3.0, 4.0])
    batches = [levels(), levels()[:4]]
    measured, (told, _) = latent.measure(batches), latent.examine(batches)
    assert stage.training
    mean, deviation = stage.eval().posterior(stage.scale(torch.cat(batches)))
    assert told["images"] == K + 4
    assert told["information"] == gaussian.information(mean, deviation**2)
    mean, square = (each.transpose(0, 1).flatten(1).mean(1) for each in (mean, mean**2 + deviation**2))
    torch.testing.assert_close(torch.stack(measured), torch.stack([mean, (square - mean**2).sqrt()]))
    shift, scale = torch.tensor([[1, 2], [3, 4]])
    assert told["mean"] == pytest.approx(((measured[0] - shift) / scale).tolist())
    assert told["standard_deviation"] == pytest.approx((measured[1] / scale).tolist())
    latent.prepare(batches)
    assert latent.examine(batches)[1] == []


@pytest.mark.parametrize(("images", "collapsed"), [(1, False), (2, True), (K, True)])
def test_latents_that_say_nothing_of_the_data_are_noted_and_those_that_suit_no_prior(
    images: int, collapsed: bool
) -> None:
    (*collapse, scaling) = process(OnePixel(gain=0.0, offset=3.0)).examine([levels()[:images]])[1]
    assert [note.partition(":")[0] for note in collapse] == ["posterior collapse"] * collapsed
    assert "latent_scaling" in scaling


def test_each_draw_of_latents_flows_as_its_closed_form_says() -> None:
    """Of Gaussian latents: ``z_1 = z_0 sqrt(v_1/v_0)``, and so the density at z_0; of ``y`` that the encoder drew."""
    stage = OnePixel()
    flow = ProbabilityFlow(divergence="exact", tolerance=1e-7)
    batch = {"levels": levels(), "indices": torch.arange(K)}
    draw = draw_flow(process(stage), Exact(), batch, flow, (0, 0), 0)
    alpha, sigma = math.sqrt(1 / (1 + math.exp(-12))), math.sqrt(1 / (1 + math.exp(12)))
    v_0, v_1 = alpha**2 * VARIANCE + sigma**2, VARIANCE / (1 + math.exp(5)) + 1 / (1 + math.exp(-5))
    volume = 0.5 * math.log(2 * math.pi) + math.log(alpha * stage.deviation)
    size = (-2 * (draw.log_q + volume)).sqrt()  # of the encoder's standard normal draw; its sign is not told
    mean, _ = stage.posterior(stage.scale(levels()))
    either = []
    for eps in (size, -size):
        y = mean.flatten() + stage.deviation * eps
        minus_log_p = 0.5 * (math.log(2 * math.pi * v_0 / v_1) + (alpha * y) ** 2 * v_1 / v_0)
        either.append(torch.stack([-stage.log_likelihood(levels(), y), minus_log_p]))
    found = torch.stack([draw.terms["reconstruction"], draw.terms["base_density"] + draw.terms["volume_change"]])
    off = torch.stack([(found - expected).abs().amax(0) for expected in either])
    assert float(off.amin(0).max()) < 1e-5 < float(off.max()), "the tolerance, times some steps"
    assert draw.drawn == "latent" and draw.terms.keys() == {"reconstruction", "base_density", "volume_change"}
    torch.testing.assert_close(draw.entropy, torch.full((K,), volume + 0.5, dtype=torch.float64))


@pytest.mark.parametrize("of_latents", [True, False])
def test_a_flow_s_report_says_what_its_draws_are_of(of_latents: bool) -> None:
    pixels = GaussianProcess.from_fields({"num_levels": K})
    measurement = FlowMeasurement(VDMObjective(Exact(), process(OnePixel()) if of_latents else pixels))
    asked = measurement.protocol()["probability_flow"]["dequantization"]
    assert ("q(y|x)" in asked) == of_latents and (asked in DEQUANTIZATIONS) != of_latents
    (note,) = measurement.notes(LikelihoodReport({"a": torch.zeros(1, 1)}, None, 1))
    assert ("encoder" in note) == of_latents and ("dequantisation" in note) != of_latents


def test_weights_of_a_flow_of_latents_are_over_what_the_encoder_draws() -> None:
    latent = process(OnePixel())
    measurement = WeightedFlowMeasurement(VDMObjective(Exact(), latent), draws=3)
    assert measurement.protocol()["importance_weights"] == {"over": "q(y|x)", "draws": 3}


def test_a_frozen_first_stage_is_never_trained_and_a_new_one_is() -> None:
    latent = LatentProcess(Pictures(), GaussianProcess.from_fields({"num_levels": K}))
    assert latent.scaling() == {"shift": [0.0, 0.0], "scale": [1.0, 1.0]}
    assert latent.eval().train().training and latent.first_stage.training
    assert not latent.eval().first_stage.training
    latent.frozen = True
    assert latent.train().training and not latent.first_stage.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift": [0.0, 1.0]}, ("latent_shift", "[0.0, 1.0]")),
        ({"shift": math.nan}, ("latent_shift", "nan")),
        ({"scale": 0.0}, (0, "1e-06")),
        ({"scale": -1.0}, ("-1",)),
        ({"shift": torch.tensor(1e300, dtype=torch.float64)}, ("latent_shift",)),
    ],
)
def test_what_is_no_scaling_is_refused(arguments: dict[str, float], message: tuple[object, ...]) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        process(OnePixel(), **arguments)


def test_a_first_stage_of_other_levels_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=naming(9, "num_levels", 256)):
        LatentProcess(OnePixel(), GaussianProcess.from_fields({}))
