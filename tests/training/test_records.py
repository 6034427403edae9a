"""What a run records about itself: its course, and how it came about; whole, and with nothing of the machine."""

from __future__ import annotations

import getpass
import hashlib
import json
import shlex
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vdm_hub
from distributions import write_metadata
from runs import LEARNED, contents, environment, finished_run, start, train_here
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.loading import load_data
from vdm_hub.recipes.configuration import DiffusionArguments, NameOrJSON
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from vdm_hub.training.state.provenance import code_state, describe_split, git_state, plugin_versions

WATCHED: dict[str, Any] = {"logging_steps": 1, "validation_size": 40, "validation_steps": 3, "checkpointing_steps": 4}


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


# ---- history.json ---------------------------------------------------------------------------------------------------


def test_the_history_holds_what_a_tracker_is_told_and_needs_none(tmp_path: Path) -> None:
    fields = WATCHED | {"logging_steps": 2, "validation_steps": 2}
    train_here(tmp_path / "tracked", **fields, report_to="tensorboard")
    train_here(tmp_path / "untracked", **fields)
    history = read(tmp_path / "tracked" / "history.json")
    assert history == read(tmp_path / "untracked" / "history.json")
    assert history["train"]["step"] == history["validation"]["step"] == [2, 4, 6]
    assert list(history["train"]) == ["step", "bits_per_dim", "reconstruction", "prior", "diffusion", "learning_rate"]
    events = EventAccumulator(str(tmp_path / "tracked" / "logs" / "vdm_hub"))
    events.Reload()
    for part, columns in history.items():
        for name in columns.keys() - {"step", "standard_error"}:
            logged = events.Scalars("learning_rate" if name == "learning_rate" else f"{part}/{name}")
            assert columns[name] == pytest.approx([event.value for event in logged], rel=1e-6), (part, name)
    assert all(error > 0 for error in history["validation"]["standard_error"])


def test_the_terms_of_the_history_add_up(tmp_path: Path) -> None:
    train_here(tmp_path / "run", logging_steps=1, noise_schedule=LEARNED, gradient_accumulation_steps=2)
    train = read(tmp_path / "run" / "history.json")["train"]
    assert train["step"] == [1, 2, 3, 4, 5, 6]
    terms = np.array([train[name] for name in ("reconstruction", "prior", "diffusion")])
    np.testing.assert_allclose(terms.sum(0), train["bits_per_dim"], rtol=1e-12)
    assert len(set(train["bits_per_dim"])) == 6


