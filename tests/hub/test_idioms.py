"""Every way to load from a Hub id: over HTTP, from the cache, by revision and variant, with and without vdm_hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers.pipelines
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

import vdm_hub
from hub.server import Blob, Call, LoopbackHub, Repository
from tiny import LEVELS, quiet, randomised, sampled, tiny_pipeline, tiny_unet, tiny_unet_2d
from vdm_hub import RegisteredModel, VDMPipeline, VDMScheduler
from vdm_hub.hub.install_hint import FORMER_HINTS, INSTALL_HINT, add_install_hint
from vdm_hub.version import HOW_TO_INSTALL

pytestmark = pytest.mark.slow  # tests/hub/test_loading.py loads from a folder, a Hub and its cache, too
ROOT = Path(__file__).resolve().parents[2]
REPO, STOCK = "me/vdm-digits", "me/stock-network"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PLACES = ("hub", "local_files_only", "offline")

READ = """
import json, sys, tempfile
import torch
torch.set_num_threads(1)
import diffusers
from diffusers import AutoModel, DiffusionPipeline
import vdm_hub
from vdm_hub import RegisteredModel, UNetVDMModel, VDMPipeline, VDMScheduler
from tiny import quiet, sampled

repo, stock, commit, place = sys.argv[1:]
where = {"local_files_only": True} if place == "local_files_only" else {}
measured, kinds = {}, {}

def measure(name, pipe):
    measured[name] = sampled(quiet(pipe)).tolist()
    kinds[name] = [type(pipe).__name__, *(f"{k}={type(v).__name__}" for k, v in sorted(pipe.components.items()))]

def parts(network, **revision):
    unet = network.from_pretrained(repo, subfolder="unet", **where, **revision)
    schedule = RegisteredModel.from_pretrained(repo, subfolder="noise_schedule", **where, **revision)
    return VDMPipeline(unet, VDMScheduler.from_pretrained(repo, subfolder="scheduler", **where, **revision), schedule)

for name, revision in {"main": {}, "branch": {"revision": "older"}, "commit": {"revision": commit}}.items():
    measure(f"DiffusionPipeline/{name}", DiffusionPipeline.from_pretrained(repo, **where, **revision))
    measure(f"VDMPipeline/{name}", VDMPipeline.from_pretrained(repo, **where, **revision))
    measure(f"parts/{name}", parts(UNetVDMModel, **revision))
    measure(f"AutoModel/{name}", parts(AutoModel, **revision))
measure("AutoModel/schedule", VDMPipeline.from_pretrained(
    repo, noise_schedule=AutoModel.from_pretrained(repo, subfolder="noise_schedule", **where), **where
))
with tempfile.TemporaryDirectory() as folder:
    VDMPipeline.from_pretrained(repo, **where).save_pretrained(folder)
    for cls in (DiffusionPipeline, VDMPipeline):
        measure(f"{cls.__name__}/saved again", cls.from_pretrained(folder))

half = {"variant": "fp16", "dtype": torch.float16}
networks = {
    "DiffusionPipeline": DiffusionPipeline.from_pretrained(repo, **where, **half).unet,
    "VDMPipeline": VDMPipeline.from_pretrained(repo, **where, **half).unet,
    "UNetVDMModel": UNetVDMModel.from_pretrained(repo, subfolder="unet", **where, **half),
    "AutoModel": AutoModel.from_pretrained(repo, subfolder="unet", **where, **half),
    "cast": VDMPipeline.from_pretrained(repo, dtype=torch.float16, **where).unet,
    "variant alone": VDMPipeline.from_pretrained(repo, variant="fp16", **where).unet,
}
weights = {
    name: [str(network.dtype), {key: tensor.double().tolist() for key, tensor in network.state_dict().items()}]
    for name, network in networks.items()
}
pipe = VDMPipeline.from_pretrained(stock, **where)
measure("stock network", pipe)
print("ANSWER" + json.dumps([measured, kinds, weights]))
"""

WITHOUT_VDM_HUB = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "vdm_hub":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from diffusers import DDPMPipeline, DiffusionPipeline
said = []
for cls in (DiffusionPipeline, DDPMPipeline):
    try:
        cls.from_pretrained(sys.argv[1])
    except Exception as error:
        said.append([type(error).__name__, str(error)])
assert not any(name.partition(".")[0] == "vdm_hub" for name in sys.modules)
print("ANSWER" + json.dumps(said))
"""


