"""The stock twin: what plain diffusers samples without vdm_hub, and how far that is from the exact process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel, UniPCMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from distributions import write_pixelwise
from exact_denoisers import ExactDenoiser, Mixture
from naming import naming
from tiny import LEVELS, quiet, sampled, seeded, tiny_pipeline, tiny_unet, tiny_unet_2d
from vdm_hub import RegisteredModel, VDMPipeline, VDMScheduler
from vdm_hub.diffusion.learned_schedules import LearnedLinearSchedule
from vdm_hub.errors import ConfigurationError
from vdm_hub.publishing.stock_twin import TwinError, build_stock_twin, twin_error

TARGETS = ("epsilon", "sample", "v_prediction")
CONTINUOUS: dict[str, Any] = {
    "linear": "linear",
    "cosine": {"name": "cosine", "config": {"gamma_min": -8.0, "gamma_max": 4.0}},
    "tabulated": {"name": "tabulated", "config": {"gammas": [-8.0, -6.0, -1.0, 3.0, 5.0]}},
}
DDPM_FAMILY: dict[str, dict[str, Any]] = {
    "discrete_betas": {},
    "clipped, leading, fixed_large": {"clip_sample": True, "variance_type": "fixed_large"},
    "cosine betas, offset": {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 1, "timestep_spacing": "leading"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def pipeline_of(kind: str, target: str = "epsilon", **fields: Any) -> VDMPipeline:
    if kind in CONTINUOUS:
        return tiny_pipeline(tiny_unet_2d(), noise_schedule=CONTINUOUS[kind], prediction_type=target, **fields)
    fields = {"noise_schedule": "discrete_betas", "prediction_type": target} | DDPM_FAMILY[kind] | fields
    return tiny_pipeline(tiny_unet_2d(), **fields)


def twin_of(pipeline: VDMPipeline) -> DDPMPipeline:
    return quiet(build_stock_twin(pipeline))


def draw(twin: DDPMPipeline, steps: int = 10) -> Tensor:
    return twin(3, seeded(4), num_inference_steps=steps, output_type="pt").images


# ---- plain diffusers ------------------------------------------------------------------------------------------------

WITHOUT_US = """
import json, sys
sys.modules["vdm_hub"] = None  # importing it raises
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
torch.set_num_threads(1)
answers = {}
for folder in sys.argv[1:]:
    for loader in (DDPMPipeline, DiffusionPipeline):
        pipe = loader.from_pretrained(folder)
        assert type(pipe) is DDPMPipeline
        pipe.set_progress_bar_config(disable=True)
        images = pipe(3, generator=torch.Generator().manual_seed(4), num_inference_steps=10, output_type="pt").images
        answers.setdefault(folder, []).append(images.tolist())
print(json.dumps(answers))
"""


def test_plain_diffusers_loads_a_twin_and_samples_what_it_samples_here(tmp_path: Path) -> None:
    pipelines = {f"{kind} {target}": pipeline_of(kind, target) for kind in CONTINUOUS for target in TARGETS}
    pipelines |= {kind: pipeline_of(kind, "v_prediction") for kind in DDPM_FAMILY}
    here = {}
    for name, pipeline in pipelines.items():
        twin = twin_of(pipeline)
        twin.save_pretrained(tmp_path / name)
        here[str(tmp_path / name)] = draw(twin)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", WITHOUT_US, *here]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr, "a scheduler's config holds keys that diffusers does not know"
    for folder, loaded in json.loads(done.stdout).items():
        assert bool(here[folder].isfinite().all())
        assert all(torch.equal(torch.tensor(images), here[folder]) for images in loaded), folder


def test_a_twin_is_stock_in_every_part(tmp_path: Path) -> None:
    build_stock_twin(pipeline_of("cosine")).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    assert index["_class_name"] == "DDPMPipeline"
    assert parts == {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    assert all("vdm" not in path.read_text().lower() for path in tmp_path.rglob("*.json"))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (kind, target)
        for kind in DDPM_FAMILY
        for target in TARGETS
        if (kind, target) != ("zero terminal SNR", "epsilon")  # where there is no data, the noise tells nothing of it
    ],
)
def test_the_twin_of_a_ddpm_is_that_ddpm(kind: str, target: str) -> None:
    pipeline = pipeline_of(kind, target)
    twin = twin_of(pipeline)
    latents = sampled(pipeline, 3, steps=10, seed=4, output_type="latent")
    assert torch.equal(draw(twin), (latents / 2 + 0.5).clamp(0, 1))
    error = twin_error(pipeline, twin, 3, 10)
    assert error.gamma < 1e-9 and error.estimates == 0 and error.scaling < 1e-6
    assert 0 < error.pixels <= 0.5 * error.level


def test_the_pipeline_keeps_its_sampler_and_its_network() -> None:
    pipeline = pipeline_of("linear")
    expected = draw(twin_of(pipeline))
    pipeline.scheduler = pipeline.scheduler.to_diffusers(UniPCMultistepScheduler)
    twin = twin_of(pipeline)
    assert torch.equal(draw(twin), expected) and twin.unet is pipeline.unet
    assert twin_error(pipeline, twin, 2, 5) == twin_error(pipeline_of("linear"), twin, 2, 5)
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)


def test_a_schedule_carried_as_weights_has_a_twin() -> None:
    schedule = LearnedLinearSchedule(-8.0, 4.0)
    scheduler = VDMScheduler(noise_schedule="learned_linear", conditioning={"name": "affine", "config": RANGE})
    carried = quiet(VDMPipeline(tiny_unet_2d(), scheduler, RegisteredModel.carrying(schedule)))
    baked = tiny_pipeline(
        tiny_unet_2d(),
        noise_schedule={"name": "linear", "config": RANGE},
        conditioning={"name": "affine", "config": RANGE},
    )
    assert torch.equal(draw(twin_of(carried)), draw(twin_of(baked)))


RANGE = {"gamma_min": -8.0, "gamma_max": 4.0}

# ---- its error ------------------------------------------------------------------------------------------------------


class ExactUNet(UNet2DModel):
    """A `UNet2DModel` by class and config whose output is the exact denoiser's."""

    exact: ExactDenoiser

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        output = self.exact(sample, torch.as_tensor(timestep).expand(len(sample)))
        return UNet2DOutput(sample=output[0]) if return_dict else output


