"""A tiny pipeline of every kind that a Space shows, but texts, whose process is a plugin's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import LEVELS, quiet, randomised, tiny_pipeline, tiny_unet
from tiny_text import WIDTH, tiny_encoder, tiny_tokenizer
from vdm_hub import HVAEPipeline, LatentVDMPipeline, MarkovianHVAE, UNetVDMModel, VDMPipeline, VDMScheduler


def unconditional() -> VDMPipeline:
    return tiny_pipeline()


def colours() -> VDMPipeline:
    return tiny_pipeline(channels=3, num_levels=256)


def classes() -> VDMPipeline:
    condition = {"column": "label", "count": 3, "names": ["cat", "dog", "bird"], "dropout": 0.1}
    return quiet(VDMPipeline(tiny_unet(num_class_embeds=4), VDMScheduler(num_levels=LEVELS), classes=condition))


def captions() -> VDMPipeline:
    told = {"column": "text", "max_length": 8, "dropout": 0.1, "examples": ["a b", "c d"], "template": None}
    unet, text = tiny_unet(cross_attention_dim=WIDTH), {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer()}
    return quiet(VDMPipeline(unet, VDMScheduler(num_levels=LEVELS), captions=told, **text))


def latent() -> LatentVDMPipeline:
    stage = MarkovianHVAE(8, in_channels=1, num_levels=LEVELS, latent_shapes=[(2, 4, 4)], block_out_channels=(8,))
    sizes: dict[str, Any] = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8,), "norm_num_groups": 4}
    unet = randomised(UNetVDMModel(sample_size=4, layers_per_block=1, fourier_features=(), **sizes))
    return quiet(LatentVDMPipeline(randomised(stage), unet, VDMScheduler(num_levels=LEVELS)))


def hvae() -> HVAEPipeline:
    return quiet(HVAEPipeline(randomised(MarkovianHVAE(8, in_channels=1, num_levels=LEVELS, latent_shapes=[(4,)]))))


KINDS: dict[str, Callable[[], Any]] = {
    made.__name__: made for made in (unconditional, colours, classes, captions, latent, hvae)
}


def saved(kind: str, folder: Path) -> Path:
    """The folder of a pipeline of a kind."""
    KINDS[kind]().save_pretrained(folder)
    return folder
