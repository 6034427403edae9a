"""`VDMScheduler` as diffusers' contract and law 3 ask; its configs from and to stock schedulers: tests/scheduler."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor

import registered
from naming import naming
from vdm_hub import VDMScheduler, registry
from vdm_hub.diffusion.draws import normal_noise
from vdm_hub.errors import ConfigurationError
from vdm_hub.schedulers.vdm import VDMSchedulerOutput
from vdm_hub.testing.installed import example_config

SCHEDULES = registered.names("noise_schedules")
TARGETS = registered.names("parameterizations")
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_target = pytest.mark.parametrize("target", TARGETS)


def build(schedule: str = "linear", **arguments: Any) -> VDMScheduler:
    """A scheduler of a registered schedule whose chain ends at z_0."""
    required = example_config(registry.lookup("noise_schedules", schedule))
    arguments = {"final_sigmas_type": "sigma_min"} | arguments
    return VDMScheduler(noise_schedule={"name": schedule, "config": required}, **arguments)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def alpha_bar(scheduler: VDMScheduler, t: float) -> tuple[Tensor, Tensor]:
    """``(abar, 1 - abar)`` at time t, float64, from gamma by the textbook's formula."""
    schedule: Any = scheduler.process.schedule
    with torch.no_grad():
        gamma = schedule(torch.tensor(t, dtype=torch.float64))
    return 1 / (1 + gamma.exp()), 1 / (1 + (-gamma).exp())


def targets(z: Tensor, x: Tensor, bar: Tensor, rest: Tensor) -> dict[str, Tensor]:
    """What a network that believes in x would answer, in each target's own words (Luo section 4)."""
    eps = (z - bar.sqrt() * x) / rest.sqrt()
    velocity = bar.sqrt() * eps - rest.sqrt() * x
    s, sd = (rest / bar).sqrt(), 0.5
    edm = (x - sd**2 / (s**2 + sd**2) * z / bar.sqrt()) * (s**2 + sd**2).sqrt() / (s * sd)
    ours = {"sample": x, "epsilon": eps, "score": -eps / rest.sqrt(), "v_prediction": velocity}
    return ours | {"flow_prediction": eps - x, "edm": edm, "ve_score": -eps / s}


# ---- the grid -------------------------------------------------------------------------------------------------------


def test_the_default_is_a_thousand_steps_of_linear_log_snr() -> None:
    scheduler = VDMScheduler()
    config = scheduler.config
    assert (config.num_train_timesteps, config.noise_schedule, config.prediction_type) == (1000, "linear", "epsilon")
    assert not config.clip_sample and config.final_sigmas_type == "sigma_min"
    assert scheduler.process.schedule.endpoints() == (-13.3, 5.0)
    assert len(scheduler) == 1000 and scheduler.init_noise_sigma == 1.0 and scheduler.order == 1
    assert len(scheduler.timesteps) == 1000 and scheduler.num_inference_steps is None


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000, 4000])
def test_n_steps_are_n_evaluations_at_999_times_1_minus_k_over_n(steps: int) -> None:
    scheduler = VDMScheduler()
    scheduler.set_timesteps(steps)
    expected = 999 * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == steps
    assert scheduler.timesteps.dtype == torch.float32
    torch.testing.assert_close(scheduler.timesteps.double(), expected, rtol=1e-6, atol=1e-4)


