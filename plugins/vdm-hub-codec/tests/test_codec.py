"""What is encoded comes back, by whatever model; its length is the bound; what is not whole is refused."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vdm_hub import (
    AutoencoderKLFirstStage,
    ConfigurationError,
    DataError,
    HVAEPipeline,
    LatentVDMPipeline,
    MarkovianHVAE,
    UNetVDMModel,
    VDMPipeline,
    VDMScheduler,
    VariationalBound,
)
from vdm_hub_codec import decode, encode
from vdm_hub_codec.container import Container

K, T = 17, 8
UNET: dict[str, Any] = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
STAGE: dict[str, Any] = {"in_channels": 1, "num_levels": K, "block_out_channels": (8,), "norm_num_groups": 4}


def randomised(network: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def unet(channels: int = 1, size: int = 8) -> UNetVDMModel:
    torch.manual_seed(0)
    return randomised(UNetVDMModel(sample_size=size, in_channels=channels, out_channels=channels, **UNET))


def vdm(**config: Any) -> VDMPipeline:
    return VDMPipeline(unet(), VDMScheduler(**{"num_levels": K} | config))


def latent(stage: Any) -> LatentVDMPipeline:
    channels, size = stage.latent_shape[0], stage.latent_shape[-1] if len(stage.latent_shape) > 1 else 1
    scheduler = VDMScheduler(num_levels=K, noise_schedule={"name": "linear", "config": {"gamma_min": -5.0}})
    scaling = {"shift": [0.1], "scale": [1.3]}
    return LatentVDMPipeline(randomised(stage), unet(channels, size), scheduler, latent_scaling=scaling)


def autoencoder() -> AutoencoderKLFirstStage:
    config = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    return AutoencoderKLFirstStage(config | {"latent_channels": 2}, sample_size=8, num_levels=K)


TABLE = {"name": "tabulated", "config": {"times": [0.0, 0.4, 1.0], "gammas": [-9.0, -2.0, 4.0]}}
MODELS: dict[str, Any] = {
    "linear": lambda: vdm(),
    "cosine, velocity": lambda: vdm(noise_schedule="cosine", prediction_type="v_prediction"),
    "learned, data": lambda: vdm(noise_schedule="learned_monotone", prediction_type="sample"),
    "hierarchy": lambda: HVAEPipeline(randomised(MarkovianHVAE(8, depth=3, latent_shapes=[(2, 4, 4), (4,), (3,)], **STAGE))),
    "vae": lambda: HVAEPipeline(randomised(MarkovianHVAE(8, latent_shapes=[(2, 4, 4)], **STAGE))),
    "latent": lambda: latent(MarkovianHVAE(8, latent_shapes=[(2, 4, 4)], **STAGE)),
    "latent, autoencoder": lambda: latent(autoencoder()),
}


def levels(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(count, 1, 3, 3, generator=generator)
    return (torch.nn.functional.interpolate(smooth, 8, mode="bicubic") * 3 + 8).round().clamp(0, K - 1).long()


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def transitions(pipe: Any) -> int | None:
    return None if isinstance(pipe, HVAEPipeline) else T


@pytest.mark.parametrize("name", MODELS)
def test_data_come_back_on_other_threads_and_batches(name: str) -> None:
    pipe, data = made(name), levels()
    whole, report = encode(pipe, data, transitions=transitions(pipe), batch_size=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        assert torch.equal(decode(made(name), whole, batch_size=3), data)
    finally:
        torch.set_num_threads(threads)
    assert report.bytes == len(whole) and report.count == len(data)


@pytest.mark.parametrize("name", MODELS)
def test_the_length_is_the_bound_on_the_same_draws(name: str) -> None:
    pipe, data = made(name), levels(64)
    _, report = encode(pipe, data, transitions=transitions(pipe))
    assert abs(report.quantisation) < 2e-3 * report.bound
    assert report.bits_per_dim == pytest.approx(report.bound + report.start + report.quantisation + report.header)


@pytest.mark.parametrize("name", ["linear", "hierarchy", "latent, autoencoder"])
def test_the_bound_on_the_draws_is_that_of_the_pipeline(name: str) -> None:
    pipe, data = made(name), levels(256)
    _, report = encode(pipe, data, transitions=transitions(pipe))
    measured = pipe.bits_per_dim(data, VariationalBound(transitions(pipe)), replicates=8)
    # The draws of a file are one replicate's: its own error is the root of 8 times theirs, and a tenth for the others'.
    error = 3 * measured.standard_error * 8**0.5
    assert report.bound == pytest.approx(measured.bits_per_dim, abs=4 * error + 0.01 * measured.bits_per_dim)
