"""`vdm-hub publish`, by its command line, to the loopback Hub."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hub.clients import Client
from hub.faults import FAULTS
from hub.publications import EVALUATION, tiny_pipeline, write_run
from hub.server import LoopbackHub
from hub.storage import Blob, Repository
from naming import naming
from vdm_hub.errors import CheckpointError
from vdm_hub.evaluation.provenance import weights_fingerprint
from vdm_hub.publishing.dry_run import write_publication

TOKEN = "hf_" + "loopbackSecret" * 3
MAIN_FILES = {
    *("README.md", "model_index.json", "evaluation.json", "history.json", "recipe.yaml", "run.json"),
    *("images/samples.png", "images/schedule.png", "images/training_curve.png"),
    *("scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
}


def vdm_hub(
    environment: Mapping[str, str], *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    script = "import sys; from vdm_hub.commands import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, env=dict(environment), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def files(repository: Repository, revision: str = "main") -> dict[str, Blob]:
    return {path: blob for path, blob in repository.at(revision).files.items() if path != ".gitattributes"}


def history(repository: Repository, branch: str = "main") -> list[str]:
    """The commits of a branch, the latest first."""
    commits: list[str] = [repository.branches[branch]]
    while (parent := repository.commits[commits[-1]].parent) is not None:
        commits.append(parent)
    return commits


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run is published, changed, published again, and once more unchanged; each repository's state in between."""
    folder = tmp_path_factory.mktemp("publishing")
    first, second = write_run(folder / "first", stock=True), write_run(folder / "second", stock=True, seed=1)
    (second / "training_curve.png").unlink()
    (first / "pipeline" / "notes.py").write_text("print('never sent')")
    (first / "pipeline" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never sent")
    answers: dict[str, Any] = {"first": first}
    with LoopbackHub() as hub:
        hub.tokens[TOKEN] = "write"
        environment = hub.environment(folder / "home", token=TOKEN)
        answers["published"] = vdm_hub(
            environment, "publish", first / "pipeline", "me/tiny", "--remote_code", "--license", "apache-2.0"
        )
        repository = hub.repositories["me/tiny"]
        answers["first commits"] = history(repository)
        own = repository.at("main").files | {"docs/mine.md": Blob(b"the owner's own")}
        repository.commit("main", "the owner's own file", own)
        answers["republished"] = vdm_hub(environment, "publish", second, "me/tiny")
        answers["second commits"] = history(repository)
        answers["unchanged"] = vdm_hub(environment, "publish", second, "me/tiny")
        answers["third commits"] = history(repository)
    return answers | {"hub": hub, "repository": repository}


def test_main_gets_everything_in_one_commit(story: dict[str, Any]) -> None:
    assert story["published"].returncode == 0, story["published"].stderr
    repository, (commit, initial) = story["repository"], story["first commits"]
    assert set(repository.commits[initial].files) == {".gitattributes"}
    assert set(files(repository, commit)) == MAIN_FILES


def test_main_holds_no_python_and_nothing_to_unpickle(story: dict[str, Any]) -> None:
    suffixes = {Path(path).suffix for path in files(story["repository"], story["first commits"][0])}
    assert suffixes == {".md", ".json", ".yaml", ".png", ".safetensors"}


def test_the_card_links_the_very_commits_of_twin_and_code(story: dict[str, Any]) -> None:
    repository = story["repository"]
    card = files(repository, story["first commits"][0])["README.md"].content.decode()
    twin, *code = list(dict.fromkeys(re.findall(r"revision=\"([0-9a-f]{40})\"", card)))
    assert json.loads(files(repository, twin)["model_index.json"].content)["_class_name"] == "DDPMPipeline"
    assert len(code) == 1
    assert {"pipeline.py", "unet/config.json"} <= set(files(repository, code[0]))
    assert twin in history(repository, "diffusers") and code[0] in history(repository, "remote-code")
    published = repository.commits[story["first commits"][0]]
    order = list(repository.commits)
    assert order.index(published.oid) > max(order.index(twin), order.index(code[0])), "main comes last"


def test_the_card_on_the_hub_holds_the_measurement(story: dict[str, Any]) -> None:
    card = ModelCard(files(story["repository"], story["first commits"][0])["README.md"].content.decode())
    assert card.data.eval_results[0].metric_value == EVALUATION["bits_per_dim"]
    assert card.data.license == "apache-2.0"
    assert "RMS" in card.text or "root mean square" in card.text.lower(), "the twin's error is stated"


def test_what_is_gone_from_the_run_goes_from_main_and_the_owners_files_stay(story: dict[str, Any]) -> None:
    assert story["republished"].returncode == 0, story["republished"].stderr
    (commit, owners, first, _), repository = story["second commits"], story["repository"]
    assert first == story["first commits"][0] and repository.commits[commit].parent == owners
    assert set(files(repository, commit)) == MAIN_FILES - {"images/training_curve.png"} | {"docs/mine.md"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files(repository, commit)[weights].sha256 != files(repository, first)[weights].sha256


def test_publishing_the_same_again_changes_nothing(story: dict[str, Any]) -> None:
    assert story["unchanged"].returncode == 0, story["unchanged"].stderr
    assert story["third commits"] == story["second commits"]


def test_the_command_says_what_is_where(story: dict[str, Any]) -> None:
    said = story["published"].stdout
    assert f"{story['hub'].url}/me/tiny" in said
    assert story["first commits"][0] in said


def test_the_token_is_in_no_output_and_no_file(story: dict[str, Any]) -> None:
    for name in ("published", "republished", "unchanged"):
        assert TOKEN not in story[name].stdout + story[name].stderr
    for call in story["hub"].calls:
        assert TOKEN not in call.path and TOKEN.encode() not in call.body
        assert TOKEN not in json.dumps(dict(call.query))
    for commit in story["repository"].commits.values():
        assert all(TOKEN.encode() not in blob.content for blob in commit.files.values())


# ---- the other ways to publish ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run")


def test_a_branch_is_made_and_main_stays(run: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        done = vdm_hub(hub.environment(tmp_path), "publish", run, "me/tiny", "--revision", "v2", "--private")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["me/tiny"]
    assert repository.private
    assert files(repository) == {}
    assert set(files(repository, "v2")) == MAIN_FILES
    card = files(repository, "v2")["README.md"].content.decode()
    assert 'from_pretrained("me/tiny", revision="v2")' in card
    assert "no twin for plain diffusers" in card and "UNetVDMModel" in card


def test_a_pull_request_changes_no_branch(run: Path, tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.repositories["you/theirs"] = Repository(False, {".gitattributes": Blob(b"")})
        done = vdm_hub(hub.environment(tmp_path), "publish", run, "you/theirs", "--create_pr")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["you/theirs"]
    assert set(repository.branches) == {"main"}
    assert files(repository) == {}
    assert set(files(repository, "refs/pr/1")) == MAIN_FILES
    assert "discussions/1" in done.stdout


PUBLISH = """
from pathlib import Path
from vdm_hub.publishing.publishing import publish
folder, name, how = sys.argv[1:]
answer(publish(Path(folder), name, create_pr=how == "pr", remote_code=how == "code").commit)
"""


@pytest.mark.slow
def test_another_model_takes_the_place_of_all_of_the_former_one(run: Path, tmp_path: Path) -> None:
    """Directly or as a pull request, the tree is the same; and the side branches no longer hold the former model."""
    former = write_run(tmp_path / "former", stock=True, noise_schedule="cosine")
    (run / "samples.png").rename(run / "kept.png")
    with LoopbackHub() as hub, Client(hub.environment(tmp_path / "home")) as client:
        for name in ("me/direct", "me/request"):
            client.run(PUBLISH, former, name, "code")
        stray = hub.repositories["me/request"].at("main").files | {"pipeline.py": Blob(b"import os")}
        hub.repositories["me/request"].commit("main", "what diffusers would run", stray)
        commit = client.run(PUBLISH, run, "me/direct", "main")
        client.run(PUBLISH, run, "me/request", "pr")
    (run / "kept.png").rename(run / "samples.png")
    direct, request = hub.repositories["me/direct"], hub.repositories["me/request"]
    expected = MAIN_FILES - {"images/samples.png"}
    assert set(files(direct)) == set(files(request, "refs/pr/1")) == expected
    assert all(
        files(direct)[path].sha256 == files(request, "refs/pr/1")[path].sha256 for path in expected - {"README.md"}
    )
    for side in ("diffusers", "remote-code"):
        assert set(files(direct, side)) == {"README.md"}
        assert commit in files(direct, side)["README.md"].content.decode()
        assert len(files(request, side)) > 1, "a pull request touches no branch"


def test_another_branch_has_sides_of_its_own(tmp_path: Path) -> None:
    stock = write_run(tmp_path / "stock", stock=True)
    with LoopbackHub() as hub:
        done = vdm_hub(hub.environment(tmp_path / "home"), "publish", stock, "me/tiny", "--revision", "v2")
        assert done.returncode == 0, done.stderr
    assert set(hub.repositories["me/tiny"].branches) == {"main", "v2", "v2-diffusers"}


@pytest.mark.slow
def test_weights_travel_by_xet_and_its_failures_are_explained(run: Path, tmp_path: Path) -> None:
    quick = "import time; time.sleep = lambda seconds: None\n"
    with LoopbackHub() as hub, Client(hub.environment(tmp_path, xet=True)) as client:
        with pytest.raises(AssertionError, match=naming("PublishError", "me/tiny")) as failed:
            client.run(quick + PUBLISH, run, "me/tiny", "main")
        assert files(hub.repositories["me/tiny"]) == {}
    assert "check the network" in str(failed.value)
    store = tmp_path / "store"
    with LoopbackHub(xet_folder=store) as hub, Client(hub.environment(tmp_path, xet=True)) as client:
        client.run(PUBLISH, run, "me/tiny", "main")
    assert set(files(hub.repositories["me/tiny"])) == MAIN_FILES


@pytest.mark.slow
def test_a_dry_run_writes_what_a_publication_sends_and_asks_nobody(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stock=True)
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home")
        dry = vdm_hub(environment | {"HF_TOKEN": ""}, "publish", run, "me/tiny", "--dry_run", "--remote_code")
        assert (dry.returncode, hub.calls) == (0, []), dry.stderr
        sent = vdm_hub(environment, "publish", run, "me/tiny", "--remote_code")
        assert sent.returncode == 0, sent.stderr
        repository = hub.repositories["me/tiny"]
    written = {path: path.read_bytes() for path in (run / "publication").rglob("*") if path.is_file()}
    commit = re.compile(rb"\b[0-9a-f]{40}\b")
    for branch in ("main", "diffusers", "remote-code"):
        folder = run / "publication" / branch
        inside = {path: content for path, content in written.items() if path.is_relative_to(folder)}
        here = {path.relative_to(folder).as_posix(): content for path, content in inside.items()}
        there = {path: blob.content for path, blob in files(repository, branch).items()}
        here_card, there_card = here.pop("README.md", b""), there.pop("README.md", b"")
        assert here == there
        assert commit.sub(b"", there_card) == re.sub(rb'(?<=revision=")(diffusers|remote-code)(?=")', b"", here_card)
    assert all(path.name in dry.stdout for path in written)
    again = vdm_hub(environment, "publish", run, "me/tiny", "--dry_run")
    assert again.returncode == 2 and "--overwrite" in again.stderr


COMMAND = """
import contextlib, io, os
os.environ["HF_TOKEN"] = sys.argv[1]
from vdm_hub.commands import main
said = io.StringIO()
with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    status = main(["publish", *sys.argv[2:]])
answer([status, said.getvalue()])
"""
REFUSED = {
    "a name with three parts": (("me/a/b",), "hf_loopback", "OWNER/NAME"),
    "no token": (("me/tiny",), "", "hf auth login"),
    "an unknown token": (("me/tiny",), "hf_unknown", "did not take the token"),
    "a token that may only read": (("me/tiny",), "hf_reader", "may not write"),
    "public, but private was asked for": (("you/public", "--private"), "hf_loopback", "is public"),
    "the twin's own branch": (("me/tiny", "--revision", "diffusers"), "hf_loopback", "stock twin"),
    "code in a pull request": (("me/tiny", "--create_pr", "--remote_code"), "hf_loopback", "leave out --remote_code"),
    "a private pull request": (("you/public", "--create_pr", "--private"), "hf_loopback", "leave out --private"),
    "a pull request to nobody": (("you/absent", "--create_pr"), "hf_loopback", "check the name"),
    "no such evaluation": (("me/tiny", "--evaluation", "absent.json"), "hf_loopback", "is no file"),
    "a place without a dry run": (("me/tiny", "--output_dir", "x"), "hf_loopback", "only with --dry_run"),
    "a conflict": (("me/tiny",), "hf_loopback", "it is being changed: try again"),
}


@pytest.fixture(scope="module")
def refusals(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    with LoopbackHub() as hub:
        hub.tokens["hf_reader"] = "read"
        hub.repositories["you/public"] = Repository(False, {".gitattributes": Blob(b"")})
        with Client(hub.environment(tmp_path_factory.mktemp("home"))) as client:
            answers = {}
            for name, (arguments, token, _) in REFUSED.items():
                if name == "a conflict":
                    hub.fail(at=0, fault=FAULTS["409"])
                answers[name] = tuple(client.run(COMMAND, token, run, *arguments))
        left = {name: files(found) for name, found in hub.repositories.items()}
        assert left == {"you/public": {}}, "a refused publication leaves nothing"
        assert hub.leaked_tokens() == []
    return answers


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_published_is_said_in_one_line(refusals: dict[str, tuple[int, str]], name: str) -> None:
    (_, token, words), (status, said) = REFUSED[name], refusals[name]
    assert status == 2
    assert words in said
    assert "Traceback" not in said
    assert not token or token not in said


def test_a_figure_that_other_weights_reached_is_not_published(tmp_path: Path) -> None:
    own = write_run(tmp_path / "own")
    measured = EVALUATION | {"weights": weights_fingerprint(tiny_pipeline())}
    (own / "evaluation.json").write_text(json.dumps(measured))
    other = write_run(tmp_path / "other", seed=1, evaluation=measured)
    assert write_publication(own, "me/tiny", tmp_path / "there")
    with pytest.raises(CheckpointError, match="other weights"):
        write_publication(other, "me/tiny", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_broken_weights_are_not_published(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = write_run(tmp_path / "run")
    weights = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, weights)
    with LoopbackHub() as hub:
        done = vdm_hub(hub.environment(tmp_path / "home"), "publish", run, "me/tiny")
        assert (done.returncode, hub.calls) == (2, [])
    assert name in done.stderr
