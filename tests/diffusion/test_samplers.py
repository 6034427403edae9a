"""Samplers by the score: with an exact score, samples of the right distribution, at the promised cost."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import registered
from distributions import write_pixelwise
from exact_denoisers import CorrelatedGaussianDenoiser, ExactDenoiser, Mixture, PerPixelSchedule, alpha_sigma
from naming import naming
from tiny import Inputs, seeded, tiny_pipeline, tiny_unet
from vdm_hub.commands import main
from vdm_hub.diffusion.conditioning import AffineConditioning
from vdm_hub.diffusion.continuous_time import DiffusionSDE
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.diffusion.samplers import (
    SAMPLERS,
    AnnealedLangevin,
    PredictorCorrector,
    ReverseSDE,
    Sampler,
    build_sampler,
)
from vdm_hub.errors import ConfigurationError

COUNT = 20_000
TWO_PEAKS = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([-0.6, 0.5], [0.02, 0.01], [0.3, 0.7])))
MEAN, VARIANCE = -0.6 * 0.3 + 0.5 * 0.7, 0.02 * 0.3 + 0.01 * 0.7 + 0.21 * 1.1**2


def process(target: str = "epsilon") -> GaussianProcess:
    return registered.process(LinearSchedule(-7.0, 5.0), target)


def draw(sampler: Sampler, steps: int, target: str = "epsilon", seed: int = 0) -> tuple[Tensor, int]:
    """z_0 of many data of 50 independent dimensions, float64, and the evaluations of the score."""
    chosen = process(target)
    network = ExactDenoiser(TWO_PEAKS, chosen)
    _, bound = chosen.bind(None, {})
    calls = 0

    def score(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return bound.score(network.bare, z, t)

    generator = seeded(seed)
    z = torch.randn(COUNT // 50, 50, dtype=torch.float64, generator=generator)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    with torch.no_grad():
        for t, s in pairwise(times):
            z = sampler.step(score, bound.sde, z, s, t, generator)
    return z, calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_distribution_of_the_data(name: str) -> None:
    """Mean, variance and the weight of a peak, within 4.5 standard errors and the bias of 200 or 250 steps, 0.02.

    The bias: a step is 12/200 in gamma, and all samplers but Heun's are of first order in it.
    """
    sampler = SAMPLERS[name]()
    z, calls = draw(sampler, steps := 250 if name == "annealed_langevin" else 200)
    assert calls == steps * sampler.evaluations
    x = z.flatten() / math.sqrt(1 / (1 + math.exp(-7.0)))
    assert abs(float(x.mean()) - MEAN) < 0.02 + 4.5 * math.sqrt(VARIANCE / COUNT)
    assert abs(float(x.var()) - VARIANCE) < 0.02 + 4.5 * VARIANCE * math.sqrt(2 / COUNT)
    assert abs(float((x < 0).double().mean()) - 0.3) < 0.02 + 4.5 * math.sqrt(0.21 / COUNT)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_on_gaussian_data_is_that_of_its_source(name: str) -> None:
    """Data N(0, 4): the score is -z / v, so a step is linear in z and in the noise, drawn here from the same seed."""
    sampler, calls = build_sampler(name), 0
    assert sampler is not None and build_sampler(sampler) is sampler

    def at(time: float) -> tuple[float, float, float]:
        """``alpha^2``, ``sigma^2`` and the variance of the marginal, at ``gamma = -7 + 12 t``."""
        alpha2, sigma2 = 1 / (1 + math.exp(-7 + 12 * time)), 1 / (1 + math.exp(7 - 12 * time))
        return alpha2, sigma2, 4 * alpha2 + sigma2

    def score(z: Tensor, time: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -z / at(float(time))[2]

    z, draws = torch.randn(5, 2, dtype=torch.float64, generator=seeded(1)), seeded(3)
    s, t = (torch.tensor(time, dtype=torch.float64) for time in (0.5, 0.6))
    found = sampler.step(score, DiffusionSDE(LinearSchedule(-7.0, 5.0)), z, s, t, seeded(3))
    (alpha2_t, sigma2_t, v_t), (alpha2_s, sigma2_s, v_s) = at(0.6), at(0.5)
    beta_t, beta_s, dt = 12 * sigma2_t, 12 * sigma2_s, 0.1
    if name == "probability_flow":
        flow_t, flow_s = 0.5 * beta_t * (1 / v_t - 1), 0.5 * beta_s * (1 / v_s - 1)
        expected = z * (1 - 0.5 * dt * (flow_t + flow_s * (1 - flow_t * dt)))
    elif name == "annealed_langevin":
        expected, size = z * math.sqrt(alpha2_s / alpha2_t), 0.2 * sigma2_s
        for _ in range(4):
            noise = torch.randn(5, 2, dtype=torch.float64, generator=draws)
            expected = expected * (1 - 0.5 * size / v_s) + math.sqrt(size) * noise
    else:
        noise = torch.randn(5, 2, dtype=torch.float64, generator=draws)
        expected = z * (1 + (0.5 - 1 / v_t) * beta_t * dt) + math.sqrt(beta_t * dt) * noise
        if name == "predictor_corrector":
            noise = torch.randn(5, 2, dtype=torch.float64, generator=draws)
            size = 2 * 0.16**2 * sigma2_s
            expected = expected * (1 - size / v_s) + math.sqrt(2 * size) * noise
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert calls == sampler.evaluations


@pytest.mark.parametrize("target", registered.names("parameterizations"))
def test_every_target_gives_the_same_samples(target: str) -> None:
    torch.testing.assert_close(draw(ReverseSDE(), 20, target)[0], draw(ReverseSDE(), 20)[0], rtol=1e-6, atol=1e-6)


def test_a_corrector_repairs_what_a_predictor_left_wrong() -> None:
    """Latents of N(0, 1) data, spread twice as wide as they are, come back to their deviation by Langevin steps."""
    chosen = process("epsilon")
    _, bound = chosen.bind(None, {})
    sampler = PredictorCorrector(corrector_steps=200, ratio=0.3)
    sampler.predictor = Stay()
    z = 2 * torch.randn(2000, 1, dtype=torch.float64, generator=seeded())
    s = t = torch.tensor(0.5, dtype=torch.float64)
    after = sampler.step(lambda z, t: -z, bound.sde, z, s, t, seeded(1))
    # 4.5 standard errors of 2,000 draws, and the step's own bias, at most e = 2 ratio^2 sigma^2 = 0.18.
    assert abs(float(after.std()) - 1) < 4.5 / math.sqrt(4000) + 0.18


class Stay(ReverseSDE):
    def step(self, score: Any, sde: Any, z: Tensor, s: Tensor, t: Tensor, generator: Any) -> Tensor:
        return z


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PredictorCorrector(ratio=1.5), ("ratio", 1.5)),
        (lambda: PredictorCorrector(ratio=math.inf), ("ratio", "inf")),
        (lambda: PredictorCorrector(corrector_steps=1.5), ("corrector_steps", 1.5)),
        (lambda: AnnealedLangevin(steps_per_level=2.5), ("steps_per_level", 2.5)),
    ],
)
def test_steps_that_diverge_are_refused(make: Any, message: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        make()


def test_so_few_evaluations_that_no_step_can_be_taken_are_refused() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ConfigurationError, match=naming("num_inference_steps", 1, "ProbabilityFlowODE", 2)):
        pipe(num_inference_steps=1, sampler="probability_flow")
    for steps in (0, -5):
        with pytest.raises((ConfigurationError, ValueError)):
            pipe(num_inference_steps=steps)


def test_a_wrong_score_is_found() -> None:
    """The test above can fail: a score twice too large narrows the peaks."""
    sampler = ReverseSDE()
    chosen = process()
    _, bound = chosen.bind(None, {})
    network = ExactDenoiser(TWO_PEAKS, chosen)
    z, generator = torch.randn(2000, 1, dtype=torch.float64, generator=seeded()), seeded()
    times = torch.linspace(1, 0, 101, dtype=torch.float64)
    for t, s in pairwise(times):
        z = sampler.step(lambda z, t: 2 * bound.score(network.bare, z, t), bound.sde, z, s, t, generator)
    assert abs(float(z.var()) - VARIANCE) > 0.05


def test_the_flow_maps_the_prior_by_its_quantiles() -> None:
    """In one dimension the probability-flow ODE is monotone: z_0 and z_1 have the same ranks, so the order stays."""
    chosen, steps = process(), 100
    _, bound = chosen.bind(None, {})
    network, z = ExactDenoiser(TWO_PEAKS, chosen), torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[:, None]
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sampler = SAMPLERS["probability_flow"]()
    for t, s in pairwise(times):
        z = sampler.step(lambda z, t: bound.score(network.bare, z, t), bound.sde, z, s, t, None)
    assert bool((z.diff(dim=0) > 0).all())
    # The prior's quantile of 0.3 goes between the peaks, which hold 0.3 and 0.7 of the mass: Phi^-1(0.3) = -0.5244.
    between = z[int((-0.5244 + 2.5) / 0.05)]
    assert -0.45 < float(between) < 0.35


def test_the_reverse_sde_tends_to_ancestral_steps() -> None:
    """One step of each from the same noise: their difference falls with the square of its length."""
    chosen = process()
    _, bound = chosen.bind(None, {})
    network, z = ExactDenoiser(TWO_PEAKS, chosen), torch.randn(500, 1, dtype=torch.float64, generator=seeded(1))
    t = torch.tensor(0.6, dtype=torch.float64)
    apart = []
    for length in (0.02, 0.01, 0.005):
        s = t - length
        ours = ReverseSDE().step(lambda z, t: bound.score(network.bare, z, t), bound.sde, z, s, t, seeded(2))
        output = bound.predict(network.bare, z, t)
        theirs, _ = bound.reverse_step(output, z, s, t, seeded(2))
        # Beside the mean, of second order, the noises' deviations differ, by less than the length times the noise.
        apart.append(float((ours - theirs).abs().mean()))
    assert apart[1] < 0.45 * apart[0]
    assert apart[2] < 0.45 * apart[1]


@pytest.mark.parametrize("name", ["ancestral", *SAMPLERS])
def test_the_pipeline_samples_by_each_and_images_do_not_depend_on_their_batch(name: str) -> None:
    pipe = tiny_pipeline(tiny_unet(fourier_features=()))  # which would make rounding visible
    arguments: dict[str, Any] = {"num_inference_steps": 8, "output_type": "pt", "sampler": name}
    whole = pipe(3, [seeded(i) for i in range(3)], **arguments).images
    alone = pipe(1, [seeded(2)], **arguments).images
    assert whole.shape == (3, 1, 8, 8)
    # A level more or less where rounding decides between two.
    assert float((whole[2:] - alone).abs().max()) < 1.5 / 16


def test_the_pipeline_evaluates_the_network_as_often_as_it_was_told() -> None:
    pipe, calls = tiny_pipeline(), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    pipe.unet.register_forward_hook(count)
    for name in ("ancestral", *SAMPLERS):
        calls = 0
        pipe(1, seeded(), num_inference_steps=12, sampler=name, output_type="pt")
        assert calls == 12, name


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_gamma_per_pixel_gives_the_covariance_of_correlated_data(name: str) -> None:
    """Two pixels noised at different rates: 4.5 standard errors of 4,000 draws, and the bias of 100 steps, 0.03."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    schedule = PerPixelSchedule(-5.0, 5.0, tilt=torch.tensor([1.0, -1.0]), bump=torch.tensor([1.5, -1.5]))
    chosen = registered.process(schedule, conditioning=AffineConditioning.from_schedule(schedule, 1000))
    _, bound = chosen.bind(None, {})
    network, sampler, generator = CorrelatedGaussianDenoiser(covariance, chosen), SAMPLERS[name](), seeded()
    z = torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    times = torch.linspace(1, 0, 101 if name != "annealed_langevin" else 201, dtype=torch.float64)
    for t, s in pairwise(times):
        z = sampler.step(lambda z, t: bound.score(network.bare, z, t), bound.sde, z, s, t, generator)
    alpha, sigma = alpha_sigma(torch.tensor([-4.0, -6.0]))
    expected = alpha[:, None] * covariance * alpha + torch.diag(sigma**2)
    error = torch.sqrt((torch.outer(expected.diag(), expected.diag()) + expected**2) / 4000)
    assert bool(((z.T.cov() - expected).abs() < 4.5 * error + 0.03).all())
    assert bool((z.mean(0).abs() < 4.5 * (expected.diag() / 4000).sqrt()).all())


