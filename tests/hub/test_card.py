"""The model card and what is published beside it: said once, complete, and harmless whatever the files hold."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from hub.publications import EVALUATION, IMAGES, RECIPE, RUN, write_run
from tiny import tiny_pipeline, tiny_unet
from tiny_text import WIDTH, tiny_encoder, tiny_tokenizer
from vdm_hub import VDMPipeline
from vdm_hub.commands import main
from vdm_hub.errors import CheckpointError, PublishError
from vdm_hub.hub.outgoing import refuse_secrets
from vdm_hub.hub.records import read_evaluation, read_history, read_run
from vdm_hub.publishing.card import Edition, render_card
from vdm_hub.publishing.contents import copy_pipeline, copy_records, read_contents
from vdm_hub.publishing.markdown import plain, visible
from vdm_hub.publishing.publishing import prepared_publication
from vdm_hub.recipes.arguments import read_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("card") / "run")


def card(run: Path, **edition: Any) -> ModelCard:
    source = read_contents(run)
    return ModelCard(render_card(source, VDMPipeline.from_pretrained(source.pipeline), Edition("me/tiny", **edition)))


def test_the_metadata_holds_the_bound_its_terms_and_its_protocol(run: Path) -> None:
    data = card(run, license="apache-2.0").data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
    assert data.license == "apache-2.0"
    results = {result.metric_type: result for result in data.eval_results}
    total = results.pop("bits_per_dim")
    assert total.metric_value == pytest.approx(EVALUATION["bits_per_dim"], abs=1e-6)
    assert total.metric_args == {
        key: EVALUATION[key]
        for key in ("standard_error", "standard_error_over_images", "num_images", "replicates", "method")
    }
    assert (total.dataset_name, total.dataset_split) == ("digits", "test")
    terms = {name.removeprefix("bits_per_dim_"): result.metric_value for name, result in results.items()}
    assert terms == pytest.approx(EVALUATION["terms"], abs=1e-6)
    assert math.fsum(terms.values()) == pytest.approx(total.metric_value, abs=1e-5)


def test_working_snippets_come_first(run: Path) -> None:
    text = card(run).text
    sections = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert sections[0] == "Use it"
    assert {"How good it is", "Samples", "Training", "Data", "How it was made", "Licence"} < set(sections)
    assert "Limits and intended use" in sections
    assert 'VDMPipeline.from_pretrained("me/tiny")' in text.split("## How good it is")[0]


def test_a_branch_is_named_wherever_the_card_loads(run: Path) -> None:
    text = card(run, revision="v2").text
    loads = re.findall(r"from_pretrained\((.*)\)", text)
    assert loads and all(load == '"me/tiny", revision="v2"' for load in loads)
    assert text.count("--revision v2") == 2, "the measurement's command and the recipe's download"


def test_what_is_not_known_is_said(tmp_path: Path, run: Path) -> None:
    bare = VDMPipeline.from_pretrained(run / "pipeline")
    bare.save_pretrained(tmp_path / "bare")
    text = card(tmp_path / "bare").text
    assert "likelihood has not been measured" in text
    assert "Nothing is recorded of the data" in text
    assert "No recipe is recorded" in text
    assert "no licence" in text
    assert "images/" not in text, "no picture that is not there"


def test_resized_images_are_not_comparable(tmp_path: Path) -> None:
    resized = EVALUATION | {"dataset": IMAGES | {"resolution": 8, "resized": True}}
    text = card(write_run(tmp_path / "run", evaluation=resized, recipe={"resolution": 8})).text
    assert text.count("not comparable with published") == 2


HOSTILE = '<script>alert("x")</script>](javascript:alert(1)) {{ 7 * 7 }} \n\n# Heading\n```\n| cell'


def test_a_hostile_name_is_shown_as_text(tmp_path: Path) -> None:
    hostile = EVALUATION | {"dataset": IMAGES | {"name": HOSTILE, "split": HOSTILE}, "terms": {HOSTILE: 1.75}}
    run = {"versions": {HOSTILE: HOSTILE}, "device": HOSTILE, "steps": 3}
    folder = write_run(tmp_path / "run", evaluation=hostile, recipe={"dataset_name": HOSTILE}, run=run)
    rendered = card(folder)
    page = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(rendered.text)
    assert "<script" not in page
    assert "javascript:" not in "".join(re.findall("<[^>]*>", page)), "no link leads there"
    assert "Heading" not in "".join(re.findall(r"<h\d>.*?</h\d>", page))
    assert "{{ 7 * 7 }}" in page, "a template in a name must not be evaluated"
    assert rendered.data.eval_results[0].dataset_name == visible(HOSTILE), "YAML quotes it"
    assert all("script" not in block for block in re.findall(r"<code.*?</code>", page, flags=re.DOTALL))


def test_plain_text_stays_readable() -> None:
    assert plain("CIFAR-10, split train (32x32)") == "CIFAR-10, split train (32x32)"


def test_the_recipe_says_nothing_of_the_place(tmp_path: Path) -> None:
    recipe = {"dataset_name": None, "train_data_dir": "/home/ada/birds"}
    recipe |= {"output_dir": "/home/ada/runs", "resume_from_checkpoint": "latest"}
    source = read_contents(write_run(tmp_path / "run", recipe=recipe))
    (tmp_path / "out").mkdir()
    copy_records(source, tmp_path / "out")
    assert "ada" not in (tmp_path / "out" / "recipe.yaml").read_text()
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["train_data_dir"] == "birds"


@pytest.mark.parametrize("token", ["hf_" + "a1B2" * 9, "the-token-in-use"])
def test_a_token_is_never_sent(tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the-token-in-use")
    (tmp_path / "recipe.yaml").write_text(f"dataset_name: https://user:{token}@host/x\n")
    with pytest.raises(PublishError, match=r"recipe\.yaml") as refused:
        refuse_secrets(tmp_path)
    assert token not in str(refused.value)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        read_contents(folder)


CLIPPED = ("standard_error", "standard_error_over_images", "terms", "network_evaluations")


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits_per_dim": None},
        {"bits_per_dim": math.nan},
        {"terms": [1.0]},
        {"weights": None},
        {"network_evaluations": "many"},
        {"dataset": "digits"},
        {"dataset": {"name": 7}},
        {"standard_error": -0.01},
        {"standard_error_over_images": -1e-9},
        {"num_images": 0},
        {"replicates": 0},
        {"network_evaluations": -1},
        {"transitions": 0},
        {"bits_per_dims": 1.75},
        {"dataset": IMAGES | {"licence": "x"}},
        {"estimator": {"stratified": True}},
        {"method": "bounds"},
        {"bits_per_dim": 1.76},
        {"terms": {"reconstruction": 0.25, "prior": 0.125}},
        {"bits_per_dim": -1.0, "terms": {"diffusion": -1.0}},
        {"standard_error": None},
        {"replicates": 1},
        {"dataset": IMAGES | {"images": 359}},
        {"clipped": {key: EVALUATION[key] for key in ("standard_error", "terms")}},
        {"clipped": {key: EVALUATION[key] for key in CLIPPED} | {"bits_per_dim": 1.5}},
    ],
    ids=str,
)
def test_a_measurement_of_another_shape_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run", evaluation=EVALUATION | wrong)
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        read_contents(folder)


WRONG_RECIPES: dict[str, dict[str, Any]] = {
    "num_inference_steps": {"num_inference_steps": "many"},
    "resolution": {"resolution": [8]},
    "dataset_name": {"dataset_name": {"a": 1}},
    "seed": {"seed": 0.5},
    "train_split": {"train_split": 7},
    "center_crop": {"center_crop": True},  # without a resolution
    "train_batch_sise": {"train_batch_sise": 8},
    "learning_rate": {"learning_rate": -1.0},
    "lr_scheduler": {"lr_scheduler": "cosin"},
    "unet": {"unet": 3},
    "noise schedule": {"noise_schedule": "cosin"},
    "max_train_steps": {"num_train_epochs": 3},
    "test_size": {"test_size": 1.5},
}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("spoilt") / "run")


@pytest.mark.parametrize("field", WRONG_RECIPES)
def test_a_recipe_that_no_run_would_take_is_refused_by_every_command(
    field: str, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (spoilt / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | WRONG_RECIPES[field]))
    output = ["--dry_run", "--output_dir", str(tmp_path / "out")]
    for place in (spoilt, spoilt / "pipeline"):
        for words in (["publish", str(place), "me/x", *output], ["evaluate", str(place), "--dataset_name", "digits"]):
            assert main(words) == 2, words
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and field in said, said
    assert not list(tmp_path.iterdir())


def test_the_recipe_that_is_published_is_what_a_run_reads(tmp_path: Path) -> None:
    """Text that other readers take for a number stays text, and a word that a run takes for false is false."""
    folder = write_run(tmp_path / "run", recipe={"train_split": "1e3", "random_flip": "no"})
    text = (
        (folder / "recipe.yaml").read_text().replace("'1e3'", "1e3").replace("train_split: 1e3", "train_split: '1e3'")
    )
    (folder / "recipe.yaml").write_text(text)
    source = read_contents(folder)
    assert source.recipe["random_flip"] is False
    copy_records(source, tmp_path)
    assert read_recipe(tmp_path / "recipe.yaml") == source.recipe


TRAIN = {"step": [1, 2], "bits_per_dim": [9.0, 8.0], "diffusion": [8.5, 7.5], "prior": [0.5, 0.5]}
WRONG_RECORDS: dict[str, tuple[str, Any]] = {
    "a field too many": ("run.json", RUN | {"gpu": "x"}),
    "a field of git too many": ("run.json", RUN | {"git": {"commit": "0f", "dirty": False, "branch": "x"}}),
    "a field too few": ("run.json", {key: RUN[key] for key in RUN if key != "steps"}),
    "a step below 0": ("run.json", RUN | {"steps": -1}),
    "no process": ("run.json", RUN | {"processes": 0}),
    "time below 0": ("run.json", RUN | {"training_seconds": -1.0}),
    "no images in a batch": ("run.json", RUN | {"global_batch_size": 0}),
    "an error below 0": (
        "run.json",
        RUN | {"validation": {"step": 1, "bits_per_dim": 2.0, "standard_error": -0.1, "images": 3}},
    ),
    "fewer bits than none": (
        "run.json",
        RUN | {"validation": {"step": 1, "bits_per_dim": -2.0, "standard_error": 0.1, "images": 3}},
    ),
    "a part too many": ("history.json", {"train": TRAIN, "validation": TRAIN, "test": TRAIN}),
    "a part too few": ("history.json", {"train": TRAIN}),
    "columns of two lengths": ("history.json", {"train": TRAIN | {"prior": [0.5]}, "validation": TRAIN}),
    "steps that fall": ("history.json", {"train": TRAIN, "validation": TRAIN | {"step": [2, 1]}}),
    "a step twice": ("history.json", {"train": TRAIN | {"step": [2, 2]}, "validation": TRAIN}),
    "half a step": ("history.json", {"train": TRAIN | {"step": [0.5, 1]}, "validation": TRAIN}),
    "another sum": ("history.json", {"train": TRAIN | {"bits_per_dim": [9.0, 8.5]}, "validation": TRAIN}),
    "another batch": ("run.json", RUN | {"global_batch_size": 24, "processes": 5}),
    "a dataset of no images": ("run.json", RUN | {"dataset": RUN["dataset"] | {"images": 0}}),
    "a dataset of no shape": ("run.json", RUN | {"dataset": RUN["dataset"] | {"shape": []}}),
    "a dataset of no side": ("run.json", RUN | {"dataset": RUN["dataset"] | {"resized": True}}),
    "a dataset of another side": ("run.json", RUN | {"dataset": RUN["dataset"] | {"resolution": 16}}),
    "a fingerprint of nothing": ("run.json", RUN | {"dataset": RUN["dataset"] | {"fingerprint": "x"}}),
    "a precision of nothing": ("run.json", RUN | {"mixed_precision": "x"}),
    "versions of nothing": ("run.json", RUN | {"versions": {}}),
    "a rate below 0": ("history.json", {"train": TRAIN | {"learning_rate": [0.1, -0.1]}, "validation": TRAIN}),
}


@pytest.mark.parametrize("wrong", WRONG_RECORDS)
def test_a_record_that_no_run_writes_is_refused(wrong: str, tmp_path: Path) -> None:
    name, record = WRONG_RECORDS[wrong]
    read: dict[str, Any] = {"run.json": read_run, "history.json": read_history}
    (tmp_path / name).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        read[name](tmp_path / name)
    (tmp_path / name).write_text(
        json.dumps({"run.json": RUN, "history.json": {"train": TRAIN, "validation": TRAIN}}[name])
    )
    assert read[name](tmp_path / name)


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a bound that is none": ("evaluation.json", {"is_bound": False}, "is_bound"),
    "another method": ("evaluation.json", {"method": "ode"}, "is_bound"),
    "no evaluation": ("evaluation.json", {"network_evaluations": 0}, "network_evaluations"),
    "an estimate without an evaluation": ("evaluation.json", {"replicates": 5}, "network_evaluations"),
    "no error": ("evaluation.json", {"standard_error": 0.0}, "standard_error"),
    "dimensions of others": ("evaluation.json", {"dimensions": 65}, "dimensions"),
    "images of no shape": ("evaluation.json", {"dataset": IMAGES | {"shape": []}}, "shape"),
    "too many levels": ("evaluation.json", {"dataset": IMAGES | {"levels": 257}}, "levels"),
    "images of no fingerprint": ("evaluation.json", {"dataset": IMAGES | {"fingerprint": None}}, "fingerprint"),
    "another fingerprint": ("evaluation.json", {"dataset": IMAGES | {"fingerprint": "x"}}, "fingerprint"),
    "resized to nothing": ("evaluation.json", {"dataset": IMAGES | {"resized": True}}, "resized"),
    "steps before the history's": ("run.json", {"steps": 0}, "steps|step is"),
    "steps after the recipe's": ("run.json", {"steps": 2**40}, "steps"),
    "more steps than are": ("run.json", {"steps": 2**62}, "steps"),
    "levels of another model": ("evaluation.json", {"dataset": IMAGES | {"levels": 256}}, "levels"),
    "levels of another model's training": ("run.json", {"dataset": RUN["dataset"] | {"levels": 256}}, "levels"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("sound") / "run")


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_record_that_contradicts_itself_or_its_model_does_not_reach_the_card(what: str, sound: Path) -> None:
    name, change, said = CONTRADICTIONS[what]
    before = (sound / name).read_text()
    try:
        (sound / name).write_text(json.dumps(json.loads(before) | change))
        with (
            pytest.raises(CheckpointError, match=said),
            prepared_publication(sound, Edition("me/x"), None, twin=False, remote_code=False),
        ):
            pass
    finally:
        (sound / name).write_text(before)


def test_an_estimate_of_almost_nothing_may_lie_below_it(tmp_path: Path) -> None:
    for more in ({}, {"method": "ode", "is_bound": False, "probability_flow": FLOW, "standard_error": 1e-9}):
        record = (
            EVALUATION | {"weights": f"sha256:{'0' * 64}", "bits_per_dim": -0.03, "terms": {"diffusion": -0.03}} | more
        )
        (tmp_path / "evaluation.json").write_text(json.dumps(record))
        assert read_evaluation(tmp_path / "evaluation.json")["bits_per_dim"] == -0.03


FLOW = {"dequantization": "uniform", "divergence": "exact", "probes": 1, "tolerance": 1e-5, "max_steps": 1000}
FLOW |= {"solver": "dop853", "steps_mean": 9.0, "steps_max": 12, "evaluations_per_solve": 60.0}
FLOW |= {"dtype": "float64", "numerical_error": 1e-6}


def test_what_the_package_wrote_before_is_read(tmp_path: Path) -> None:
    for card_folder in (Path(__file__).parents[2] / "model_cards").iterdir():
        assert read_evaluation(card_folder / "evaluation.json") and read_run(card_folder / "run.json")
        assert read_history(card_folder / "history.json") and read_recipe(card_folder / "recipe.yaml")


@pytest.mark.parametrize("missing", ["bits_per_dim", "terms", "weights"])
def test_a_measurement_without_what_it_is_of_is_refused(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "run")
    record = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({key: record[key] for key in record if key != missing}))
    with pytest.raises(CheckpointError, match=missing):
        read_contents(folder)


def test_what_a_picture_or_weights_say_is_searched_too(tmp_path: Path) -> None:
    token = "hf_" + "a1B2" * 9
    info = PngInfo()
    info.add_text("comment", token)
    (tmp_path / "a").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "a" / "picture.png", pnginfo=info)
    (tmp_path / "b").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "b" / "w.safetensors", metadata={"by": token})
    for folder in ("a", "b"):
        with pytest.raises(PublishError, match="would hold"):
            refuse_secrets(tmp_path / folder)


def test_only_a_pipelines_own_files_are_copied(tmp_path: Path, run: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(run / "pipeline", pipeline)
    for stray in (
        "unet/notes.json",
        "unet/other.safetensors",
        "unet/vdm_hub.py",
        "unet/model.bin",
        "pipeline.py",
        ".env",
    ):
        (pipeline / stray).write_bytes(b"{}")
    own = {"unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json"}
    own |= {"unet/diffusion_pytorch_model-00001-of-00002.safetensors"}
    for name in own:
        (pipeline / name).write_bytes(b"{}")
    copy_pipeline(pipeline, tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")}
    usual = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert copied == own | usual | {"unet/diffusion_pytorch_model.safetensors"}


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        read_contents(tmp_path)


def test_a_runs_folder_and_its_pipeline_are_the_same_source(run: Path) -> None:
    of_run, of_pipeline = read_contents(run), read_contents(run / "pipeline")
    assert of_run == of_pipeline
    assert of_run.evaluation["bits_per_dim"] == json.loads((run / "evaluation.json").read_text())["bits_per_dim"]


def test_a_model_of_captions_says_what_it_is_told_and_asks_for_it(tmp_path: Path) -> None:
    captions = {"column": "text", "template": None, "max_length": 12, "dropout": 0.1, "examples": ["a `b`", "c"]}
    pipe = VDMPipeline(
        tiny_unet(cross_attention_dim=WIDTH),
        tiny_pipeline().scheduler,
        captions=captions,
        text_encoder=tiny_encoder(),
        tokenizer=tiny_tokenizer(),
    )
    pipe.save_pretrained(tmp_path / "model")
    told = card(tmp_path / "model")
    assert told.data.pipeline_tag == "text-to-image" and "conditional" in told.data.tags
    assert 'pipe(prompt=["a `b`", "c"], guidance_scale=2' in told.text
    assert "of the column `text`" in told.text and "`` a `b` ``, `c`" in told.text and "BertModel" in told.text
    assert (
        "A caption-conditional variational diffusion model" in told.text
        and "pipe.classify(images, [caption, ...])" in told.text
    )
