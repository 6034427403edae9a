"""Importing the package makes diffusers know its classes, and changes nothing that was there before."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import diffusers
import diffusers.pipelines
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import fork_server
import vdm_hub
from naming import naming
from tiny import tiny_unet_2d
from vdm_hub.errors import VDMHubError
from vdm_hub.hub.install_hint import FORMER_HINTS, INSTALL_HINT
from vdm_hub.pipelines.registration import CLASSES, register

REPOSITORY = Path(__file__).resolve().parents[2]


def in_a_fresh_process(script: str) -> str:
    done = subprocess.run(
        [*fork_server.NEW, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_is_found_where_diffusers_looks(name: str) -> None:
    cls = getattr(vdm_hub, name)
    assert getattr(diffusers, name) is cls
    assert diffusers.pipelines.vdm_hub is getattr(diffusers.pipelines, INSTALL_HINT) is vdm_hub
    # Wire format: the name of the library in model_index.json.
    assert cls.__module__ == "vdm_hub" and name in vdm_hub.__all__


def test_diffusers_finds_its_load_methods_in_the_package() -> None:
    assert vdm_hub.ModelMixin is ModelMixin and vdm_hub.SchedulerMixin is SchedulerMixin


def test_registering_again_is_silent_and_changes_nothing() -> None:
    before = {name: getattr(diffusers, name) for name in CLASSES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register("vdm_hub")
    assert before == {name: getattr(diffusers, name) for name in CLASSES}


@pytest.mark.parametrize(
    "named", [[], ["diffusers", "UNet2DModel"], [None], ["pipeline"], [[], "X"], ["os", "x"]], ids=str
)
def test_a_list_in_a_pipeline_s_index_that_names_no_class_is_refused(named: list[Any], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": named}))
    with pytest.raises((VDMHubError, OSError), match=naming("model_index.json")):
        DiffusionPipeline.from_pretrained(tmp_path)


PLANTED = """
import json, sys, tempfile, types, warnings
import diffusers, diffusers.pipelines
class VDMPipeline(diffusers.DDPMPipeline):
    pass
planted = types.ModuleType("diffusers.pipelines.vdm_hub")
diffusers.VDMPipeline, diffusers.pipelines.vdm_hub = VDMPipeline, planted
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import vdm_hub
unet = vdm_hub.UNetVDMModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4
)
with tempfile.TemporaryDirectory() as folder:
    vdm_hub.VDMPipeline(unet, vdm_hub.VDMScheduler(num_levels=17)).save_pretrained(folder)
    parts = {"unet": vdm_hub.UNetVDMModel, "scheduler": vdm_hub.VDMScheduler}
    ours = vdm_hub.VDMPipeline(**{k: cls.from_pretrained(folder, subfolder=k) for k, cls in parts.items()})
print(json.dumps({
    "kept": [diffusers.VDMPipeline is VDMPipeline, diffusers.pipelines.vdm_hub is planted, vars(planted).keys()
             == vars(types.ModuleType("x")).keys()],
    "others": diffusers.VDMScheduler is vdm_hub.VDMScheduler,
    "loaded": type(ours) is vdm_hub.VDMPipeline and type(ours.unet) is vdm_hub.UNetVDMModel,
    "warnings": [str(warning.message) for warning in caught if "vdm_hub" in str(warning.message)],
}))
"""


@pytest.mark.slow
def test_names_planted_before_the_import_are_left_alone_with_a_warning() -> None:
    """In both places that diffusers looks into: the pipelines' libraries, and the classes."""
    seen = json.loads(in_a_fresh_process(PLANTED).splitlines()[-1])
    assert all(seen["kept"]) and seen["others"] and seen["loaded"]
    cls, library = sorted(seen["warnings"])
    assert "diffusers.pipelines.vdm_hub exists already" in library and "the classes of vdm_hub" in library
    assert "diffusers.VDMPipeline exists already" in cls and "vdm_hub.VDMPipeline" in cls


ADDITIVE = """
import json
import diffusers, diffusers.pipelines, diffusers.models, diffusers.schedulers, transformers
places = (diffusers, diffusers.pipelines, diffusers.models, diffusers.schedulers, transformers)
before = [dict(vars(place)) for place in places]
import vdm_hub
added, changed = {}, []
for place, old in zip(places, before):
    new = vars(place)
    changed += [f"{place.__name__}.{name}" for name in old if new.get(name) is not old[name]]
    added |= {
        f"{place.__name__}.{name}": value
        for name, value in new.items()
        if name not in old and getattr(value, "__module__", getattr(value, "__name__", "")).startswith("vdm_hub")
    }
print(json.dumps([sorted(added), changed]))
"""


def test_the_import_adds_its_own_names_and_changes_no_other() -> None:
    added, changed = json.loads(in_a_fresh_process(ADDITIVE).splitlines()[-1])
    libraries = [f"diffusers.pipelines.{name}" for name in ("vdm_hub", INSTALL_HINT, *FORMER_HINTS)]
    assert added == sorted([*libraries, "diffusers.__getattr__"])  # which finds the classes
    assert changed == []


def test_a_stock_pipeline_loads_as_before(tmp_path: Path) -> None:
    unet = tiny_unet_2d()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    for loader in (DDPMPipeline, DiffusionPipeline):
        pipe = loader.from_pretrained(tmp_path)
        assert type(pipe) is DDPMPipeline
        assert type(pipe.unet) is UNet2DModel and type(pipe.scheduler) is DDPMScheduler