@pytest.mark.parametrize("kind", ["pixelwise", "contextual"])
def test_a_pipeline_with_a_gamma_per_pixel_samples_by_each(
    kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedules of a plugin that is installed as pip would: the same for all data, and of a latent drawn once."""
    monkeypatch.syspath_prepend(write_pixelwise(tmp_path))
    schedule = {"name": kind, "config": {"size": 8, "gamma_min": -7.65, "gamma_max": 5.5}, "package": "fakes"}
    pipe = tiny_pipeline(tiny_unet(fourier_features=()), noise_schedule=schedule)
    inputs = Inputs(pipe.unet)
    for name in ("ancestral", *SAMPLERS):
        inputs.timesteps.clear()
        images = pipe(2, seeded(), num_inference_steps=12, sampler=name, output_type="pt").images
        assert bool(images.isfinite().all()) and float(images.std()) > 0.05
        told = torch.cat([timestep.flatten() for timestep in inputs.timesteps])
        assert told.dtype == torch.float32 and float(told.min()) < 300
        if name != "annealed_langevin":  # which begins a level lower
            assert float(told.max()) == pytest.approx(999, abs=0.01), "timesteps span the schedule's own endpoints"


def test_the_command_takes_a_sampler(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    words = ["sample", str(tmp_path / "pipe"), "--num_images", "2", "--num_inference_steps", "4"]
    assert main([*words, "--sampler", "predictor_corrector", "--output", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").exists()


def test_what_is_out_of_range_or_unknown_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=naming("'langevin'", "annealed_langevin")):
        build_sampler("langevin")
    with pytest.raises(ConfigurationError, match=naming("corrector_steps", 0, "ratio", 0.16)):
        PredictorCorrector(0)
    with pytest.raises(ConfigurationError, match=naming("steps_per_level", 1, "step_size", 5)):
        AnnealedLangevin(1, 5)
    pipe = tiny_pipeline()
    from diffusers import DDIMScheduler

    pipe.scheduler = pipe.scheduler.to_diffusers(DDIMScheduler)
    with pytest.raises(ConfigurationError, match=naming("ReverseSDE", "VDMScheduler")):
        pipe(1, num_inference_steps=4, sampler="reverse_sde")
