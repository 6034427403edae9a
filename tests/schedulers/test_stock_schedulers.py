"""diffusers' configs in, bitwise the same DDPM; stock samplers out, the same process within their listed errors."""

from __future__ import annotations

import inspect
import json
import logging
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from distributions import write_pixelwise
from naming import naming
from schedulers import sampler_table
from vdm_hub import VDMScheduler
from vdm_hub.errors import ConfigurationError
from vdm_hub.schedulers.configs import SHOWN_SAMPLERS

DDPM_CONFIGS: dict[str, dict[str, Any]] = {
    "default, clipped": {},
    "sample, not clipped, fixed_large": {
        "prediction_type": "sample",
        "clip_sample": False,
        "variance_type": "fixed_large",
    },
    "cosine, thresholding": {
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
    },
    "v, zero terminal SNR, trailing": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample_range": 0.7,
    },
    "scaled linear, linspace": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "timestep_spacing": "linspace",
        "clip_sample": False,
    },
    "trained betas, offset": {
        "trained_betas": torch.linspace(2e-4, 0.03, 800).tolist(),
        "num_train_timesteps": 800,
        "steps_offset": 1,
        "variance_type": "fixed_small_log",
    },
}

REFUSED_TOGETHER: list[dict[str, Any]] = [
    {"use_karras_sigmas": True, "use_exponential_sigmas": True},
    # Of DPMSolverMultistepScheduler, whose last step has then no length, by which a formula of higher order divides.
    *(
        {spaced: True} | higher
        for spaced in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
        for higher in ({"solver_order": 3}, {"solver_type": "heun"})
    ),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fake_network(z: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * z) * (0.5 + float(t) / 2000) - 0.2 * z.roll(1, -1)


def chain(scheduler: Any, steps: int) -> list[Tensor]:
    """All samples and all estimates of the data, of every step."""
    generator = seeded(1)
    scheduler.set_timesteps(steps)
    z, trace = torch.randn(2, 3, 8, 8, generator=generator), []
    for t in scheduler.timesteps:
        output = scheduler.step(fake_network(z, t), t, z, generator=generator)
        z = output.prev_sample
        trace += [z, output.pred_original_sample]
    return trace


@pytest.mark.parametrize("way", ["code", "json"])
@pytest.mark.parametrize("steps", [50, 500])
@pytest.mark.parametrize("name", DDPM_CONFIGS)
def test_a_ddpm_config_gives_bitwise_ddpm(name: str, steps: int, way: str, tmp_path: Path) -> None:
    stock = DDPMScheduler(**DDPM_CONFIGS[name])
    stock.save_config(tmp_path)
    ours = VDMScheduler.from_config(stock.config) if way == "code" else VDMScheduler.from_pretrained(tmp_path)
    assert ours.ends_at_data and ours.config.noise_schedule == "discrete_betas"
    assert torch.equal(ours.betas, stock.betas) and torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)
    traces = chain(stock, steps), chain(ours, steps)
    assert torch.equal(ours.timesteps, stock.timesteps) and ours.timesteps.dtype == stock.timesteps.dtype
    assert bool(traces[0][-1].isfinite().all())
    assert all(torch.equal(theirs, own) for theirs, own in zip(*traces, strict=True))


