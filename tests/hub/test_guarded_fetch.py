"""A server that announces or sends other files than it lists: nothing of it is used, nothing is written elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hub.faults import FAULTS
from hub.messages import Response
from hub.server import Blob, LoopbackHub, Repository
from hub.test_idioms import blobs, run
from tiny import tiny_pipeline, tiny_unet_2d

# Each line that comes in names a repository and a door; out goes what came of it, and what the cache holds.
READ = """
import json, os, sys
from pathlib import Path
from diffusers import DiffusionPipeline
from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler
from vdm_hub.errors import VDMHubError
doors = {
    "VDMPipeline": VDMPipeline.from_pretrained,
    "DiffusionPipeline": DiffusionPipeline.from_pretrained,
    "VDMScheduler": lambda repo: VDMScheduler.from_pretrained(repo, subfolder="scheduler"),
    "UNetVDMModel": lambda repo: UNetVDMModel.from_pretrained(repo, subfolder="unet"),
    "from_diffusers": VDMPipeline.from_diffusers,
}
said = {}
for door in json.loads(sys.argv[1]):
    try:
        doors[door](sys.argv[2])
        said[door] = ["loaded", True, ""]
    except Exception as error:
        said[door] = [type(error).__name__, isinstance(error, VDMHubError), str(error)]
