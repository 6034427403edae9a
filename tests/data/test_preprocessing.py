"""What a pipeline says of its images travels with it, and is what measures them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from naming import naming
from runs import start
from tiny import tiny_pipeline
from vdm_hub import HVAEPipeline, LatentVDMPipeline, VDMPipeline
from vdm_hub.commands import main
from vdm_hub.data.loading import load_split
from vdm_hub.errors import ConfigurationError, VDMHubError
from vdm_hub.evaluation.provenance import fingerprint
from vdm_hub.hub.places import pipeline_folder
from vdm_hub.publishing.remote_code import add_remote_code, check_remote_code
from vdm_hub.training.parts.setup import build_pipeline

NETWORK: dict[str, Any] = {"block_out_channels": [8], "norm_num_groups": 4}
RUNGS: dict[str, tuple[type, dict[str, Any]]] = {
    "vdm": (VDMPipeline, {}),
    "hvae": (
        HVAEPipeline,
        {"model": "hvae", "hvae": NETWORK | {"latent_shapes": [[4]]}, "unet": {}, "noise_schedule": "linear"},
    ),
    "latent_vdm": (
        LatentVDMPipeline,
        {"model": "latent_vdm", "first_stage": NETWORK | {"latent_shapes": [[2, 4, 4]]}},
    ),
}
PREPROCESSING: Any = {
    "resolution": 8,
    "center_crop": True,
    "color": "grey",
    "num_levels": 17,
    "image_column": "picture",
}
HELD_OUT: Any = {
    "split": "train",
    "images": 40,
    "size": 4,
    "seed": 0,
    "label_column": "label",
    "skip_corrupt": False,
    "fingerprint": f"sha256:{'0123' * 16}",
}


@pytest.mark.parametrize("rung", RUNGS)
def test_both_mappings_are_saved_and_loaded_with_every_rung(rung: str, tmp_path: Path) -> None:
    cls, fields = RUNGS[rung]
    objective = start(tmp_path / "run", **fields).model
    pipeline = build_pipeline(objective.eval(), PREPROCESSING, HELD_OUT)
    pipeline.save_pretrained(tmp_path / "pipeline")
    for loader in (cls, DiffusionPipeline):
        loaded: Any = loader.from_pretrained(tmp_path / "pipeline")
        assert (type(loaded), loaded.preprocessing, loaded.held_out) == (cls, PREPROCESSING, HELD_OUT)
        loaded.preprocessing["resolution"] = 99
        assert loaded.preprocessing == PREPROCESSING, "what is given out is a copy"
    loaded.save_pretrained(tmp_path / "again")
    assert cls.from_pretrained(tmp_path / "again").held_out == HELD_OUT  # type: ignore[attr-defined]


def test_a_pipeline_that_says_nothing_of_images_is_as_before(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    assert not {"preprocessing", "held_out"} & set(json.loads((tmp_path / "model_index.json").read_text()))
    loaded = VDMPipeline.from_pretrained(tmp_path)
    assert (loaded.preprocessing, loaded.held_out) == (None, None)


def test_the_carried_code_keeps_them(tmp_path: Path) -> None:
    parts = tiny_pipeline().components
    VDMPipeline(**parts, preprocessing=PREPROCESSING, held_out=HELD_OUT).save_pretrained(tmp_path)
    add_remote_code(tmp_path)
    check_remote_code(tmp_path)  # in a process without this package
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["preprocessing"], index["held_out"]) == (PREPROCESSING, HELD_OUT)


WRONG: dict[str, Any] = {
    "an unknown key": PREPROCESSING | {"crop": "centre"},
    "text for a number": PREPROCESSING | {"resolution": "8"},
    "truth for a number": PREPROCESSING | {"resolution": True},
    "a number below the range": PREPROCESSING | {"resolution": 0},
    "a number above the range": PREPROCESSING | {"num_levels": 257},
    "an unknown colour": PREPROCESSING | {"color": "sepia"},
    "a colour of another kind": PREPROCESSING | {"color": ["grey"]},
    "a number for truth": PREPROCESSING | {"center_crop": 1},
    "nothing for text": PREPROCESSING | {"image_column": None},
    "a list": [8],
    "text": "resolution",
    "what is no number": PREPROCESSING | {"num_levels": float("nan")},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_can_not_be_a_preprocessing_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="preprocessing is") as caught:
        VDMPipeline(**tiny_pipeline().components, preprocessing=wrong)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


IMAGES_OF_ANOTHER_MODEL: dict[str, dict[str, Any]] = {
    "levels": {"num_levels": 256},
    "a side": {"resolution": 65_536},
    "a smaller side": {"resolution": 4},
    "channels": {"color": "rgb"},
}


@pytest.mark.parametrize("change", IMAGES_OF_ANOTHER_MODEL.values(), ids=IMAGES_OF_ANOTHER_MODEL)
@pytest.mark.parametrize("rung", ["vdm", "hvae", "latent_vdm"])
def test_a_saved_preprocessing_that_makes_other_images_than_the_models_is_refused(
    rung: str, change: dict[str, Any], sound: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "p"
    shutil.copytree(sound[rung], place)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"preprocessing": PREPROCESSING | change}))
    with pytest.raises(ConfigurationError, match=naming("preprocessing")):
        RUNGS[rung][0].from_pretrained(place)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sound")
    for rung, (_, fields) in RUNGS.items():
        build_pipeline(start(root / f"{rung}-run", **fields).model.eval(), PREPROCESSING).save_pretrained(root / rung)
    return {rung: root / rung for rung in RUNGS}


@pytest.mark.parametrize("missing", PREPROCESSING)
def test_a_preprocessing_without_a_part_of_it_is_refused(missing: str) -> None:
    told = {name: value for name, value in PREPROCESSING.items() if name != missing}
    for less in (told, {}):
        with pytest.raises(ConfigurationError, match=naming("preprocessing", missing if less else "resolution")):
            VDMPipeline(**tiny_pipeline().components, preprocessing=less)


@pytest.mark.parametrize(
    "change", [{"size": 0}, {"seed": -1}, {"split": None}, {"images": 4.5}, {"size": "4"}], ids=str
)
def test_what_can_not_be_a_choice_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="held_out is"):
        VDMPipeline(**tiny_pipeline().components, held_out=HELD_OUT | change)


@pytest.mark.parametrize("missing", HELD_OUT)
def test_a_choice_without_a_part_of_it_is_refused(missing: str, tmp_path: Path) -> None:
    VDMPipeline(**tiny_pipeline().components, held_out=HELD_OUT).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["held_out"].pop(missing)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(VDMHubError, match="held_out"):
        VDMPipeline.from_pretrained(tmp_path)


# ---- what measures --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve colour images of 10x12, that this model reads as grey ones of 8x8."""
    folder, source = tmp_path_factory.mktemp("pictures") / "birds", np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = source.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{split}-{i}.png")
    return folder


