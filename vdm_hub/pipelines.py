"""The pipelines of the ladder by their names, which a folder's ``model_index.json`` gives."""

from __future__ import annotations

from vdm_hub.likelihood_pipeline import LikelihoodPipeline
from vdm_hub.pipeline_hvae import HVAEPipeline
from vdm_hub.pipeline_latent_vdm import LatentVDMPipeline
from vdm_hub.pipeline_vdm import VDMPipeline

_CLASSES: tuple[type[LikelihoodPipeline], ...] = (HVAEPipeline, LatentVDMPipeline, VDMPipeline)

PIPELINES: dict[str, type[LikelihoodPipeline]] = {cls.__name__: cls for cls in _CLASSES}
"""All that know a likelihood."""
