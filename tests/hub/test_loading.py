"""Law 5: what is saved is what is loaded, in a fresh process, from a folder and by the Hub's protocol over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import registered
from hub.server import LoopbackHub
from vdm_hub import RegisteredModel, UNetVDMModel, VDMPipeline, VDMScheduler
from vdm_hub.diffusion.learned_schedules import LearnedMonotoneSchedule

REPOSITORY = Path(__file__).resolve().parents[2]
PIPELINES = ("plain", "baked", "carried")
PLACES = ("folder", "hub", "cache")

# What every process does with a pipeline. JSON keeps each float exactly.
MEASURE = """
def measure(pipe):
    import torch
    torch.set_num_threads(1)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(3, torch.Generator().manual_seed(1), num_inference_steps=5, output_type="pt").images
    levels = torch.arange(2 * 64).reshape(2, 1, 8, 8) % 17
    report = pipe.bits_per_dim(levels, replicates=3, seed=2)
    return {"samples": images.tolist(), "terms": {k: v.tolist() for k, v in report.terms_per_image.items()}}
"""

PUBLISH = """
import sys
from huggingface_hub import create_repo, upload_folder
for repo, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    create_repo(repo)
    upload_folder(repo_id=repo, folder_path=folder)
"""

LOAD = (
    MEASURE
    + """
import json, sys
from diffusers import DiffusionPipeline
from vdm_hub import RegisteredModel, UNetVDMModel, VDMPipeline, VDMScheduler
answers = {}
for name, place in zip(sys.argv[1::2], sys.argv[2::2]):
    if name == "stock":
        pipe = DiffusionPipeline.from_pretrained(place)
        answers[name] = [type(part).__name__ for part in (pipe, pipe.unet, pipe.scheduler)]
        continue
    pipes = [cls.from_pretrained(place) for cls in (DiffusionPipeline, VDMPipeline)]
    parts = {"unet": UNetVDMModel, "scheduler": VDMScheduler}
    parts |= {"noise_schedule": RegisteredModel} if name == "carried" else {}
    pipes.append(VDMPipeline(**{part: cls.from_pretrained(place, subfolder=part) for part, cls in parts.items()}))
    assert all(type(pipe) is VDMPipeline for pipe in pipes)
    answers[name] = [measure(pipe) for pipe in pipes]
print(json.dumps(answers))
"""
)
LOADERS = ("DiffusionPipeline", "VDMPipeline", "its parts")


def build_pipeline(kind: str) -> VDMPipeline:
    """A pipeline whose network and schedule have been moved from where they start."""
    torch.manual_seed(0)
    unet = UNetVDMModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        fourier_features=(3, 4),
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    unet.eval()
    schedule = registered.learned("learned_monotone", hidden_features=1024)
    assert isinstance(schedule, LearnedMonotoneSchedule)
    if kind == "plain":
        return VDMPipeline(unet, VDMScheduler(num_levels=17, prediction_type="v_prediction"))
    if kind == "carried":
        scheduler = VDMScheduler(num_levels=17, noise_schedule="learned_monotone")
        return VDMPipeline(unet, scheduler, RegisteredModel.carrying(schedule))
    scheduler = VDMScheduler(num_levels=17, noise_schedule="learned_monotone")
    scheduler.process.schedule.load_state_dict(schedule.state_dict())  # type: ignore[union-attr]
    return VDMPipeline(unet, VDMScheduler(**scheduler.process.fields()))


def run(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    path = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment | path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in PIPELINES:
        build_pipeline(kind).save_pretrained(folder / kind)
    _stock_pipeline().save_pretrained(folder / "stock")
    return {kind: folder / kind for kind in (*PIPELINES, "stock")}


def _stock_pipeline() -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return DDPMPipeline(unet, DDPMScheduler())


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What fresh processes measured, by the place they loaded from; and the calls that the Hub saw."""
    cache = tmp_path_factory.mktemp("cache")
    repositories = {kind: f"me/{kind}" for kind in folders}
    answers: dict[str, Any] = {}

    def load(places: dict[str, Any], **environment: str) -> Any:
        return json.loads(run(LOAD, *(str(x) for pair in places.items() for x in pair), **environment))

    answers["folder"] = load(folders, **os.environ | {"HF_HUB_OFFLINE": "1"})
    with LoopbackHub() as hub:
        environment = hub.environment(cache)
        published = [str(x) for kind, repository in repositories.items() for x in (repository, folders[kind])]
        run(PUBLISH, *published, **hub.environment(tmp_path_factory.mktemp("publisher")))
        first = len(hub.calls)
        answers["hub"] = load(repositories, **environment)
        answers["calls"] = hub.calls[first:]
    # The Hub is gone by now.
    answers["cache"] = load(repositories, **environment | {"HF_HUB_OFFLINE": "1"})
    return answers


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    here: dict[str, Any] = {}
    exec(MEASURE, here)
    return {kind: here["measure"](build_pipeline(kind)) for kind in PIPELINES}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", PIPELINES)