def exact_pipeline(population: Mixture, **fields: Any) -> VDMPipeline:
    unet = ExactUNet(**{key: value for key, value in tiny_unet_2d().config.items() if not key.startswith("_")})
    pipeline = tiny_pipeline(unet, **fields)
    unet.exact = ExactDenoiser(population, pipeline.process)  # type: ignore[arg-type]
    return pipeline


def exact_twin(pipeline: VDMPipeline, **changes: Any) -> DDPMPipeline:
    """The twin, with the network that `build_stock_twin` would refuse; ``changes`` plant an error."""
    network, pipeline.unet = pipeline.unet, tiny_unet_2d()
    twin = twin_of(pipeline)
    pipeline.unet = twin.unet = network
    twin.scheduler = DDPMScheduler.from_config(twin.scheduler.config, **changes)
    return twin


@pytest.mark.parametrize("steps", [50, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", CONTINUOUS)
def test_with_an_exact_denoiser_the_twin_is_the_process_to_four_digits(kind: str, target: str, steps: int) -> None:
    """What is left is rounding to levels and the scale of the pixels, each at most half a level."""
    pipeline = exact_pipeline(Mixture.gaussian(0.2), noise_schedule=CONTINUOUS[kind], prediction_type=target)
    error = twin_error(pipeline, exact_twin(pipeline), 32, steps)
    assert error.gamma < (0.02 if kind == "linear" else 3e-4), "float32 betas hold -13.3 to two digits, -8 to four"
    assert error.estimates < 3e-4
    assert 0.1 * error.level < error.pixels < 0.6 * error.level
    assert error.means < 0.05 * error.level
    assert error.scaling == pytest.approx(1 / (2 * LEVELS))


def test_the_scale_of_the_pixels_is_counted_and_named() -> None:
    """Every dimension is the first or the last of two levels: the twin shows them at 1/4 and 3/4."""
    levels = {"num_levels": 2, "noise_schedule": {"name": "linear", "config": {"gamma_min": -5.0, "gamma_max": 5.0}}}
    population = Mixture.alphabet(torch.tensor([-0.5, 0.5]), torch.tensor([0.5, 0.5]))
    pipeline = exact_pipeline(population, **levels)
    error = twin_error(pipeline, exact_twin(pipeline), 16, 50)
    assert error.scaling == pytest.approx(0.25)
    assert error.pixels == pytest.approx(0.25, abs=1e-3) and error.estimates < 1e-3
    assert "scale of the pixels (up to 0.25)" in str(error)
    full = exact_pipeline(Mixture.alphabet(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5])), **levels)
    full.scheduler = VDMScheduler.from_config(full.scheduler.config, data_scaling="full")
    assert twin_error(full, exact_twin(full), 16, 50).pixels < 1e-3


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"trained_betas": None, "beta_end": 0.02}, ("gamma", "estimates", "pixels")),
        ({"trained_betas": None, "beta_schedule": "squaredcos_cap_v2"}, ("gamma", "estimates", "pixels")),
        ({"prediction_type": "sample"}, ("estimates", "pixels")),
        ({"variance_type": "fixed_large"}, ("estimates", "pixels")),
    ],
)
def test_a_wrong_twin_has_a_large_error(changes: dict[str, Any], broken: tuple[str, ...]) -> None:
    pipeline = exact_pipeline(Mixture.gaussian(0.2))
    right, wrong = (twin_error(pipeline, exact_twin(pipeline, **c), 16, 50) for c in ({}, changes))
    for name in broken:
        assert getattr(wrong, name) > {"gamma": 20, "estimates": 50, "pixels": 1.2}[name] * getattr(right, name), name
    if "prediction_type" in changes:  # in one unit, and here the whole of it, as little is clamped
        assert wrong.pixels == pytest.approx(wrong.estimates, rel=0.1)
    if "gamma" not in broken:
        assert wrong.gamma == right.gamma