def run(script: str, *arguments: str, **environment: str) -> Any:
    places = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, env=environment | places, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("ANSWER")[2])


def carried_pipeline(seed: int) -> VDMPipeline:
    schedule = randomised(RegisteredModel("learned_monotone"), seed)
    scheduler = VDMScheduler(num_levels=LEVELS, noise_schedule="learned_monotone")
    return quiet(VDMPipeline(randomised(tiny_unet(), seed), scheduler, schedule))


def blobs(folder: Path) -> dict[str, Blob]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix == ".safetensors") for path in files
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is published: main with a variant in half precision, an older revision, and a stock network."""
    root = tmp_path_factory.mktemp("published")
    carried_pipeline(1).save_pretrained(root / "older")
    carried_pipeline(2).save_pretrained(root / "main")
    carried_pipeline(2).to(torch.float16).save_pretrained(root / "main", variant="fp16")
    tiny_pipeline(tiny_unet_2d()).save_pretrained(root / "stock")
    for name in ("older", "main", "stock"):
        add_install_hint(root / name)
    return {name: root / name for name in ("older", "main", "stock")}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each reader measured, by its place; and the calls that the Hub saw of it."""
    answers: dict[str, Any] = {}
    cache = tmp_path_factory.mktemp("cache")
    with LoopbackHub() as hub:
        published = hub.repositories[REPO] = Repository()
        oldest = published.commit("main", "first", blobs(folders["older"]))
        published.commit("main", "second", blobs(folders["main"]))
        published.commit("older", "first", blobs(folders["older"]))
        hub.repositories[STOCK] = Repository()
        hub.repositories[STOCK].commit("main", "first", blobs(folders["stock"]))
        environment = hub.environment(cache)
        for place in PLACES[:2]:
            first = len(hub.calls)
            answers[place] = run(READ, REPO, STOCK, oldest.oid, place, **environment)
            answers[f"calls of {place}"] = hub.calls[first:]
        first = len(hub.calls)
        stranger = hub.environment(tmp_path_factory.mktemp("stranger"))
        answers["without vdm_hub"] = run(WITHOUT_VDM_HUB, REPO, **stranger)
        answers["calls of without vdm_hub"] = hub.calls[first:]
    # The Hub is gone by now.
    answers["offline"] = run(READ, REPO, STOCK, oldest.oid, "offline", **environment | {"HF_HUB_OFFLINE": "1"})
    return answers


@pytest.mark.parametrize("place", PLACES)
def test_every_idiom_gives_the_same_samples(loaded: dict[str, Any], folders: dict[str, Path], place: str) -> None:
    """Bit for bit those of the revision asked for; another revision gives others."""
    measured, kinds, _ = loaded[place]
    newer, older = (sampled(quiet(VDMPipeline.from_pretrained(folders[name]))).tolist() for name in ("main", "older"))
    assert newer != older
    for idiom in ("DiffusionPipeline", "VDMPipeline", "parts", "AutoModel"):
        assert measured[f"{idiom}/main"] == newer, idiom
        assert measured[f"{idiom}/branch"] == measured[f"{idiom}/commit"] == older, idiom
    assert measured["AutoModel/schedule"] == newer
    assert measured["DiffusionPipeline/saved again"] == measured["VDMPipeline/saved again"] == newer
    of_parts = ["VDMPipeline", "forward_process=NoneType", "noise_schedule=RegisteredModel", "scheduler=VDMScheduler"]
    of_parts += ["text_encoder=NoneType", "tokenizer=NoneType"]
    stock = [*(part.replace("=RegisteredModel", "=NoneType") for part in of_parts), "unet=UNet2DModel"]
    assert kinds.pop("stock network") == stock
    assert {tuple(kind) for kind in kinds.values()} == {(*of_parts, "unet=UNetVDMModel")}


