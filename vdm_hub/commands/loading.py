"""A pipeline from a folder or a Hub id, with an error that a person can read."""

from __future__ import annotations

from pathlib import Path

import torch

from vdm_hub.diffusers_checkpoints import pipeline_class
from vdm_hub.errors import ConfigurationError, VDMHubError
from vdm_hub.likelihood_pipeline import LikelihoodPipeline
from vdm_hub.pipeline_vdm import VDMPipeline
from vdm_hub.pipelines import PIPELINES
from vdm_hub.repositories import HTTP_ERROR
from vdm_hub.scheduling_vdm import VDMScheduler


def load_pipeline(name: str, num_levels: int | None = None, revision: str | None = None) -> LikelihoodPipeline:
    """Load a pipeline, any of ours or one of diffusers' DDPM family, onto the GPU, where there is one.

    Args:
        name: A folder or a Hub id.
        num_levels: K, instead of the model's; 256 for a pipeline of diffusers if it isn't given.
        revision: A branch or commit on the Hub; main where not given.

    Raises:
        ConfigurationError: There is none at that place, or it can't be loaded.
    """
    looks_local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    folder = Path(name).expanduser()
    if looks_local and not (folder / "model_index.json").is_file():
        raise ConfigurationError(
            f"{name} holds no pipeline (no model_index.json): give a folder such as runs/digits/pipeline, or a Hub id."
        )
    try:
        pipeline = _load(str(folder) if looks_local else name, num_levels, revision)
    except VDMHubError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError, HTTP_ERROR) as error:
        cause = " ".join(str(error).split())[:400].rstrip(".")
        raise ConfigurationError(
            f"the pipeline {name!r} can't be loaded: {cause}. Check the folder or the Hub id, and the network."
        ) from error
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _load(place: str, num_levels: int | None, revision: str | None) -> LikelihoodPipeline:
    own = PIPELINES.get(pipeline_class(place, revision=revision))
    if own is None:
        return VDMPipeline.from_diffusers(place, 256 if num_levels is None else num_levels, revision=revision)
    pipeline: LikelihoodPipeline = own.from_pretrained(place, revision=revision)
    if num_levels in (None, pipeline.num_levels):
        return pipeline
    if type(pipeline) is not VDMPipeline:
        raise ConfigurationError(
            f"num_levels is {num_levels}, and the model's decoder knows {pipeline.num_levels}: leave it out."
        )
    pipeline.scheduler = VDMScheduler.from_config(pipeline.scheduler.config, num_levels=num_levels)
    return pipeline
