"""Law 4 on real data: CIFAR-10's prior and reconstruction terms, which no network can change.

Both depend on the data only through how often each of the 256 levels occurs. So the exact values are sums over levels,
of the library's own quadrature for the second (no Monte Carlo error; the tolerance is the rounding of the published
digits), and its Monte Carlo path in float32 must agree with them within five of its own standard errors.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

import registered
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule

ROUNDING = 6e-8  # of seven printed decimals


def read(folder: Path, split: str) -> Tensor:
    files = sorted((folder / "cifar10").glob(f"{split}-*.parquet"))
    if not files:
        pytest.skip(f"REAL DATA ABSENT, THIS ORACLE WAS NOT CHECKED: no {split} split in {folder / 'cifar10'}")
    images = [
        np.asarray(Image.open(io.BytesIO(row["bytes"])))
        for file in files
        for row in pyarrow.parquet.read_table(file, columns=["image"])["image"].to_pylist()
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def test_images(data_folder: Path) -> Tensor:
    return read(data_folder, "test")


def frequencies(images: Tensor) -> Tensor:
    return torch.bincount(images.flatten(), minlength=256).double() / images.numel()


def unused_network(sample: Tensor, timestep: Tensor) -> Tensor:
    raise AssertionError("neither term may call the network")


def exact_prior(process: GaussianProcess, frequency: Tensor) -> float:
    x = process.scaling.encode(torch.arange(256), torch.float64)[:, None]
    return float(process.bind(x, {})[1].prior_kl(x) @ frequency) / math.log(2)


def exact_reconstruction(process: GaussianProcess, frequency: Tensor) -> float:
    by_level = process.reconstruction_by_level()
    assert by_level is not None
    return float(frequency @ by_level) / math.log(2)


def check(images: Tensor, prior: float, reconstructions: dict[float, float]) -> None:
    frequency = frequencies(images)
    assert exact_prior(registered.process(LinearSchedule()), frequency) == pytest.approx(prior, abs=ROUNDING)
    for gamma_0, bits in reconstructions.items():
        process = registered.process(LinearSchedule(gamma_0, 5.0))
        assert exact_reconstruction(process, frequency) == pytest.approx(bits, abs=2 * ROUNDING)


def test_all_test_images_have_the_terms_of_the_table(test_images: Tensor) -> None:
    assert test_images.shape == (10_000, 3, 32, 32)
    check(test_images, 0.0012360, {-13.3: 0.0103897, -8.7: 2.7520581})


@pytest.mark.slow
def test_all_training_images_have_the_terms_of_the_table(data_folder: Path) -> None:
    images = read(data_folder, "train")
    assert images.shape == (50_000, 3, 32, 32)
    check(images, 0.0012425, {-13.3: 0.0103900, -8.7: 2.7517752})


@pytest.mark.parametrize(("gamma_0", "count"), [(-13.3, 3000), (-8.7, 500)])
def test_the_float32_estimate_agrees_within_its_standard_error(
    test_images: Tensor, gamma_0: float, count: int
) -> None:
    process, images = registered.process(LinearSchedule(gamma_0, 5.0)), test_images[:count]
    generator = torch.Generator().manual_seed(0)
    reconstructions, priors = [], []
    for levels in images.split(250):
        x = process.encode(levels)
        noise = process.draw_noise(tuple(x.shape), generator, x.device)
        bound = process.bind(x, noise)[1]
        reconstructions.append(bound.reconstruction(levels, x, noise, unused_network))
        priors.append(bound.prior_kl(x))
    to_bits = 1 / (3072 * math.log(2))
    frequency = frequencies(images)
    prior = float(torch.cat(priors).double().mean()) * to_bits
    assert prior == pytest.approx(exact_prior(process, frequency), rel=1e-5)
    # Given the images, only eps is random; the spread over images bounds that of eps from above.
    estimate = torch.cat(reconstructions).double() * to_bits
    standard_error = float(estimate.std()) / math.sqrt(count)
    assert standard_error < 0.02 * float(estimate.mean())
    assert float(estimate.mean()) == pytest.approx(exact_reconstruction(process, frequency), abs=5 * standard_error)
