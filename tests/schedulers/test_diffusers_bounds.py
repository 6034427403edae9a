"""The bound of DDPM checkpoints: that of Ho et al. draw by draw, under any variance, clipped or not."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from ddpm import BETAS, K, T, digits_levels, ho_et_al, new_network, trained_ddpm, transitions_summed, with_variance
from naming import naming
from tiny import quiet, seeded
from vdm_hub import VariationalBound, VDMPipeline
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.methods import LikelihoodMethod, ProbabilityFlow
from vdm_hub.likelihood.report import LikelihoodReport


@pytest.fixture(scope="session")
def trained() -> DDPMPipeline:
    return trained_ddpm()


@pytest.fixture(scope="session")
def levels() -> Tensor:
    return digits_levels()


@pytest.fixture
def taken_over(trained: DDPMPipeline) -> VDMPipeline:
    return quiet(VDMPipeline.from_diffusers(trained, num_levels=K))


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range", "learned"])
def test_the_bound_is_that_of_ho_et_al_draw_by_draw(
    variance: str, clipped: bool, trained: DDPMPipeline, levels: Tensor
) -> None:
    stock = with_variance(trained, variance)
    pipe = VDMPipeline.from_diffusers(stock, num_levels=K)
    objective = pipe.clipped_objective(T - 1) if clipped else pipe.objective(T - 1)
    assert objective is not None
    noise = objective.draw_noise({"levels": levels}, seeded(5))
    ours = transitions_summed(objective, levels, noise)
    draws = noise["marginal"], noise["reconstruction"]
    theirs = ho_et_al(stock.unet, stock.scheduler.betas, levels, *draws, variance=variance, clipped=clipped)
    for name, term in theirs.items():
        torch.testing.assert_close(
            ours[name], term, rtol=2e-4, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_kinds_of_variance_and_clipping_are_models_of_their_own(trained: DDPMPipeline, levels: Tensor) -> None:
    found = set()
    for variance in ("fixed_small", "fixed_large", "learned_range", "learned"):
        pipe = VDMPipeline.from_diffusers(with_variance(trained, variance), num_levels=K)
        report = pipe.bits_per_dim(levels[:8], VariationalBound(T - 1), replicates=2)
        found |= {report.bits_per_dim, report.details["clipped"]["bits_per_dim"]}
        assert ("own variance" in str(report)) is (variance != "fixed_small")
    assert len(found) == 8
    with pytest.raises(ConfigurationError, match=naming("transitions")):
        pipe.bits_per_dim(levels[:8], replicates=2)


def test_one_network_has_one_bound_whatever_stock_scheduler_is_beside_it(
    trained: DDPMPipeline, levels: Tensor
) -> None:
    expected = VDMPipeline.from_diffusers(trained, num_levels=K).bits_per_dim(
        levels, VariationalBound(T - 1), replicates=2
    )
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"):
        check_scheduler(getattr(diffusers, name).from_config(trained.scheduler.config), trained, expected, levels)
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"):
        check_scheduler(getattr(diffusers, name)(**BETAS), trained, expected, levels)
    learned = with_variance(trained, "learned_range")
    solver = diffusers.DPMSolverMultistepScheduler(**BETAS, variance_type="learned_range")
    one, two = (
        VDMPipeline.from_diffusers(DDPMPipeline(learned.unet, scheduler), num_levels=K)
        for scheduler in (learned.scheduler, solver)
    )
    reports = [pipe.bits_per_dim(levels[:8], VariationalBound(T - 1), replicates=2) for pipe in (one, two)]
    assert torch.equal(reports[0].per_image, reports[1].per_image)


def check_scheduler(scheduler: Any, trained: DDPMPipeline, expected: LikelihoodReport, levels: Tensor) -> None:
    pipe = VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler), num_levels=K)
    report = pipe.bits_per_dim(levels, VariationalBound(T - 1), replicates=2)
    assert torch.equal(report.per_image, expected.per_image), type(scheduler).__name__


@pytest.mark.parametrize("target", ["v_prediction", "sample"])
def test_a_last_snr_of_zero_has_the_bound_of_the_data_form(target: str, trained: DDPMPipeline, levels: Tensor) -> None:
    """``1/2 (SNR_s - SNR_t) |x - x_hat|^2`` is finite at an SNR of zero, where z_T is noise and nothing else."""
    changes = {"rescale_betas_zero_snr": True, "clip_sample": False, "prediction_type": target}
    stock = with_variance(trained, "fixed_small", **changes)
    bar = stock.scheduler.alphas_cumprod.double()
    bar = torch.where(bar < 1e-6, 0.0, bar)
    assert bar[-1] == 0
    objective = VDMPipeline.from_diffusers(stock, num_levels=K).objective(T - 1)
    noise = objective.draw_noise({"levels": levels}, seeded(5))
    x, eps = 2 * levels.double() / (K - 1) - 1, noise["marginal"].double()
    snr, expected = bar / (1 - bar), torch.zeros(len(levels), dtype=torch.float64)
    for t in range(1, T):
        z = bar[t].sqrt() * x + (1 - bar[t]).sqrt() * eps
        with torch.no_grad():
            output = stock.unet(z.float(), torch.full((len(z),), t)).sample.double()
        x_hat = output if target == "sample" else bar[t].sqrt() * z - (1 - bar[t]).sqrt() * output
        expected += 0.5 * (snr[t - 1] - snr[t]) * ((x - x_hat) ** 2).flatten(1).sum(1)
    ours = transitions_summed(objective, levels, noise)["diffusion"]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_what_is_reported_estimates_the_bound_of_ho_et_al(
    taken_over: VDMPipeline, trained: DDPMPipeline, levels: Tensor
) -> None:
    report = taken_over.bits_per_dim(levels, VariationalBound(T - 1), replicates=20)
    generator, draws = seeded(6), []
    for _ in range(5):
        eps, eps_1 = (torch.randn(levels.shape, generator=generator) for _ in range(2))
        terms = ho_et_al(trained.unet, trained.scheduler.betas, levels, eps, eps_1)
        draws.append(sum(term.mean() for term in terms.values()) / (64 * math.log(2)))
    exact = torch.stack(draws)  # type: ignore[arg-type]
    error = math.hypot(report.standard_error, float(exact.std()) / math.sqrt(len(exact)))
    assert error < 0.15 * report.bits_per_dim
    assert abs(report.bits_per_dim - float(exact.mean())) < 4 * error


def test_training_improved_it(taken_over: VDMPipeline, trained: DDPMPipeline, levels: Tensor) -> None:
    before = VDMPipeline.from_diffusers(DDPMPipeline(new_network().eval(), trained.scheduler), num_levels=K)
    untrained, measured = (
        pipe.bits_per_dim(levels, VariationalBound(T - 1), replicates=4) for pipe in (before, taken_over)
    )
    assert measured.bits_per_dim < 0.5 * untrained.bits_per_dim
    assert measured.terms["prior"] == untrained.terms["prior"]


def test_what_the_sampler_adds_is_noted_and_changes_no_bound(trained: DDPMPipeline, levels: Tensor) -> None:
    def taken(**changes: Any) -> VDMPipeline:
        scheduler = DDPMScheduler.from_config(trained.scheduler.config, **changes)
        return VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler), num_levels=K)

    plain = taken(clip_sample=False).bits_per_dim(levels, replicates=8)
    assert "notes" not in plain.to_dict() and "note" not in str(plain)
    for changes, words in (
        ({"clip_sample": True}, "clips its estimates (clip_sample=True); the bound is that of the model unclipped"),
        ({"clip_sample": False, "thresholding": True}, "(thresholding=True)"),
        ({"clip_sample": False, "variance_type": "fixed_large"}, "in continuous time the bound is the same for both"),
    ):
        report = taken(**changes).bits_per_dim(levels, replicates=8)
        assert torch.equal(report.per_image, plain.per_image)
        (note,) = report.to_dict()["notes"]
        assert words in note and f"note: {note}" in str(report)
        assert ("clipped" in report.details) is ("clips" in note), "another model, in continuous time as well"


def test_where_the_sampler_clips_both_models_are_named_and_reported(trained: DDPMPipeline, levels: Tensor) -> None:
    for changes in ({"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True}):
        pipe = VDMPipeline.from_diffusers(with_variance(trained, "fixed_small", **changes), num_levels=K)
        report = pipe.bits_per_dim(levels, VariationalBound(T - 1), replicates=3)
        clipped = report.to_dict()["clipped"]
        assert clipped["bits_per_dim"] != report.bits_per_dim
        assert clipped["bits_per_dim"] == pytest.approx(sum(clipped["terms"].values()))
        assert clipped["terms"]["prior"] == report.terms["prior"], "only what estimates the data differs"
        shown = str(report)
        assert f"{clipped['bits_per_dim']:.4f}" in shown and f"{report.bits_per_dim:.4f}" in shown
        assert "model unclipped" in shown and "clipped as the sampler does" in shown
    half = clipped_bits(trained, levels, 0.5)
    assert half > clipped_bits(trained, levels, 1.0), "digits are black and white: half of their range can't hold them"


@pytest.mark.parametrize(
    "method",
    [VariationalBound(), pytest.param(ProbabilityFlow(tolerance=1e-3), marks=pytest.mark.slow)],
    ids=["bound", "ode"],
)
def test_the_clipped_model_is_measured_in_continuous_time_too(
    trained: DDPMPipeline, levels: Tensor, method: LikelihoodMethod
) -> None:
    """Clipping to more than the network ever says changes nothing; to half of the data's range it costs bits."""
    found = {}
    for most in (1e6, 0.5):
        stock = with_variance(trained, "fixed_small", clip_sample=True, clip_sample_range=most)
        pipe = VDMPipeline.from_diffusers(stock, num_levels=K)
        found[most] = pipe.bits_per_dim(levels[:2], method, replicates=2)
    report, half = found[1e6], found[0.5]
    assert report.details["clipped"]["bits_per_dim"] == pytest.approx(report.bits_per_dim, rel=1e-4)
    assert half.details["clipped"]["bits_per_dim"] > report.bits_per_dim + 0.1
    assert half.details["clipped"]["network_evaluations"] > 0
    assert half.bits_per_dim == report.bits_per_dim