def test_what_is_saved_is_what_is_loaded(
    loaded: dict[str, Any], original: dict[str, Any], kind: str, place: str, loader: str
) -> None:
    """Same samples bit for bit from the same seed, same likelihood."""
    measured = loaded[place][kind][LOADERS.index(loader)]
    assert measured["samples"] == original[kind]["samples"]
    assert measured["terms"] == original[kind]["terms"]


def test_the_pipelines_differ(original: dict[str, Any]) -> None:
    """Or the law would hold for a loader that ignores the schedule; a baked one is the carried one at its knots."""
    plain, baked, carried = (torch.tensor(original[kind]["terms"]["diffusion"]) for kind in PIPELINES)
    assert not torch.allclose(plain, carried, rtol=0.01)
    torch.testing.assert_close(baked, carried, rtol=0.01, atol=0.01)


def test_the_files_came_over_http(loaded: dict[str, Any]) -> None:
    downloaded = {call.path.split("/resolve/")[0].lstrip("/") for call in loaded["calls"] if call.route == "resolve"}
    assert downloaded == {f"me/{kind}" for kind in (*PIPELINES, "stock")}
    assert any(call.path.endswith("noise_schedule/diffusion_pytorch_model.safetensors") for call in loaded["calls"])
    assert {call.route for call in loaded["calls"]} <= {"model_info", "model_info_at_revision", "resolve", "tree"}


@pytest.mark.parametrize("place", PLACES)
def test_other_pipelines_load_as_before(loaded: dict[str, Any], place: str) -> None:
    assert loaded[place]["stock"] == ["DDPMPipeline", "UNet2DModel", "DDPMScheduler"]


@pytest.mark.parametrize("kind", PIPELINES)
def test_model_index_names_only_diffusers_and_the_core(folders: dict[str, Path], kind: str) -> None:
    index = json.loads((folders[kind] / "model_index.json").read_text())
    assert index["_class_name"] == "VDMPipeline"
    parts = {key: value for key, value in index.items() if not key.startswith("_")}
    assert parts == {
        "unet": ["vdm_hub", "UNetVDMModel"],
        "scheduler": ["vdm_hub", "VDMScheduler"],
        "noise_schedule": ["vdm_hub", "RegisteredModel"] if kind == "carried" else [None, None],
        "forward_process": [None, None],
    }


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_folder_holds_json_and_safetensors_alone(folders: dict[str, Path], kind: str) -> None:
    suffixes = {path.suffix for path in folders[kind].rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    with_weights = {path.parent.name for path in folders[kind].rglob("*.safetensors")}
    assert with_weights == {"unet"} | ({"noise_schedule"} if kind == "carried" else set())


def test_a_learned_schedule_is_published_as_a_table(folders: dict[str, Path]) -> None:
    config = json.loads((folders["baked"] / "scheduler" / "scheduler_config.json").read_text())
    assert config["noise_schedule"]["name"] == "tabulated"
    knots = torch.tensor(config["noise_schedule"]["config"]["gammas"], dtype=torch.float64)
    with torch.no_grad():
        gamma = registered.learned("learned_monotone", hidden_features=1024)(
            torch.linspace(0, 1, len(knots), dtype=torch.float64)
        )
    torch.testing.assert_close(knots, gamma.double(), rtol=1e-12, atol=1e-12)