def test_an_end_of_the_process_that_the_timesteps_do_not_reach_is_measured() -> None:
    """gamma(1) of a schedule that has moved since its conditioning was fixed: the twin begins elsewhere."""
    errors = []
    for last in (5.0, 4.5, 1.0, 6.0, 8.0):
        schedule = {"name": "linear", "config": {"gamma_min": -8.0, "gamma_max": last}}
        conditioning = {"name": "affine", "config": {"gamma_min": -8.0, "gamma_max": 5.0}}
        pipeline = exact_pipeline(Mixture.gaussian(0.2), noise_schedule=schedule, conditioning=conditioning)
        errors.append(twin_error(pipeline, exact_twin(pipeline), 16, 50).estimates)
    assert errors[0] < 1e-4 < errors[1] < 0.1 * errors[2]
    assert 1e-3 < errors[3] < errors[4]


def test_the_twins_images_are_those_of_its_pipeline() -> None:
    """`twin_error` steps by itself; its readers call the pipeline."""
    pipeline = pipeline_of("linear")
    twin = twin_of(pipeline)
    generators = [seeded(7), seeded(8)]
    theirs = twin(2, generators, num_inference_steps=20, output_type="pt").images
    # Our own side: the same steps as the pipeline's, where its grid is the twin's.
    error = twin_error(pipeline, twin, 2, 20, seed=7)
    pipeline.scheduler.set_timesteps(timesteps=[float(t) for t in twin.scheduler.timesteps])
    ours = on_the_grid(pipeline, [seeded(7), seeded(8)])
    expected = float((theirs - ours).double().square().mean().sqrt())
    assert error.pixels == pytest.approx(expected, rel=1e-6)
    assert error.means == pytest.approx(abs(float(theirs.double().mean() - ours.double().mean())), abs=1e-8)


def on_the_grid(pipeline: VDMPipeline, generators: list[torch.Generator]) -> Tensor:
    """`VDMPipeline.__call__` at the timesteps that its scheduler has already."""
    set_timesteps, pipeline.scheduler.set_timesteps = pipeline.scheduler.set_timesteps, lambda *_, **__: None
    try:
        return pipeline(len(generators), generators, output_type="pt").images
    finally:
        pipeline.scheduler.set_timesteps = set_timesteps


def test_an_error_is_json_and_one_sentence() -> None:
    pipeline = pipeline_of("linear")
    error = twin_error(pipeline, twin_of(pipeline), 2, 4, seed=3)
    assert TwinError(**json.loads(json.dumps(error.to_dict()))) == error
    assert asdict(error)["seed"] == 3
    assert str(error).endswith(".") and str(error).count(". ") == 0 and "\n" not in str(error)
    with pytest.raises(FrozenInstanceError):
        error.gamma = 0.0  # type: ignore[misc]


# ---- refusals -------------------------------------------------------------------------------------------------------


def class_conditional() -> UNet2DModel:
    config = {key: value for key, value in tiny_unet_2d().config.items() if not key.startswith("_")}
    return UNet2DModel(**config | {"num_class_embeds": 3})


@pytest.mark.parametrize(
    ("network", "fields", "message"),
    [
        (tiny_unet, {}, ("UNetVDMModel",)),
        (class_conditional, {}, ("classes",)),
        (tiny_unet_2d, {"prediction_type": "score"}, ("score",)),
        (
            tiny_unet_2d,
            {"noise_schedule": {"name": "linear", "config": {"gamma_min": -20.0, "gamma_max": 5.0}}},
            ("float32", "twin"),
        ),
        (tiny_unet_2d, {"noise_schedule": "discrete_betas", "conditioning": "affine"}, ("betas", "timesteps", "twin")),
    ],
)
def test_there_is_no_twin(network: Any, fields: dict[str, Any], message: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*message)):
        build_stock_twin(tiny_pipeline(network(), **fields))


def test_a_network_without_a_size_has_no_twin() -> None:
    pipeline = pipeline_of("linear")
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ConfigurationError, match="no sample_size"):
        build_stock_twin(pipeline)


def test_a_gamma_per_pixel_has_no_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_pixelwise(tmp_path))
    schedule = {"name": "pixelwise", "config": {"size": 8}, "package": "fakes"}
    with pytest.raises(ConfigurationError, match="gamma per pixel"):
        build_stock_twin(tiny_pipeline(tiny_unet_2d(), noise_schedule=schedule))


def test_an_error_is_measured_in_full_precision_and_of_finite_samples() -> None:
    pipeline = pipeline_of("linear")
    twin = twin_of(pipeline)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ConfigurationError, match="not finite"):
        twin_error(pipeline, twin, 2, 3)
    with pytest.raises(ConfigurationError, match="float32"):
        twin_error(pipeline.to(torch.float16), twin, 2, 3)