@every_schedule
def test_timesteps_are_tau_of_gamma_and_invert(schedule: str) -> None:
    scheduler = build(schedule)
    scheduler.set_timesteps(13)
    process: Any = scheduler.process
    times = torch.tensor(scheduler.times[:-1], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(scheduler.timesteps, process.conditioning(process.schedule(times)).float())
    torch.testing.assert_close(process.time(scheduler.timesteps), times, rtol=0, atol=1e-5)
    assert float(scheduler.timesteps.max()) <= 999 + 1e-3 and float(scheduler.timesteps.min()) >= 0


def test_custom_timesteps_and_sigmas_are_the_same_grid() -> None:
    by_timesteps, by_sigmas = VDMScheduler(), VDMScheduler()
    by_timesteps.set_timesteps(timesteps=[999.0, 640.5, 12.25])
    gammas = torch.tensor(by_timesteps.timesteps.tolist(), dtype=torch.float64) / 999 * 18.3 - 13.3
    by_sigmas.set_timesteps(sigmas=[*torch.exp(gammas / 2).tolist(), 0.0])  # stock lists end with a zero
    assert by_timesteps.timesteps.tolist() == [999.0, 640.5, 12.25]
    torch.testing.assert_close(by_sigmas.timesteps, by_timesteps.timesteps)
    assert by_sigmas.times == pytest.approx(by_timesteps.times)
    assert by_sigmas.num_inference_steps == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ("num_inference_steps", "timesteps", "sigmas")),
        ({"num_inference_steps": 3, "timesteps": [3.0]}, ("num_inference_steps", "timesteps", "sigmas")),
        ({"num_inference_steps": 0}, ("num_inference_steps", 0)),
        ({"timesteps": [10.0, 20.0]}, ("descending",)),
        ({"timesteps": []}, ("timesteps",)),
        ({"timesteps": [1500.0, 3.0]}, (0, 999, 1500)),
        ({"sigmas": [1.0, 1.0]}, ("descending",)),
    ],
)
def test_a_grid_that_is_none_is_refused(arguments: dict[str, Any], words: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*words)):
        VDMScheduler().set_timesteps(**arguments)


# ---- law 3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "target"), registered.crossed("noise_schedules", "parameterizations"))
@pytest.mark.parametrize("steps", [1, 10, 250])
def test_law_3_step_draws_from_luos_posterior(schedule: str, target: str, steps: int) -> None:
    """Luo eq. 84 in alpha-bar: the draw must be its mean plus its deviation times the generator's own normal."""
    scheduler = build(schedule, prediction_type=target)
    scheduler.set_timesteps(steps)
    for index in {0, steps // 2, steps - 1}:
        z, x = draw(2, 3, 4, 4, seed=index).double(), draw(2, 3, 4, 4, seed=99).double().clamp(-1, 1)
        bar_t, rest_t = alpha_bar(scheduler, 1 - index / steps)
        bar_s, rest_s = alpha_bar(scheduler, 1 - (index + 1) / steps)
        z = bar_t.sqrt() * x + rest_t.sqrt() * z
        output = targets(z, x, bar_t, rest_t)[target]
        stepped = scheduler.step(output, scheduler.timesteps[index], z, generator=seeded(5))
        a, one_minus_a = bar_t / bar_s, (rest_t - rest_s) / bar_s  # 1 - a, without cancelling in abar near 1
        mean = (a.sqrt() * rest_s * z + bar_s.sqrt() * one_minus_a * x) / rest_t
        variance = one_minus_a * rest_s / rest_t
        eps = normal_noise(z.shape, seeded(5), z.device, z.dtype)
        torch.testing.assert_close(stepped.prev_sample, mean + variance.sqrt() * eps, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(stepped.pred_original_sample, x, rtol=1e-7, atol=1e-7)


def test_law_3_many_draws_have_the_posteriors_mean_and_variance() -> None:
    scheduler = VDMScheduler(prediction_type="sample")
    scheduler.set_timesteps(4)
    z, x = torch.full((200_000, 1), 0.7), torch.full((200_000, 1), -0.4)
    drawn = scheduler.step(x, scheduler.timesteps[2], z, generator=seeded()).prev_sample.double()
    (bar_t, rest_t), (bar_s, rest_s) = alpha_bar(scheduler, 0.5), alpha_bar(scheduler, 0.25)
    a = bar_t / bar_s
    mean = float((a.sqrt() * rest_s * 0.7 - bar_s.sqrt() * (1 - a) * 0.4) / rest_t)
    variance = float((1 - a) * rest_s / rest_t)
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * (variance / 200_000) ** 0.5)
    assert float(drawn.var()) == pytest.approx(variance, rel=5 * (2 / 200_000) ** 0.5)


@every_target
def test_the_last_step_adds_noise_too_and_ends_at_z_0(target: str) -> None:
    scheduler = VDMScheduler(prediction_type=target)
    scheduler.set_timesteps(5)
    z, output = draw(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    one, two = (scheduler.step(output, scheduler.timesteps[-1], z, generator=seeded(s)).prev_sample for s in (0, 1))
    bar_0, rest_0 = alpha_bar(scheduler, 0.0)
    (bar_t, rest_t), eps = alpha_bar(scheduler, 0.2), draw(1, 1, 4, 4, seed=0) - draw(1, 1, 4, 4, seed=1)
    deviation = float(((1 - bar_t / bar_0) * rest_0 / rest_t).sqrt())
    torch.testing.assert_close(one - two, deviation * eps, rtol=1e-3, atol=1e-6)
    assert not scheduler.ends_at_data


# ---- diffusers' contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vdm", "ddpm"])
def test_steps_are_stateless_and_callable_out_of_order(family: str) -> None:
    scheduler = VDMScheduler() if family == "vdm" else VDMScheduler(noise_schedule="discrete_betas")
    scheduler.set_timesteps(10)
    z, output = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)

    def step(index: int) -> Tensor:
        stepped: Tensor = scheduler.step(output, scheduler.timesteps[index], z, generator=seeded(index)).prev_sample
        return stepped

    forward = [step(i) for i in range(10)]
    assert all(torch.equal(step(i), forward[i]) for i in (7, 0, 9, 3, 3))


def test_a_timestep_between_grid_points_steps_to_the_next_grid_point() -> None:
    scheduler, finer = VDMScheduler(), VDMScheduler()
    scheduler.set_timesteps(4)
    finer.set_timesteps(timesteps=[999.0, 600.0, 499.5, 249.75])
    z, output = draw(1, 1, 4, 4), draw(1, 1, 4, 4, seed=1)
    between = scheduler.step(output, 600.0, z, generator=seeded())[0]
    torch.testing.assert_close(between, finer.step(output, 600.0, z, generator=seeded())[0])


@pytest.mark.parametrize("family", ["vdm", "ddpm"])
def test_a_list_of_generators_makes_each_datum_independent_of_its_batch(family: str) -> None:
    scheduler = VDMScheduler() if family == "vdm" else VDMScheduler(noise_schedule="discrete_betas")
    scheduler.set_timesteps(10)
    z, output, t = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1), scheduler.timesteps[2]
    batch = scheduler.step(output, t, z, generator=[seeded(s) for s in (4, 5, 6)]).prev_sample
    alone = scheduler.step(output[1:2], t, z[1:2], generator=[seeded(5)]).prev_sample
    assert torch.equal(batch[1:2], alone)
    if family == "vdm":
        with pytest.raises(ValueError, match="3"):
            scheduler.step(output, t, z, generator=[seeded(0), seeded(1)])


