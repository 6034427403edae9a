"""`vdm-hub space --push`, by its command line, to the loopback Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from hub.endpoints import card_metadata
from hub.server import Blob, LoopbackHub, Repository
from spaces.kinds import saved

TOKEN = "hf_" + "loopbackSecret" * 3
OWN = {"README.md", "app.py", "requirements.txt", "space.json"}


def vdm_hub(environment: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    script = "import sys; from vdm_hub.commands import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    settings = {**environment, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)


def paths(repository: Repository) -> set[str]:
    return {path for path in repository.at("main").files if path != ".gitattributes"}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A local model is pushed, its owner adds a file, a published one takes its place; then what is refused."""
    folder = tmp_path_factory.mktemp("spaces")
    model = saved("classes", folder / "digits" / "pipeline")
    seen: dict[str, Any] = {}
    with LoopbackHub() as hub:
        hub.tokens |= {TOKEN: "write", "hf_reader": "read"}
        environment = hub.environment(folder / "home", token=TOKEN)
        files = {path.relative_to(model).as_posix(): Blob(path.read_bytes()) for path in model.rglob("*.*")
                 if path.is_file()}  # fmt: skip
        hub.repositories["me/tiny"] = Repository(False, files)
        seen["local"] = vdm_hub(environment, "space", model, "--push", "me/demo", "--private")
        space = hub.repositories["spaces/me/demo"]
        seen["first"], seen["private"] = paths(space), space.private
        seen["commits"] = len(list(space.history("main")))
        space.commit("main", "the owner's own", space.at("main").files | {"examples/a.png": Blob(b"mine")})
        output = folder / "written"
        seen["hub id"] = vdm_hub(environment, "space", "me/tiny", "--push", "me/demo", "--output", output)
        seen["second"], seen["title"] = paths(space), [one.title for one in space.history("main")]
        seen["card"] = card_metadata(space.at("main").files["README.md"].content.decode())
        seen["told"] = json.loads(space.at("main").files["space.json"].content)
        seen["written"] = {one.relative_to(output).as_posix() for one in output.rglob("*") if one.is_file()}
        hub.repositories["spaces/me/open"] = Repository(False, {})
        seen["open"] = vdm_hub(environment, "space", "me/tiny", "--push", "me/open", "--private")
        hub.repositories["spaces/me/theirs"] = Repository(True, {"app.py": Blob(b"print()")})
        seen["theirs"] = vdm_hub(environment, "space", "me/tiny", "--push", "me/theirs")
        seen["kept"] = hub.repositories["spaces/me/theirs"].at("main").files["app.py"].content
        reader = hub.environment(folder / "home", token="hf_reader")
        seen["reader"] = vdm_hub(reader, "space", "me/tiny", "--push", "me/mine")
        seen["leaks"], seen["repositories"] = hub.leaked_tokens(), set(hub.repositories)
        yield seen


def test_a_local_model_goes_with_its_space_in_one_commit(story: dict[str, Any]) -> None:
    done = story["local"]
    assert done.returncode == 0, done.stderr
    assert story["first"] >= {*OWN, "model/model_index.json", "model/unet/diffusion_pytorch_model.safetensors"}
    assert story["commits"] == 2 and story["private"]  # that which creates it, and one
    assert "spaces/me/demo" in done.stdout and "with the model" in done.stdout


def test_a_published_model_is_named_and_a_former_copy_goes(story: dict[str, Any]) -> None:
    done = story["hub id"]
    assert done.returncode == 0, done.stderr
    assert story["second"] == {*OWN, "examples/a.png"}  # what the owner added stays
    assert story["written"] == OWN
    assert story["card"]["models"] == ["me/tiny"] and story["card"]["sdk"] == "gradio"
    assert story["told"]["model"] == "me/tiny" and story["told"]["title"] == "tiny"
    assert "class-conditional" in story["told"]["about"]


def test_what_the_hub_or_the_token_does_not_allow_is_said(story: dict[str, Any]) -> None:
    assert story["open"].returncode == 2 and "public" in story["open"].stderr
    assert story["reader"].returncode == 2 and "write" in story["reader"].stderr
    assert "spaces/me/mine" not in story["repositories"]


def test_an_app_of_somebodys_own_is_not_replaced(story: dict[str, Any]) -> None:
    assert story["theirs"].returncode == 2 and "app.py" in story["theirs"].stderr
    assert story["kept"] == b"print()"


def test_no_token_goes_where_none_belongs(story: dict[str, Any]) -> None:
    assert story["leaks"] == []
