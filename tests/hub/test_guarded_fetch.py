"""A server that announces or sends other files than it lists: nothing of it is used, nothing is written elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.damage import damaged_json
from hub.faults import FAULTS, rate_limited
from hub.messages import Response
from hub.server import Blob, LoopbackHub, Repository
from hub.test_idioms import blobs
from hub.test_loading import REPOSITORY
from tiny import tiny_pipeline, tiny_unet_2d

# Each line that comes in names doors and a repository; out goes what came of each, and all files around HF_HOME.
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
around = Path(os.environ["HF_HOME"]).parent
for line in sys.stdin:
    names, repo = json.loads(line)
    said = {}
    for door in names:
        try:
            doors[door](repo)
            said[door] = ["loaded", True, ""]
        except Exception as error:
            said[door] = [type(error).__name__, isinstance(error, VDMHubError), str(error)]
    files = {str(path.relative_to(around)): path.stat().st_size for path in around.rglob("*") if path.is_file()}
    print("ANSWER" + json.dumps([said, files]), flush=True)
"""
OWN = ("VDMPipeline", "DiffusionPipeline", "VDMScheduler", "UNetVDMModel")
COUNTS: Counter[str] = Counter()
NUMBERS = count()
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
    """Weights with a bit of their last number flipped, which nothing but a hash can tell; other files as they are."""
    is_weights = content[8:9] == b"{" and len(content) > 1000
    return content[:-1] + bytes([content[-1] ^ 1]) if is_weights else content


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
    "a bit of the weights flipped on the way": ("resolve", body(flipped), WEIGHTS),
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


