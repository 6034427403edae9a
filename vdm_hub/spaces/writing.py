"""The files of a Space: the app, what it is told of the model, its card and its requirements."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from vdm_hub.data.kinds import IMAGES, TOKENS
from vdm_hub.hub.outgoing import forget_places
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.publishing.contents import copy_pipeline
from vdm_hub.publishing.markdown import visible
from vdm_hub.publishing.wording import wording_of
from vdm_hub.spaces.requirements import FILE, as_text

MODEL = "model"
"""The folder of a Space that carries its pipeline, where that is on no Hub."""
TOLD = "space.json"
GRADIO = "6.31.0"
"""The version of gradio that the apps are tested with, and that a Space asks for."""

_APPS = {IMAGES.name: "app_of_images.py", TOKENS.name: "app_of_texts.py"}


@dataclass(frozen=True)
class Space:
    """A Space of a model.

    Attributes:
        pipeline: The model, loaded.
        model: Its Hub id; or its folder, where it is on no Hub.
        title: Over the app.
        requirements: A line for each package: see `vdm_hub.spaces.requirements.requirements`.
        loading: What `vdm_hub.load_pipeline` is given besides, as plain JSON: the revision of a Hub id, and what a
            checkpoint of diffusers does not say itself.
    """

    pipeline: LikelihoodPipeline
    model: str | Path
    title: str
    requirements: dict[str, str]
    loading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether the model lies in a folder."""
        return isinstance(self.model, Path)


def write_space(space: Space, folder: Path, *, carries: bool = True) -> list[str]:
    """Write a Space into a new folder.

    Args:
        space: What is to be in it.
        folder: Where to.
        carries: Whether to copy a model that lies in a folder into it; else the app loads that very folder.

    Returns:
        The paths of its files within the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = str(space.model)
    if isinstance(space.model, Path):
        model = MODEL if carries else str(space.model.resolve())
        if carries:
            copy_pipeline(space.model, folder / MODEL)
            forget_places(folder / MODEL)
    told = {"model": model, "loading": dict(space.loading), "title": space.title, "about": _about(space)}
    (folder / TOLD).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
    shutil.copyfile(Path(__file__).with_name(_APPS[space.pipeline.kind.name]), folder / "app.py")
    (folder / FILE).write_text(as_text(space.requirements), "utf-8")
    (folder / "README.md").write_text(_card(space), "utf-8")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _about(space: Space) -> str:
    """What stands below the title, as Markdown."""
    pipeline = space.pipeline
    shape = "x".join(map(str, pipeline.shape[1:] if pipeline.kind is IMAGES else pipeline.shape))
    of = f"images of {shape} pixels" if pipeline.kind is IMAGES else f"texts, in windows of {shape} tokens"
    where = "" if space.is_local else f": [{space.model}](https://huggingface.co/{space.model})"
    return f"{wording_of(pipeline).kind} of {of}{where}"


def _card(space: Space) -> str:
    """The README of the Space, whose head is what the Hub reads."""
    data = SpaceCardData(
        title=space.title,
        emoji="🎲",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version="3.11",
        app_file="app.py",
        models=None if space.is_local else [str(space.model)],
        tags=["vdm_hub", *wording_of(space.pipeline).tags],
    )
    where = f", which lies in `{MODEL}/`" if space.is_local else ""
    return f"""---
{data.to_yaml()}
---

# {visible(space.title)}

{_about(space)}{where}. The app draws samples, with the chain in view, and measures the bits of what you bring.

Made by `vdm-hub space`. `{TOLD}` names the model; `{FILE}` what it needs, beside gradio {GRADIO}. Here as there,
`python app.py` runs it. Of a private model, give the Space a secret `HF_TOKEN` that may read it.
"""
