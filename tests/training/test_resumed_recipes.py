"""What a run goes on with: the same images and the same process, whatever they are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from naming import naming
from runs import UNET, contents, train_here
from vdm_hub.errors import CheckpointError
from vdm_hub.recipes.configuration import differences


def images(folder: Path, seed: int = 0) -> Path:
    (folder / "train").mkdir(parents=True)
    draws = np.random.default_rng(seed)
    for number in range(20):
        pixels = draws.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{number}.png")
    return folder


def fields(folder: str | Path, **more: Any) -> dict[str, Any]:
    named = {"dataset_name": None, "train_data_dir": str(folder), "num_levels": 256, "test_split": None}
    return named | {"train_batch_size": 8, "max_train_steps": 2, "lr_scheduler": "constant"} | more


def test_the_same_images_elsewhere_are_the_same_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = images(tmp_path / "one")
    train_here(tmp_path / "run", **fields(first))
    shutil.copytree(tmp_path / "run", tmp_path / "calm")
    shutil.copytree(first, tmp_path / "two")
    (tmp_path / "link").symlink_to(first)
    places = [f"{first}/", "one", "./one/../one", tmp_path / "two", "link"]
    for step, place in enumerate(places, start=3):
        train_here(tmp_path / "run", **fields(place, max_train_steps=step), resume_from_checkpoint="latest")
    train_here(tmp_path / "calm", **fields(first, max_train_steps=7), resume_from_checkpoint="latest")
    assert contents(tmp_path / "calm" / "pipeline") == contents(tmp_path / "run" / "pipeline")

    before = contents(tmp_path / "run")
    for place in (images(tmp_path / "others", seed=1), tmp_path / "one"):
        if place.name == "one":
            (place / "train" / "0.png").unlink()
        with pytest.raises(CheckpointError, match=naming("training data")):
            train_here(tmp_path / "run", **fields(place, max_train_steps=9), resume_from_checkpoint="latest")
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_mappings_in_another_order_and_long_forms_are_the_same(tmp_path: Path) -> None:
    train_here(tmp_path / "run", max_train_steps=1, noise_schedule="linear")
    turned = dict(reversed({"_class_name": "UNetVDMModel", **UNET}.items()))
    for step, schedule in enumerate(
        [{"name": "linear"}, {"config": {}, "name": "linear"}, {"name": "linear", "package": "vdm-hub"}], start=2
    ):
        more = {"noise_schedule": schedule, "unet": turned, "prediction_type": {"name": "epsilon"}}
        train_here(tmp_path / "run", **more, max_train_steps=step, resume_from_checkpoint="latest")
    for more in (
        {"noise_schedule": {"name": "linear", "config": {"gamma_min": -5.0}}},
        {"unet": {**UNET, "dropout": 0.2}},
    ):
        with pytest.raises(CheckpointError, match=next(iter(more))):
            train_here(
                tmp_path / "run",
                **{"noise_schedule": "linear"} | more,
                max_train_steps=9,
                resume_from_checkpoint="latest",
            )


def test_what_is_compared_is_what_a_field_means() -> None:
    def same(field: str, one: Any, other: Any, **more: Any) -> bool:
        texts = [json.dumps(value) if isinstance(value, dict) else value for value in (one, other)]
        return not differences({field: texts[0]}, {field: texts[1]}, **more)

    assert same("hvae", {"depth": 2, "dropout": 0.1}, {"dropout": 0.1, "depth": 2})
    assert same("hvae", {"dropout": 0}, {"dropout": 0.0})
    assert same("first_stage", {}, {"_class_name": "MarkovianHVAE"})
    assert same("decoder", "factorised", {"name": "factorised", "config": {}})
    assert same("conditioning", None, None) and not same("conditioning", None, "affine")
    assert not same("unet", {}, {"_class_name": "UNet2DModel"})
    assert not same(
        "first_stage", {"depth": 1, "latent_shapes": [[1, 8, 8]]}, {"latent_shapes": [[8, 1, 8]], "depth": 1}
    )
    assert same("first_stage_from", "runs/vae/pipeline/", "runs/../runs/vae/pipeline")
    assert same("train_data_dir", "a", "b", same_images=True) and not same("train_data_dir", "a", "b")
    for field in ("resolution", "random_flip", "num_levels", "center_crop", "streaming"):
        assert not same(field, 1, 2, same_images=True), "this changes what a step sees of the same images"
