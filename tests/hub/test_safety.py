"""Hostile and damaged repositories: refused before anything of them is used, with a message; nothing is unpickled."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file

from hub.faults import FAULTS
from hub.server import Blob, LoopbackHub, Repository
from hub.test_idioms import blobs, carried_pipeline, run, weights_asked_for
from naming import naming
from tiny import quiet, sampled, tiny_pipeline, tiny_unet_2d
from vdm_hub import UNetVDMModel, VDMPipeline
from vdm_hub.errors import CheckpointError, ConfigurationError, VDMHubError
from vdm_hub.hub.json_files import MAX_JSON_BYTES, MAX_JSON_DEPTH
from vdm_hub.hub.places import INDEX

UNET = "unet/diffusion_pytorch_model.safetensors"
SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKEN = "hf_" + "s" * 34


class Malice:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.mark.mkdir, ())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Of a pipeline that loads."""
    folder = tmp_path_factory.mktemp("sound")
    carried_pipeline(1).save_pretrained(folder)
    return {path: blob.content for path, blob in blobs(folder).items()}


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def changed(files: dict[str, bytes], path: str, **fields: Any) -> dict[str, bytes]:
    return files | {path: json.dumps(json.loads(files[path]) | fields).encode()}


def listing(files: dict[str, bytes], shard: object) -> dict[str, bytes]:
    """With a list of shards, the first of which is ``shard``."""
    weight_map: dict[str, object] = {"conv_in.weight": shard, "conv_in.bias": Path(UNET).name}
    return files | {SHARDS: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


Hostility = Callable[[dict[str, bytes]], dict[str, bytes]]
# What is wrong, and the words for it.
IN_FILES: dict[str, tuple[Hostility, str]] = {
    "an index that is no JSON": (lambda f: f | {INDEX: b'{"_class_name": '}, "can't be read as JSON"),
    "an index that is no text": (lambda f: f | {INDEX: b"\xff\xfe\x00"}, "can't be read as JSON"),
    "an index that is a list": (lambda f: f | {INDEX: b"[1]"}, "holds a list, not an object"),
    "an oversized index": (lambda f: f | {INDEX: b" " * (MAX_JSON_BYTES + 1)}, "10,000,001 bytes"),
    "an oversized config": (lambda f: f | {"unet/config.json": b" " * (MAX_JSON_BYTES + 1)}, "10,000,001 bytes"),
    "a malformed config": (lambda f: f | {"unet/config.json": b"{'a': 1}"}, "unet/config.json can't be read as JSON"),
    "a config that is a number": (lambda f: f | {SCHEDULER: b"3"}, "holds a int, not an object"),
    "a config nested beyond Python": (lambda f: f | {SCHEDULER: nested(200_000)}, "can't be read as JSON"),
    "a config nested beyond reason": (lambda f: f | {SCHEDULER: nested(MAX_JSON_DEPTH)}, "levels deep"),
    "an endless number": (lambda f: f | {SCHEDULER: b'{"a": ' + b"9" * 5000 + b"}"}, "can't be read as JSON"),
    "a library of its own": (lambda f: changed(f, INDEX, unet=["evil", "Net"]), "the library 'evil'"),
    "a library of the system": (lambda f: changed(f, INDEX, unet=["os", "system"]), "the library 'os'"),
    "a module of a library": (lambda f: changed(f, INDEX, unet=["diffusers.utils", "Net"]), "'diffusers.utils'"),
    "a function": (lambda f: changed(f, INDEX, unet=["diffusers", "logging"]), "no such component"),
    "a dotted class": (lambda f: changed(f, INDEX, unet=["diffusers", "utils.logging"]), "no such component"),
    "a private class": (lambda f: changed(f, INDEX, unet=["vdm_hub", "_InOwnPrecision"]), "no such component"),
    "no class": (lambda f: changed(f, INDEX, unet=["vdm_hub", "LikelihoodReport"]), "no such component"),
    "a class that is missing": (lambda f: changed(f, INDEX, unet=["diffusers", "UNet9DModel"]), "no such component"),
    "a class of the repository's": (lambda f: changed(f, INDEX, _class_name=["pipeline", "P"]), "trust_remote_code"),
    "half a class": (lambda f: changed(f, INDEX, unet=["vdm_hub"]), "not as [library, class]"),
    "a component above": (lambda f: changed(f, INDEX, **{"../unet": ["vdm_hub", "UNetVDMModel"]}), "'../unet'"),
    "a private component above": (lambda f: changed(f, INDEX, **{"_../unet": ["x", "y"]}), "'_../unet'"),
    "an absolute component": (lambda f: changed(f, INDEX, **{"/etc": ["vdm_hub", "UNetVDMModel"]}), "'/etc'"),
    "a shard above": (lambda f: listing(f, "../../x.safetensors"), "no file beside it"),
    "a shard in a folder": (lambda f: listing(f, "a/x.safetensors"), "no file beside it"),
    "an absolute shard": (lambda f: listing(f, "/etc/passwd"), "no file beside it"),
    "a shard with backslashes": (lambda f: listing(f, "..\\x.safetensors"), "no file beside it"),
    "a shard that is missing": (lambda f: listing(f, "x.safetensors"), "no file beside it"),
    "a shard that is no name": (lambda f: listing(f, 3), "no file beside it"),
    "a list of no shards": (lambda f: f | {SHARDS: b"{}"}, "no weight_map"),
    "a module for a schedule": (lambda f: changed(f, SCHEDULER, noise_schedule="os:system"), "'os:system'"),
    "a plugin": (
        lambda f: changed(f, SCHEDULER, decoder={"name": "x", "package": "vdm-hub-x"}),
        "pip install vdm-hub-x",
    ),
}
PATHS = ("../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:/evil.txt", "unet/c:evil.txt")


@pytest.mark.parametrize("what", sorted(IN_FILES))
def test_a_folder_is_refused_before_its_weights_are_read(what: str, files: dict[str, bytes], tmp_path: Path) -> None:
    hostile, words = IN_FILES[what]
    folder = written(tmp_path, hostile(files))
    (folder / UNET).write_bytes(b"weights that nobody may read yet")
    with pytest.raises(VDMHubError) as caught:
        VDMPipeline.from_pretrained(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "nobody" not in str(caught.value) and "safetensors file" not in str(caught.value)


READ = """
import json, os, sys
from pathlib import Path
from vdm_hub import VDMPipeline
said = {}
for repo in sys.argv[2:]:
    try:
        VDMPipeline.from_pretrained(repo, token=sys.argv[1])
        said[repo] = ["loaded", "loaded", ""]
    except Exception as error:
        said[repo] = [type(error).__name__, type(error).__mro__[-4].__name__, str(error)]
files = [str(path) for path in Path(os.environ["HF_HOME"]).rglob("*")]
print("ANSWER" + json.dumps([said, files]))
"""


def test_a_repository_is_refused_before_its_weights_are_downloaded(files: dict[str, bytes], tmp_path: Path) -> None:
    """The same, and paths that no folder can hold, over HTTP; and the token is in no message."""
    expected = {f"me/json-{i}": words for i, (_, words) in enumerate(IN_FILES.values())}
    expected |= {f"me/path-{i}": f"{path!r}, whose path leaves" for i, path in enumerate(PATHS)}
    with LoopbackHub() as hub:
        hub.tokens[TOKEN] = "read"
        for repo, (hostile, _) in zip(expected, IN_FILES.values(), strict=False):
            hub.repositories[repo] = Repository(private=True)
            hub.repositories[repo].commit("main", "evil", {k: Blob(v) for k, v in hostile(files).items()})
        for i, path in enumerate(PATHS):
            hub.repositories[f"me/path-{i}"] = Repository()
            content = {k: Blob(v) for k, v in (files | {path: b"evil"}).items()}
            hub.repositories[f"me/path-{i}"].commit("main", "evil", content)
        environment = hub.environment(tmp_path / "cache", token=None)
        said, cached = run(READ, TOKEN, *expected, "me/nowhere", **environment)
        calls = list(hub.calls)
    for repo, words in expected.items():
        assert words in said[repo][2], repo
    assert said.pop("me/nowhere")[0] == "HubError"
    assert not weights_asked_for(calls)
    oversized = [f"me/json-{i}" for i, what in enumerate(IN_FILES) if what.startswith("an oversized")]
    assert not [c for c in calls if c.route == "resolve" and c.path.startswith(f"/{oversized[0]}/")]
    assert not [path for path in cached if path.endswith(("evil.txt", ".safetensors"))]
    assert not [text for _, _, text in said.values() if TOKEN in text]
    assert any(call.headers.get("Authorization") == f"Bearer {TOKEN}" for call in calls)


def test_links_must_stay_within_their_folder(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = written(tmp_path / "pipeline", files)
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": 1}')
    (folder / "scheduler" / "more.json").symlink_to(folder / SCHEDULER)
    VDMPipeline.from_pretrained(folder)
    (tmp_path / "elsewhere").symlink_to(folder)
    VDMPipeline.from_pretrained(tmp_path / "elsewhere")  # where the reader's own link leads is the reader's affair
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=naming("unet/config.json")) as caught:
        VDMPipeline.from_pretrained(folder)
    assert "password" not in str(caught.value)
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=naming("unet", "link")):
        VDMPipeline.from_pretrained(folder)


def test_what_the_reader_brings_is_not_looked_at(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = written(tmp_path, files | {"unet/config.json": b"[", UNET: b"", SCHEDULER: b"{"})
    pipe = carried_pipeline(1)
    loaded = VDMPipeline.from_pretrained(folder, unet=pipe.unet, scheduler=pipe.scheduler)
    assert torch.equal(sampled(quiet(loaded)), sampled(pipe))


# ---- weights --------------------------------------------------------------------------------------------------------


def spoiled(path: Path, how: str) -> str:
    """Spoil a file of weights; returns the tensor that the message must name, or other words."""
    weights = load_file(path)
    name = next(key for key, tensor in weights.items() if key.endswith("weight") and tensor.numel() > 1)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return "truncated"
    if how == "no safetensors":
        path.write_bytes(pickle.dumps({"a": 1}))
        return "no safetensors file"
    if how == "empty":
        path.write_bytes(b"")
        return "no safetensors file"
    if how == "a pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        return "git-lfs"
    if how == "a missing tensor":
        del weights[name]
    elif how == "one too many":
        name = "evil.weight"
        weights[name] = torch.zeros(2)
    elif how == "another shape":
        weights[name] = torch.zeros(3, 3)
    else:
        weights[name].view(-1)[-1] = {"nan": math.nan, "inf": -math.inf}[how]
    save_file(weights, path)
    return name


HOWS = ("truncated", "no safetensors", "empty", "a pointer", "a missing tensor", "one too many", "another shape")


@pytest.mark.parametrize("network", ["own", "stock"])
@pytest.mark.parametrize("how", [*HOWS, "nan", "inf"])
def test_spoiled_weights_are_refused_with_the_tensor_s_name(how: str, network: str, tmp_path: Path) -> None:
    """Of our network by every door, of a stock one by the pipeline's."""
    tiny_pipeline(tiny_unet_2d() if network == "stock" else None).save_pretrained(tmp_path)
    words = spoiled(tmp_path / UNET, how)
    doors: list[Callable[[], object]] = [lambda: VDMPipeline.from_pretrained(tmp_path)]
    if network == "own":
        doors += [
            lambda: DiffusionPipeline.from_pretrained(tmp_path),
            lambda: UNetVDMModel.from_pretrained(tmp_path, subfolder="unet"),
            lambda: AutoModel.from_pretrained(tmp_path, subfolder="unet"),
        ]
    for door in doors:
        with pytest.raises(CheckpointError) as caught:
            door()
        assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_schedule_s_weights_are_checked_too(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = written(tmp_path, files)
    name = spoiled(folder / "noise_schedule" / "diffusion_pytorch_model.safetensors", "nan")
    for cls in (VDMPipeline, DiffusionPipeline):
        with pytest.raises(CheckpointError, match=name):
            cls.from_pretrained(folder)


def test_a_stock_network_from_before_renamed_attention_still_loads(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tiny_unet_2d())
    pipe.save_pretrained(tmp_path)
    weights = load_file(tmp_path / UNET)
    old_names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in weights.items():
        old = next((name.replace(new, old) for new, old in old_names.items() if new in name), name)
        renamed[old] = tensor
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / UNET)
    assert torch.equal(sampled(quiet(VDMPipeline.from_pretrained(tmp_path))), sampled(pipe))


def test_shards_load_and_their_tensors_are_counted(tmp_path: Path) -> None:
    for network in (None, tiny_unet_2d()):
        folder = tmp_path / str(network is None)
        pipe = tiny_pipeline(network)
        pipe.save_pretrained(folder, max_shard_size="5KB")
        assert len(list((folder / "unet").glob("*.safetensors"))) > 1
        assert torch.equal(sampled(quiet(VDMPipeline.from_pretrained(folder))), sampled(pipe))


def test_what_the_network_asks_for_is_what_it_gets(tmp_path: Path) -> None:
    """The reader's own arguments keep their meaning."""
    tiny_pipeline().save_pretrained(tmp_path)
    model, info = UNetVDMModel.from_pretrained(tmp_path, subfolder="unet", output_loading_info=True)
    assert isinstance(model, UNetVDMModel) and info["missing_keys"] == info["unexpected_keys"] == []
    assert UNetVDMModel.from_pretrained(tmp_path, subfolder="unet", dtype=torch.float16).dtype == torch.float16


# ---- nothing is unpickled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [VDMPipeline, DiffusionPipeline])
def test_a_pickle_beside_or_instead_of_safetensors_is_never_opened(
    loader: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    plant = pickle.dumps(Malice(mark))
    pickled = {path.replace(".safetensors", ".bin"): plant for path in files if path.endswith(".safetensors")}
    loader.from_pretrained(written(tmp_path / "beside", files | pickled))
    only = {path: content for path, content in files.items() if not path.endswith(".safetensors")}
    with pytest.raises(OSError, match="safetensors"):
        loader.from_pretrained(written(tmp_path / "instead", only | pickled))
    disguised = {path: plant if path.endswith(".safetensors") else content for path, content in files.items()}
    with pytest.raises(CheckpointError, match=naming("safetensors")):
        loader.from_pretrained(written(tmp_path / "disguised", disguised))
    assert not mark.exists()
    pickle.loads(plant)
    assert mark.exists()  # the plant works


@pytest.mark.parametrize("name", ["a/b/c/d", "no such folder/x", "a//b", "https://example.org/me/model"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_said_to_be_so(name: str) -> None:
    with pytest.raises(ConfigurationError, match="Hub id"):
        VDMPipeline.from_pretrained(name)


def test_a_folder_without_a_pipeline_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model_index\.json"):
        VDMPipeline.from_pretrained(tmp_path)


# ---- a Hub that does not answer -------------------------------------------------------------------------------------


def test_a_hub_that_fails_is_answered_from_the_cache_or_with_its_own_error(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    """What was checked once is loaded from the cache; what is not there is not loaded unchecked."""
    with LoopbackHub() as hub:
        hub.tokens[TOKEN] = "read"
        for repo in ("me/model", "me/uncached"):
            hub.repositories[repo] = Repository()
            hub.repositories[repo].commit("main", "first", {path: Blob(text) for path, text in files.items()})
        environment = hub.environment(tmp_path / "cache", token=None)
        assert run(READ, TOKEN, "me/model", **environment)[0]["me/model"][0] == "loaded"
        for fault in ("404", "429", "dropped before"):
            failure = hub.fail(at=0, fault=FAULTS[fault], times=None)
            said, _ = run(READ, TOKEN, "me/model", "me/uncached", **environment)
            assert failure.struck and said["me/model"][0] == "loaded", fault
            assert said["me/uncached"][0] == "HubError" and TOKEN not in said["me/uncached"][2], fault
            hub.heal()
        # The listing alone fails: the rest must not be loaded without it.
        hub.fail(at=1, fault=FAULTS["404"])
        said, _ = run(READ, TOKEN, "me/uncached", **environment)
        assert said["me/uncached"][0] == "HubError"