@pytest.mark.parametrize(
    "killed_after", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)]
)
def test_a_resumed_run_has_the_history_of_the_undisturbed_one(killed_after: int, tmp_path: Path) -> None:
    """Whatever was logged between the last checkpoint and the end is logged again, and once."""
    fields = WATCHED | {"checkpointing_steps": killed_after, "max_train_steps": 7}
    train_here(tmp_path / "calm", **fields)
    shutil.copytree(tmp_path / "calm", tmp_path / "killed")
    for path in checkpoints(tmp_path / "killed" / "checkpoints")[1:]:
        shutil.rmtree(path)
    names = ("history.json", "training_curve.png", "run.json")
    for name in names:
        (tmp_path / "killed" / name).unlink()
    train_here(tmp_path / "killed", **fields, resume_from_checkpoint="latest")
    calm, killed = ({name: (tmp_path / run / name).read_bytes() for name in names} for run in ("calm", "killed"))
    assert json.loads(calm["history.json"])["train"]["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads(calm["history.json"])["validation"]["step"] == [3, 6]
    assert calm["history.json"] == killed["history.json"]
    assert calm["training_curve.png"] == killed["training_curve.png"]
    reports = [json.loads(records["run.json"]) | {"training_seconds": None} for records in (calm, killed)]
    assert reports[0] == reports[1]


def test_a_longer_run_goes_on_with_the_history(tmp_path: Path) -> None:
    train_here(tmp_path / "run", logging_steps=2, max_train_steps=4)
    before = read(tmp_path / "run" / "history.json")["train"]
    train_here(tmp_path / "run", logging_steps=1, max_train_steps=6, resume_from_checkpoint="latest")
    after = read(tmp_path / "run" / "history.json")["train"]
    assert after["step"] == [2, 4, 5, 6]
    assert {name: values[:2] for name, values in after.items()} == before


def test_every_checkpoint_says_how_the_run_came_about(tmp_path: Path) -> None:
    train_here(tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    first, last = (load_checkpoint(path).state["provenance"] for path in checkpoints(tmp_path / "run" / "checkpoints"))
    assert last == read(tmp_path / "run" / "run.json")
    assert (first["steps"], last["steps"]) == (2, 4)
    changing = ("steps", "training_seconds")
    assert {key: first[key] for key in first if key not in changing} == {k: last[k] for k in last if k not in changing}


# ---- run.json -------------------------------------------------------------------------------------------------------


def test_a_launched_run_says_how_it_came_about() -> None:
    run, done = finished_run()
    assert done.returncode == 0, done.stderr
    told = read(run / "run.json")
    assert told["command"] == "accelerate launch --num_processes 1 -m vdm_hub.train recipe.yaml"
    assert (told["steps"], told["processes"], told["global_batch_size"]) == (6, 1, 16)
    assert (told["device"], told["mixed_precision"], told["gradient_accumulation_steps"]) == ("cpu", "no", 1)
    assert told["training_seconds"] > 0
    assert told["plugins"] == {}
    for name in ("torch", "diffusers", "huggingface-hub", "numpy"):
        assert told["versions"][name] == metadata.version(name)
    assert told["versions"]["python"] == sys.version.split()[0]
    tensors = load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert told["parameters"] == {"network": sum(tensor.numel() for tensor in tensors.values()), "schedule": 0}


def test_the_dataset_of_a_run_is_known_by_its_levels() -> None:
    run, _ = finished_run()
    train, test = train_test_split(load_digits().images.astype(np.uint8), test_size=360, random_state=0)
    for record, split, images in (("run.json", "train", train), ("evaluation.json", "test", test)):
        told = read(run / record)["dataset"]
        count = len(images)
        digest = hashlib.sha256(f"({count}, 1, 8, 8)".encode() + images.tobytes()).hexdigest()
        expected = {"name": "digits", "config": None, "split": split, "images": count, "shape": [1, 8, 8]}
        expected |= {"levels": 17, "resolution": None, "resized": False, "fingerprint": f"sha256:{digest}"}
        assert told == expected


def test_batch_parameters_and_held_out_images_are_counted(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"gradient_accumulation_steps": 3, "train_batch_size": 8, "noise_schedule": LEARNED}
    run = start(tmp_path / "run", **fields)
    train_here(tmp_path / "run", **fields, validation_size=100, random_flip=True)
    told = read(tmp_path / "run" / "run.json")
    assert (told["global_batch_size"], told["gradient_accumulation_steps"]) == (24, 3)
    assert told["parameters"]["schedule"] == sum(p.numel() for p in run.model.process.parameters()) > 0
    assert told["dataset"]["images"] == 1437 - 100
    assert told["augmentation"] == {"random_flip": True, "random_crop": False}


@pytest.mark.parametrize("center_crop", [False, True])
def test_a_run_says_how_its_images_were_cut_and_how_far_it_is(center_crop: bool, tmp_path: Path) -> None:
    (tmp_path / "birds" / "train").mkdir(parents=True)
    for index in range(4):
        pixels = np.full((12, 12), 255 * index // 3, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "birds" / "train" / f"{index}.png")
    fields: dict[str, Any] = {"dataset_name": None, "test_split": None, "num_levels": 256, "train_batch_size": 4}
    fields |= {"train_data_dir": str(tmp_path / "birds"), "resolution": 8, "center_crop": center_crop}
    told = start(tmp_path / "run", **fields).provenance.describe(2, 7.12345)
    assert told["augmentation"] == {"random_flip": False, "random_crop": not center_crop}
    assert (told["steps"], told["training_seconds"], told["global_batch_size"]) == (2, 7.123, 4)
    assert (told["processes"], told["device"], told["dataset"]["name"]) == (1, "cpu", "birds")


@pytest.mark.parametrize("asked", [None, "bf16"])
def test_a_precision_is_part_of_the_command_only_where_the_recipe_does_not_say_it(
    asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "accelerate launch --num_processes 1 -m vdm_hub.train recipe.yaml"
    assert start(tmp_path / "plain").provenance.describe(0, 0.0)["command"] == plain
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    told = start(tmp_path / "run", mixed_precision=asked).provenance.describe(0, 0.0)
    assert told["mixed_precision"] == "bf16"
    assert told["command"] == (plain if asked else plain.replace(" -m", " --mixed_precision bf16 -m"))


def test_a_split_is_described_with_all_that_was_asked_of_it() -> None:
    images = load_data(DataArguments(dataset_name="digits", num_levels=17)).train
    asked = {"resolution": 8, "color": "grey", "image_column": "picture"}
    told = describe_split(images, DataArguments(dataset_name="digits", dataset_config_name="old", **asked), "train")
    assert {key: told.get(key) for key in asked} == asked
    assert (told["name"], told["config"], told["split"]) == ("digits", "old", "train")
    assert not {"label_column", "caption_column", "caption_template"} & told.keys()
    labelled = DataArguments(dataset_name="digits", label_column="label", caption_template="a {label}")
    told = describe_split(images, labelled, "train")
    assert (told["label_column"], told["caption_template"]) == ("label", "a {label}") and "caption_column" not in told


def test_texts_are_described_with_their_column_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    asked: dict[str, Any] = {"dataset_name": str(tmp_path / "text.txt"), "tokenizer": "character", "window_length": 16}
    windows = load_data(DataArguments(**asked)).train
    told = describe_split(windows, DataArguments(**asked, dataset_config_name="old", text_column="body"), "train")
    assert (told["config"], told["text_column"], told["split"]) == ("old", "body", "train")


def test_a_stream_has_no_number_of_images(tmp_path: Path) -> None:
    train_here(tmp_path / "run", streaming=True, evaluation_replicates=1, max_train_steps=1)
    streamed = read(tmp_path / "run" / "run.json")["dataset"]
    assert (streamed["images"], streamed["fingerprint"], streamed["shape"]) == (None, None, [1, 8, 8])
    measured, held = (read(run / "evaluation.json")["dataset"] for run in (tmp_path / "run", finished_run()[0]))
    assert measured == held, "the images that were measured are known"


def test_the_time_of_all_parts_is_summed(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    train_here(tmp_path / "run", **fields, max_train_steps=2)
    (path,) = checkpoints(tmp_path / "run" / "checkpoints")
    checkpoint = load_checkpoint(path)
    first = checkpoint.state["training_seconds"]
    assert read(tmp_path / "run" / "run.json")["training_seconds"] == pytest.approx(first, abs=1e-3)
    shutil.rmtree(path)
    save_checkpoint(path.parent, 2, checkpoint.tensors, checkpoint.state | {"training_seconds": first + 5000})
    train_here(tmp_path / "run", **fields, max_train_steps=3, resume_from_checkpoint="latest")
    assert read(tmp_path / "run" / "run.json")["training_seconds"] > first + 5000


def test_the_command_repeats_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recipe alone, in another folder, and a precision that only the launcher was told."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train_here(Path("runs/tiny"))
    shutil.copy(Path("runs/tiny/recipe.yaml"), tmp_path / "second")
    told = read(Path("runs/tiny/run.json"))
    assert told["mixed_precision"] == "bf16"
    launcher, launch, *words = shlex.split(told["command"])
    assert (launcher, launch) == ("accelerate", "launch")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    again = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        cwd=tmp_path / "second",
        env=environment(HF_HOME=str(tmp_path / "home")),  # nobody's `accelerate config`
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    pipelines = [contents(tmp_path / name / "runs" / "tiny" / "pipeline") for name in ("first", "second")]
    assert pipelines[0] == pipelines[1]


def test_nothing_of_the_machine_or_its_user_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 6)
    places = {}
    for name, size in (("birds", 8), ("large birds", 12)):
        folder = places[name] = tmp_path / "ada" / "private" / name
        for split in ("train", "test"):
            (folder / split).mkdir(parents=True)
            for index in range(4):
                level = np.full((size, size), 255 * index // 3, np.uint8)
                Image.fromarray(level).save(folder / split / f"{index}.png")
    fields: dict[str, Any] = {"dataset_name": None, "num_levels": 256, "train_batch_size": 4, "max_train_steps": 1}
    fields |= {"evaluation_replicates": 1, "resolution": 8}
    for name, folder in places.items():
        output = tmp_path / f"run of {name}"
        train_here(output, **fields, train_data_dir=str(folder))
        text = "".join((output / record).read_text() for record in ("run.json", "evaluation.json", "history.json"))
        secrets = [str(tmp_path), "ada", "private", "hf_secret", str(Path.home()) + "/", socket.gethostname()]
        assert not [secret for secret in [*secrets, getpass.getuser()] if secret in text]
        for record in ("run.json", "evaluation.json"):
            told = read(output / record)["dataset"]
            assert (told["name"], told["resolution"], told["resized"]) == (name, 8, name == "large birds")
        assert read(output / "run.json")["augmentation"]["random_crop"] == (name == "large birds")


def test_the_commit_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None, "no repository"

    def git(*words: str) -> str:
        identity = ("-c", "user.name=ada", "-c", "user.email=ada@example.org")
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    assert git_state() is None, "no commit"
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "--quiet", "-m", "first")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "result").write_text("no code")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("2")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state() is None, "no git"


def test_the_commit_is_that_of_the_code_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = code_state()
    assert here == code_state(Path(vdm_hub.__file__).parent)
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet", "."], check=True)
    assert code_state() == here and git_state() is None
    # Installed into an environment that lies in a project's own repository: the project's commit is not the code's.
    identity = ("-c", "user.name=ada", "-c", "user.email=ada@example.org")
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
    (tmp_path / "vdm_hub").mkdir()
    (tmp_path / "vdm_hub" / "__init__.py").touch()
    assert code_state(tmp_path / "vdm_hub") is None and git_state() is not None
    subprocess.run(["git", "add", "vdm_hub"], check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "second"], check=True)
    assert code_state(tmp_path / "vdm_hub") == git_state() != here


def test_the_plugins_of_a_recipe_are_named_with_their_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metadata(tmp_path, "bent-schedules", "1.5", "[vdm_hub.noise_schedules]\nbent = bent:Bent\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = DiffusionArguments(noise_schedule=NameOrJSON('{"name": "bent", "config": {"by": 1.0}}'))
    assert plugin_versions(named) == plugin_versions(DiffusionArguments(noise_schedule=NameOrJSON("bent")))
    assert plugin_versions(named) == {"bent-schedules": "1.5"}
    assert plugin_versions(DiffusionArguments()) == {}


# ---- a run that ended before its first checkpoint -------------------------------------------------------------------


def test_a_run_that_ended_before_its_first_checkpoint_starts_again_where_it_was(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.announce()
    run.optimise(next(run.batches()))
    train_here(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=2)
    assert read(tmp_path / "run" / "run.json")["steps"] == 2
