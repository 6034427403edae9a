"""Measures a pipeline as someone without vdm_hub does. Run as a script, it lets nobody import that package."""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

_IMAGES, _STEPS, _REPLICATES = 2, 3, 2


def measure(pipe: Any) -> dict[str, Tensor]:
    """Samples, the latents on their way, and the terms of the bound of images of noise: all from fixed seeds."""
    pipe.set_progress_bar_config(disable=True)
    classes = pipe.num_classes
    told: dict[str, Any] = {} if classes is None else {"class_labels": torch.arange(_IMAGES) % classes}
    if pipe.text_encoder is not None:
        told = {"prompt": ["a cat", ""]}
    latents: dict[str, Tensor] = {}

    def record(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        latents[f"the latents after step {step + 1}"] = tensors["latents"].clone()

    images = pipe(
        _IMAGES,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=_STEPS,
        **told,
        output_type="pt",
        callback_on_step_end=record,
    ).images
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    levels = (noise * pipe.process.num_levels).long()
    report = pipe.bits_per_dim(levels, replicates=_REPLICATES, seed=2, **told)
    terms = {f"the bound's term {name!r}": values for name, values in report.terms_per_image.items()}
    return {name: values.contiguous() for name, values in ({"the samples": images} | latents | terms).items()}


def main(folder: str, output: str, threads: str) -> None:
    """Load a folder with the code that it carries, and write what was measured to a safetensors file."""
    sys.modules["vdm_hub"] = None  # type: ignore[assignment]  # Python's way to make an import fail
    torch.set_num_threads(int(threads))  # as many as there are on the other side: they decide how sums are rounded
    save_file(measure(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