def test_a_flow_that_clipping_makes_too_hard_costs_no_figure() -> None:
    def fails() -> LikelihoodReport:
        raise ConfigurationError("the probability-flow ODE of image 0 needs more than 3 steps")

    term = {"base_density": torch.ones(1, 1)}
    report = LikelihoodReport(term, None, 1, is_bound=False, method="ode").with_clipped(fails)
    assert "clipped" not in report.details
    assert report.details["notes"] == [
        "the clipped model could not be measured: the probability-flow ODE of image 0 needs more than 3 steps"
    ]
    with pytest.raises(ConfigurationError):  # a bound has no solver that could fail: something else is wrong
        LikelihoodReport(term, None, 1).with_clipped(fails)


def test_a_chain_that_is_not_the_checkpoints_is_named(trained: DDPMPipeline, levels: Tensor) -> None:
    pipe = VDMPipeline.from_diffusers(with_variance(trained, "fixed_small", clip_sample=False), num_levels=K)
    own, words = T - 1, "transitions are not the checkpoint's own chain"
    for transitions in (own, None, T, 2 * own, 3):
        notes = " ".join(
            pipe.bits_per_dim(levels[:2], VariationalBound(transitions), replicates=1).details.get("notes", [])
        )
        assert (f"{transitions} {words}, which has {own}" in notes) is (transitions not in (own, None))
        assert ("interpolated" in notes) is (transitions is not None and own % transitions != 0)


