"""Code for readers without vdm_hub: it computes the same, from a folder and from a Hub id, and touches nothing."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers.utils.dynamic_modules_utils import check_imports

import fork_server
from distributions import write_metadata
from hub.server import LoopbackHub
from hub.test_loading import MEASURE, PIPELINES, REPOSITORY, build_pipeline
from naming import naming
from tiny import tiny_pipeline, tiny_unet, tiny_unet_2d
from tiny_text import LIMIT, WIDTH, tiny_encoder, tiny_tokenizer
from vdm_hub import VDMPipeline
from vdm_hub.errors import CheckpointError, ConfigurationError
from vdm_hub.hub.install_hint import add_install_hint
from vdm_hub.publishing import remote_code, remote_code_reader
from vdm_hub.publishing.carried_code import PUBLIC_CLASSES, carried_sources, pinned_name
from vdm_hub.publishing.remote_code import add_remote_code, check_remote_code

KINDS = (*PIPELINES, "stock network")
REVISION = "remote-code"
PROVIDED = {
    "torch",
    "diffusers",
    "numpy",
    "packaging",  # of huggingface_hub
    "PIL",
    "safetensors",
    "huggingface_hub",
    "yaml",
}  # diffusers requires the others

# None makes every import of that name fail, as if it were not installed.
HIDE = """
import sys
for name in ("vdm_hub", "transformers", "datasets", "scipy", "sklearn", "matplotlib", "tenacity"):
    sys.modules[name] = None
"""

PUBLISH = f"""
import sys
from huggingface_hub import create_branch, create_repo, upload_folder
for repo, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    create_repo(repo)
    create_branch(repo, branch="{REVISION}")
    upload_folder(repo_id=repo, folder_path=folder, revision="{REVISION}")
"""

# What is measured by every way to load, then what is refused; pipelines to save again go to the last argument.
READ = (
    HIDE
    + MEASURE
    + """
import json, diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
name, output, *places = sys.argv[1:]
ways = json.loads(sys.stdin.read())
answers = {"refused": []}
for kind, place in zip(places[::2], places[1::2]):
    for way in ways:
        arguments = {key: place if value == "PLACE" else value for key, value in way.items()}
        pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True, **arguments)
        answers.setdefault(kind, []).append(measure(pipe))
    package = sys.modules[name]
    assert type(pipe) is package.VDMPipeline and type(pipe.scheduler) is package.VDMScheduler
    assert kind == "stock network" or type(pipe.unet) is package.UNetVDMModel
    pipe.save_pretrained(f"{output}/{kind}")
    for way in ways:
        arguments = {key: place if value == "PLACE" else value for key, value in way.items()}
        try:
            DiffusionPipeline.from_pretrained(place, **arguments)
        except ValueError as error:
            answers["refused"].append(str(error))
    if "revision" in ways[0]:
        snapshot_download(place, revision=ways[0]["revision"])
assert sys.modules["vdm_hub"] is None
assert not hasattr(diffusers, "VDMPipeline") and not hasattr(diffusers.pipelines, "vdm_hub")
print(json.dumps(answers))
"""
)

# For the code behind an id diffusers asks the Hub, cached or not; so offline the reader names the cached folder.
OFFLINE = (
    HIDE
    + MEASURE
    + f"""
import json
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
folder = snapshot_download(sys.argv[1], revision="{REVISION}")
print(json.dumps(measure(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))))
"""
)

ADD = """
import pathlib, sys
from vdm_hub.publishing.remote_code import add_remote_code
print(add_remote_code(pathlib.Path(sys.argv[1])))
"""

COEXIST = (
    MEASURE
    + """
