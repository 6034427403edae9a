"""The learned forward process through the whole way: training, resuming, bounds, samples, loading, publishing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from naming import naming
from plugin_runs import check_the_whole_way, errors_without_plugins, train_a_little
from tiny import randomised, tiny_pipeline, tiny_unet
from vdm_hub import (
    ConfigurationError,
    ImportanceWeighted,
    RegisteredModel,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    as_hierarchical_vae,
    load_split,
    parse_recipe,
)

PACKAGE, NAME = "vdm-hub-learned", "learned"
PROCESS: dict[str, Any] = {"name": NAME, "package": PACKAGE, "config": {"width": 4, "depth": 1}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_a_little(tmp_path_factory.mktemp("runs") / "digits", forward_process=PROCESS, checkpointing_steps=3)


def test_the_whole_way(run: Path) -> None:
    check_the_whole_way(run, "digits")


def test_the_encoder_is_trained_and_travels_with_the_pipeline(run: Path) -> None:
    pipe = VDMPipeline.from_pretrained(run / "pipeline").to(torch.float16)
    assert isinstance(pipe.forward_process, RegisteredModel) and pipe.noise_schedule is None
    weights = pipe.process.encoder.state_dict()
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert bool(weights["out.weight"].any())  # where m starts as x


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    again = train_a_little(
        tmp_path / "again", forward_process=PROCESS, checkpointing_steps=3, resume_from_checkpoint="latest"
    )
    whole, resumed = (VDMPipeline.from_pretrained(one / "pipeline").process.state_dict() for one in (run, again))
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_both_bounds_are_measured(run: Path) -> None:
    pipe = VDMPipeline.from_pretrained(run / "pipeline")
    levels = load_split("digits", "test[:16]", num_levels=17).levels
    found = [pipe.bits_per_dim(levels, VariationalBound(transitions), replicates=4) for transitions in (None, 10, 400)]
    for report in found:
        assert report.is_bound and set(report.terms) == {"reconstruction", "prior", "diffusion"}
    assert found[1].bits_per_dim > found[2].bits_per_dim
    assert found[2].bits_per_dim == pytest.approx(found[0].bits_per_dim, rel=0.05)


def test_importance_weights_are_measured(run: Path) -> None:
    pipe = VDMPipeline.from_pretrained(run / "pipeline")
    levels = load_split("digits", "test[:8]", num_levels=17).levels
    one, many = (
        pipe.log_likelihood(levels, ImportanceWeighted(transitions=6, draws=draws), replicates=2) for draws in (1, 8)
    )
    assert many.is_bound and many.bits_per_dim < one.bits_per_dim


@pytest.mark.parametrize("schedule", ["learned_linear", "learned_monotone"])
def test_a_learned_schedule_is_published_with_the_encoder(schedule: str, tmp_path: Path) -> None:
    form = {"name": schedule, "config": {"gamma_min": -7.87, "gamma_max": 5.0}}
    run = train_a_little(tmp_path / "run", forward_process=PROCESS, noise_schedule=form, max_train_steps=3)
    pipe = VDMPipeline.from_pretrained(run / "pipeline")
    assert pipe.scheduler.config.noise_schedule["name"] == "tabulated"
    assert pipe.process.scalar_gamma.endpoints()[0] != -7.87
    assert bool(pipe.process.encoder.out.weight.any())
    assert pipe.bits_per_dim(torch.zeros(2, 1, 8, 8), replicates=1).bits_per_dim > 0


@pytest.mark.slow
def test_without_the_package_loading_says_what_to_install(run: Path, tmp_path: Path) -> None:
    (message,) = errors_without_plugins(tmp_path / "site-packages", run)
    assert f"'{NAME}'" in message and f"pip install {PACKAGE}" in message and "unverified" in message


# ---- what it has not ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> VDMPipeline:
    made = tiny_pipeline(tiny_unet(), num_levels=17, forward_process=PROCESS)
    randomised(made.process.encoder)
    return made


def test_the_likelihood_of_the_probability_flow_is_refused(pipe: VDMPipeline) -> None:
    with pytest.raises(ConfigurationError, match=naming("LearnedProcess", "method='bound'")):
        pipe.log_likelihood(torch.zeros(2, 1, 8, 8), method="ode")


def test_other_forms_and_samplers_are_refused(pipe: VDMPipeline) -> None:
    with pytest.raises(ConfigurationError, match="LearnedProcess"):
        as_hierarchical_vae(pipe.objective(3), (1, 8, 8))
    with pytest.raises(ConfigurationError, match="LearnedProcess"):
        pipe.log_likelihood(torch.zeros(2, 1, 8, 8), VariationalBound(4, decomposition="consistency"))
    with pytest.raises(ConfigurationError, match="BoundEncoded"):
        pipe(1, num_inference_steps=2, sampler="probability_flow")
    with pytest.raises(ConfigurationError, match="diffusers"):
        pipe.scheduler.to_diffusers(type(pipe.scheduler))


def test_a_step_without_the_trained_process_is_refused(pipe: VDMPipeline) -> None:
    scheduler, z = VDMScheduler.from_config(pipe.scheduler.config), torch.zeros(1, 1, 8, 8)
    scheduler.set_timesteps(4)
    with pytest.raises(ConfigurationError, match=naming("LearnedProcess", "process")):
        scheduler.step(z, scheduler.timesteps[0], z)
    bound = pipe.process.bind(None, {})[1]
    drawn = scheduler.step(z, scheduler.timesteps[0], z, torch.Generator().manual_seed(0), process=bound)
    again = scheduler.transition_log_prob(drawn.prev_sample, z, z, scheduler.timesteps[0], process=bound)
    assert drawn.prev_sample.shape == z.shape and bool(again.isfinite().all())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"forward_process": PROCESS | {"config": {"widht": 2}}}, ("widht", "'width'")),
        ({"forward_process": PROCESS | {"config": {"width": 0}}}, ("width", 0)),
        ({"forward_process": PROCESS | {"config": {"degree": 2.5}}}, ("degree", 2.5)),
        ({"forward_process": PROCESS | {"config": {"num_levels": 7}}}, ("num_levels",)),
        ({"noise_schedule": "discrete_betas"}, ("discrete_betas",)),
    ],
)
def test_arguments_that_are_wrong_are_refused(fields: dict[str, Any], words: tuple[object, ...]) -> None:
    with pytest.raises(ConfigurationError, match=naming(*words)):
        VDMScheduler(**{"forward_process": PROCESS, "num_levels": 17} | fields)


def test_data_of_other_channels_are_refused() -> None:
    scheduler = VDMScheduler(forward_process=PROCESS, num_levels=17)
    with pytest.raises(ConfigurationError, match=naming("data_channels", 3)):
        VDMPipeline(tiny_unet(channels=3), scheduler)


def test_the_recipe_of_the_readme_is_valid() -> None:
    form = '{"name": "learned", "package": "vdm-hub-learned"}'
    configuration = parse_recipe(["digits", "--forward_process", form])
    assert "learned" in configuration.diffusion.forward_process