def test_the_schedule_behind_a_zero_terminal_snr_config_is_finite_and_increases() -> None:
    ours = VDMScheduler.from_config(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config)
    gammas = ours.process.schedule.gammas
    assert bool(gammas.isfinite().all()) and float(gammas.diff().min()) > 0
    bar = ours.alphas_cumprod[:-1].double()
    torch.testing.assert_close(torch.sigmoid(-gammas[:-1]), bar, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "stock",
    [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler],
)
def test_any_config_of_the_family_gives_the_ddpm_of_its_betas_and_grid(stock: type, tmp_path: Path) -> None:
    theirs = stock(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.015, prediction_type="v_prediction")
    theirs.save_config(tmp_path)
    spacing = theirs.config.timestep_spacing
    clips = getattr(theirs.config, "clip_sample", False)  # DDPM's own default must not clip where theirs does not
    ddpm = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.001,
        beta_end=0.015,
        prediction_type="v_prediction",
        timestep_spacing=spacing,
        clip_sample=clips,
    )
    expected = chain(ddpm, 25)
    for ours in (VDMScheduler.from_config(theirs.config), VDMScheduler.from_pretrained(tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(expected, chain(ours, 25), strict=True))


def test_a_key_that_an_old_file_lacks_has_its_own_classs_default() -> None:
    """As the published DDPM of CIFAR-10: written before clip_sample_range, timestep_spacing and others existed."""
    old = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    traces = chain(DDPMScheduler(), 20), chain(VDMScheduler.from_config(old), 20)
    assert all(torch.equal(a, b) for a, b in zip(*traces, strict=True))


def test_ddpm_with_the_score_as_target_is_ddpm_with_the_noise_as_target() -> None:
    config = DDPMScheduler(clip_sample=False).config
    by_noise = VDMScheduler.from_config(config)
    by_score = VDMScheduler.from_config(config, prediction_type="score")
    for scheduler in (by_noise, by_score):
        scheduler.set_timesteps(10)
    z, eps = torch.randn(2, 1, 4, 4, generator=seeded()), torch.randn(2, 1, 4, 4, generator=seeded(1))
    for t in by_noise.timesteps:
        score = -eps / (1 - by_noise.alphas_cumprod[t]).sqrt()
        one, two = by_noise.step(eps, t, z, seeded(2)), by_score.step(score, t, z, seeded(2))
        torch.testing.assert_close(one.prev_sample, two.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.pred_original_sample, two.pred_original_sample, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_process_of_another_family_asks_for_what_its_config_does_not_say(name: str, tmp_path: Path) -> None:
    other = getattr(diffusers, name)()
    other.save_config(tmp_path)
    with pytest.raises(ConfigurationError, match=naming(name, "num_levels")):
        VDMScheduler.from_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=naming("num_levels", "data_scaling", "decoder")):
        VDMScheduler.from_config(other.config)
    said = {"num_levels": 17, "data_scaling": "full", "decoder": "factorised"}
    from_file, from_code = (
        VDMScheduler.from_pretrained(tmp_path, **said),
        VDMScheduler.from_config(other.config, **said),
    )
    assert dict(from_file.config) == dict(from_code.config)


def test_a_process_that_is_neither_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="neither"):
        VDMScheduler.from_config(diffusers.CMStochasticIterativeScheduler().config)


# ---- to stock samplers ----------------------------------------------------------------------------------------------

STOCK = [
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    HeunDiscreteScheduler,
    EulerDiscreteScheduler,
]


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", [pytest.param("linear", marks=pytest.mark.slow), "cosine", "learned_monotone"])
@pytest.mark.parametrize("stock", STOCK)
def test_a_stock_sampler_of_the_config_runs_the_same_process(stock: Any, schedule: str, target: str) -> None:
    ours = VDMScheduler(noise_schedule=schedule, prediction_type=target)
    samplers = [
        ours.to_diffusers(stock),
        stock.from_config(ours.config),
        stock.from_config(json.loads(ours.to_json_string())),
    ]
    bar = torch.sigmoid(-ours.process.conditioning.inverse(torch.arange(1000, dtype=torch.float64)))
    for sampler in samplers:
        torch.testing.assert_close(sampler.alphas_cumprod.double(), bar, rtol=0, atol=1e-7)
        assert sampler.config.prediction_type == target and sampler.config.timestep_spacing == "trailing"
        assert not getattr(sampler.config, "clip_sample", False)
        assert not getattr(sampler.config, "thresholding", False)
        assert VDMScheduler.from_config(sampler.config).config.noise_schedule == ours.config.noise_schedule
        assert len(stock.from_config(sampler.config, num_train_timesteps=500).alphas_cumprod) == 1000


def test_a_beta_table_goes_out_as_it_came_in() -> None:
    betas = torch.linspace(2e-4, 0.03, 300).tolist()
    for ours in (
        VDMScheduler(noise_schedule={"name": "discrete_betas", "config": {"betas": betas}}),
        VDMScheduler(trained_betas=betas),
        VDMScheduler.from_config(DDPMScheduler(trained_betas=betas, num_train_timesteps=300).config),
    ):
        assert torch.equal(ours.to_diffusers(DDIMScheduler).betas, torch.tensor(betas))
        assert torch.equal(DDIMScheduler.from_config(json.loads(ours.to_json_string())).betas, torch.tensor(betas))


