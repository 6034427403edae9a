"""`--push_to_hub`: known to be possible before training, done after it, and never at the cost of the run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hub.server import LoopbackHub
from runs import TORCHRUN, configuration, contents, python, recipe
from vdm_hub import VDMPipeline
from vdm_hub.errors import ConfigurationError, PublishError
from vdm_hub.publishing.publishing import Publication
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training import publishing
from vdm_hub.training.publishing import publish_run

TOKEN = "hf_loopback"
PUSHING: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/tiny", "max_train_steps": 2}


def train(hub: LoopbackHub, tmp_path: Path, *words: str, **fields: Any) -> subprocess.CompletedProcess[str]:
    """A run into ``tmp_path/run``, in a process for which ``hub`` is the Hub."""
    return launch(("vdm_hub.train",), hub, tmp_path, *words, **fields)


def launch(
    module: tuple[str, ...], hub: LoopbackHub, tmp_path: Path, *words: str, **fields: Any
) -> subprocess.CompletedProcess[str]:
    told = hub.environment(tmp_path / "home", fields.pop("token", TOKEN))
    changes = {name: value for name, value in told.items() if name.startswith("HF_") or name.lower() == "no_proxy"}
    changes |= {"HF_HUB_OFFLINE": "0", "ACCELERATE_USE_CPU": "true"}
    path = recipe(tmp_path / "recipe", tmp_path / "run", **PUSHING | fields)
    return python(module[0], *module[1:], path, *words, **changes)


def test_a_run_is_published_and_says_where(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        done = train(hub, tmp_path, evaluation_replicates=1, num_sample_images=1, hub_private_repo=True)
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/me/tiny" in "".join(done.stdout.splitlines()[-2:])
        repository = hub.repositories["me/tiny"]
        files = repository.at("main").files
        assert repository.private
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(files)
    weights = tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert files["unet/diffusion_pytorch_model.safetensors"].content == weights.read_bytes()
    everything = {**contents(tmp_path / "run"), "out": done.stdout, "err": done.stderr}
    assert not [name for name, value in everything.items() if TOKEN in value]
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert not [path for path, blob in files.items() if TOKEN.encode() in blob.content]


@pytest.mark.slow
def test_the_name_is_that_of_the_folder_and_a_finished_run_is_published_by_going_on(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        done = train(hub, tmp_path, push_to_hub=False, hub_model_id=None)
        assert done.returncode == 0, done.stderr
        assert not hub.calls
        assert "me/" not in done.stdout
        weights = contents(tmp_path / "run" / "pipeline")
        words = ("--push_to_hub", "--resume_from_checkpoint", "latest")
        done = train(hub, tmp_path, *words, push_to_hub=False, hub_model_id=None)
        assert done.returncode == 0, done.stderr
        (name,) = hub.repositories
        assert name.split("/")[-1] == "run"
        assert f"{hub.url}/{name}" in done.stdout
    assert contents(tmp_path / "run" / "pipeline") == weights


@pytest.mark.slow
def test_two_processes_publish_once(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        done = launch((*TORCHRUN, "-m", "vdm_hub.train"), hub, tmp_path, train_batch_size=8)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{hub.url}/me/tiny") == 1
        assert [call.route for call in hub.calls].count("create_repo") == 1
        commits = hub.repositories["me/tiny"].commits.values()
        assert len([commit for commit in commits if "README.md" in commit.files]) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"token": None}, "hf auth login"), ({"hub_model_id": "me/tiny/vdm"}, "'me/tiny/vdm'")],
)
def test_what_would_stop_the_publication_is_said_before_training(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with LoopbackHub() as hub:
        done = train(hub, tmp_path, **fields)
        assert not hub.calls
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert not (tmp_path / "run").exists(), "nothing was trained"


@pytest.mark.slow
def test_a_publication_that_fails_costs_nothing_of_the_run(tmp_path: Path) -> None:
    """The Hub is gone at the end: status 2, a complete run, and the command that goes on, which then succeeds."""
    with LoopbackHub() as gone:
        pass
    done = train(gone, tmp_path, evaluation_replicates=1)
    assert done.returncode == 2
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    pipeline = tmp_path / "run" / "pipeline"
    assert str(tmp_path / "run") in error and "vdm-hub publish" in error
    assert f"`vdm-hub publish {pipeline} me/tiny`" in error
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert f"{report['bits_per_dim']:.4f}" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 2
    assert VDMPipeline.from_pretrained(pipeline).process.num_levels == 17


def test_where_to_publish_is_refused_where_nothing_is_published() -> None:
    for fields in ({"hub_model_id": "me/tiny"}, {"hub_private_repo": True}):
        with pytest.raises(ConfigurationError, match="push_to_hub"):
            TrainingArguments(max_train_steps=1, **fields)
    named = TrainingArguments(max_train_steps=1, output_dir="runs/tiny", push_to_hub=True)
    assert named.hub_repository == "tiny"
    here = TrainingArguments(max_train_steps=1, output_dir=".", push_to_hub=True)
    assert here.hub_repository == Path.cwd().name


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("no_results", ["", "it has no dataset"])
def test_what_is_asked_of_the_hub_and_said(
    no_results: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    private: bool,
) -> None:
    """And of a failure: the words that go on where it stopped."""
    asked: list[Any] = []
    error: list[Exception] = []

    def publish(folder: Path, repository: str, **options: Any) -> Publication:
        asked.append((folder, repository, options))
        if error:
            raise error[0]
        return Publication(repository, "https://hub/me/tiny", "c0ffee", no_results=no_results)

    monkeypatch.setattr(publishing, "publish", publish)
    folder: Any = SimpleNamespace(pipeline=tmp_path / "pipeline", path=tmp_path)
    run = configuration(tmp_path, **PUSHING | {"hub_private_repo": private})
    publish_run(configuration(tmp_path), folder)
    assert asked == [] and not capsys.readouterr().out
    publish_run(run, folder)
    assert asked == [(tmp_path / "pipeline", "me/tiny", {"private": True if private else None})]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (2 if no_results else 1) and said[0].endswith("https://hub/me/tiny")
    assert no_results in said[-1]
    error.append(OSError("no route"))
    words = f"`vdm-hub publish {tmp_path / 'pipeline'} me/tiny{' --private' if private else ''}`"
    with pytest.raises(PublishError, match=re.escape(words)):
        publish_run(run, folder)
