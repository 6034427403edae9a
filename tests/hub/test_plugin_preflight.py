"""A model with a plugin's schedule: its config says whose, and a reader without it learns that before any weight."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler

from distributions import write_metadata
from hub.server import LoopbackHub, Repository
from hub.test_idioms import blobs, run, weights_asked_for
from naming import naming
from tiny import LEVELS, quiet, randomised, sampled, tiny_pipeline, tiny_unet
from vdm_hub import RegisteredModel, VDMPipeline, VDMScheduler, registry
from vdm_hub.errors import CheckpointError, ConfigurationError, MissingPluginError
from vdm_hub.registry import SERIALISED_FIELDS

PACKAGE, VERSION = "vdm-hub-steep", "1.2"
MODULE = '''
import torch
from vdm_hub.diffusion.noise_schedules import NoiseSchedule


class Steep(NoiseSchedule):
    """gamma rises from -9 to a learned end."""

    def __init__(self, gamma_max: float = 7.0) -> None:
        super().__init__()
        self.gamma_max = gamma_max
        self.end = torch.nn.Parameter(torch.tensor(gamma_max))

    def forward(self, t):
        return -9.0 + (self.end.to(t.dtype) + 9.0) * t

    def to_config(self):
        return {"gamma_max": self.gamma_max}
'''

READ = """
import json
import torch
torch.set_num_threads(1)  # sums of floats depend on it
from diffusers import DiffusionPipeline
from vdm_hub import RegisteredModel, VDMPipeline, VDMScheduler
from tiny import quiet, sampled
said, answers = {}, {}
for repo in ("me/fixed", "me/carried", "me/denied"):
    for cls in (VDMPipeline, DiffusionPipeline):
        try:
            answers[f"{cls.__name__} {repo}"] = sampled(quiet(cls.from_pretrained(f"{repo}-{cls.__name__}"))).tolist()
        except Exception as error:
            said[f"{cls.__name__} {repo}"] = [type(error).__name__, isinstance(error, ImportError), str(error)]
brought = VDMScheduler(num_levels=17)
pipe = VDMPipeline.from_pretrained("me/brought", scheduler=brought, noise_schedule=None)
print("ANSWER" + json.dumps([said, answers, pipe.scheduler is brought and pipe.noise_schedule is None]))
"""


def install(folder: Path) -> Path:
    """What ``pip install`` leaves behind: a module, and the distribution's metadata."""
    (folder / "vdm_hub_steep.py").write_text(MODULE)
    return write_metadata(folder, PACKAGE, VERSION, "[vdm_hub.noise_schedules]\nsteep = vdm_hub_steep:Steep\n")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("site-packages"))