def clipped_bits(trained: DDPMPipeline, levels: Tensor, most: float) -> float:
    stock = with_variance(trained, "fixed_small", clip_sample=True, clip_sample_range=most)
    report = VDMPipeline.from_diffusers(stock, num_levels=K).bits_per_dim(
        levels, VariationalBound(T - 1), replicates=3
    )
    return float(report.details["clipped"]["bits_per_dim"])


def test_a_last_snr_of_zero_is_measured_for_a_target_that_knows_the_data(
    trained: DDPMPipeline, levels: Tensor
) -> None:
    betas = {"rescale_betas_zero_snr": True, "clip_sample": False}
    for target in ("v_prediction", "sample"):
        scheduler = DDPMScheduler.from_config(trained.scheduler.config, prediction_type=target, **betas)
        pipe = VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler), num_levels=K)
        report = pipe.bits_per_dim(levels, replicates=2)
        assert math.isfinite(report.bits_per_dim) and report.terms["prior"] < 1e-6
        assert "alpha_bar = 2^-24" in report.to_dict()["notes"][0]
    with pytest.raises(ConfigurationError, match=naming("v_prediction", "sample")):
        scheduler = DDPMScheduler.from_config(trained.scheduler.config, **betas)
        VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler))
    with pytest.raises(ConfigurationError, match="SNR of zero"):
        scheduler = DDPMScheduler(trained_betas=[0.1, 0.5, 1.0], num_train_timesteps=3)
        VDMPipeline.from_diffusers(DDPMPipeline(trained.unet, scheduler))