@pytest.mark.parametrize("place", PLACES)
def test_a_variant_is_its_own_file_and_a_dtype_a_cast(
    loaded: dict[str, Any], folders: dict[str, Path], place: str
) -> None:
    weights = loaded[place][2]
    half = load_file(folders["main"] / WEIGHTS.replace("model.", "model.fp16."))
    expected = {name: tensor.double().tolist() for name, tensor in half.items()}
    assert half["conv_in.weight"].dtype == torch.float16
    for idiom, (dtype, found) in weights.items():
        assert found == expected, idiom
        assert dtype == ("torch.float32" if idiom == "variant alone" else "torch.float16"), idiom


def test_a_stock_network_in_a_vdm_pipeline_loads_alike(loaded: dict[str, Any], folders: dict[str, Path]) -> None:
    expected = sampled(quiet(VDMPipeline.from_pretrained(folders["stock"]))).tolist()
    assert all(loaded[place][0]["stock network"] == expected for place in PLACES)


def test_only_the_first_reader_downloaded_anything(loaded: dict[str, Any]) -> None:
    downloaded = [call.path for call in loaded["calls of hub"] if call.route == "resolve" and call.method == "GET"]
    assert any(path.endswith("model.fp16.safetensors") for path in downloaded)
    assert sum(path.endswith(WEIGHTS) for path in downloaded) == 3  # main, older, and the stock network, once each
    assert loaded["calls of local_files_only"] == []


# ---- readers without vdm_hub ----------------------------------------------------------------------------------------


def weights_asked_for(calls: list[Call]) -> list[str]:
    return [call.path for call in calls if call.path.endswith((".safetensors", ".bin"))]


def test_a_reader_without_vdm_hub_is_told_what_to_install(loaded: dict[str, Any]) -> None:
    for error, text in loaded["without vdm_hub"]:
        assert error == "ValueError"
        assert INSTALL_HINT in text and HOW_TO_INSTALL in text and REPO in text
        assert "Without it, vdm_hub.py as defined in `model_index.json` does not exist" in text
    assert len(loaded["without vdm_hub"]) == 2
    assert loaded["calls of without vdm_hub"] and not weights_asked_for(loaded["calls of without vdm_hub"])


def test_the_hint_stays_what_published_repositories_hold() -> None:
    """Every later version must know it, or it can't load what this one published."""
    assert INSTALL_HINT == (
        "the package vdm_hub: install it (`pip install .` in a clone of its source, or `pip install` of its wheel), "
        "and `import vdm_hub` before you load. Without it, vdm_hub"
    )
    assert FORMER_HINTS == (
        "the package vdm_hub: run `pip install vdm-hub`, and `import vdm_hub` before you load. Without it, vdm_hub",
    )
    for hint in (INSTALL_HINT, *FORMER_HINTS):
        assert getattr(diffusers.pipelines, hint) is vdm_hub, "what any version has published, this one loads"


def test_no_text_promises_an_index_where_the_package_is_not() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in (root / "README.md", *(root / "docs").rglob("*.md"), *(root / "model_cards").glob("*/README.md")):
        assert not re.search(r"pip install .?vdm-hub|pypi\.org/project/vdm", path.read_text()), path
    for path in (*(root / "vdm_hub").rglob("*.py"), *(root / "vdm_hub").rglob("*.jinja")):
        promise = re.search(r"pip install .?vdm-hub|pypi\.org/project/vdm", path.read_text())
        assert promise is None or path.name == "install_hint.py", f"{path}: only what was once published says so"


def test_the_hint_is_the_first_entry_is_added_once_and_changes_nothing_else(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    before = json.loads((tmp_path / "model_index.json").read_text())
    add_install_hint(tmp_path)
    text = (tmp_path / "model_index.json").read_text()
    add_install_hint(tmp_path)
    assert (tmp_path / "model_index.json").read_text() == text
    after = json.loads(text)
    lists = [key for key, value in after.items() if isinstance(value, list)]
    assert lists[0] == "_requires" and after.pop("_requires") == [INSTALL_HINT, None]
    assert after == before
    loaded = VDMPipeline.from_pretrained(tmp_path)
    loaded.scheduler = loaded.scheduler.to_diffusers(DDPMScheduler)
    loaded.save_pretrained(tmp_path / "again")
    assert not re.search("_requires|pip", (tmp_path / "again" / "model_index.json").read_text())
