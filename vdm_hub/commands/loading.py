"""Loading a pipeline from a folder or a Hub id, with errors that a person can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vdm_hub.errors import ConfigurationError
from vdm_hub.hub.places import RECIPE, run_folder
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.by_name import open_pipeline, place_of_pipeline
from vdm_hub.recipes.arguments import read_recipe


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
    place = place_of_pipeline(name)
    pipeline = open_pipeline(place, num_levels, revision, overrides)
    if num_levels not in (None, pipeline.num_levels):
        raise ConfigurationError(
            f"num_levels is {num_levels}, and the model's decoder knows {pipeline.num_levels}: with others it would "
            f"be another model. Leave it out."
        )
    if (run := run_folder(Path(place))) is not None:
        read_recipe(run / RECIPE)  # a run that is said to be another than it was is no one's to measure
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
