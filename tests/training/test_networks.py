"""The networks that a recipe describes: what it says, what follows from the data, and what contradicts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from naming import naming
from plugin_of_law_7 import LogitsProcess, ResamplingProcess
from runs import UNET, configuration
from vdm_hub.errors import ConfigurationError
from vdm_hub.training.parts.networks import build_hvae, build_network, on_meta_device

ATTENTIVE = {"_class_name": "UNet2DModel", "block_out_channels": [8, 8], "norm_num_groups": 4}
ATTENTIVE |= {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
VAE = {"latent_shapes": [[1, 8, 8]], "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}


class Telling(ResamplingProcess):
    """A process that tells its network three numbers."""

    context_size = 3


def config(tmp_path: Path, shape: Any, features: bool = True, tells: bool = False, **fields: Any) -> Any:
    process = Telling() if tells else ResamplingProcess()
    network: Any = build_network(configuration(tmp_path, **fields), shape, process, features)
    return network.config


@pytest.mark.parametrize("unet", [UNET, ATTENTIVE])
@pytest.mark.parametrize(("shape", "size"), [((2, 8, 8), 8), ((3, 16, 8), [16, 8])])
def test_size_and_channels_are_those_of_the_data(unet: Any, shape: Any, size: Any, tmp_path: Path) -> None:
    found = config(tmp_path, shape, unet=unet, num_train_timesteps=500)
    assert (found["in_channels"], found["out_channels"]) == (shape[0], shape[0])
    assert found["sample_size"] == size and found["num_train_timesteps"] == 500
    assert found["block_out_channels"] == unet["block_out_channels"]


def test_the_process_says_what_comes_out(tmp_path: Path) -> None:
    built: Any = build_network(configuration(tmp_path), (3, 8, 8), LogitsProcess(5))
    assert (built.config.in_channels, built.config.out_channels, built.config.add_input) == (3, 15, False)


def test_a_network_of_images_reads_their_fine_scales_and_adds_its_input_unless_told_otherwise(tmp_path: Path) -> None:
    built: Any = build_network(configuration(tmp_path), (1, 8, 8), ResamplingProcess())
    assert (built.config.fourier_features, built.config.add_input) == ((7, 8), True)


def test_a_network_without_patches_takes_sides_of_any_length(tmp_path: Path) -> None:
    one_level = {"_class_name": "UNetVDMModel", "block_out_channels": [8], "norm_num_groups": 4}
    assert config(tmp_path, (1, 7, 5), unet=one_level)["sample_size"] == [7, 5]


@pytest.mark.parametrize("name", ["UNetVDMModell", "VDMPipeline", "DDPMScheduler", "os.system", "Model"])
def test_what_is_no_network_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=naming(name, "UNetVDMModel")):
        config(tmp_path, (1, 8, 8), unet={"_class_name": name})


def test_another_network_of_diffusers_is_built_by_its_class(tmp_path: Path) -> None:
    said = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1}
    found = config(tmp_path, (1, 8, 8), unet=said | {"norm_num_groups": 1})
    assert (found["sample_size"], found["in_channels"], found["out_channels"]) == (8, 1, 1)


def test_a_description_goes_before_a_default_and_may_repeat_the_data(tmp_path: Path) -> None:
    said = UNET | {"fourier_features": [5], "num_train_timesteps": 300, "in_channels": 1, "sample_size": None}
    found = config(tmp_path, (1, 8, 8), False, unet=said)
    assert (found["fourier_features"], found["num_train_timesteps"], found["sample_size"]) == ([5], 300, 8)
    assert config(tmp_path, (1, 8, 8))["fourier_features"] == (7, 8)
    assert config(tmp_path, (1, 8, 8), False)["fourier_features"] == ()


def test_a_network_is_told_the_context_of_the_process_or_refused(tmp_path: Path) -> None:
    assert config(tmp_path, (1, 8, 8), tells=True)["context_size"] == 3
    assert config(tmp_path, (1, 8, 8))["context_size"] is None
    with pytest.raises(ConfigurationError, match=naming("context_size", 3)):
        config(tmp_path, (1, 8, 8), unet=UNET | {"context_size": 3})
    with pytest.raises(ConfigurationError, match=naming("in_channels=2", "1x8x8")):
        config(tmp_path, (1, 8, 8), unet=UNET | {"in_channels": 2})
    with pytest.raises(ConfigurationError, match=naming("UNet2DModel")):
        config(tmp_path, (1, 8, 8), tells=True, unet=ATTENTIVE)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"in_channels": 3}, ("in_channels=3", "1x8x16")),
        ({"sample_size": 8}, ("sample_size=8", "1x8x16")),
        ({"block_channels": [8]}, ("block_channels", "block_out_channels")),
        ({"self": 1}, ("self",)),
        ({"block_out_channels": [7]}, ("norm_num_groups",)),
        (ATTENTIVE | {"down_block_types": ["DownBlock2D"]}, ("UNet2DModel", "unet")),
    ],
)
def test_what_no_network_has_or_the_data_contradict_is_refused(
    said: dict[str, Any], named: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=naming(*named)):
        config(tmp_path, (1, 8, 16), unet=UNET | said if "_class_name" not in said else said)


def test_a_hierarchy_has_the_size_and_the_levels_of_the_data(tmp_path: Path) -> None:
    for shape, size in (((2, 8, 8), 8), ((2, 8, 16), [8, 16])):
        found = build_hvae(configuration(tmp_path, num_levels=9), shape, "first_stage", VAE).config
        assert (found.in_channels, found.sample_size, found.num_levels) == (2, size, 9)
    with pytest.raises(ConfigurationError, match=naming("first_stage", "num_levels=7", "2x8x16 of 9 levels")):
        build_hvae(configuration(tmp_path, num_levels=9), (2, 8, 16), "first_stage", VAE | {"num_levels": 7})


def test_a_sketch_takes_no_memory_and_ends_with_its_block(tmp_path: Path) -> None:
    def device() -> torch.device:
        return next(build_network(configuration(tmp_path), (1, 8, 8), ResamplingProcess()).parameters()).device

    with on_meta_device():
        assert device().type == "meta"
        with pytest.raises(ArithmeticError), on_meta_device():
            raise ArithmeticError
        assert device().type == "meta"
    assert device().type == "cpu"
