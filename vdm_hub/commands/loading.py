"""A pipeline from a folder or a Hub id, with an error that a person can read."""

from __future__ import annotations

from pathlib import Path

import torch

from vdm_hub.errors import ConfigurationError, VDMHubError
from vdm_hub.pipeline_vdm import VDMPipeline


def load_pipeline(name: str) -> VDMPipeline:
    """Load a pipeline onto the GPU, where there is one.

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
        pipeline: VDMPipeline = VDMPipeline.from_pretrained(str(folder) if looks_local else name)
    except VDMHubError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        cause = " ".join(str(error).split())[:400].rstrip(".")
        raise ConfigurationError(
            f"the pipeline {name!r} can't be loaded: {cause}. Check the folder or the Hub id, and the network."
        ) from error
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