@pytest.mark.parametrize("family", ["vdm", "ddpm"])
def test_the_tuple_has_the_order_of_the_fields(family: str) -> None:
    scheduler = VDMScheduler() if family == "vdm" else VDMScheduler(noise_schedule="discrete_betas")
    scheduler.set_timesteps(3)
    z = draw(1, 1, 4, 4)
    output = scheduler.step(z, scheduler.timesteps[1], z, generator=seeded())
    plain = scheduler.step(z, scheduler.timesteps[1], z, generator=seeded(), return_dict=False)
    assert isinstance(output, VDMSchedulerOutput) and isinstance(plain, tuple) and len(plain) == 2
    names = [field.name for field in fields(VDMSchedulerOutput)]
    assert names == ["prev_sample", "pred_original_sample", "log_prob"] and output.log_prob is None
    assert all(torch.equal(output[name], value) for name, value in zip(names, plain, strict=False))


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_add_noise_and_velocity_are_their_formulas(schedule: str, dtype: torch.dtype) -> None:
    scheduler = build(schedule)
    x, eps = draw(3, 2, 4, 4).to(dtype), draw(3, 2, 4, 4, seed=1).to(dtype)
    timesteps = torch.tensor([0.0, 321.5, 999.0])
    process: Any = scheduler.process
    gamma = process.conditioning.inverse(timesteps.double()).reshape(-1, 1, 1, 1)
    alpha, sigma = (1 / (1 + gamma.exp())).sqrt(), (1 / (1 + (-gamma).exp())).sqrt()
    noised, velocity = (f(x, eps, timesteps) for f in (scheduler.add_noise, scheduler.get_velocity))
    assert noised.dtype == velocity.dtype == dtype
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-4, torch.float64: 2e-4}[dtype]
    torch.testing.assert_close(noised.double(), alpha * x + sigma * eps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(velocity.double(), alpha * eps - sigma * x, rtol=tolerance, atol=tolerance)


def test_add_noise_takes_one_timestep_for_a_whole_batch_and_integers() -> None:
    scheduler, x, eps = VDMScheduler(), draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    one, all_alike = (scheduler.add_noise(x, eps, torch.tensor(t)) for t in ([500], [500.0, 500.0, 500.0]))
    torch.testing.assert_close(one, all_alike)


def test_the_sample_is_the_models_input() -> None:
    z = draw(1, 1, 2, 2)
    assert VDMScheduler().scale_model_input(z, 3) is z and VDMScheduler().scale_model_input(z) is z


def test_what_diffusers_looks_for_is_there() -> None:
    parameters = inspect.signature(VDMScheduler.__init__).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "trained_betas" in parameters
    assert "__getattr__" not in vars(VDMScheduler)
    assert len(VDMScheduler().betas) == len(VDMScheduler().alphas_cumprod) == 1000
    assert {cls.__name__ for cls in VDMScheduler().compatibles} >= {"DDPMScheduler", "UniPCMultistepScheduler"}


@every_schedule
@every_target
def test_a_config_survives_json(schedule: str, target: str, tmp_path: Path) -> None:
    scheduler = build(schedule, prediction_type=target, num_levels=17)
    scheduler.save_config(tmp_path)
    loaded = VDMScheduler.from_pretrained(tmp_path)
    assert json.loads(scheduler.to_json_string()) == json.loads(loaded.to_json_string())
    for grid in (scheduler, loaded):
        grid.set_timesteps(20)
    assert torch.equal(scheduler.timesteps, loaded.timesteps) and torch.equal(scheduler.betas, loaded.betas)
    z, output = draw(1, 1, 4, 4), draw(1, 1, 4, 4, seed=1)
    one, two = (s.step(output, s.timesteps[3], z, generator=seeded())[0] for s in (scheduler, loaded))
    assert torch.equal(one, two)


# ---- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ({"noise_schedule": "cosin"}, "cosine"),
        ({"noise_schedule": {"name": "linear", "config": {"gamma_mn": -3.0}}}, "gamma_min"),
        ({"prediction_type": "epsilom"}, "epsilon"),
        ({"conditioning": "afine"}, "affine"),
        ({"data_scaling": "bin_centres"}, "bin_centers"),
        ({"decoder": "factorized"}, "factorised"),
        ({"forward_process": "gausian"}, "gaussian"),
        ({"final_sigmas_type": "zeros"}, "zero"),
        ({"timestep_spacing": "trailling"}, "trailing"),
        ({"num_train_timesteps": 1}, "2 to "),
        ({"num_levels": "many"}, "many"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(arguments: dict[str, Any], nearest: str) -> None:
    with pytest.raises(ConfigurationError, match=nearest):
        VDMScheduler(**arguments)


def test_the_config_keeps_copies_of_what_it_is_given() -> None:
    schedule: dict[str, Any] = {"name": "tabulated", "config": {"gammas": [-9.0, -2.0, 5.0]}}
    target: dict[str, Any] = {"name": "epsilon", "config": {}}
    scheduler = VDMScheduler(noise_schedule=schedule, prediction_type=target)
    before, again = copy.deepcopy(dict(scheduler.config)), VDMScheduler.from_config(scheduler.config)
    schedule["config"]["gammas"][0] = target["name"] = 0
    again.config.noise_schedule["config"]["gammas"][0] = 0
    assert dict(scheduler.config) == before


def test_betas_that_contradict_the_schedule_are_refused() -> None:
    narrow = {"name": "cosine", "config": {"gamma_min": -13.0}}
    VDMScheduler(noise_schedule=narrow, trained_betas=VDMScheduler(noise_schedule=narrow).config.trained_betas)
    with pytest.raises(ConfigurationError, match="disagrees"):
        VDMScheduler(noise_schedule=narrow, trained_betas=VDMScheduler().config.trained_betas)
    with pytest.raises(ConfigurationError, match="disagrees"):
        VDMScheduler(noise_schedule="linear", trained_betas=[0.1, 0.3])
    table = {"name": "discrete_betas", "config": {"betas": [0.1, 0.2, 0.3]}}
    assert VDMScheduler(noise_schedule=table).config.trained_betas == [0.1, 0.2, 0.3]
    with pytest.raises(ConfigurationError, match="disagrees"):
        VDMScheduler(noise_schedule=table, trained_betas=[0.1, 0.2, 0.4])


@pytest.mark.parametrize("source", ["vdm", "learned", "table"])
def test_the_networks_conditioning_never_follows_a_schedule_that_replaces_its_own(source: str) -> None:
    before = {
        "vdm": VDMScheduler(),
        "learned": VDMScheduler(noise_schedule="learned_linear"),
        "table": VDMScheduler(noise_schedule="discrete_betas"),
    }[source]
    narrower = {"name": "cosine", "config": {"gamma_min": -9.0, "gamma_max": 4.0}}
    after = VDMScheduler.from_config(before.config, noise_schedule=narrower)
    reloaded = VDMScheduler.from_config(json.loads(after.to_json_string()))
    gammas = torch.linspace(-9, 4, 50, dtype=torch.float64)
    for scheduler in (after, reloaded):
        assert scheduler.process.schedule.endpoints() == pytest.approx((-9.0, 4.0))
        assert torch.equal(scheduler.process.conditioning(gammas), before.process.conditioning(gammas))
        ddim = scheduler.to_diffusers(DDIMScheduler)
        bar = torch.sigmoid(-before.process.conditioning.inverse(torch.arange(1000.0, dtype=torch.float64)))
        torch.testing.assert_close(ddim.alphas_cumprod.double(), bar, rtol=0, atol=1e-6)


def test_a_trained_schedule_is_published_with_the_conditioning_of_its_start() -> None:
    """Its constants happen to be the defaults, so a bare name would be read as "derive them from the table"."""
    trained = VDMScheduler(noise_schedule="learned_linear")
    with torch.no_grad():
        for parameter in trained.process.parameters():
            parameter += 0.7
    published = VDMScheduler(**json.loads(json.dumps(trained.process.fields())))
    assert published.config.noise_schedule["name"] == "tabulated"
    assert published.process.schedule.endpoints() == pytest.approx(trained.process.schedule.endpoints(), abs=1e-6)
    assert published.process.schedule.endpoints()[0] == pytest.approx(-12.6, abs=1e-5)
    assert published.process.conditioning.to_config() == trained.process.conditioning.to_config()
    t = torch.linspace(0, 1, 31, dtype=torch.float64)
    torch.testing.assert_close(published.process.timestep(t), trained.process.timestep(t), rtol=0, atol=1e-3)


def test_other_numbers_of_train_timesteps_scale_the_same_process() -> None:
    scheduler = VDMScheduler.from_config(VDMScheduler().config, num_train_timesteps=500)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([499.0, 374.25, 249.5, 124.75]))
    assert len(scheduler) == len(scheduler.betas) == 500
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(1 / (1 + torch.tensor(5.0).exp().item()), rel=1e-5)
    published = VDMScheduler(**VDMScheduler().process.fields())
    again = VDMScheduler.from_config(published.config, num_train_timesteps=500)
    assert torch.equal(again.betas, scheduler.betas)


# ---- diffusers' own pipeline ----------------------------------------------------------------------------------------


def test_ddpm_pipeline_runs_it_unmodified_and_takes_ddim_in_its_place() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    pipe = DDPMPipeline(unet.eval(), VDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    image = pipe(generator=seeded(), num_inference_steps=5, output_type="np").images
    z, scheduler = draw(1, 1, 8, 8), VDMScheduler()
    scheduler.set_timesteps(5)
    generator = seeded()
    z = torch.randn(1, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t).sample, t, z, generator=generator).prev_sample
    expected = (z / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert (image == expected).all()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe(generator=seeded(), num_inference_steps=5, output_type="np").images.shape == (1, 8, 8, 1)


def test_a_conditioning_takes_the_schedulers_number_of_timesteps_and_no_other() -> None:
    form = {"name": "affine", "config": {"num_train_timesteps": 100}}
    with pytest.raises(ConfigurationError, match=naming("num_train_timesteps", 100, 1000)):
        VDMScheduler(conditioning=form)
    made = VDMScheduler(conditioning=form, num_train_timesteps=100).process
    assert made.conditioning.to_config()["num_train_timesteps"] == 100


def test_a_table_that_ends_before_the_timesteps_gives_no_betas() -> None:
    """Its later entries would be extrapolated: no signal is left, and stock samplers would read NaN."""
    table = {"name": "table", "config": {"gammas": [-13.3, -2.0, 1.0, 5.0]}}
    scheduler = VDMScheduler(conditioning=table)
    assert scheduler.config.trained_betas is None
    with pytest.raises(ConfigurationError, match=naming("VDMScheduler")):
        scheduler.to_diffusers(DDIMScheduler)