def pipeline_256() -> VDMPipeline:
    """It knows 256 levels, as ordinary images have."""
    return tiny_pipeline(num_levels=256)


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    status = main(["evaluate", *map(str, words), "--replicates", "2", "--json"])
    shown = capsys.readouterr()
    return status, json.loads(shown.out) if shown.out else {}, shown.err


def test_the_command_reads_images_as_the_model_was_trained_on_them(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = PREPROCESSING | {"num_levels": 256, "image_column": "image"}
    VDMPipeline(**pipeline_256().components, preprocessing=told).save_pretrained(tmp_path / "told")
    pipeline_256().save_pretrained(tmp_path / "silent")
    status, report, _ = evaluated(capsys, tmp_path / "told", "--dataset_name", pictures)
    expected = load_split(str(pictures), "test", num_levels=256, color="grey", resolution=8)
    assert status == 0 and report["dataset"]["fingerprint"] == fingerprint(expected.levels)
    assert (report["dataset"]["resolution"], report["dataset"]["color"]) == (8, "grey")
    assert "notes" not in report or not any("trained with" in note for note in report["notes"])
    options = ("--resolution", 8, "--color", "grey")
    status, same, _ = evaluated(capsys, tmp_path / "silent", "--dataset_name", pictures, *options)
    assert status == 0 and same["bits_per_dim"] == report["bits_per_dim"]
    status, _, error = evaluated(capsys, tmp_path / "silent", "--dataset_name", pictures)
    assert status == 2 and "--resolution" in error


def test_an_option_that_is_given_comes_before_the_models_and_is_said(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = PREPROCESSING | {"resolution": None, "color": "auto", "num_levels": 256}
    VDMPipeline(**pipeline_256().components, preprocessing=told).save_pretrained(tmp_path)
    given = ("--resolution", 8, "--color", "grey")
    status, report, _ = evaluated(capsys, tmp_path, "--dataset_name", pictures, *given)
    assert status == 0 and report["dataset"]["resolution"] == 8
    said = [note for note in report["notes"] if "trained with" in note]
    assert len(said) == 2 and "8" in said[0] and "None" in said[0]


def test_a_column_of_the_models_is_read_too(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = [{"picture": {"bytes": path.read_bytes(), "path": None}} for path in sorted(pictures.glob("test/*"))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "data").mkdir()
    shutil.move(tmp_path / "test.parquet", tmp_path / "data" / "test.parquet")
    VDMPipeline(**pipeline_256().components, preprocessing=PREPROCESSING | {"num_levels": 256}).save_pretrained(
        tmp_path / "p"
    )
    status, report, error = evaluated(capsys, tmp_path / "p", "--dataset_name", tmp_path / "data")
    assert (status, report["dataset"]["image_column"]) == (0, "picture"), error
    status, report, _ = evaluated(capsys, tmp_path / "p", "--dataset_name", pictures)  # other data, the usual name
    assert status == 0 and any("column 'image'" in note for note in report["notes"])
    assert "image_column" not in report["dataset"]
    given = ("--dataset_name", pictures, "--image_column", "picture")
    status, _, error = evaluated(capsys, tmp_path / "p", *given)
    assert status == 2 and "no column 'picture'" in error


def test_a_split_that_is_named_is_never_replaced(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"preprocessing": PREPROCESSING | {"num_levels": 256}, "held_out": HELD_OUT | {"images": 8, "size": 2}}
    known["held_out"]["label_column"] = None
    VDMPipeline(**pipeline_256().components, **known).save_pretrained(tmp_path / "p")
    status, report, _ = evaluated(capsys, tmp_path / "p", "--dataset_name", pictures)
    assert (status, report["dataset"]["split"]) == (0, "test"), "the data have one"
    status, report, _ = evaluated(capsys, tmp_path / "p", "--dataset_name", pictures / "train")
    assert (status, report["dataset"]["split"], report["num_images"]) == (0, "held_out", 2)
    status, _, error = evaluated(capsys, tmp_path / "p", "--dataset_name", pictures / "train", "--split", "test")
    assert status == 2 and "no split 'test'" in error
    for part in ("held_out[", "held_out[5:]", "held_out[:150%]"):
        status, _, error = evaluated(capsys, tmp_path / "p", "--dataset_name", pictures, "--split", part)
        assert status == 2 and part in error and "Traceback" not in error


def test_held_out_images_of_a_model_that_knows_of_none_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline_256().save_pretrained(tmp_path)
    status, _, error = evaluated(capsys, tmp_path, "--dataset_name", pictures, "--split", "held_out")
    assert status == 2 and "test_size" in error and "Traceback" not in error


# ---- where a pipeline lies ------------------------------------------------------------------------------------------


def test_a_runs_folder_stands_for_its_pipeline(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline_folder(tmp_path / "run") == pipeline_folder(tmp_path / "run" / "pipeline")
    assert pipeline_folder(tmp_path / "none") == tmp_path / "none"
    tiny_pipeline().save_pretrained(tmp_path / "run")  # a pipeline itself, whatever else lies in it
    assert pipeline_folder(tmp_path / "run") == tmp_path / "run"


def test_every_command_takes_a_runs_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    figures = [
        evaluated(capsys, tmp_path / place, "--dataset_name", "digits", "--max_images", 2)
        for place in ("run", "run/pipeline")
    ]
    assert figures[0][0] == 0 and figures[0][1]["bits_per_dim"] == figures[1][1]["bits_per_dim"]
    pictures = []
    for place in ("run", "run/pipeline"):
        picture = tmp_path / f"{place.replace('/', '-')}.png"
        words = ["--num_images", "2", "--num_inference_steps", "2", "--output", str(picture)]
        assert main(["sample", str(tmp_path / place), *words]) == 0
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1]
    (tmp_path / "empty").mkdir()
    assert main(["sample", str(tmp_path / "empty"), "--output", str(tmp_path / "x.png")]) == 2
    assert "runs/digits" in capsys.readouterr().err
