"""Tiny pipelines for tests: random weights, so that no output is a layer's initial zero."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler

LEVELS = 17


def randomised(network: Any, seed: int = 0) -> Any:
    """A network whose output depends on all of its inputs, as no layer is at its initial zero; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def tiny_unet(channels: int = 1, **arguments: Any) -> UNetVDMModel:
    torch.manual_seed(0)
    return randomised(
        UNetVDMModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            **arguments,
        )
    )


def tiny_unet_2d() -> UNet2DModel:
    torch.manual_seed(0)
    return randomised(
        UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline(unet: Any = None, channels: int = 1, **scheduler: Any) -> VDMPipeline:
    return quiet(VDMPipeline(unet or tiny_unet(channels), VDMScheduler(**{"num_levels": LEVELS} | scheduler)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(pipe: Any, batch_size: int = 2, steps: int = 4, seed: int = 0, **arguments: Any) -> Tensor:
    arguments = {"generator": seeded(seed), "output_type": "pt"} | arguments
    return pipe(batch_size, num_inference_steps=steps, **arguments).images


class Inputs:
    """Records what a network is given, in order."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.samples: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.keywords: list[dict[str, Any]] = []
        network.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.samples.append(arguments[0].clone())
        self.timesteps.append(torch.as_tensor(arguments[1]).clone())
        self.keywords.append(keywords)
