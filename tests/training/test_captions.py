"""A run that is told the captions of its images: what it trains on, publishes, samples and measures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from naming import naming
from runs import TORCHRUN, as_process, configuration, python, recipe, start, train_here
from tiny import sampled
from tiny_text import WIDTH, text_folder
from vdm_hub import VDMPipeline, load_split
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.training.parts import conditions
from vdm_hub.training.parts.conditions import LONGEST
from vdm_hub.training.state.checkpoints import checkpoints

TEXTS = ["a cat", "a big dog", "eel"]
NAMES = ["cat", "dog", "eel"]
TEXT = {"image": datasets.Image(), "text": datasets.Value("string")}
CLASS = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of encodings for this test alone."""
    place = tmp_path / "assets"
    place.mkdir()
    monkeypatch.setattr("vdm_hub.models.encodings.cached_assets_path", lambda *names: place)
    return place


def folder(path: Path, features: Any = TEXT, told: Any = None, train: int = 48) -> str:
    """A folder of Parquet files of random 8x8 images that are told these, one after the other."""
    draws, (name,) = np.random.default_rng(0), set(features) - {"image"}
    told = (TEXTS if name == "text" else [0, 1, 2]) if told is None else told
    for split, count in {"train": train, "test": 6}.items():
        pictures = [Image.fromarray(draws.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(count)]
        (path / split).mkdir(parents=True)
        rows = {"image": pictures, name: [told[row % len(told)] for row in range(count)]}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(
            path / split / "rows.parquet"
        )
    return str(path)


def fields(path: Path, features: Any = TEXT, **others: Any) -> dict[str, Any]:
    """The fields of a run with captions, by a column or, of classes, by a template."""
    by = {"caption_column": "text"}
    if "text" not in features:
        by = {"label_column": "label", "caption_template": "a {label}"}
    data = folder(path / "data", features) if not (path / "data").exists() else str(path / "data")
    encoder = text_folder(path / "encoder") if not (path / "encoder").exists() else str(path / "encoder")
    return {"dataset_name": data, "num_levels": 256, "text_encoder": encoder, **by} | others


def test_a_run_publishes_samples_and_measures_the_captions(tmp_path: Path, capsys: Any, own_cache: Path) -> None:
    drawn = {"num_sample_images": 6, "evaluation_replicates": 2, "validation_size": 6, "validation_steps": 3}
    report = train_here(tmp_path / "run", **fields(tmp_path, **drawn))
    assert report is not None and report.details["condition"] == "caption"
    assert report.details["dataset"]["caption_column"] == "text"
    pipe = VDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.text_condition is not None and set(pipe.text_condition.choices) == set(TEXTS)
    assert "; ".join(pipe.text_condition.choices) in capsys.readouterr().out
    images = load_split(str(tmp_path / "data"), "test", caption_column="text")
    assert evaluate(pipe, images, replicates=2, progress=False).per_image.equal(report.per_image)
    own = pipe.bits_per_dim(images.levels, prompt=TEXTS * 2, replicates=2).per_image
    torch.testing.assert_close(own, report.per_image)
    assert not torch.equal(own, pipe.bits_per_dim(images.levels, prompt=TEXTS[::-1] * 2, replicates=2).per_image)
    assert len(sampled(pipe, 1, prompt=TEXTS, guidance_scale=2.0)) == 3


def test_the_encoder_is_no_part_of_what_is_trained(tmp_path: Path) -> None:
    run = start(tmp_path / "run", **fields(tmp_path))
    names = [name for name, _ in run.model.named_parameters()]
    assert names and not any("encoder" in name for name in names) and set(run.model.parts) == {"network", "schedule"}


def test_encodings_are_made_once_for_all_runs(tmp_path: Path, own_cache: Path) -> None:
    first = start(tmp_path / "one", **fields(tmp_path)).model.condition
    before = {path.name: path.stat().st_mtime_ns for path in own_cache.iterdir()}
    second = start(tmp_path / "two", **fields(tmp_path), seed=1).model.condition
    assert {path.name: path.stat().st_mtime_ns for path in own_cache.iterdir()} == before and len(before) == 1
    assert torch.equal(first.encodings.states, second.encodings.states)  # type: ignore[union-attr]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("features", [TEXT, CLASS], ids=["column", "template"])
def test_captions_stay_with_their_images_in_memory_and_in_a_stream(
    tmp_path: Path, features: Any, streaming: bool
) -> None:
    run = start(tmp_path / "run", **fields(tmp_path, features, streaming=streaming, train_batch_size=8))
    name = "caption_column" if "text" in features else "label_column"
    whole = load_split(str(tmp_path / "data"), "train", **{name: name.split("_")[0].replace("caption", "text")})
    if whole.captions is None:
        texts = [f"a {NAMES[int(label)]}" for label in whole.labels]  # type: ignore[union-attr]
    else:
        texts = [whole.captions.texts[int(number)] for number in whole.captions.numbers]
    of_image = {image.numpy().tobytes(): text for image, text in zip(whole.levels, texts, strict=True)}
    condition: Any = run.model.condition
    assert condition.width == WIDTH and condition.dropout == 0.1
    lengths = set()
    for _, (batch,) in zip(range(5), run.batches(), strict=False):
        told = condition.told(batch)
        lengths.add(tuple(told["encoder_hidden_states"].shape))
        for place, image in enumerate(batch["levels"]):
            expected = condition.text.encode([of_image[image.numpy().tobytes()]]).states
            mask = told["encoder_attention_mask"][place]
            assert torch.equal(told["encoder_hidden_states"][place][mask], expected)
    assert len(lengths) == 1  # of one shape, so that nothing is compiled anew


def test_what_is_hidden_is_told_as_the_empty_text(tmp_path: Path) -> None:
    run = start(tmp_path / "run", **fields(tmp_path), condition_dropout=0.25, train_batch_size=40)
    condition: Any = run.model.condition
    empty, numbers = condition.text.encode([""]).states, torch.arange(40) % 3 + 1
    run.step, shares = 0, []
    for run.step in range(100):
        told = run._condition({"captions": numbers}, 0)
        hidden = told["encoder_attention_mask"].sum(1) == len(empty)
        assert torch.equal(
            told["encoder_hidden_states"][hidden][:, : len(empty)], empty.expand(int(hidden.sum()), -1, -1)
        )
        shares.append(hidden.double().mean())
    assert abs(float(torch.stack(shares).mean()) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    second = run._condition({"captions": numbers}, 1)["encoder_attention_mask"]
    as_process(1, 2)
    assert torch.equal(run._condition({"captions": numbers}, 0)["encoder_attention_mask"], second)


def test_a_template_makes_as_many_encodings_as_classes(tmp_path: Path) -> None:
    condition: Any = start(tmp_path / "run", **fields(tmp_path, CLASS)).model.condition
    assert len(condition.encodings.lengths) == 4 and condition.choices == ("a cat", "a dog", "a eel")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("feature", "told", "named"),
    [
        (datasets.Value("string"), ["a cat", None], ("text", "None")),
        (datasets.Value("int64"), [1, 2], ("text", "int64", "--caption_column")),
        (datasets.List(datasets.Value("string")), [["a"], ["b"]], ("text", "--caption_column")),
    ],
)
def test_columns_without_captions_are_refused(
    tmp_path: Path, feature: Any, told: Any, named: Any, streaming: bool
) -> None:
    folder(tmp_path / "data", {"image": datasets.Image(), "text": feature}, told)
    with pytest.raises(DataError, match=naming(*named)):
        start(tmp_path / "run", **fields(tmp_path, streaming=streaming))
    with pytest.raises(DataError, match=naming("caption", "text")):
        start(tmp_path / "run", **fields(tmp_path, streaming=streaming, caption_column="caption"))


def test_a_template_for_integers_without_names_is_refused(tmp_path: Path) -> None:
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    with pytest.raises(DataError, match=naming("caption_template", "ClassLabel")):
        start(tmp_path / "run", **fields(tmp_path, features))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"caption_column": "text", "label_column": "label", "text_encoder": "e"}, ("caption_column", "label_column")),
        ({"caption_column": "text"}, ("caption_column", "text_encoder")),
        ({"text_encoder": "e"}, ("text_encoder", "caption_column")),
        ({"caption_template": "a {label}", "text_encoder": "e"}, ("caption_template", "label_column")),
        ({"label_column": "label", "caption_template": "a photo", "text_encoder": "e"}, ("'a photo'", "{label}")),
        ({"label_column": "label", "caption_template": "{label} {x}", "text_encoder": "e"}, ("{x}",)),
        ({"label_column": "label", "caption_template": "{label} }", "text_encoder": "e"}, ("{label} }",)),
        ({"caption_max_length": 9}, ("caption_max_length", "text_encoder")),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(tmp_path: Path, others: Any, named: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*named)):
        configuration(tmp_path / "run", **others)


