"""The inherited ``push_to_hub``: one commit that leaves a published card alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hub.server import Blob, LoopbackHub, Repository
from hub.test_idioms import run
from tiny import sampled, tiny_pipeline
from vdm_hub import VDMPipeline
from vdm_hub.hub.install_hint import INSTALL_HINT

# Not as any YAML writer would put it: rewriting it would show.
CARD = b"---\nlicense:    apache-2.0\ntags: [a,   'b']\n---\r\n# Mine \xe2\x80\x94 with figures\n\n"
LOCAL = "# Beside the weights\n"

PUSH = """
import json, sys
from pathlib import Path
from tiny import tiny_pipeline
pipe = tiny_pipeline()
PREPROCESSING = {"resolution": None, "center_crop": False, "color": "auto", "num_levels": 17, "image_column": "image"}
pipe.push_to_hub("me/published")
pipe.push_to_hub("me/fresh", commit_message="My words", private=True)
pipe.push_to_hub("me/fresh", subfolder="inner", variant="fp16")
pipe.push_to_hub("me/asked", create_pr=True)
root = Path(sys.argv[1])
pipe.save_pretrained(root / "named-by-its-folder", push_to_hub=True)
pipe.save_pretrained(str(root / "one"), push_to_hub=True, repo_id="me/saved", commit_message="Saved")
(root / "two").mkdir()
(root / "two" / "README.md").write_text(sys.argv[2])
pipe.save_pretrained(root / "two", push_to_hub=True, repo_id="me/local-card")
(root / "three").mkdir()
(root / "three" / "README.md").write_text(sys.argv[2])
pipe.save_pretrained(root / "three", push_to_hub=True, repo_id="me/both-cards")
pipe.unet.push_to_hub("me/parts", subfolder="unet")
pipe.scheduler.push_to_hub("me/parts", subfolder="scheduler")

from vdm_hub.errors import PublishError
secret, refusals = "hf_" + "aB1" * 12, []

def refused(what, push):
    try:
        push()
    except PublishError as error:
        assert "nothing was sent" in str(error) and "aB1aB1" not in str(error), error
        refusals.append(what)

(root / "four").mkdir()
(root / "four" / "notes.md").write_text(f"log in with {secret}")
refused("a file beside", lambda: pipe.save_pretrained(root / "four", push_to_hub=True, repo_id="me/secrets"))
refused("a message", lambda: pipe.push_to_hub("me/secrets", commit_message=f"with {secret}"))
refused("a part's message", lambda: pipe.scheduler.push_to_hub("me/secret-part", commit_message=secret))
pipe.register_to_config(preprocessing={**PREPROCESSING, "image_column": secret})
refused("the index", lambda: pipe.push_to_hub("me/secrets"))
pipe.unet.register_to_config(down_block_types=[secret])
refused("a network's config", lambda: pipe.unet.push_to_hub("me/secret-part"))
to_parts = {"push_to_hub": True, "repo_id": "me/secret-part"}
refused("a part that is saved", lambda: pipe.unet.save_pretrained(root / "five", **to_parts))
print("ANSWER" + json.dumps(refusals))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("pushed")
    with LoopbackHub() as hub:
        for repo in ("me/published", "me/both-cards", "me/asked"):
            hub.repositories[repo] = Repository()
            hub.repositories[repo].commit("main", "card", {"README.md": Blob(CARD), "notes.txt": Blob(b"mine")})
        environment = hub.environment(root / "home")
        hub.refused = run(PUSH, str(root), LOCAL, **environment)  # type: ignore[attr-defined]
    hub.root = root  # type: ignore[attr-defined]
    return hub


def head(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    return {path: blob.content for path, blob in hub.repositories[repo].at("main").files.items()}


@pytest.mark.parametrize("repo", ["me/published", "me/both-cards"])
def test_a_published_card_keeps_its_bytes_and_all_else_is_one_commit(hub: LoopbackHub, repo: str) -> None:
    files = head(hub, repo)
    assert files["README.md"] == CARD and files["notes.txt"] == b"mine"
    assert {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"} <= files.keys()
    assert [commit.title for commit in hub.repositories[repo].history("main")][:2] == ["Upload VDMPipeline", "card"]


def test_a_repository_without_a_card_gets_one(hub: LoopbackHub) -> None:
    for repo in ("me/fresh", "me/saved", "me/named-by-its-folder"):
        assert b"library_name: diffusers" in head(hub, repo)["README.md"]
    assert head(hub, "me/local-card")["README.md"] == LOCAL.encode()
    for name in ("two", "three"):
        assert (hub.root / name / "README.md").read_text() == LOCAL  # type: ignore[attr-defined]


def test_the_arguments_keep_their_meaning(hub: LoopbackHub) -> None:
    fresh = hub.repositories["me/fresh"]
    titles = [commit.title for commit in fresh.history("main")]
    assert fresh.private and titles[:2] == ["Upload VDMPipeline", "My words"]
    assert "inner/unet/diffusion_pytorch_model.fp16.safetensors" in head(hub, "me/fresh")
    assert "inner/README.md" not in head(hub, "me/fresh")
    assert next(commit.title for commit in hub.repositories["me/saved"].history("main")) == "Saved"
    asked = hub.repositories["me/asked"]
    assert head(hub, "me/asked").keys() == {"README.md", "notes.txt"} and len(asked.pull_requests) == 1
    assert "model_index.json" in asked.at("refs/pr/1").files
    assert asked.at("refs/pr/1").files["README.md"].content == CARD


def test_what_was_pushed_loads_and_tells_others_what_to_install(hub: LoopbackHub, tmp_path: Path) -> None:
    for path, content in head(hub, "me/published").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    loaded = VDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert sampled(loaded).tolist() == sampled(tiny_pipeline()).tolist()
    assert json.loads((tmp_path / "model_index.json").read_text())["_requires"] == [INSTALL_HINT, None]


def test_no_door_sends_a_secret(hub: LoopbackHub) -> None:
    expected = ["a file beside", "a message", "a part's message", "the index", "a network's config"]
    assert hub.refused == [*expected, "a part that is saved"]  # type: ignore[attr-defined]
    assert "me/secrets" not in hub.repositories
    assert not hub.repositories["me/secret-part"].at("main").files.keys() - {".gitattributes"}
    sent = b"".join(call.body for call in hub.calls)
    assert b"aB1aB1" not in sent


def test_parts_are_pushed_as_ever(hub: LoopbackHub) -> None:
    files = head(hub, "me/parts")
    assert {"unet/config.json", "scheduler/scheduler_config.json"} <= files.keys()
    assert "unet/diffusion_pytorch_model.safetensors" in files and "README.md" not in files


def test_no_token_went_anywhere_but_into_its_header(hub: LoopbackHub) -> None:
    assert hub.tokens and hub.leaked_tokens() == []
