"""``vdm-hub sample`` and ``vdm-hub evaluate`` of a model that is told captions, and of those that are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from naming import naming
from tiny import quiet, randomised, sampled, tiny_pipeline, tiny_unet
from tiny_text import LIMIT, WIDTH, tiny_encoder, tiny_tokenizer
from vdm_hub import VDMPipeline, load_split
from vdm_hub.commands import main

CAPTIONS = {"column": "label", "template": "a {label}", "max_length": LIMIT, "dropout": 0.1, "examples": ["a", "b"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet = randomised(tiny_unet(cross_attention_dim=WIDTH))
    text: Any = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer()}
    folder = tmp_path_factory.mktemp("captions")
    VDMPipeline(unet, tiny_pipeline().scheduler, captions=CAPTIONS, **text).save_pretrained(folder / "text")
    tiny_pipeline().save_pretrained(folder / "plain")
    return folder


def sample(folder: Path, output: Path, *more: str) -> int:
    few = ["--num_inference_steps", "3", "--num_images", "4", "--output", str(output), "--overwrite"]
    return main(["sample", str(folder), *few, *more])


def test_a_row_of_samples_for_each_prompt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, rows in (((), "a, b"), (("--prompt", "a cat", "eel"), "a cat, eel")):
        assert sample(folder / "text", tmp_path / "grid.png", *more) == 0
        assert f"a row each of {rows}:" in capsys.readouterr().out
    plain = (tmp_path / "grid.png").read_bytes()
    assert sample(folder / "text", tmp_path / "grid.png", "--prompt", "a cat", "eel", "--guidance_scale", "3") == 0
    guided = (tmp_path / "grid.png").read_bytes()
    more = ("--prompt", "a cat", "eel", "--guidance_scale", "3", "--negative_prompt", "dog")
    assert sample(folder / "text", tmp_path / "grid.png", *more) == 0
    assert len({plain, guided, (tmp_path / "grid.png").read_bytes()}) == 3
    assert Image.open(tmp_path / "grid.png").size[0] > 16


@pytest.mark.parametrize(
    ("kind", "more", "named"),
    [
        ("text", ("--class_labels", "3"), ("class_labels", "--prompt")),
        ("plain", ("--prompt", "a cat"), ("prompt", "leave it out")),
        ("text", ("--prompt", "a cat", "--negative_prompt", "b"), ("negative_prompt", "guidance_scale")),
    ],
)
def test_what_the_model_is_not_told_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, more: Any, named: Any
) -> None:
    assert sample(folder / kind, tmp_path / "grid.png", *more) == 2
    assert re.search(naming(*named), capsys.readouterr().err)


def test_images_are_measured_given_the_captions_of_their_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdm_hub.models.encodings.cached_assets_path", lambda *names: tmp_path)
    words = ["evaluate", str(folder / "text"), "--dataset_name", "digits", "--max_images", "6", "--replicates", "2"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["condition"] == "caption" and report["dataset"]["caption_template"] == "a {label}"
    images = load_split("digits", "test[:6]", num_levels=17, label_column="label", caption_template="a {label}")
    assert images.captions is not None
    prompts = [images.captions.texts[number] for number in images.captions.numbers]
    pipe = quiet(VDMPipeline.from_pretrained(folder / "text"))
    assert report["bits_per_dim"] == pytest.approx(
        pipe.bits_per_dim(images.levels, prompt=prompts, replicates=2).bits_per_dim
    )
    assert main([*words, "--caption_column", "nothing"]) == 2
    assert re.search(naming("nothing"), capsys.readouterr().err)
    assert main(["evaluate", str(folder / "plain"), *words[2:], "--caption_column", "label"]) == 2
    assert re.search(naming("--caption_column", "leave"), capsys.readouterr().err)
    assert len(sampled(pipe, 1, prompt="a")) == 1
