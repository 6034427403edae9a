"""The road of someone with a folder of images: template trains, ends with a figure, and the figure can be repeated."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from runs import ROOT, UNET, forget_accelerator
from vdm_hub import VDMPipeline
from vdm_hub.commands import main
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.loop import train_model

CLASSES = ("cat", "dog", "fox", "owl")
TINY = {"max_train_steps": 6, "train_batch_size": 8, "learning_rate": 1e-3, "report_to": "none", "unet": UNET}
TINY |= {
    "num_sample_images": 0,
    "sample_steps": 0,
    "validation_steps": 2,
    "early_stopping_patience": "none",
    "checkpointing_steps": 0,
}


def draw(folder: Path, count: int = 40) -> None:
    """So many images of 10x12 in folders by class."""
    source = np.random.default_rng(0)
    for i in range(count):
        pixels = source.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        path = folder / CLASSES[i % 4] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def words(**fields: Any) -> list[str]:
    values = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in fields.items()}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def run_template(**fields: Any) -> None:
    forget_accelerator()
    train_model(parse_recipe(["template", *words(**TINY | fields)]))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a finished run of the recipe template."""
    home = tmp_path_factory.mktemp("home")
    draw(home / "my_images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run_template(train_data_dir="my_images", resolution=8, output_dir="runs/mine")
    return home


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_the_run_ends_with_a_figure_of_images_that_it_did_not_train_on() -> None:
    report, run = read(Path("runs/mine/evaluation.json")), read(Path("runs/mine/run.json"))
    assert report["dataset"]["split"] == "held_out" and report["num_images"] == 4
    assert report["standard_error"] > 0 and report["replicates"] >= 8
    assert run["dataset"]["images"] == 32 and run["dataset"]["fingerprint"] != report["dataset"]["fingerprint"]


def test_the_run_says_its_figure_and_what_it_is_of(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_template(train_data_dir="my_images", resolution=8, output_dir="runs/said", validation_steps=0)
    shown = capsys.readouterr().out
    assert f"{read(Path('runs/said/evaluation.json'))['bits_per_dim']:.4f} bits/dim" in shown
    assert "held out of my_images" in shown


def test_the_same_images_give_the_same_figure_afterwards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report, table = read(Path("runs/mine/evaluation.json")), tmp_path / "images.parquet"
    for place, split in (("runs/mine", ["--split", "held_out"]), ("runs/mine/pipeline", [])):
        capsys.readouterr()
        assert main(["evaluate", place, "--dataset_name", "my_images", *split, "--json", "--overwrite",
                     "--per_image", str(table)]) == 0  # fmt: skip
        again = json.loads(capsys.readouterr().out)
        assert again["dataset"] == report["dataset"], "no option was repeated"
        assert again["bits_per_dim"] == pytest.approx(report["bits_per_dim"], rel=1e-6)
        assert again["standard_error"] == pytest.approx(report["standard_error"], rel=1e-4)
        assert not any("very images" in note for note in again.get("notes", []))
    files = pq.read_table(table)["file"].to_pylist()
    assert sorted(Path(file).parent.name for file in files) == list(CLASSES), "one of each class"


@pytest.mark.slow
def test_another_seed_is_tested_on_the_same_images() -> None:
    run_template(train_data_dir="my_images", resolution=8, output_dir="runs/other", seed=7, validation_size=0.25)
    ours, theirs = (read(Path(f"runs/{name}/evaluation.json")) for name in ("mine", "other"))
    assert ours["dataset"]["fingerprint"] == theirs["dataset"]["fingerprint"]
    assert ours["bits_per_dim"] != theirs["bits_per_dim"]


def test_the_card_has_the_figure_and_the_command_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "runs/mine", "me/mine", "--dry_run"]) == 0
    card = (Path("runs/mine/publication/main/README.md")).read_text()
    report = read(Path("runs/mine/evaluation.json"))
    assert f"{report['bits_per_dim']:.4f} bits/dim" in card
    (command,) = re.findall(r"^vdm-hub evaluate .*$", card, flags=re.MULTILINE)
    assert "--resolution" not in command, "the pipeline says it"
    arguments = shlex.split(command)[1:]
    arguments[1] = "runs/mine/publication/main"  # the repository, as a reader has it
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["dataset"] == report["dataset"]
    assert again["bits_per_dim"] == pytest.approx(report["bits_per_dim"], rel=1e-6)


