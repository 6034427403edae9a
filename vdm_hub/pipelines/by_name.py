"""The pipelines of the ladder by their names, which a folder's ``model_index.json`` gives."""

from __future__ import annotations

from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.hvae import HVAEPipeline
from vdm_hub.pipelines.latent_vdm import LatentVDMPipeline
from vdm_hub.pipelines.tokens import TokenPipeline
from vdm_hub.pipelines.vdm import VDMPipeline

_CLASSES: tuple[type[LikelihoodPipeline], ...] = (HVAEPipeline, LatentVDMPipeline, TokenPipeline, VDMPipeline)

PIPELINES: dict[str, type[LikelihoodPipeline]] = {cls.__name__: cls for cls in _CLASSES}
"""The pipelines that know a likelihood, by the name of their class."""
