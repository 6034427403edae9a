"""The pipelines of the ladder by their names, which a folder's ``model_index.json`` gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdm_hub.errors import ConfigurationError
from vdm_hub.files import expanded
from vdm_hub.hub.places import INDEX, pipeline_folder
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.hvae import HVAEPipeline
from vdm_hub.pipelines.latent_vdm import LatentVDMPipeline
from vdm_hub.pipelines.tokens import TokenPipeline
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.schedulers.diffusers_checkpoints import is_latent, pipeline_class

_CLASSES: tuple[type[LikelihoodPipeline], ...] = (HVAEPipeline, LatentVDMPipeline, TokenPipeline, VDMPipeline)

PIPELINES: dict[str, type[LikelihoodPipeline]] = {cls.__name__: cls for cls in _CLASSES}
"""The pipelines that know a likelihood, by the name of their class."""


def place_of_pipeline(name: str) -> str:
    """The folder of a pipeline that a name stands for, a run's folder among them; else the name, a Hub id.

    Raises:
        ConfigurationError: It is a folder without a pipeline.
    """
    place = expanded(name)
    if not (name.startswith((".", "/", "~")) or place.is_dir()):
        return name
    folder = pipeline_folder(place)
    if not (folder / INDEX).is_file():
        raise ConfigurationError(
            f"{name} holds no pipeline (no {INDEX}): give a run's folder such as runs/digits, a pipeline's such as "
            f"runs/digits/pipeline, or a Hub id."
        )
    return str(folder)


def open_pipeline(
    place: str,
    num_levels: int | None = None,
    revision: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> LikelihoodPipeline:
    """A pipeline of ours, or one of diffusers', as `VDMPipeline.from_diffusers` takes it over.

    Args:
        place: As `place_of_pipeline` gives it.
        num_levels: K of a pipeline of diffusers, whose config does not say it; 256 for a DDPM if it isn't given.
        revision: A branch or commit on the Hub; main where not given.
        overrides: What the config of a pipeline of diffusers says wrongly: see `VDMPipeline.from_diffusers`.

    Raises:
        VDMHubError: There is none at that place, or it can't be loaded.
    """
    name = pipeline_class(place, revision=revision)
    own = PIPELINES.get(name)
    if own is None:
        reader: Any = LatentVDMPipeline if is_latent(place, revision) else VDMPipeline
        taken: LikelihoodPipeline = reader.from_diffusers(place, num_levels, revision=revision, **(overrides or {}))
        return taken
    if overrides:
        raise ConfigurationError(
            f"{', '.join(overrides)} is for checkpoints of diffusers; a {own.__name__}'s own config says it: leave it "
            f"out."
        )
    pipeline: LikelihoodPipeline = own.from_pretrained(place, revision=revision)
    return pipeline
