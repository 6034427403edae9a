"""Damaged files behind every door: a paragraph of ours, or a model; nothing raw, nothing written, no memory taken."""

from __future__ import annotations

import resource
import shutil
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.damage import damaged_header, damaged_json
from tiny import tiny_pipeline, tiny_unet, tiny_unet_2d
from vdm_hub import (
    AutoencoderKLFirstStage,
    HVAEPipeline,
    LatentVDMPipeline,
    MarkovianHVAE,
    RegisteredModel,
    UNetVDMModel,
    VDMPipeline,
    VDMScheduler,
)
from vdm_hub.diffusion.learned_schedules import LearnedMonotoneSchedule
from vdm_hub.errors import MAX_MESSAGE, VDMHubError

SECONDS, MEBIBYTES = 5.0, 200
"""What one damaged file may cost at most; a sound one costs a hundredth of a second and nothing."""


@dataclass(frozen=True)
class Door:
    """Something that loads a folder."""

    name: str
    load: Callable[[Path], Any]


def component(cls: Any, folder: str) -> Door:
    return Door(cls.__name__, lambda root: cls.from_pretrained(root, subfolder=folder))


PIPELINES: dict[str, list[Door]] = {
    "carried": [
        Door("VDMPipeline", VDMPipeline.from_pretrained),
        Door("DiffusionPipeline", DiffusionPipeline.from_pretrained),
        component(VDMScheduler, "scheduler"),
        component(UNetVDMModel, "unet"),
        component(RegisteredModel, "noise_schedule"),
    ],
    "stock": [
        Door("VDMPipeline", VDMPipeline.from_pretrained),
        Door("DiffusionPipeline", DiffusionPipeline.from_pretrained),
    ],
    "ddpm": [Door("from_diffusers", lambda root: VDMPipeline.from_diffusers(root, num_levels=17))],
    "hvae": [Door("HVAEPipeline", HVAEPipeline.from_pretrained), component(MarkovianHVAE, "hvae")],
    "latent": [
        Door("LatentVDMPipeline", LatentVDMPipeline.from_pretrained),
        component(AutoencoderKLFirstStage, "first_stage"),
    ],
}


def built(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "carried":
        schedule = RegisteredModel.carrying(LearnedMonotoneSchedule(hidden_features=4))
        return VDMPipeline(tiny_unet(), VDMScheduler(num_levels=17, noise_schedule="learned_monotone"), schedule)
    if kind == "stock":
        return tiny_pipeline(tiny_unet_2d())
    if kind == "ddpm":
        return DDPMPipeline(tiny_unet_2d(), DDPMScheduler(num_train_timesteps=20))
    if kind == "hvae":
        return HVAEPipeline(
            MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(4,)], block_out_channels=(8,))
        )
    config = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    stage = AutoencoderKLFirstStage(config | {"latent_channels": 2}, sample_size=8, num_levels=17)
    unet = UNetVDMModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4
    )
    return LatentVDMPipeline(stage, unet, VDMScheduler(num_levels=17))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sound")
    for kind in PIPELINES:
        built(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in PIPELINES}


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    yield found
    print(f"\n{sum(found.values())} damaged files: {dict(found.most_common())}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused_or_loaded(door: Door, folder: Path) -> str:
    """What came of it; anything but a model or a paragraph of ours fails the test."""
    before, held, started = contents(folder), memory(), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            door.load(folder)
        outcome = "loaded"
    except VDMHubError as error:
        text = str(error)
        assert text and len(text) <= MAX_MESSAGE and "\n" not in text, text
        assert not any(unicodedata.category(character) in ("Cc", "Cf") for character in text), text
        assert "Traceback" not in text
        outcome = type(error).__name__
    assert contents(folder) == before, "loading wrote something"
    assert time.perf_counter() - started < SECONDS
    assert memory() - held < MEBIBYTES
    return outcome


def try_all(kind: str, sound: Path, place: Path, draw: Any, counts: Counter[str]) -> None:
    """Damage one file of a pipeline, and try every door."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    files = sorted(path for path in place.rglob("*") if path.suffix in (".json", ".safetensors"))
    chosen = draw(st.sampled_from(files))
    damage = damaged_json if chosen.suffix == ".json" else damaged_header
    chosen.write_bytes(draw(damage(chosen.read_bytes())))
    for door in PIPELINES[kind]:
        counts[f"{refused_or_loaded(door, place)}"] += 1


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("kind", sorted(PIPELINES))
@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=QUIET, derandomize=True)
def test_a_damaged_pipeline_is_refused_in_one_paragraph(
    kind: str, folders: dict[str, Path], counts: Counter[str], data: st.DataObject
) -> None:
    try_all(kind, folders[kind], folders[kind].with_name(f"{kind}-damaged"), data.draw, counts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(PIPELINES))
@given(data=st.data())
@settings(max_examples=1500, deadline=None, suppress_health_check=QUIET)
def test_a_damaged_pipeline_is_refused_however_often_it_is_tried(
    kind: str, folders: dict[str, Path], counts: Counter[str], data: st.DataObject
) -> None:
    try_all(kind, folders[kind], folders[kind].with_name(f"{kind}-damaged"), data.draw, counts)