@dataclass(frozen=True)
class Reader:
    """A process that loads from a loopback Hub what it is told to; one for all, as it takes seconds to start."""

    hub: LoopbackHub
    process: subprocess.Popen[str]
    home: Path
    sound: dict[str, Blob]

    def __repr__(self) -> str:
        """Short: hypothesis prints it."""
        return f"Reader({self.hub.url})"

    def load(self, repo: str, *doors: str) -> tuple[dict[str, tuple[str, bool, str]], dict[str, int]]:
        """By each door: the error's class or "loaded", whether it is ours, its text; and all files there are."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([doors, repo]) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("ANSWER"):
            assert line, "the reader died"
        said, files = json.loads(line.removeprefix("ANSWER"))
        return said, files


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Blob]:
    folder = tmp_path_factory.mktemp("sound")
    tiny_pipeline().save_pretrained(folder)
    return blobs(folder)


@pytest.fixture(scope="module")
def reader(sound: dict[str, Blob], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    home = tmp_path_factory.mktemp("around") / "home"
    with LoopbackHub() as hub:
        environment = hub.environment(home) | {"PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", READ]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
            yield Reader(hub, process, home, sound)
            process.kill()
    print(f"\n{sum(COUNTS.values())} lies of a server: {dict(COUNTS.most_common())}")


def published(hub: LoopbackHub, name: str, files: dict[str, Blob]) -> str:
    hub.heal()
    repo = f"me/{re.sub('[^a-z]+', '-', name.lower())}"
    hub.repositories[repo] = Repository()
    hub.repositories[repo].commit("main", "first", files)
    return repo


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_nothing_of_a_server_that_sends_other_files_than_it_lists_is_used(
    what: str, sound: dict[str, Blob], reader: Reader
) -> None:
    route, change, word = HOSTILE[what]
    repo, fault = published(reader.hub, what, sound), Changed(change)
    reader.hub.fail(at=0, fault=fault, times=None, route=route)
    said, files = reader.load(repo, *(OWN[:2] if "flipped" in what else OWN))
    reader.hub.heal()
    assert fault.struck
    for door, (_, is_ours, text) in said.items():
        assert is_ours and word in text and len(text) <= 1000 and "\n" not in text, (door, text)
    assert not [path for path in files if not path.startswith("home/") or "evil" in Path(path).name]
    assert max(files.values(), default=0) < 1_000_000, "no more than is listed stays on the disk"
    assert not [path for path in files if path.endswith(".incomplete")]
    assert reader.load(repo, "VDMPipeline")[0]["VDMPipeline"][0] == "loaded", "once the server is sound"


HEADERS = ("ETag", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "Content-Type", "Location")
VALUES = ("", '""', '"../../evil"', '"' + "0" * 64 + '"', "-1", "9" * 30, "a" * 40, "/tmp/evil", "text/html", "\u00e9")


@st.composite
def lies(draw: st.DrawFn, listing: bytes) -> tuple[str, Callable[[Response], Response]]:
    """A route, and what its answers become: a damaged listing, a header that says something else, damaged content."""
    what = draw(st.sampled_from(["listing", "listing", "header", "content"]))
    if what == "listing":
        damaged = draw(damaged_json(listing))
        return "model_info_at_revision", body(lambda _: damaged)
    if what == "header":
        return "resolve", headers(**{draw(st.sampled_from(HEADERS)): draw(st.sampled_from(VALUES))})
    share, new = draw(st.floats(0, 1)), draw(st.sampled_from([b"", b"\x00", b"{", bytes(5000)]))
    at = share / 2
    return "resolve", body(
        lambda content: content[: int(at * len(content))] + new + content[int(share * len(content)) :]
    )


def try_lies(number: int, reader: Reader, draw: Callable[..., Any]) -> Counter[str]:
    """One lie of the server, by every door."""
    repo = f"me/lie-{number:06}"  # of one length, as places in what is listed are drawn
    reader.hub.heal()
    reader.hub.repositories[repo] = Repository()
    reader.hub.repositories[repo].commit("main", "first", reader.sound)
    told = reader.hub.answer("GET", f"/api/models/{repo}/revision/main?blobs=true", {}, b"").body
    route, change = draw(lies(told))
    reader.hub.fail(at=0, fault=Changed(change), times=None, route=route)
    said, files = reader.load(repo, *OWN)
    reader.hub.heal()
    for door, (name, is_ours, text) in said.items():
        assert is_ours and len(text) <= 1000 and "\n" not in text, (door, name, text)
    assert not [
        path for path in files if not path.startswith("home/") or "evil" in path or path.endswith("incomplete")
    ]
    assert max(files.values(), default=0) < 1_000_000
    return Counter(name for name, _, _ in said.values())


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=QUIET, derandomize=True)
def test_whatever_a_server_says_is_loaded_or_refused_in_one_paragraph(reader: Reader, data: st.DataObject) -> None:
    COUNTS.update(try_lies(next(NUMBERS), reader, data.draw))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=2000, deadline=None, suppress_health_check=QUIET)
def test_whatever_a_server_says_however_often(reader: Reader, data: st.DataObject) -> None:
    COUNTS.update(try_lies(next(NUMBERS), reader, data.draw))


def test_a_file_that_was_changed_in_the_cache_is_fetched_again_or_refused(
    sound: dict[str, Blob], tmp_path: Path, reader: Reader
) -> None:
    repo = published(reader.hub, "changed in the cache", sound)
    assert reader.load(repo, "VDMPipeline")[0]["VDMPipeline"][0] == "loaded"
    (weights,) = reader.home.rglob("models--me--changed-in-the-cache/**/diffusion_pytorch_model.safetensors")
    whole = weights.resolve().read_bytes()
    weights.resolve().write_bytes(flipped(whole))
    reader.hub.fail(at=0, fault=FAULTS["dropped before"], times=None)
    _, is_ours, text = reader.load(repo, "VDMPipeline")[0]["VDMPipeline"]
    assert is_ours and weights.name in text
    reader.hub.heal()
    assert reader.load(repo, "VDMPipeline")[0]["VDMPipeline"][0] == "loaded"
    assert weights.resolve().read_bytes() == whole


@pytest.mark.parametrize(("status", "remedy"), [("401", "hf auth login"), ("403", "hf auth login"), ("404", "name")])
def test_what_the_hub_refuses_is_said_with_what_to_do(
    status: str, remedy: str, sound: dict[str, Blob], reader: Reader
) -> None:
    repo = published(reader.hub, f"refused {'abc'[int(status) % 3]}", sound)
    reader.hub.fail(at=0, fault=FAULTS[status], times=None)
    for door, answer in reader.load(repo, "VDMPipeline", "VDMScheduler", "from_diffusers")[0].items():
        name, is_ours, text = answer
        assert is_ours and name == "HubError" and remedy in text, (door, text)


@pytest.mark.parametrize("door", ["VDMPipeline", "VDMScheduler"])
def test_an_answer_that_asks_to_wait_for_an_hour_is_refused_at_once(
    door: str, sound: dict[str, Blob], reader: Reader
) -> None:
    repo = published(reader.hub, f"patient {door}", sound)
    reader.hub.fail(at=0, fault=rate_limited(3600), times=None)
    started = time.monotonic()
    name, is_ours, text = reader.load(repo, door)[0][door]
    assert is_ours and name == "HubError" and "3,600 s" in text
    assert time.monotonic() - started < 60  # the client's own patience with short waits is within


def test_a_stock_network_loads_through_the_same_door(tmp_path: Path, reader: Reader) -> None:
    tiny_pipeline(tiny_unet_2d()).save_pretrained(tmp_path)
    repo = published(reader.hub, "stock", blobs(tmp_path))
    said, _ = reader.load(repo, "VDMPipeline", "DiffusionPipeline")
    assert [answer[0] for answer in said.values()] == ["loaded", "loaded"]
