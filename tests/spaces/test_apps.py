"""The app of each kind of model, without a browser: what its buttons call."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runs import ROOT
from spaces.browser import needs_gradio
from spaces.kinds import KINDS
from vdm_hub import VDMPipeline

pytestmark = needs_gradio


def loaded(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "vdm_hub" / "spaces" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def choice_of(pipe: Any) -> Any:
    return None if pipe.condition is None else pipe.condition.choices[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_app_of_every_kind_samples_and_measures(kind: str, tmp_path: Path) -> None:
    app, pipe = loaded("app_of_images"), KINDS[kind]()
    assert app.build(pipe, "a title", "about it").config["title"] == "a title"
    frames = list(app.sample(pipe, 2, 4, 0, choice_of(pipe), 1))
    has_chain = isinstance(pipe, VDMPipeline)
    assert len(frames) == (5 if has_chain else 1) and "2 samples" in frames[-1][1]
    assert len({frame[0].size for frame in frames}) == 1
    app.one_sample(pipe, choice_of(pipe)).save(tmp_path / "sample.png")
    words, plot = app.measure(pipe, str(tmp_path / "sample.png"), None, False, 2, choice_of(pipe))
    assert "bits in all" in words and all(term in words for term in ("reconstruction", "prior"))
    assert (plot is None) == (kind == "hvae")
    if kind in ("hvae", "latent"):
        assert "no pixel" in words
    both, _ = app.measure(pipe, *[str(tmp_path / "sample.png")] * 2, False, 2, choice_of(pipe))
    assert "fewer bits" in both


def test_guidance_and_its_refusals_are_messages(tmp_path: Path) -> None:
    import gradio

    app = loaded("app_of_images")
    guided = list(app.sample(KINDS["classes"](), 1, 4, 0, "dog", 3.0))
    plain = list(app.sample(KINDS["classes"](), 1, 4, 0, "dog", 1))
    assert guided[-1][0].tobytes() != plain[-1][0].tobytes()
    with pytest.raises(gradio.Error, match="with a condition"):
        list(app.sample(KINDS["unconditional"](), 1, 4, 0, None, 3.0))
    with pytest.raises(gradio.Error, match="cow"):
        list(app.sample(KINDS["classes"](), 1, 4, 0, "cow", 1))
    with pytest.raises(gradio.Error, match="drop one"):
        app.measure(KINDS["unconditional"](), None, None, False, 2, None)
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(gradio.Error, match="3x3"):
        app.measure(KINDS["unconditional"](), str(tmp_path / "small.png"), None, False, 2, None)


def test_the_last_states_of_a_chain_are_near_the_samples() -> None:
    """What is in view is the latents' nearest levels, so that the view ends where the samples are."""
    pipe, app = KINDS["unconditional"](), loaded("app_of_images")
    *_, last, samples = [np.asarray(frame).astype(int) for frame, _ in app.sample(pipe, 4, 40, 0, None, 1)]
    first = np.asarray(next(app.sample(pipe, 4, 40, 0, None, 1))[0]).astype(int)
    assert np.abs(last - samples).mean() < np.abs(first - samples).mean()
