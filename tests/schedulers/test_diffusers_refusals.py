"""Checkpoints that `VDMPipeline.from_diffusers` refuses, each with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from naming import naming
from tiny import tiny_pipeline, tiny_unet_2d
from vdm_hub import VDMPipeline
from vdm_hub.commands import main
from vdm_hub.errors import CheckpointError, ConfigurationError
from vdm_hub.publishing.stock_twin import build_stock_twin


def small(network: Any, **changes: Any) -> Any:
    """A tiny `UNet2DModel`-like network with some of its fields changed."""
    return network(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": (8,),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
        | changes
    )


def unet_2d(**changes: Any) -> UNet2DModel:
    return small(UNet2DModel, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **changes)


def latent() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, num_vq_embeddings=4, **blocks)
    return LDMPipeline(vqvae, unet_2d(), DDIMScheduler())


def conditional() -> Any:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    return DDPMPipeline(small(UNet2DConditionModel, cross_attention_dim=8, **blocks), DDPMScheduler())


def with_scheduler(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: DDPMPipeline(unet_2d(), getattr(diffusers, name)(**fields))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "latent": (latent, r"LDMPipeline \(scheduler, unet, vqvae\), and it diffuses the latents of an autoencoder"),
    "text": (conditional, "UNet2DConditionModel, needs encoder_hidden_states"),
    "learned variance of one output": (
        lambda: DDPMPipeline(unet_2d(), DDPMScheduler(variance_type="learned_range")),
        "1 input and 1 output channels, and its variance_type is 'learned_range'",
    ),
    "two outputs": (
        lambda: DDPMPipeline(unet_2d(out_channels=2), DDPMScheduler()),
        "half predicts a variance.*Give the variance_type",
    ),
    "three outputs": (lambda: DDPMPipeline(unet_2d(out_channels=3), DDPMScheduler()), "1 input and 3 output channels"),
    "flow matching": (with_scheduler("FlowMatchEulerDiscreteScheduler"), naming("num_levels", "data_scaling")),
    "EDM": (with_scheduler("EDMEulerScheduler"), naming("num_levels", "data_scaling", "decoder")),
    "VE": (with_scheduler("ScoreSdeVeScheduler"), naming("num_levels", "data_scaling", "decoder")),
    "consistency": (with_scheduler("CMStochasticIterativeScheduler"), naming("CMStochasticIterativeScheduler")),
    "twin of a VDM": (lambda: build_stock_twin(tiny_pipeline(tiny_unet_2d())), "no likelihood comes from it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    build, message = REFUSED[kind]
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()  # refused before any weight is looked for
    for source in (pipeline, tmp_path):
        with pytest.raises(ConfigurationError, match=message):
            VDMPipeline.from_diffusers(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": ["diffusers", "DiTTransformer2DModel"], "unet": [None, None]}, "made of other parts"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, r"\(scheduler, text_encoder, unet\)"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "latents of an autoencoder"),
        ({"unet": ["somewhere", "UNet2DModel"]}, "'UNet2DModel' of 'somewhere': only diffusers' own classes"),
        ({"unet": ["diffusers", "DDPMScheduler"]}, "'DDPMScheduler' of 'diffusers'"),
        ({"unet": ["diffusers", "logging"]}, "'logging' of 'diffusers'"),
        ({"image_normalizer": ["diffusers", "UNet2DModel"]}, "made of other parts"),
        ({"scheduler": [None, None]}, r"\(unet\)"),
    ],
)
def test_a_list_of_other_components_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.42.1"} | parts | changes
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match=message):
        VDMPipeline.from_diffusers(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet_2d(), DDPMScheduler()).save_pretrained(tmp_path, safe_serialization=False)
    assert list((tmp_path / "unet").glob("*.bin"))
    with pytest.raises(CheckpointError, match=naming("safetensors", ".bin")):
        VDMPipeline.from_diffusers(tmp_path)
    assert main(["evaluate", str(tmp_path), "--dataset_name", "digits", "--num_levels", "17"]) == 2


def test_an_autoencoder_alone_is_no_pipeline(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=naming("model_index.json")):
        VDMPipeline.from_diffusers(tmp_path)