def test_a_network_of_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=naming("cross_attention_dim", 16)):
        start(
            tmp_path / "run",
            **fields(tmp_path),
            unet={"block_out_channels": [8], "norm_num_groups": 4, "cross_attention_dim": 16},
        )


def test_a_run_goes_on_with_its_own_captions_and_encoder_alone(tmp_path: Path) -> None:
    given = fields(tmp_path, checkpointing_steps=3)
    train_here(tmp_path / "run", **given, max_train_steps=3)
    train_here(tmp_path / "run", **given, max_train_steps=6, resume_from_checkpoint="latest")
    text_folder(tmp_path / "encoder", seed=1)  # in its very place
    with pytest.raises(CheckpointError, match="text encoder"):
        train_here(tmp_path / "run", **given, max_train_steps=9, resume_from_checkpoint="latest")


def test_images_without_captions_are_not_measured_by_a_model_of_captions(tmp_path: Path) -> None:
    train_here(tmp_path / "run", **fields(tmp_path))
    pipe = VDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    with pytest.raises(DataError, match="--caption_column"):
        evaluate(pipe, load_split(str(tmp_path / "data"), "test"), replicates=2, progress=False)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_encode_once(tmp_path: Path, own_cache: Path) -> None:
    both = {"max_train_steps": 3, "train_batch_size": 8, "condition_dropout": 0.4, "adam_epsilon": 1e-3}
    given = fields(tmp_path, **both)
    path = recipe(tmp_path / "recipe", tmp_path / "two", **given)
    cache = tmp_path / "cache"
    done = python(*TORCHRUN, "-m", "vdm_hub.train", path, ACCELERATE_USE_CPU="true", HF_ASSETS_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 1
    train_here(tmp_path / "one", **given, gradient_accumulation_steps=2)
    ends = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("one", "two"))
    one, two = (load_file(end / "objective.safetensors") for end in ends)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