def test_images_that_have_changed_are_said_to_be_others(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "my_images")
    file = sorted((tmp_path / "my_images").rglob("*.png"))[0]
    for path in (tmp_path / "my_images").rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    run = ["evaluate", str(home / "runs" / "mine"), "--dataset_name", str(tmp_path / "my_images"), "--replicates", "2"]
    assert main([*run, "--split", "held_out", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("fingerprint" in note for note in notes)
    file.unlink()
    assert main([*run, "--split", "held_out"]) == 2
    error = capsys.readouterr().err
    assert "had 40 images" in error and "has 39" in error and "Traceback" not in error


def test_images_are_ranked_without_an_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "rank_images.py")
    for split in ([], ["--split", "held_out"], ["--split", "held_out[:3]"]):
        with pytest.MonkeyPatch.context() as patch:
            picture = ["--picture", str(tmp_path / "ranking.png"), "--replicates", "2"]
            patch.setattr(sys, "argv", [script, "runs/mine", "my_images", *split, *picture])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(script, run_name="__main__")
        assert ended.value.code == 0
        assert "my_images, held_out" in capsys.readouterr().out


def test_a_model_keeps_what_it_does_to_images() -> None:
    pipeline = VDMPipeline.from_pretrained("runs/mine/pipeline")
    assert pipeline.preprocessing == {
        "resolution": 8,
        "center_crop": False,
        "color": "auto",
        "num_levels": 256,
        "image_column": "image",
    }
    assert pipeline.held_out is not None
    assert (pipeline.held_out["images"], pipeline.held_out["size"]) == (40, 4)
    assert pipeline.held_out["fingerprint"] == read(Path("runs/mine/evaluation.json"))["dataset"]["fingerprint"]


# ---- where nothing is held out for the test -------------------------------------------------------------------------


@pytest.mark.slow
def test_without_test_images_the_last_held_out_figure_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"train_data_dir": "my_images", "resolution": 8, "test_size": 0, "test_split": "none"}
    run_template(**fields, output_dir="runs/untested", max_train_steps=5)
    shown = capsys.readouterr().out
    history, record = (read(Path(f"runs/untested/{name}.json")) for name in ("history", "run"))
    last = record["validation"]
    assert (last["step"], last["images"]) == (4, 4)
    assert last["bits_per_dim"] == history["validation"]["bits_per_dim"][-1]
    assert f"{last['bits_per_dim']:.4f} bits/dim" in shown.rsplit("trained ", 1)[1], "after the training"
    assert not Path("runs/untested/evaluation.json").exists()
    assert main(["publish", "runs/untested", "me/mine", "--dry_run"]) == 0
    card = (Path("runs/untested/publication/main/README.md")).read_text()
    assert f"{last['bits_per_dim']:.4f}" in card and "step 4" in card


def test_the_figure_of_a_run_that_stopped_early_is_that_of_the_weights_it_publishes() -> None:
    fields = {"train_data_dir": "my_images", "resolution": 8, "test_size": 0, "test_split": "none"}
    fields |= {"learning_rate": 0.5, "lr_warmup_steps": 0, "early_stopping_patience": 2, "max_train_steps": 20}
    run_template(**fields, validation_steps=1, output_dir="runs/early")
    history, record = (read(Path(f"runs/early/{name}.json")) for name in ("history", "run"))
    measured = history["validation"]["bits_per_dim"]
    best = measured.index(min(measured))
    assert best < len(measured) - 1, "it got worse, which this test needs"
    assert record["validation"]["bits_per_dim"] == measured[best]
    assert record["validation"]["step"] == history["validation"]["step"][best]