def test_conversion_warns_of_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    for stock in STOCK:
        VDMScheduler.from_config(VDMScheduler().to_diffusers(stock).config)
        VDMScheduler.from_config(stock().config)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("name", "target"), sampler_table.cases())
def test_every_sampler_that_is_offered_runs_the_process(name: str, target: str) -> None:
    """4.5 standard errors of 1,000 draws where it draws noise, and the bias of 50 steps."""
    ours = VDMScheduler(prediction_type=target)
    sampler = ours.to_diffusers(getattr(diffusers, name))
    mean, deviation = sampler_table.errors(sampler, ours, count=1000)
    assert max(abs(mean), abs(deviation)) < sampler_table.WORST + 4.5 * sampler_table.DEVIATION / math.sqrt(1000)
    bar = torch.sigmoid(-ours.process.conditioning.inverse(torch.arange(1000, dtype=torch.float64)))
    torch.testing.assert_close(sampler.alphas_cumprod.double(), bar, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_is_measured_with_every_option() -> None:
    written = sampler_table.PAGE.read_text().split(sampler_table.BEGIN)[1].split(sampler_table.END)[0]
    measured = sampler_table.table()
    assert written.strip() == measured
    figures = [float(cell) for row in measured.splitlines() for cell in row.split("|") if cell.strip()[:2] == "0."]
    assert len(figures) == 2 * len(sampler_table.cases()) and max(figures) <= sampler_table.WORST


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), sampler_table.cases())
def test_two_options_together_run_the_process_or_are_refused(name: str, target: str) -> None:
    ours, stock = VDMScheduler(prediction_type=target), getattr(diffusers, name)
    for pair in sampler_table.pairs(name):
        try:
            sampler = ours.to_diffusers(stock, **pair)
        except ConfigurationError:
            assert pair in REFUSED_TOGETHER, pair
        else:
            assert max(map(abs, sampler_table.errors(sampler, ours))) <= sampler_table.WORST, pair


@pytest.mark.parametrize("pair", REFUSED_TOGETHER)
def test_two_options_that_do_not_run_together_are_refused(pair: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=naming(DPMSolverMultistepScheduler.__name__)):
        VDMScheduler().to_diffusers(DPMSolverMultistepScheduler, **pair)


def test_the_table_names_every_sampler_target_and_option_that_is_offered() -> None:
    """Quickly: its figures are held against measured ones by the slow test."""
    written = sampler_table.PAGE.read_text()
    assert all(f"| `{name}` | `{target}` |" in written for name, target in sampler_table.cases())
    assert all(row in written for row in sampler_table.offered())


@pytest.mark.parametrize("name", sorted({*sampler_table.of_the_family()} - {*SHOWN_SAMPLERS, "VDMScheduler"}))
def test_a_sampler_that_is_not_shown_to_run_the_process_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        VDMScheduler().to_diffusers(getattr(diffusers, name))


def test_what_no_stock_sampler_can_run_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigurationError, match="score"):
        VDMScheduler(prediction_type="score").to_diffusers(DDIMScheduler)
    for other in (
        diffusers.FlowMatchEulerDiscreteScheduler,
        type("Mine", (DDIMScheduler,), {}),
        "DDIMScheduler",
        None,
    ):
        with pytest.raises(ConfigurationError, match="process"):
            VDMScheduler().to_diffusers(other)
    with pytest.raises(ConfigurationError, match=naming("PNDMScheduler")):
        VDMScheduler(prediction_type="sample").to_diffusers(PNDMScheduler)


@pytest.mark.parametrize(
    ("stock", "options"),
    [
        (DDIMScheduler, {"clip_sample": True}),
        (DDIMScheduler, {"thresholding": True}),
        (DDIMScheduler, {"rescale_betas_zero_snr": True}),
        (DDIMScheduler, {"beta_schedule": "scaled_linear"}),
        (DDIMScheduler, {"prediction_type": "sample"}),
        (DDIMScheduler, {"set_alpha_to_one": 1}),
        (DDPMScheduler, {"variance_type": "learned_range"}),
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}),
        (DPMSolverMultistepScheduler, {"use_beta_sigmas": True}),
        (DPMSolverMultistepScheduler, {"solver_order": 4}),
        (UniPCMultistepScheduler, {"num_train_timesteps": 500}),
        (UniPCMultistepScheduler, {"nonsense": 0}),
        (EulerDiscreteScheduler, {"timestep_spacing": "backwards"}),
    ],
)
def test_an_option_that_changes_the_process_is_refused_by_name(stock: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=naming(stock.__name__, next(iter(options)))):
        VDMScheduler().to_diffusers(stock, **options)