home = Path(os.environ["HF_HOME"])
files = {str(path.relative_to(home.parent)): path.stat().st_size for path in home.parent.rglob("*") if path.is_file()}
print("ANSWER" + json.dumps([said, files]))
"""
OWN = ("VDMPipeline", "DiffusionPipeline", "VDMScheduler", "UNetVDMModel")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Changed:
    """The answer to a request, changed on its way; of the files whose path ends so."""

    change: Callable[[Response], Response]
    struck: int = field(default=0)

    def __call__(self, handle: Callable[[], Response]) -> Response:
        self.struck += 1
        return self.change(handle())


def headers(**changes: str) -> Callable[[Response], Response]:
    names = {name.replace("_", "-"): value for name, value in changes.items()}
    return lambda response: replace(response, headers={**response.headers, **names})


def body(change: Callable[[bytes], bytes]) -> Callable[[Response], Response]:
    return lambda response: replace(response, body=change(response.body))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content


def listed(**changes: Any) -> Callable[[Response], Response]:
    """A listing that says something else of the weights."""

    def change(response: Response) -> Response:
        told = json.loads(response.body)
        for sibling in told.get("siblings", ()):
            if sibling["rfilename"] == WEIGHTS:
                sibling.update(changes)
        return replace(response, body=json.dumps(told).encode())

    return change


# What a hostile or a broken server does: to which route, and what the message must name.
HOSTILE: Mapping[str, tuple[str, Callable[[Response], Response], str]] = {
    "an ETag that leads elsewhere": ("resolve", headers(ETag='"../../../evil"'), "ETag"),
    "an ETag that is a path": ("resolve", headers(ETag='"/tmp/evil"'), "ETag"),
    "an ETag of other content": ("resolve", headers(ETag=f'"{"0" * 40}"'), "ETag"),
    "an ETag of another kind": ("resolve", headers(ETag='"W/weak"'), "ETag"),
    "another commit": ("resolve", headers(X_Repo_Commit="f" * 40), "commit"),
    "a bit flipped on the way": ("resolve", body(flipped), ""),
    "more than is listed": ("resolve", body(lambda content: content + bytes(3_000_000)), ""),
    "less than is listed": ("resolve", body(lambda content: content[: len(content) // 2]), ""),
    "a listing with another hash": ("model_info_at_revision", listed(lfs={"sha256": "1" * 64, "size": 9}), ""),
    "a listing whose hash is a path": (
        "model_info_at_revision",
        listed(lfs={"sha256": "../../evil", "size": 9, "pointerSize": 3}),
        "",
    ),
    "a listing with another size": ("model_info_at_revision", listed(size=3), ""),
    "a listing that is no JSON": ("model_info_at_revision", body(lambda _: b"<html>"), ""),
    "a listing without files": ("model_info_at_revision", body(lambda _: b"{}"), ""),
    "a listing of numbers": ("model_info_at_revision", body(lambda _: b'{"siblings": [1, 2]}'), ""),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Blob]:
    folder = tmp_path_factory.mktemp("sound")
    tiny_pipeline().save_pretrained(folder)
    return blobs(folder)


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_nothing_of_a_server_that_sends_other_files_than_it_lists_is_used(
    what: str, sound: dict[str, Blob], tmp_path: Path
) -> None:
    route, change, word = HOSTILE[what]
    with LoopbackHub() as hub:
        hub.repositories["me/model"] = Repository()
        hub.repositories["me/model"].commit("main", "first", sound)
        fault = Changed(change)
        hub.fail(at=0, fault=fault, times=None, route=route)
        doors = OWN if what.startswith("an ETag that leads") else OWN[:2]
        said, files = run(READ, json.dumps(doors), "me/model", **hub.environment(tmp_path / "inner" / "home"))
        hub.heal()
        again, _ = run(READ, json.dumps(["VDMPipeline"]), "me/model", **hub.environment(tmp_path / "inner" / "home"))
    assert fault.struck
    for door, (_, is_ours, text) in said.items():
        assert is_ours and word in text and len(text) <= 1000 and "\n" not in text, (door, text)
    assert not [path for path in files if "evil" in path or not path.startswith("home/")]
    assert max(files.values(), default=0) < 1_000_000, "no more than is listed stays on the disk"
    assert not [path for path in files if path.endswith(".incomplete")]
    assert again["VDMPipeline"][0] == "loaded", "and it loads once the server is sound"


def test_a_file_that_was_changed_in_the_cache_is_fetched_again_or_refused(
    sound: dict[str, Blob], tmp_path: Path
) -> None:
    with LoopbackHub() as hub:
        hub.repositories["me/model"] = Repository()
        hub.repositories["me/model"].commit("main", "first", sound)
        environment = hub.environment(tmp_path / "home")
        said, _ = run(READ, json.dumps(["VDMPipeline"]), "me/model", **environment)
        assert said["VDMPipeline"][0] == "loaded"
        (weights,) = (tmp_path / "home").rglob("diffusion_pytorch_model.safetensors")
        blob = weights.resolve()
        blob.write_bytes(flipped(blob.read_bytes()))
        said, _ = run(READ, json.dumps(["VDMPipeline"]), "me/model", **environment | {"HF_HUB_OFFLINE": "1"})
        assert said["VDMPipeline"][1] and "diffusion_pytorch_model.safetensors" in said["VDMPipeline"][2]
        said, _ = run(READ, json.dumps(["VDMPipeline"]), "me/model", **environment)
        assert said["VDMPipeline"][0] == "loaded"


@pytest.mark.parametrize(("status", "remedy"), [(401, "hf auth login"), (403, "hf auth login"), (404, "name")])
def test_what_the_hub_refuses_is_said_with_what_to_do(
    status: int, remedy: str, sound: dict[str, Blob], tmp_path: Path
) -> None:
    with LoopbackHub() as hub:
        hub.repositories["me/ddpm"] = Repository()
        hub.repositories["me/ddpm"].commit("main", "first", sound)
        hub.fail(at=0, fault=FAULTS[str(status)], times=None)
        said, _ = run(
            READ, json.dumps(["VDMPipeline", "VDMScheduler", "from_diffusers"]), "me/ddpm", **hub.environment(tmp_path)
        )
    for door, (name, is_ours, text) in said.items():
        assert is_ours and name == "HubError" and remedy in text, (door, text)


def test_a_stock_pipeline_loads_through_the_same_door(tmp_path: Path) -> None:
    tiny_pipeline(tiny_unet_2d()).save_pretrained(tmp_path / "stock")
    with LoopbackHub() as hub:
        hub.repositories["me/model"] = Repository()
        hub.repositories["me/model"].commit("main", "first", blobs(tmp_path / "stock"))
        said, _ = run(
            READ, json.dumps(["VDMPipeline", "DiffusionPipeline"]), "me/model", **hub.environment(tmp_path / "h")
        )
    assert {door: answer[0] for door, answer in said.items()} == {
        "VDMPipeline": "loaded",
        "DiffusionPipeline": "loaded",
    }
