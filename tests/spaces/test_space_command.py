"""`vdm-hub space`: the folder that it writes for every kind of model, and what it refuses."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

import vdm_hub
from ddpm import new_network
from hub.publications import write_run
from runs import ROOT
from spaces.kinds import KINDS, saved
from vdm_hub.commands import main
from vdm_hub.commands.loading import load_pipeline
from vdm_hub.evaluation.provenance import weights_fingerprint
from vdm_hub.spaces.requirements import on_no_index, requirements
from vdm_hub.spaces.writing import GRADIO

APPS = sorted((ROOT / "vdm_hub" / "spaces").glob("app_of_*.py"))
FILES = {"README.md", "app.py", "requirements.txt", "space.json", "model/model_index.json"}


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.stem)
def test_an_app_has_at_most_150_lines_and_uses_public_names_alone(app: Path) -> None:
    text = app.read_text()
    assert len(text.splitlines()) <= 150
    tree = ast.parse(text)
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
             if (node.module or "").startswith("vdm_hub")]  # fmt: skip
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in modules if (name or "").startswith("vdm_hub.")]
    named += re.findall(r"\bvdm_hub\.(\w+)", text)
    assert named and set(named) <= {*vdm_hub.__all__}


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_all_that_a_space_needs(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = saved(kind, tmp_path / "pipeline"), tmp_path / "space"
    with pytest.warns(UserWarning, match=r"vdm-hub.*--requirement"):  # no index has it, and that is said
        assert main(["space", str(model), "--output", str(output), "--title", "A tiny one"]) == 0
    said = capsys.readouterr()
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert files >= FILES and all(name in said.out for name in files)
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left
    assert (output / "app.py").read_bytes() == (ROOT / "vdm_hub" / "spaces" / "app_of_images.py").read_bytes()
    told = json.loads((output / "space.json").read_text())
    assert told["model"] == "model" and told["loading"] == {} and told["title"] == "A tiny one"
    assert weights_fingerprint(load_pipeline(str(output / "model"))) == weights_fingerprint(load_pipeline(str(model)))
    assert "_name_or_path" not in (output / "model" / "model_index.json").read_text()
    card = SpaceCard.load(output / "README.md").data.to_dict()
    assert {
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "title": "A tiny one",
    }.items() <= card.items()
    assert "vdm_hub" in card["tags"] and "models" not in card
    lines = [Requirement(line) for line in (output / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert [line.name for line in lines] == ["vdm-hub", "torch"]
    assert str(lines[0].specifier) == f"=={vdm_hub.__version__}"


def test_a_requirement_takes_the_place_of_that_of_the_same_package(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model, address = saved("unconditional", tmp_path / "pipeline"), "vdm_hub @ git+https://example.org/vdm_hub@0a1b2c3"
    asked = ["--requirement", address, "--requirement", "einops>=0.8"]
    assert main(["space", str(model), "--output", str(tmp_path / "space"), *asked]) == 0
    lines = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert lines[0] == address and lines[1].startswith("torch==") and lines[2] == "einops>=0.8"
    assert not [one for one in recwarn if "--requirement" in str(one.message)]


def test_a_package_that_pip_took_from_a_repository_is_named_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEP 610: `direct_url.json` of an installed distribution, here of one that stands before the real one."""
    folder = tmp_path / "vdm_hub-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vdm-hub\nVersion: 0.1.0\n")
    where = {"url": "https://example.org/vdm_hub", "vcs_info": {"vcs": "git", "commit_id": "0a1b2c3"}}
    (folder / "direct_url.json").write_text(json.dumps(where))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = requirements(KINDS["unconditional"]())
    assert found["vdm-hub"] == "vdm-hub @ git+https://example.org/vdm_hub@0a1b2c3" and not on_no_index(found)
    (folder / "direct_url.json").write_text(json.dumps(where | {"subdirectory": "core"}))
    assert requirements(KINDS["unconditional"]())["vdm-hub"].endswith("@0a1b2c3#subdirectory=core")
    (folder / "direct_url.json").write_text(json.dumps({"url": "file:///home/ada/vdm_hub", "dir_info": {}}))
    assert requirements(KINDS["unconditional"]())["vdm-hub"] == f"vdm-hub=={vdm_hub.__version__}"