class Captions:
    """Those of some images, of which so many are asked for."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def examples(self, most: int) -> tuple[str, ...]:
        return self.texts[:most]


def test_pictures_show_captions_of_images_that_are_held_out_where_there_are_any() -> None:
    """Short ones; those of classes come from the training images, which have them all."""
    longest = "x" * LONGEST
    of_each = ["t"], ["v", longest, longest + "x"], ["e"]
    train, validation, test = (SimpleNamespace(captions=Captions(*texts)) for texts in of_each)
    everything: Any = SimpleNamespace(train=train, validation=validation, test=test)
    assert conditions._examples(everything, is_template=False) == ("v", longest)
    assert conditions._examples(everything, is_template=True) == ("t",)
    assert conditions._examples(replaced(everything, validation=None), is_template=False) == ("e",)
    assert conditions._examples(replaced(everything, validation=None, test=None), is_template=False) == ("t",)


def replaced(data: Any, **others: Any) -> Any:
    return SimpleNamespace(**vars(data) | others)


@pytest.mark.parametrize("features", [TEXT, CLASS], ids=["captions", "template"])
def test_a_template_is_told_from_captions(features: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        conditions, "_examples", lambda data, *, is_template: (asked.append(is_template), ("a cat",))[1]
    )
    run = start(tmp_path / "run", **fields(tmp_path, features))
    assert asked == [features is CLASS]
    condition: Any = run.model.condition
    assert condition.examples == ("a cat",)
