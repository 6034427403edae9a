"""Latent VDMs by the same training: in one stage or two, from a VAE or from diffusers' AutoencoderKL."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from naming import naming
from runs import TORCHRUN, configuration, python, recipe, start, train_here
from tiny import randomised
from vdm_hub import AutoencoderKLFirstStage, LatentVDMPipeline
from vdm_hub.commands.__main__ import main
from vdm_hub.errors import ConfigurationError
from vdm_hub.training.parts.first_stages import build_first_stage

STAGE: dict[str, Any] = {"latent_shapes": [[2, 4, 4]], "block_out_channels": [8], "norm_num_groups": 4}
LATENT: dict[str, Any] = {"model": "latent_vdm", "first_stage": STAGE}
KL_CONFIG: dict[str, Any] = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 2}


def hvae(folder: Path, **stage: Any) -> str:
    """The pipeline of a VAE, hardly trained."""
    fields: dict[str, Any] = {"model": "hvae", "hvae": STAGE | stage, "unet": {}, "noise_schedule": "linear"}
    train_here(folder, **fields)
    return str(folder / "pipeline")


def test_one_stage_trains_everything_and_the_result_is_measured_and_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    report = train_here(run, **LATENT, evaluation_replicates=2, num_sample_images=4, learning_rate=5e-3)
    assert report is not None
    assert "images the latents have means" in capsys.readouterr().out
    assert (run / "samples.png").exists()
    told = json.loads((run / "run.json").read_text())
    assert set(told["parameters"]) == {"network", "first_stage", "schedule"}
    assert told["parameters"]["first_stage"] > 0
    words = ["evaluate", str(run / "pipeline"), "--dataset_name", "digits", "--replicates", "2", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_dim"] == report.bits_per_dim
    words = ["sample", str(run / "pipeline"), "--num_images", "3", "--num_inference_steps", "4", "--output"]
    assert main([*words, str(tmp_path / "grid.png")]) == 0


def test_two_stages_leave_the_first_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = hvae(tmp_path / "vae")
    capsys.readouterr()
    fields = {"model": "latent_vdm", "first_stage_from": source, "freeze_first_stage": True}
    train_here(tmp_path / "run", **fields)
    assert "they are shifted and scaled to 0 and 1" in capsys.readouterr().out
    pipe = LatentVDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    run = start(tmp_path / "again", **fields)
    before = run.model.process.first_stage.state_dict()
    for name, tensor in pipe.first_stage.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    run.objective.train()
    assert not run.model.process.first_stage.training
    levels = torch.stack([torch.as_tensor(image) for image in run.data.train.levels])
    latents = pipe.encode(levels[:1024])
    assert float(latents.mean((0, 2, 3)).abs().max()) < 0.1  # the sample was 1,024 images of the same set
    assert float((latents.std((0, 2, 3)) - 1).abs().max()) < 0.1


def test_latents_that_are_not_normalised_are_measured_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = {**KL_CONFIG, "in_channels": 1, "out_channels": 1}
    autoencoder = randomised(AutoencoderKL(**config))
    with torch.no_grad():
        autoencoder.quant_conv.bias[:2] += 30
    autoencoder.save_pretrained(tmp_path / "vae")
    fields = {"model": "latent_vdm", "first_stage_from": str(tmp_path / "vae"), "freeze_first_stage": True}
    train_here(tmp_path / "run", **fields, scale_latents=False)
    assert "warning: the first stage's latents are not normalised: over " in capsys.readouterr().out
    pipe = LatentVDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.config.latent_scaling == {"shift": [0.0, 0.0], "scale": [1.0, 1.0]}
    assert isinstance(pipe.first_stage, AutoencoderKLFirstStage)
    for name, tensor in autoencoder.state_dict().items():
        assert torch.equal(tensor, pipe.first_stage.autoencoder.state_dict()[name]), name
    # The likelihood's own scale was not in it, so it is learned.
    assert float((pipe.first_stage.log_scale.detach() - torch.log(torch.tensor(0.1))).abs()) > 1e-4


def test_an_autoencoder_kl_is_trained_from_its_description(tmp_path: Path) -> None:
    described = {"_class_name": "AutoencoderKL", "initial_scale": 0.3, **KL_CONFIG}
    train_here(tmp_path / "run", model="latent_vdm", first_stage=described)
    pipe = LatentVDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.latent_shape == (2, 8, 8)
    # And what came of it is a first stage to go on from.
    again = start(tmp_path / "again", model="latent_vdm", first_stage_from=str(tmp_path / "run"))
    assert isinstance(again.model.process.first_stage, AutoencoderKLFirstStage)
    assert all(parameter.requires_grad for parameter in again.model.parameters()), "nothing is frozen unasked"


def test_a_first_stage_is_of_the_data_s_sides_and_begins_as_described(tmp_path: Path) -> None:
    described = {"_class_name": "AutoencoderKL", "initial_scale": 0.3, **KL_CONFIG}
    run = configuration(tmp_path / "run", model="latent_vdm", first_stage=described)
    stages = {shape: build_first_stage(run, shape) for shape in ((1, 8, 8), (1, 8, 16), (1, 16, 8))}
    for shape, stage in stages.items():
        assert isinstance(stage, AutoencoderKLFirstStage) and stage.image_shape == shape
        assert stage.autoencoder.config.sample_size == max(shape)
        assert stage.log_scale.item() == pytest.approx(math.log(0.3))
    assert (stages[1, 8, 8].config.sample_size, stages[1, 8, 16].config.sample_size) == (8, (8, 16))
    stages[1, 8, 16].save_pretrained(tmp_path / "wide")
    trained = configuration(tmp_path / "run", model="latent_vdm", first_stage_from=str(tmp_path / "wide"))
    with pytest.raises(ConfigurationError, match=naming("1x8x16 of 17", "1x8x8 of 17")):
        build_first_stage(trained, (1, 8, 8))


@pytest.mark.slow
def test_two_processes_agree_on_the_scaling_and_the_weights(tmp_path: Path) -> None:
    made = recipe(tmp_path / "recipe", tmp_path / "run", **LATENT, max_train_steps=3)
    done = python(*TORCHRUN, "-m", "vdm_hub.train", made, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the latents have means") == 1
    assert (tmp_path / "run" / "pipeline" / "first_stage").is_dir()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_stage": STAGE | {"depth": 2}}, ("first_stage", "depth", 2)),
        ({"first_stage": STAGE | {"num_levels": 5}}, ("first_stage", "num_levels", 5)),
        ({"first_stage": {"_class_name": "VQModel"}}, ("_class_name", "first_stage", "VQModel")),
        ({"first_stage": {"_class_name": "AutoencoderKL", "layers": 3}}, ("AutoencoderKL", "layers")),
        ({"freeze_first_stage": True}, ("freeze_first_stage", "first_stage_from")),
        ({"first_stage_from": "NOWHERE"}, ("empty",)),
        ({"unet": {"in_channels": 1}}, ("unet", "in_channels", 1)),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], message: Any, tmp_path: Path) -> None:
    if fields.get("first_stage_from") == "NOWHERE":
        (tmp_path / "empty").mkdir()
        fields = fields | {"first_stage": {}, "first_stage_from": str(tmp_path / "empty")}
    with pytest.raises(ConfigurationError, match=naming(*message)):
        start(tmp_path / "run", **LATENT | fields)
    assert not (tmp_path / "run").exists()


def test_a_first_stage_of_other_images_is_refused(tmp_path: Path) -> None:
    source = hvae(tmp_path / "vae")
    with pytest.raises(ConfigurationError, match=naming("1x8x8", 17, 256)):
        start(tmp_path / "run", model="latent_vdm", first_stage_from=source, num_levels=256, dataset_name="digits")
    with pytest.raises(ConfigurationError, match=naming("first_stage", "'block_out_channels'")):
        start(tmp_path / "run", **LATENT, first_stage_from=source)
    with pytest.raises(
        ConfigurationError, match=naming("first_stage", "AutoencoderKL", "first_stage_from", "MarkovianHVAE")
    ):
        fields = {"first_stage": {"_class_name": "AutoencoderKL"}, "first_stage_from": source}
        start(tmp_path / "run", model="latent_vdm", **fields)
    deep = hvae(tmp_path / "deep", depth=2, latent_shapes=[[2, 4, 4], [3]])
    with pytest.raises(ConfigurationError, match=naming("one latent", 2)):
        start(tmp_path / "run", model="latent_vdm", first_stage_from=deep)
    train_here(tmp_path / "vdm")
    with pytest.raises(ConfigurationError, match=naming("VDMPipeline", "first stage")):
        start(tmp_path / "run", model="latent_vdm", first_stage_from=str(tmp_path / "vdm" / "pipeline"))
