"""Every recipe that comes with the package trains, with its own network, on images of its data set's shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plugin_of_law_7 import ResamplingProcess
from runs import forget_accelerator
from vdm_hub import UNetVDMModel
from vdm_hub.recipes.arguments import parse_recipe, recipes
from vdm_hub.training.loop import train_model
from vdm_hub.training.parts.networks import build_network
from vdm_hub.training.parts.setup import build_objective

SHAPES = {
    "cifar10": (3, 32, 32),
    "cifar10_fast": (3, 32, 32),
    "digits": (1, 8, 8),
    "digits_classes": (1, 8, 8),
    "digits_hvae": (1, 8, 8),
    "digits_latent": (1, 8, 8),
    "digits_vae": (1, 8, 8),
    "fashion_mnist": (1, 28, 28),
    "fashion_mnist_captions": (1, 28, 28),
    "imagenet32": (3, 32, 32),
    "mnist": (1, 28, 28),
    "template": (3, 32, 32),
}


TEXTS = ("python_source", "shakespeare")
"""Those of texts: see test_tokens."""


def test_these_are_all() -> None:
    assert sorted([*SHAPES, *TEXTS]) == recipes()


@pytest.mark.parametrize("name", SHAPES)
def test_each_builds_its_network_and_process(name: str) -> None:
    recipe = parse_recipe([name])
    is_vdm = recipe.model.model == "vdm"
    with torch.device("meta" if is_vdm else "cpu"):  # some are large
        network = (
            build_network(recipe, SHAPES[name], ResamplingProcess())
            if is_vdm
            else build_objective(recipe, SHAPES[name]).body
        )
    assert network.config.sample_size == SHAPES[name][1]


def test_the_network_of_the_paper_has_its_size() -> None:
    """The CIFAR-10 network of the reference code: 30.58 million parameters."""
    with torch.device("meta"):
        network = build_network(parse_recipe(["cifar10"]), (3, 32, 32), ResamplingProcess())
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == 30.58


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("mnist", "fashion_mnist", "cifar10_fast", "template")],
)
def test_each_small_one_takes_a_step_that_learns(name: str, tmp_path: Path) -> None:
    """With the recipe's own network and precision; only the images are few, and nothing is compiled."""
    channels, height, width = SHAPES[name]
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(8):
        pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(tmp_path / "images" / f"{index}.png")
    words = [name, "--train_data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    words += ["--image_column", "image", "--test_split", "none", "--max_train_steps", "5", "--train_batch_size", "2"]
    words += ["--num_sample_images", "0", "--compile", "none", "--report_to", "none", "--validation_size", "2"]
    words += ["--validation_steps", "5", "--sample_steps", "0", "--lr_warmup_steps", "0", "--logging_steps", "1"]
    configuration = parse_recipe(words)
    forget_accelerator()
    train_model(configuration)
    forget_accelerator()
    before = build_objective(configuration, SHAPES[name]).network.state_dict()
    after = UNetVDMModel.from_pretrained(tmp_path / "run" / "pipeline" / "unet")
    moved = {key: not torch.equal(value, before[key]) for key, value in after.state_dict().items()}
    assert all(moved.values()), [key for key, changed in moved.items() if not changed]