@pytest.fixture(scope="module")
def saved(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two pipelines of an author who has the plugin: its schedule in the scheduler alone, and with weights."""
    root = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(plugin)
        schedule = randomised(RegisteredModel.carrying(registry.build("noise_schedules", "steep")), 3)
        # By its name, as a user writes it, and from the schedule itself, as training does.
        by_name = VDMScheduler(num_levels=LEVELS, noise_schedule="steep")
        form = registry.serialise("noise_schedules", schedule.schedule)
        as_trained = VDMScheduler(num_levels=LEVELS, noise_schedule=form)
        assert RegisteredModel(noise_schedule="steep").config == schedule.config
        fixed = quiet(VDMPipeline(tiny_unet(), by_name))
        carried = quiet(VDMPipeline(tiny_unet(), as_trained, schedule))
        pipes = {"fixed": fixed, "carried": carried}
        for name, pipe in pipes.items():
            pipe.save_pretrained(root / name)
        denied = Path(shutil.copytree(root / "carried", root / "denied"))
        shutil.rmtree(denied / "noise_schedule")
        index = json.loads((denied / "model_index.json").read_text())
        (denied / "model_index.json").write_text(json.dumps(index | {"noise_schedule": [None, None]}))
        yield {"folders": root, "samples": {name: sampled(pipe).tolist() for name, pipe in pipes.items()}}
    sys.modules.pop("vdm_hub_steep", None)


@pytest.fixture(scope="module")
def readers(saved: dict[str, Any], plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    with LoopbackHub() as hub:
        for name in ("fixed", "carried", "denied"):
            for repo in (f"{name}-VDMPipeline", f"{name}-DiffusionPipeline", "brought"):
                hub.repositories[f"me/{repo}"] = Repository()
                hub.repositories[f"me/{repo}"].commit("main", "first", blobs(saved["folders"] / name))
        answers["without"] = run(READ, **hub.environment(tmp_path_factory.mktemp("without")))
        answers["calls"] = list(hub.calls)
        with_plugin = READ.replace("import json", f"import json, sys; sys.path.insert(0, {str(plugin)!r})", 1)
        answers["with"] = run(with_plugin, **hub.environment(tmp_path_factory.mktemp("with")))
    return answers


@pytest.mark.parametrize(
    "path",
    [
        "fixed/scheduler/scheduler_config.json",
        "carried/scheduler/scheduler_config.json",
        "carried/noise_schedule/config.json",
    ],
)
def test_the_config_says_whose_it_is(saved: dict[str, Any], path: str) -> None:
    form = json.loads((saved["folders"] / path).read_text())["noise_schedule"]
    assert form == {"name": "steep", "config": {}, "package": PACKAGE, "version": VERSION}


def test_a_reader_without_the_plugin_learns_its_name_by_either_door(readers: dict[str, Any]) -> None:
    said, answers, _ = readers["without"]
    assert not answers and len(said) == 6
    for kind, is_import_error, text in said.values():
        assert kind == "MissingPluginError" and is_import_error
        assert f"pip install {PACKAGE}" in text and "'steep'" in text and "unverified" in text and "\n" not in text
    for name in ("fixed", "carried"):
        assert said[f"VDMPipeline me/{name}"] == said[f"DiffusionPipeline me/{name}"]


def test_the_own_pipeline_learns_it_before_any_weight_was_asked_for(readers: dict[str, Any]) -> None:
    asked = weights_asked_for(readers["calls"])
    assert not [path for path in asked if "Pipeline/" in path]


def test_components_that_the_reader_brings_need_no_plugin(readers: dict[str, Any]) -> None:
    assert readers["without"][2] is True


def test_a_reader_with_the_plugin_gets_the_author_s_samples(readers: dict[str, Any], saved: dict[str, Any]) -> None:
    said, answers, _ = readers["with"]
    assert said.keys() == {"VDMPipeline me/denied", "DiffusionPipeline me/denied"}, (
        "it has weights, and none are there"
    )
    for kind, _, text in said.values():
        assert kind == "CheckpointError" and "noise_schedule" in text and "steep" in text
    for door in ("VDMPipeline", "DiffusionPipeline"):
        for name, samples in saved["samples"].items():
            assert answers[f"{door} me/{name}"] == samples
    assert saved["samples"]["fixed"] != saved["samples"]["carried"]  # the weights of the schedule took part


# ---- every field, in a folder whose weights are gone ----------------------------------------------------------------


def without_weights(folder: Path, path: str = "", **fields: Any) -> Path:
    tiny_pipeline().save_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    if path:
        config = folder / path
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return folder


@pytest.mark.parametrize("field", sorted(SERIALISED_FIELDS))
def test_a_missing_plugin_is_named_for_every_field_without_weights(field: str, tmp_path: Path) -> None:
    form = {"name": "unheard_of", "config": {"a": 1}, "package": "vdm-hub-unheard-of", "version": "0.1"}
    folder = without_weights(tmp_path, "scheduler/scheduler_config.json", **{field: form})
    with pytest.raises(MissingPluginError, match=naming("'unheard_of'", "pip install vdm-hub-unheard-of")):
        VDMPipeline.from_pretrained(folder)
    with pytest.raises(OSError, match="safetensors"):  # with a scheduler of one's own, the weights are next
        VDMPipeline.from_pretrained(folder, scheduler=VDMScheduler())


@pytest.mark.parametrize("name", ["os:system", "os.system", "builtins:eval", "vdm_hub.commands", "../x", "__import__"])
@pytest.mark.parametrize("field", sorted(SERIALISED_FIELDS))
def test_a_config_can_name_no_module(field: str, name: str, tmp_path: Path) -> None:
    for form in (name, {"name": name, "config": {"command": "true"}}):
        folder = without_weights(tmp_path, "scheduler/scheduler_config.json", **{field: form})
        with pytest.raises(ConfigurationError, match=r"Known: |did you mean"):
            VDMPipeline.from_pretrained(folder)


def test_a_package_that_is_no_name_is_refused(tmp_path: Path) -> None:
    form = {"name": "steep", "package": "https://evil.example/steep.tar.gz"}
    folder = without_weights(tmp_path, "scheduler/scheduler_config.json", noise_schedule=form)
    with pytest.raises(ConfigurationError, match="no valid name"):
        VDMPipeline.from_pretrained(folder)


def test_arguments_are_checked_before_the_weights_too(tmp_path: Path) -> None:
    form = {"name": "linear", "config": {"gamma_mx": 3.0}}
    folder = without_weights(tmp_path, "scheduler/scheduler_config.json", noise_schedule=form)
    with pytest.raises(ConfigurationError, match=naming("'gamma_max'")):
        VDMPipeline.from_pretrained(folder)


def test_a_stock_sampler_s_config_is_checked_for_the_process_it_carries(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = pipe.scheduler.to_diffusers(DDIMScheduler)
    pipe.save_pretrained(tmp_path)
    assert type(VDMPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_schedule": {"name": "x", "package": "y"}}))
    with pytest.raises(MissingPluginError, match=naming("pip install y")):
        VDMPipeline.from_pretrained(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="not an object"):
        VDMPipeline.from_pretrained(tmp_path)