import inspect, json, sys
import diffusers, vdm_hub
from diffusers import DiffusionPipeline
before = {holder: dict(vars(holder)) for holder in (diffusers, diffusers.pipelines, vdm_hub)}
new, old, plain = sys.argv[1:]
load = DiffusionPipeline.from_pretrained
pipes = {"new": load(new, trust_remote_code=True), "old": load(old, trust_remote_code=True), "installed": load(plain)}
pipes["new again"] = load(new, custom_pipeline=new, trust_remote_code=True)
for holder, attributes in before.items():
    assert all(getattr(holder, name) is value for name, value in attributes.items()), holder
    assert not any(name.startswith("vdm_hub_") for name in vars(holder)), holder
assert sys.modules["vdm_hub"] is vdm_hub and type(pipes["installed"]) is vdm_hub.VDMPipeline
assert len({type(pipe) for pipe in pipes.values()}) == len({type(pipe.unet) for pipe in pipes.values()}) == 3
answers = {name: measure(pipe) for name, pipe in pipes.items()}
try:
    type(pipes["new"].scheduler)(noise_schedule={"name": "steep", "package": "vdm-hub-steep"})
except ImportError as error:
    answers["plugin"] = [type(error).__name__, str(error)]
answers["installed plugin"] = vdm_hub.VDMScheduler(noise_schedule="steep").process.schedule.endpoints()
answers["source"] = inspect.getsource(type(pipes["new"]).bits_per_dim)
print(json.dumps(answers))
"""
)


def run(script: str, *arguments: object, stdin: str = "", cwd: Path, **environment: str) -> str:
    # A library that is to be missing must be so before another is imported.
    python = fork_server.NEW if "sys.modules[name] = None" in script else (sys.executable,)
    done = subprocess.run(
        [*python, "-c", script, *map(str, arguments)],
        input=stdin,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "might require" not in done.stderr, "diffusers takes a part of the text for a requirement"
    return done.stdout


def build(kind: str) -> VDMPipeline:
    return tiny_pipeline(tiny_unet_2d()) if kind == "stock network" else build_pipeline(kind)


def measured(pipe: VDMPipeline) -> Any:
    here: dict[str, Any] = {}
    exec(MEASURE, here)
    return here["measure"](pipe)


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    return {kind: measured(build(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines as they were saved, and with code."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        build(kind).save_pretrained(root / "saved" / kind)
        shutil.copytree(root / "saved" / kind, root / "with code" / kind)
        add_remote_code(root / "with code" / kind)
    return {"saved": root / "saved", "with code": root / "with code"}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A pipeline of one's own, without code."""
    return Path(shutil.copytree(folders["saved"] / "carried", tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def read(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What processes without vdm_hub measured, by place: of each kind, once for each way to ask for it."""
    root = tmp_path_factory.mktemp("readers")
    repositories = {kind: f"me/{kind.replace(' ', '-')}" for kind in KINDS}
    places = {kind: folders["with code"] / kind for kind in KINDS}
    answers: dict[str, Any] = {}

    def measure(place: str, ways: list[dict[str, str]], where: dict[str, Any], **environment: str) -> None:
        arguments = [str(x) for pair in where.items() for x in pair]
        output = root / place
        out = run(READ, pinned_name(), output, *arguments, stdin=json.dumps(ways), cwd=root, **environment)
        answers[place] = json.loads(out) | {"saved": output}

    modules = {"HF_MODULES_CACHE": str(root / "modules")}
    measure("folder", [{}, {"custom_pipeline": "PLACE"}], places, **os.environ | {"HF_HUB_OFFLINE": "1"} | modules)
    with LoopbackHub() as hub:
        published = [x for kind in KINDS for x in (repositories[kind], places[kind])]
        run(PUBLISH, *published, cwd=root, **hub.environment(root / "publisher"))
        commits = {kind: hub.repositories[repositories[kind]].branches[REVISION] for kind in KINDS}
        reader = hub.environment(root / "reader")
        as_the_issue_says = {"custom_pipeline": "PLACE", "custom_revision": REVISION}
        measure("hub", [{"revision": REVISION}, {"revision": REVISION} | as_the_issue_says], repositories, **reader)
        by_commit = {"revision": commits["carried"]}
        ways = [by_commit, by_commit | {"custom_pipeline": "PLACE", "custom_revision": commits["carried"]}]
        measure("commit", ways, {"carried": repositories["carried"]}, **hub.environment(root / "another reader"))
    offline = reader | {"HF_HUB_OFFLINE": "1"}
    answers["offline"] = {"carried": [json.loads(run(OFFLINE, repositories["carried"], cwd=root, **offline))]}
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "kind", "ways"),
    [
        *(("folder", kind, 2) for kind in KINDS),
        *(("hub", kind, 2) for kind in KINDS),
        ("commit", "carried", 2),
        ("offline", "carried", 1),
    ],
)
def test_a_reader_without_the_package_gets_the_same_samples_and_the_same_bound(
    read: dict[str, Any], original: dict[str, Any], place: str, kind: str, ways: int
) -> None:
    """Bit for bit, also without transformers, scipy and whatever else vdm_hub requires but diffusers does not."""
    assert read[place][kind] == [original[kind]] * ways


@pytest.mark.slow
@pytest.mark.parametrize(("place", "loads"), [("folder", 2 * len(KINDS)), ("hub", 2 * len(KINDS)), ("commit", 2)])
def test_nothing_runs_without_trust(read: dict[str, Any], place: str, loads: int) -> None:
    refusals = read[place]["refused"]
    assert len(refusals) == loads
    assert all("contains custom code in pipeline.py" in text and "trust_remote_code=True" in text for text in refusals)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_such_a_reader_saves_again_is_the_package_s(
    read: dict[str, Any], folders: dict[str, Path], original: dict[str, Any], kind: str
) -> None:
    again = read["hub"]["saved"] / kind
    indices = [json.loads((path / "model_index.json").read_text()) for path in (again, folders["saved"] / kind)]
    assert indices[0].pop("_name_or_path") and indices[0] == indices[1]
    assert measured(VDMPipeline.from_pretrained(again)) == original[kind]


@pytest.fixture(scope="module")
def side_by_side(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process measured with two versions of the carried code and with the installed package."""
    root = tmp_path_factory.mktemp("versions")
    old_folder = shutil.copytree(folders["saved"] / "plain", root / "old pipeline")
    shutil.copytree(REPOSITORY / "vdm_hub", root / "old" / "vdm_hub")
    # An older version, whose network gives half of what today's gives.
    _replace(root / "old" / "vdm_hub" / "version.py", f'"{_version()}"', '"0.0.9"')
    _replace(
        root / "old" / "vdm_hub" / "models" / "unet_vdm.py", "(self.norm_out(hidden))", "(self.norm_out(hidden) / 2)"
    )
    environment = dict(os.environ) | {"HF_MODULES_CACHE": str(root / "modules")}
    name = run(ADD, old_folder, cwd=root, **environment | {"PYTHONPATH": str(root / "old")}).strip()
    write_metadata(root / "plugins", "vdm-hub-steep", "1.0", "[vdm_hub.noise_schedules]\nsteep = steep:Steep\n")
    (root / "plugins" / "steep.py").write_text(
        "from vdm_hub.diffusion.noise_schedules import LinearSchedule\n\n\nclass Steep(LinearSchedule):\n    pass\n"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(root / "plugins")])}
    places = (folders["with code"] / "plain", old_folder, folders["saved"] / "plain")
    return json.loads(run(COEXIST, *places, cwd=root, **environment | path)) | {"old name": name}


def _version() -> str:
    return remote_code.__version__


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_versions_live_side_by_side_with_the_installed_package(
    side_by_side: dict[str, Any], original: dict[str, Any]
) -> None:
    """The process itself asserts that the classes are three, and that the package and diffusers are as they were."""
    for name in ("new", "new again", "installed"):
        assert side_by_side[name] == original["plain"]
    assert side_by_side["old"]["samples"] != original["plain"]["samples"], "each runs its own code"
    assert side_by_side["old name"].startswith("vdm_hub_0_0_9_")
    assert side_by_side["old name"] != pinned_name()


def test_carried_code_takes_no_plugin_even_where_it_is_installed(side_by_side: dict[str, Any]) -> None:
    kind, message = side_by_side["plugin"]
    assert kind == "MissingPluginError"
    assert "'steep'" in message and "pip install vdm-hub-steep" in message
    assert side_by_side["installed plugin"] == pytest.approx([-13.3, 5.0])


def test_tracebacks_and_debuggers_find_the_carried_source(side_by_side: dict[str, Any]) -> None:
    assert side_by_side["source"].lstrip().startswith("def bits_per_dim(self")


# ---- what is written ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_folder_gives_the_same_files(folder: Path, folders: dict[str, Path]) -> None:
    name = add_remote_code(folder)
    once = contents(folder)
    assert once == contents(folders["with code"] / "carried")
    assert add_remote_code(folder) == name == pinned_name()
    assert contents(folder) == once
    python = {path for path in once if path.endswith(".py")}
    assert python == {"pipeline.py"} | {f"{part}/{name}.py" for part in ("unet", "scheduler", "noise_schedule")}
    header = once["pipeline.py"].decode().split('"""')[1]
    assert all(word in header for word in ("GENERATED", "do not edit", _version(), name, "Apache-2.0"))


def test_a_published_folder_loses_its_hint_to_install_the_package(folder: Path, folders: dict[str, Path]) -> None:
    add_install_hint(folder)
    add_remote_code(folder)
    assert contents(folder) == contents(folders["with code"] / "carried")


def test_code_of_an_older_version_is_replaced(folder: Path) -> None:
    name = add_remote_code(folder)
    expected = contents(folder)
    older = "vdm_hub_0_0_9_0123abcd"
    for path in folder.glob(f"*/{name}.py"):
        path.rename(path.with_stem(older))
    _write_index(folder, (folder / "model_index.json").read_text().replace(name, older))
    add_remote_code(folder)
    assert contents(folder) == expected


def test_diffusers_finds_no_file_to_fetch_in_the_text(folders: dict[str, Path]) -> None:
    for path in (folders["with code"] / "carried").rglob("*.py"):
        assert check_imports(path) == []


def test_the_carried_sources_are_the_package_s() -> None:
    """But for the form of imports within it."""
    for module, text in carried_sources().items():
        if module:
            path = REPOSITORY / "vdm_hub" / module.replace(".", "/")
            is_package = path.is_dir()
            source = (path / "__init__.py" if is_package else path.with_suffix(".py")).read_text()
            assert ast.dump(_absolute(module, is_package, text)) == ast.dump(ast.parse(source)), module


def _absolute(module: str, is_package: bool, text: str) -> ast.Module:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == module.count(".") + 1 + is_package
            node.module, node.level = f"vdm_hub.{node.module}" if node.module else "vdm_hub", 0
    return tree


def test_the_carried_sources_are_complete_and_need_nothing_that_diffusers_does_not_bring() -> None:
    sources = carried_sources()
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (node.module or "") in sources, f"{module} imports {node.module}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                unknown = {name.split(".")[0] for name in names} - PROVIDED - sys.stdlib_module_names
                assert not unknown, f"{module} imports {unknown}"
    rooms = {module.split(".")[0] for module in sources}
    assert not {"training", "recipes", "publishing", "evaluation", "commands"} & rooms
    assert {module for module in sources if module.startswith("data.")} == {
        f"data.{name}" for name in ("captions", "colors", "conditions", "kinds", "levels", "preprocessing")
    }
    assert set(PUBLIC_CLASSES.values()) <= set(sources)


# ---- what is refused ------------------------------------------------------------------------------------------------


def _write_index(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text)


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "field"),
    [
        *(
            ("scheduler/scheduler_config.json", field)
            for field in ("noise_schedule", "prediction_type", "conditioning", "decoder", "forward_process")
        ),
        ("noise_schedule/config.json", "noise_schedule"),
    ],
)
def test_a_plugin_s_code_can_t_be_carried(folder: Path, file: str, field: str) -> None:
    before = contents(folder)
    _change(folder / file, **{field: {"name": "steep", "package": "vdm-hub-steep"}})
    with pytest.raises(ConfigurationError, match=naming("steep", "vdm-hub-steep")):
        add_remote_code(folder)
    assert contents(folder).keys() == before.keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), ("model_index.json",)),
        (lambda folder: _write_index(folder, "{"), ("model_index.json", "JSON")),
        (lambda folder: _write_index(folder, "[]"), ("model_index.json", "list")),
        (lambda folder: _change(folder / "model_index.json", _class_name="DDPMPipeline"), ("DDPMPipeline",)),
        (lambda folder: _change(folder / "model_index.json", unet=["os", "system"]), ("os.system",)),
        (lambda folder: _change(folder / "model_index.json", unet=["vdm_hub", "register"]), ("vdm_hub.register",)),
        (lambda folder: _change(folder / "model_index.json", unet=["diffusers", "No"]), ("diffusers.No",)),
        (lambda folder: _change(folder / "model_index.json", **{"../x": ["vdm_hub", "UNetVDMModel"]}), ("'../x'",)),
    ],
)
def test_a_folder_that_is_no_pipeline_of_the_package_is_refused(
    folder: Path, damage: Callable[[Path], Any], message: Any
) -> None:
    damage(folder)
    before = contents(folder)
    for use in (add_remote_code, check_remote_code):
        with pytest.raises(CheckpointError, match=naming(*message)):
            use(folder)
    assert contents(folder) == before


