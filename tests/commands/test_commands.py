"""The doors: what they print, and one paragraph with exit status 2 for whatever is the user's to mend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import ROOT, TINY, contents, environment, finished_run, forget_accelerator, recipe
from vdm_hub import train
from vdm_hub.commands import main

Words = Callable[..., str]
VDM_HUB = "import sys; from vdm_hub.commands import main; sys.exit(main())"  # the installed script `vdm-hub`


@pytest.fixture(scope="module")
def pipeline() -> Path:
    run, done = finished_run()
    assert done.returncode == 0, done.stderr
    return run / "pipeline"


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Words:
    """Call a door that must refuse, and give back what it says."""

    def call(*words: object, door: Callable[[], int] | None = None) -> str:
        arguments = [str(word) for word in words]
        capfd.readouterr()
        if door is None:
            status = main(arguments)
        else:
            forget_accelerator()
            monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
            status = door()
        shown = capfd.readouterr()
        assert status == 2
        assert shown.out == "" or door is not None, "only a run says what it is before it is refused"
        assert "Traceback" not in shown.err
        said = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, shown.err
        assert shown.err.rstrip().endswith(said[0]), "one paragraph, and nothing after it"
        return said[0]

    return call


NO_PLACES = {"no such home": "~no-such-user/x", "too long a name": "a" * 300, "too long a path": f"/tmp/{'b' * 300}/x"}


@pytest.mark.parametrize("name", NO_PLACES.values(), ids=NO_PLACES.keys())
def test_a_name_that_nothing_can_have_is_refused_at_every_door(
    name: str, pipeline: Path, tmp_path: Path, refused: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    publish = ("publish", pipeline.parent, "me/digits", "--dry_run")
    measured = ("evaluate", pipeline, "--dataset_name", "digits")
    doors: list[tuple[object, ...]] = [("evaluate", name, "--dataset_name", "digits"), ("sample", name)]
    doors += [("publish", name, "me/digits", "--dry_run"), ("evaluate", pipeline, "--dataset_name", name)]
    doors += [(*publish, "--output_dir", name), (*publish, "--evaluation", name)]
    doors += [(*measured, "--journal", name), (*measured, "--per_image", f"{name}.parquet")]
    doors += [("sample", pipeline, "--output", f"{name}.png")]
    for words in doors:
        assert name[:60] in refused(*words)
    for option in ("train_data_dir", "dataset_name", "output_dir", "first_stage_from", "resume_from_checkpoint"):
        first_stage = ("--model", "latent_vdm") if option == "first_stage_from" else ()
        assert name[:60] in refused("digits", *first_stage, f"--{option}", name, door=train.main)
    assert contents(tmp_path) == {}


# ---- evaluate -------------------------------------------------------------------------------------------------------


def test_evaluate_prints_one_object_and_nothing_else(pipeline: Path) -> None:
    """In a process of its own, as a script would call it; it agrees with what the run measured."""
    words = ["evaluate", str(pipeline), "--dataset_name", "digits", "--split", "test", "--replicates", "2", "--json"]
    command = [sys.executable, "-c", VDM_HUB, *words, "--batch_size", "77"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {"bits_per_dim", "standard_error", "terms", "num_images", "network_evaluations"} <= figures.keys()
    assert figures["terms"].keys() == {"reconstruction", "prior", "diffusion"}
    pilot = figures["estimator"]["pilot_evaluations"]
    assert (figures["num_images"], figures["network_evaluations"]) == (360, 720 + pilot)
    measured = json.loads((pipeline.parent / "evaluation.json").read_text())
    assert figures["bits_per_dim"] == pytest.approx(measured["bits_per_dim"], rel=1e-6)
    assert figures["standard_error"] == pytest.approx(measured["standard_error"], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 13, 1000])
def test_the_batch_size_changes_no_printed_figure(
    batch_size: int, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(pipeline), "--dataset_name", "digits", "--max_images", "20", "--replicates", "2"]
    printed = []
    for size in (20, batch_size):
        assert main([*words, "--batch_size", str(size)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    for word in ("bits/dim", "standard error", "reconstruction", "prior", "diffusion", "20 images", "296 network"):
        assert word in printed[0]


def test_one_replicate_has_no_standard_error(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(pipeline), "--dataset_name", "digits", "--max_images", "3", "--replicates", "1", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["standard_error"] is None


def test_the_number_of_levels_is_the_models_and_no_other(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(pipeline), "--dataset_name", "digits", "--max_images", "3", "--replicates", "2", "--json"]
    printed = []
    for more in ([], ["--num_levels", "17"]):
        assert main([*words, *more]) == 0
        printed.append(json.loads(capsys.readouterr().out)["terms"])
    assert printed[0] == printed[1]
    assert main([*words, "--num_levels", "256"]) == 2
    assert "num_levels is 256, and the model's decoder knows 17" in capsys.readouterr().err


# ---- sample ---------------------------------------------------------------------------------------------------------


def test_sample_writes_a_grid_and_the_seed_decides(pipeline: Path, tmp_path: Path) -> None:
    grids = []
    for name, more in (("a", ["--batch_size", "4"]), ("b", []), ("c", ["--seed", "1"])):
        path = tmp_path / "new folder" / f"{name}.png"
        words = ["sample", str(pipeline), "--num_images", "9", "--num_inference_steps", "3", "--output", str(path)]
        assert main([*words, *more]) == 0
        grids.append(np.asarray(Image.open(path)))
    assert grids[0].shape == (8 * (3 * 9 + 1), 8 * (3 * 9 + 1))
    assert (grids[0] == grids[1]).all(), "an image is its seed's, whatever the batch"
    assert (grids[0] != grids[2]).any()
    assert len(list((tmp_path / "new folder").iterdir())) == 3


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--batch_size", "0"), ("--replicates", "0"), ("--transitions", "0"), ("--max_images", "-1")),
        *(("--seed", "-1"), ("--resolution", "0"), ("--num_levels", "1"), ("--draws", "0"), ("--probes", "0")),
        *(("--tolerance", "2.0"), ("--target_standard_error", "0.0"), ("--target_standard_error", "-1.0")),
    ],
)
def test_evaluate_refuses_numbers_out_of_range(option: str, value: str, pipeline: Path, refused: Words) -> None:
    said = refused("evaluate", pipeline, "--dataset_name", "digits", option, value)
    assert f"{option[2:]} is {value}" in said


def test_sample_refuses_bad_numbers_and_places(pipeline: Path, tmp_path: Path, refused: Words) -> None:
    assert "num_images is 0" in refused("sample", pipeline, "--num_images", 0)
    assert "batch_size is -3" in refused("sample", pipeline, "--batch_size", -3)
    assert "seed is" in refused("sample", pipeline, "--seed", 2**63)
    for option in ("num_images", "num_inference_steps", "batch_size"):
        assert f"{option} is {2**40}" in refused("sample", pipeline, f"--{option}", 2**40)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    before = contents(tmp_path)
    few = ("--num_images", 1, "--num_inference_steps", 1)
    assert "is a folder" in refused("sample", pipeline, *few, "--output", tmp_path / "thesis")
    below_a_file = tmp_path / "thesis" / "chapter.tex" / "grid.png"
    assert "chapter.tex" in refused("sample", pipeline, *few, "--output", below_a_file)
    assert contents(tmp_path) == before


def test_sample_replaces_a_file_only_where_it_is_told_to(pipeline: Path, tmp_path: Path, refused: Words) -> None:
    picture = tmp_path / "grid.png"
    picture.write_text("years of work")
    words = ("sample", pipeline, "--num_images", 1, "--num_inference_steps", 1, "--output", picture)
    assert f"{picture} exists: name another --output, or replace it with --overwrite" in refused(*words)
    assert picture.read_text() == "years of work"
    assert main([str(word) for word in (*words, "--overwrite")]) == 0
    assert Image.open(picture).mode == "L"


def test_a_picture_s_link_is_followed(pipeline: Path, tmp_path: Path) -> None:
    """Also one to a file of another name, whose ending says no format."""
    (tmp_path / "data").write_text("old")
    (tmp_path / "grid.png").symlink_to("data")
    words = ["sample", str(pipeline), "--num_images", "1", "--num_inference_steps", "1", "--overwrite", "--output"]
    assert main([*words, str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").is_symlink()
    assert Image.open(tmp_path / "data").format == "PNG"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("option", ["output", "per_image", "plot"])
def test_an_output_that_is_a_pipe_is_refused_before_anything(
    option: str, linked: bool, tmp_path: Path, refused: Words
) -> None:
    """Before the pipeline is looked for, too: there is none."""
    place = tmp_path / {"output": "a.png", "per_image": "a.parquet", "plot": "a.png"}[option]
    os.mkfifo(tmp_path / "pipe" if linked else place)
    if linked:
        place.symlink_to("pipe")
    words = ["sample"] if option == "output" else ["evaluate", "--dataset_name", "digits"]
    for more in ([], ["--overwrite"]):
        said = refused(*words, tmp_path / "nowhere", f"--{option}", place, *more)
        assert str(place) in said and "pipe" in said
    assert (tmp_path / "pipe" if linked else place).is_fifo()


def test_a_pipeline_that_is_not_there(tmp_path: Path, refused: Words) -> None:
    assert "holds no pipeline" in refused("sample", tmp_path)
    assert "holds no pipeline" in refused("evaluate", tmp_path / "nowhere", "--dataset_name", "digits")
    said = refused("evaluate", "someone/model-that-is-nowhere", "--dataset_name", "digits")
    assert "someone/model-that-is-nowhere" in said


def spoil(pipeline: Path, how: str) -> None:
    weights, config = pipeline / "unet" / "diffusion_pytorch_model.safetensors", pipeline / "unet" / "config.json"
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "pickled weights":
        weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    elif how == "another network":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [12]}))
    elif how == "broken config":
        config.write_text(config.read_text()[:-20])
    else:
        process = json.loads(scheduler.read_text())
        process["noise_schedule"] = (
            {"name": "tabulated", "config": {"gammas": [-7.0, 2.0, 1.0]}} if how == "not monotone" else "cosin"
        )
        scheduler.write_text(json.dumps(process))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated weights", ""),
        ("no weights", ""),
        ("pickled weights", ""),
        ("another network", ""),
        ("broken config", ""),
        ("not monotone", "increas"),
        ("unknown schedule", "did you mean 'cosine'"),
    ],
)
def test_a_spoilt_pipeline(how: str, words: str, pipeline: Path, tmp_path: Path, refused: Words) -> None:
    shutil.copytree(pipeline, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt", how)
    said = refused("evaluate", tmp_path / "spoilt", "--dataset_name", "digits")
    assert words in said
    assert len(said) < 1000


def folder_of(images: list[Image.Image], folder: Path) -> Path:
    (folder / "test").mkdir(parents=True)
    for index, image in enumerate(images):
        image.save(folder / "test" / f"{index}.png")
    return folder


def test_images_that_do_not_fit_the_pipeline(pipeline: Path, tmp_path: Path, refused: Words) -> None:
    def said(*images: Image.Image, name: str) -> str:
        return refused("evaluate", pipeline, "--dataset_name", folder_of(list(images), tmp_path / name))

    assert "images are 1x9x9, the model's 1x8x8" in said(Image.new("L", (9, 9)), name="large")
    mixed = said(Image.new("L", (8, 8)), Image.new("L", (9, 8)), name="mixed sizes")
    assert "8 x 8" in mixed and "9 x 8" in mixed and "1.png" in mixed
    assert "RGB" in said(Image.new("L", (8, 8)), Image.new("RGB", (8, 8)), name="mixed modes")
    between = said(Image.new("L", (8, 8), 7), name="between levels")
    assert "none of the 17 levels" in between
    assert "set num_levels (--num_levels) to the number of levels" in between
    assert "mode 1" in said(Image.new("1", (8, 8)), name="bitmap")
    digits = ("evaluate", pipeline, "--dataset_name", "digits")
    assert "no column 'picture': it has image" in refused(*digits, "--image_column", "picture")
    assert "no split 'validation': it has train, test" in refused(*digits, "--split", "validation")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digit"], "unknown recipe 'digit': did you mean 'digits'"),
        (["nowhere/mine.yaml"], "no recipe is at nowhere/mine.yaml"),
        (["digits", "--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["digits", "--max_train_steps", "many"], "max_train_steps must be an integer"),
        (["digits", "--noise_schedule", "cosin"], "did you mean 'cosine'"),
        (["digits", "--prediction_type", "v_predict"], "did you mean 'v_prediction'"),
        (["digits", "--lr_scheduler", "cosin"], "did you mean 'cosine'"),
        (["digits", "--image_column", "picture"], "no column 'picture': it has image"),
        (["digits", "--num_levels", "16"], "none of the 16 levels"),
        (["digits", "--train_data_dir", "nowhere"], "there is nothing at"),
        (["digits", "--output_dir", "setup.py/run"], "setup.py"),
        (
            ["digits", "--noise_schedule", '{"name": "tabulated", "config": {"gammas": [-7.0, 2.0, 1.0]}}'],
            "increas",
        ),
    ],
)
def test_train_refuses(
    words: list[str], said: str, refused: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text("")
    before = contents(tmp_path)
    assert said in refused(*words, door=train.main)
    assert contents(tmp_path) == before


def test_train_refuses_a_misspelt_recipe(tmp_path: Path, refused: Words) -> None:
    path = Path(recipe(tmp_path, tmp_path / "run"))
    path.write_text(path.read_text() + "prediction_typ: epsilon\n")
    assert "did you mean 'prediction_type'" in refused(path, door=train.main)


def test_train_refuses_a_truncated_checkpoint(pipeline: Path, tmp_path: Path, refused: Words) -> None:
    shutil.copytree(pipeline.parent, tmp_path / "run")
    weights = sorted((tmp_path / "run" / "checkpoints").rglob("ema.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:500])
    before = contents(tmp_path / "run")
    words = [tmp_path / "run" / "recipe.yaml", "--output_dir", tmp_path / "run"]
    said = refused(*words, "--resume_from_checkpoint", weights.parent, door=train.main)
    assert "damaged: ema.safetensors" in said
    assert "step-00000004 instead" in said
    assert contents(tmp_path / "run") == before


def test_a_command_line_that_argparse_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["evaluate"], ["evalute", "x"], ["sample", "x", "--num_image", "3"], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert "vdm-hub" in capsys.readouterr().err


def test_train_prints_where_things_are_without_a_test_split_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TINY["evaluation_replicates"] == 0
    forget_accelerator()
    path = recipe(tmp_path, tmp_path / "run", max_train_steps=1, num_sample_images=1)
    monkeypatch.setattr(sys, "argv", ["train.py", path, "--test_split", "none"])
    assert train.main() == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "run" / "pipeline") in shown
    assert str(tmp_path / "run" / "samples.png") in shown