def test_a_gamma_per_pixel_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin's schedule, installed as pip would: a folder that says what it brings."""
    monkeypatch.syspath_prepend(write_pixelwise(tmp_path))
    scheduler = VDMScheduler(noise_schedule={"name": "pixelwise", "config": {"size": 4}, "package": "fakes"})
    assert scheduler.config.trained_betas is None and len(scheduler.betas) == 0
    with pytest.raises(ConfigurationError, match="gamma per pixel"):
        scheduler.to_diffusers(DDIMScheduler)
    with pytest.raises(ConfigurationError, match="timesteps instead"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999.0, 749.25, 499.5, 249.75]


# ---- their errors against the exact flow ----------------------------------------------------------------------------

# HUGGING_FACE's list, at its digits: what a sampler leaves between itself and the exact flow of N(0, 1/4).
LISTED = [
    (DDIMScheduler, 50, 0.0224),
    (DDIMScheduler, 250, 0.00455),
    (DPMSolverMultistepScheduler, 20, 0.0060),
    (DPMSolverMultistepScheduler, 50, 0.00105),
    (UniPCMultistepScheduler, 20, 0.0036),
    (UniPCMultistepScheduler, 50, 0.00026),
    (HeunDiscreteScheduler, 50, 0.0006),
]


@pytest.mark.parametrize(("stock", "steps", "listed"), LISTED)
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_a_stock_sampler_is_as_near_to_the_exact_flow_as_listed(
    stock: Any, steps: int, listed: float, target: str
) -> None:
    """RMSE over the initial noise. The flow of N(0, s^2) is linear: ``z_0 = z_1 deviation(0) / deviation(1)``."""
    variance = 0.25
    ours = VDMScheduler(prediction_type=target)
    sampler = ours.to_diffusers(stock)
    sampler.set_timesteps(steps)
    noise = torch.randn(4000, 1, generator=seeded(), dtype=torch.float64)
    z = noise * sampler.init_noise_sigma
    for t in sampler.timesteps:
        given = sampler.scale_model_input(z, t)
        gamma = ours.process.conditioning.inverse(torch.as_tensor(float(t), dtype=torch.float64))
        alpha, sigma = (1 / (1 + gamma.exp())).sqrt(), (1 / (1 + (-gamma).exp())).sqrt()
        marginal = alpha**2 * variance + sigma**2
        eps, x = sigma * given / marginal, alpha * variance * given / marginal
        output = eps if target == "epsilon" else alpha * eps - sigma * x
        z = sampler.step(output, t, z).prev_sample
    first, last = ((variance + math.exp(g)) / (1 + math.exp(g)) for g in (-13.3, 5.0))
    error = (z - noise * math.sqrt(first / last)).square().mean().sqrt()
    assert float(error) < listed


def test_stock_samplers_step_like_ours_where_both_can() -> None:
    """One DDPM step of the carried table from t = i to i - 1 is our posterior step between the same noise levels."""
    ours = VDMScheduler()
    stock = ours.to_diffusers(DDPMScheduler)
    stock.set_timesteps(1000)
    ours.set_timesteps(timesteps=[700.0, 699.0])
    z, eps = torch.randn(2, 1, 4, 4, generator=seeded()), torch.randn(2, 1, 4, 4, generator=seeded(1))
    theirs = stock.step(eps, 700, z, generator=seeded(2)).prev_sample
    torch.testing.assert_close(ours.step(eps, 700.0, z, generator=seeded(2)).prev_sample, theirs, rtol=1e-4, atol=1e-4)


def test_our_constructor_reads_every_key_of_ddpm() -> None:
    theirs = set(inspect.signature(DDPMScheduler.__init__).parameters)
    assert theirs <= set(inspect.signature(VDMScheduler.__init__).parameters)
