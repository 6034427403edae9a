"""Loading a pipeline from a folder or a Hub id, with errors that a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vdm_hub.errors import ConfigurationError
from vdm_hub.files import expanded
from vdm_hub.hub.places import RECIPE, pipeline_folder, run_folder
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.by_name import PIPELINES
from vdm_hub.pipelines.latent_vdm import LatentVDMPipeline
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.recipes.arguments import read_recipe
from vdm_hub.schedulers.diffusers_checkpoints import LATENT_PIPELINES, pipeline_class


def load_pipeline(
    name: str,
    num_levels: int | None = None,
    revision: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> LikelihoodPipeline:
    """Load a pipeline, any of ours or one of diffusers' that is read as a VDM, onto the GPU, where there is one.

    Args:
        name: A folder or a Hub id.
        num_levels: K of a pipeline of diffusers, whose config does not say it; 256 for a DDPM if it isn't given.
        revision: A branch or commit on the Hub; main where not given.
        overrides: What the config of a pipeline of diffusers says wrongly: see `VDMPipeline.from_diffusers`.

    Raises:
        VDMHubError: There is none at that place, or it can't be loaded.
    """
    place = expanded(name)
    looks_local = name.startswith((".", "/", "~")) or place.is_dir()
    folder = pipeline_folder(place)
    if looks_local and not (folder / "model_index.json").is_file():
        raise ConfigurationError(
            f"{name} holds no pipeline (no model_index.json): give a run's folder such as runs/digits, a pipeline's "
            f"such as runs/digits/pipeline, or a Hub id."
        )
    pipeline = _load(str(folder) if looks_local else name, num_levels, revision, overrides or {})
    if looks_local and (run := run_folder(folder)) is not None:
        read_recipe(run / RECIPE)  # a run that is said to be another than it was is no one's to measure
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _load(
    place: str, num_levels: int | None, revision: str | None, overrides: Mapping[str, str]
) -> LikelihoodPipeline:
    name = pipeline_class(place, revision=revision)
    own = PIPELINES.get(name)
    if own is None:
        latent = name in LATENT_PIPELINES
        reader: Any = LatentVDMPipeline if latent else VDMPipeline
        taken: LikelihoodPipeline = reader.from_diffusers(place, num_levels, revision=revision, **overrides)
        return taken
    if overrides:
        raise ConfigurationError(
            f"{', '.join(overrides)} is for checkpoints of diffusers; a {own.__name__}'s own config says it: leave it "
            f"out."
        )
    pipeline: LikelihoodPipeline = own.from_pretrained(place, revision=revision)
    if num_levels not in (None, pipeline.num_levels):
        raise ConfigurationError(
            f"num_levels is {num_levels}, and the model's decoder knows {pipeline.num_levels}: with others it would "
            f"be another model. Leave it out."
        )
    return pipeline