# ---- the check ------------------------------------------------------------------------------------------------------


def test_the_check_passes_where_both_sides_agree_and_says_where_they_do_not(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_remote_code(folders["with code"] / "carried")
    other = remote_code_reader.measure(build("plain"))
    monkeypatch.setattr(remote_code, "_measure_without_the_package", lambda folder: other)
    with pytest.raises(CheckpointError, match=naming("samples", "diffusion")):
        check_remote_code(folders["with code"] / "carried")


def test_a_model_of_captions_carries_its_code_and_a_reader_its_encoder_s(tmp_path: Path) -> None:
    captions = {"column": "text", "template": None, "max_length": LIMIT, "dropout": 0.0, "examples": []}
    parts: Any = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer(), "captions": captions}
    VDMPipeline(tiny_unet(cross_attention_dim=WIDTH), tiny_pipeline().scheduler, **parts).save_pretrained(tmp_path)
    add_remote_code(tmp_path)
    check_remote_code(tmp_path)  # samples and bounds of prompts, in a process without vdm_hub
    _change(tmp_path / "model_index.json", text_encoder=["transformers", "NoSuchModel"])
    with pytest.raises(CheckpointError, match="NoSuchModel"):
        add_remote_code(tmp_path)


def test_the_check_runs_no_code_but_today_s(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.py"):
        check_remote_code(folder)
    add_remote_code(folder)
    trace = tmp_path / "ran"
    for path in (folder / "pipeline.py", *folder.glob("unet/*.py"), folder / "more.py"):
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + f"\nopen({str(trace)!r}, 'w')\n".encode())
        with pytest.raises(CheckpointError, match=naming(path.name)):
            check_remote_code(folder)
        path.write_bytes(before)
    assert not trace.exists()


def test_a_process_that_can_t_load_the_folder_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_remote_code(folder)
    monkeypatch.setattr(remote_code, "_load_with_the_package", lambda *_: build("carried"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=naming("vdm_hub", "safetensors")):
        check_remote_code(folder)