def test_a_checkpoint_of_diffusers_is_loaded_by_what_was_said_of_it(tmp_path: Path) -> None:
    DDPMPipeline(new_network(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    asked = ["--num_levels", "17", "--decoder", "factorised"]
    assert main(["space", str(tmp_path / "stock"), "--output", str(tmp_path / "space"), *asked]) == 0
    told = json.loads((tmp_path / "space" / "space.json").read_text())
    assert told["loading"] == {"num_levels": 17, "overrides": {"decoder": "factorised"}}
    pipe = load_pipeline(str(tmp_path / "space" / told["model"]), **told["loading"])
    assert pipe.num_levels == 17 and pipe.scheduler.config.decoder == "factorised"


def test_a_runs_folder_gives_its_name_and_its_pipeline(tmp_path: Path) -> None:
    write_run(tmp_path / "my-digits")
    assert main(["space", str(tmp_path / "my-digits"), "--output", str(tmp_path / "space")]) == 0
    assert json.loads((tmp_path / "space" / "space.json").read_text())["title"] == "my-digits"


def test_a_former_space_is_replaced_when_asked_and_nothing_else_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = saved("unconditional", tmp_path / "pipeline"), tmp_path / "space"
    asked = ["space", str(model), "--output", str(output)]
    output.mkdir()
    assert main(asked) == 0  # an empty folder is nobody's
    assert main(asked) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*asked, "--overwrite", "--title", "another"]) == 0
    assert json.loads((output / "space.json").read_text())["title"] == "another"
    (output / "mine.txt").write_text("mine")
    assert main([*asked, "--overwrite"]) == 2 and "mine.txt" in capsys.readouterr().err
    assert (output / "mine.txt").read_text() == "mine"
    other = tmp_path / "pictures"
    other.mkdir()
    (other / "app.py").write_text("mine")
    assert main(["space", str(model), "--output", str(other), "--overwrite"]) == 2
    assert "pictures" in capsys.readouterr().err and (other / "app.py").read_text() == "mine"


REFUSED: list[tuple[list[str], str]] = [
    ([], "--output"),
    (["--output", "x", "--private"], "--push"),
    (["--output", "x", "--port", "7860"], "--serve"),
    (["--push", "me/x", "--overwrite"], "--output"),
    (["--output", "x", "--requirement", "no such @@"], "--requirement"),
    (["--output", "x", "--revision", "v2"], "--revision"),
    (["--push", "me/x/y"], "me/x/y"),
    (["--push", "me/x"], "HF_TOKEN"),
]


@pytest.mark.parametrize(("asked", "named"), REFUSED, ids=[" ".join(asked) or "nothing" for asked, _ in REFUSED])
def test_contradictions_are_refused_with_the_option(
    asked: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    saved("unconditional", tmp_path / "pipeline")
    assert main(["space", "pipeline", *asked]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", str(tmp_path), "--output", str(tmp_path / "space")]) == 2
    assert "model_index.json" in capsys.readouterr().err and not (tmp_path / "space").exists()


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_serving_without_gradio_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", str(saved("unconditional", tmp_path / "pipeline")), "--serve"]) == 2
    assert f"gradio=={GRADIO}" in capsys.readouterr().err


def test_the_version_of_gradio_is_the_one_that_is_pinned_and_no_dependency() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pins["gradio"] == GRADIO and "playwright" in pins
    assert any(line.startswith("gradio") for line in project["optional-dependencies"]["space"])
    assert not any("gradio" in line or "playwright" in line for line in project["dependencies"])
