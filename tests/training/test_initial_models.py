"""A run that begins from a trained model: what is taken over, said and refused, and that it needs the model once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

import tiny_tokens
from ddpm import new_network
from hub.server import LoopbackHub
from naming import naming
from runs import (
    LEARNED,
    TORCHRUN,
    contents,
    forget_accelerator,
    python,
    recipe,
    start,
    train_here,
    vdm_hub_here,
    weights,
)
from tiny import randomised, tiny_unet_2d
from training.test_captions import fields as of_captions
from training.test_survival import FIELDS as SURVIVING
from training.test_survival import check as check_survival
from vdm_hub import VDMPipeline
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError
from vdm_hub.evaluation.provenance import weights_fingerprint
from vdm_hub.objectives.variational_bound import Objective
from vdm_hub.pipelines.by_name import open_pipeline
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.loop import TrainingRun
from vdm_hub.training.parts.setup import build_pipeline
from vdm_hub.training.parts.weights import averages

STILL = 1e-60  # a learning rate that no float32 weight follows
STAGE: dict[str, Any] = {"latent_shapes": [[2, 4, 4]], "block_out_channels": [8], "norm_num_groups": 4}
KL: dict[str, Any] = {"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4}
BETAS = {"num_train_timesteps": 50, "beta_start": 0.004, "beta_end": 0.2, "clip_sample": True}
KINDS: dict[str, dict[str, Any]] = {
    "vdm": {},
    "learned": {"noise_schedule": LEARNED},
    "classes": {"label_column": "label"},
    "hvae": {"model": "hvae", "hvae": STAGE, "unet": {}, "noise_schedule": "linear"},
    "latent": {"model": "latent_vdm", "first_stage": STAGE},
    "latent of an AutoencoderKL": {"model": "latent_vdm", "first_stage": KL | {"latent_channels": 2}},
}
SLOW = pytest.mark.slow
LONG = ("latent of an AutoencoderKL", "classes", "learned")


pytestmark = pytest.mark.usefixtures("token_plugin")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of encodings for each test alone."""
    (tmp_path / "assets").mkdir()
    monkeypatch.setattr("vdm_hub.models.encodings.cached_assets_path", lambda *names: tmp_path / "assets")


@pytest.fixture(scope="module")
def vdm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a VDM of the digits."""
    run = tmp_path_factory.mktemp("vdm") / "run"
    train_here(run, max_train_steps=3)
    return run


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers."""
    place = tmp_path_factory.mktemp("ddpm") / "pipeline"
    DDPMPipeline(tiny_unet_2d(), DDPMScheduler(**BETAS)).save_pretrained(place)
    return place


def of_kind(kind: str, path: Path) -> dict[str, Any]:
    """The fields of a recipe that trains a model of a kind."""
    if kind == "captions":
        return of_captions(path)
    return tiny_tokens.run_fields(path, time_embedding=True) if kind == "tokens" else KINDS[kind]


def needed(fields: dict[str, Any]) -> dict[str, Any]:
    """What a recipe must say where a trained model answers the rest."""
    return {name: fields[name] for name in ("dataset_name", "model", "tokenizer") if name in fields}


def bound(objective: Objective, run: TrainingRun) -> Tensor:
    """The bound on the first batch of a run, at its first step's times and noise, per datum."""
    batch = run._condition(next(run.batches())[0], 0)
    with torch.no_grad():
        return objective.eval()(batch, run._times(0), run._noise(batch, 0)).total


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=SLOW if kind in LONG else ()) for kind in KINDS), "captions", "tokens"]
)
def test_weights_process_and_data_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """Of every kind: the same weights, averages and bound, bit for bit, and so after steps that change nothing."""
    fields = of_kind(kind, tmp_path)
    before = train_here(tmp_path / "before", **fields, evaluation_replicates=1, max_train_steps=3)
    own = open_pipeline(str(tmp_path / "before" / "pipeline"))
    again = {"init_from": str(tmp_path / "before"), **needed(fields)}
    run = start(tmp_path / "run", **again)
    made = build_pipeline(run.model, **run.data.train.pipeline_arguments(run.configuration.data))
    assert (
        weights_fingerprint(made)
        == weights_fingerprint(own)
        == run.provenance.describe(0, 0.0)["init_from"]["weights"]
    )
    for name, average in averages(run.model, run.ema).items():
        assert torch.equal(average, run.model.get_parameter(name)), name
    condition = run.model.condition
    its = own.objective(run.configuration.diffusion.transitions)
    its.condition = condition
    torch.testing.assert_close(bound(run.model, run), bound(its, run), rtol=0, atol=0)
    after = train_here(tmp_path / "after", **again, evaluation_replicates=1, max_train_steps=2, learning_rate=STILL)
    assert before is not None and after is not None
    assert torch.equal(before.per_image, after.per_image)
    texts = (path.read_text() for path in (tmp_path / "after" / "pipeline").rglob("*.json"))
    assert not any(str(tmp_path / "before") in text for text in texts), "no place of this machine is published"
    index, index_before = (
        json.loads((tmp_path / name / "pipeline" / "model_index.json").read_text()) for name in ("after", "before")
    )
    assert index | {"_name_or_path": 0} == index_before | {"_name_or_path": 0}


@pytest.mark.parametrize("variance", ["fixed_small", pytest.param("learned_range", marks=SLOW)])
def test_a_ddpm_is_trained_on_by_the_bound_of_its_very_chain(variance: str, tmp_path: Path) -> None:
    """Network, betas, scaling, decoder and what its sampler does are in what the run publishes."""
    unet = randomised(new_network(2 if variance == "learned_range" else 1))
    DDPMPipeline(unet, DDPMScheduler(**BETAS, variance_type=variance)).save_pretrained(tmp_path / "ddpm")
    own = VDMPipeline.from_diffusers(tmp_path / "ddpm", num_levels=17)
    fields = {"init_from": str(tmp_path / "ddpm"), "num_levels": 17, "transitions": 49}
    run = start(tmp_path / "run", **fields)
    assert torch.equal(bound(run.model, run), bound(own.objective(49), run))
    train_here(tmp_path / "run", **fields, max_train_steps=1, learning_rate=STILL)
    after = VDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    images = run.data.test.take(torch.arange(4))["levels"]  # type: ignore[union-attr]
    reports = [pipe.bits_per_dim(images, replicates=1) for pipe in (own, after)]
    assert torch.equal(reports[0].per_image, reports[1].per_image)
    for name in ("clip_sample", "variance_type", "final_sigmas_type", "timestep_spacing", "decoder", "data_scaling"):
        assert after.scheduler.config[name] == own.scheduler.config[name], name
    drawn = [pipe.sample(2, torch.Generator().manual_seed(0), 5) for pipe in (own, after)]
    assert torch.equal(*drawn)


def test_a_class_conditional_network_of_diffusers_is_told_the_classes_of_the_data(tmp_path: Path) -> None:
    config = tiny_unet_2d().config
    unet = randomised(UNet2DModel(**{k: v for k, v in config.items() if k[0] != "_"} | {"num_class_embeds": 10}))
    DDPMPipeline(unet, DDPMScheduler(**BETAS)).save_pretrained(tmp_path / "ddpm")
    run = start(tmp_path / "run", init_from=str(tmp_path / "ddpm"), num_levels=17)
    own = VDMPipeline.from_diffusers(tmp_path / "ddpm", num_levels=17)
    assert run.configuration.data.label_column == "label" and run.model.condition.count == 10  # type: ignore[union-attr]
    assert torch.equal(bound(run.model, run), bound(own.objective(), run))


def test_a_model_of_flow_matching_is_told_what_its_family_leaves_open(tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet_2d(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    said = {"num_levels": 17, "data_scaling": "full", "decoder": "factorised"}
    with pytest.raises(ConfigurationError, match=naming("decoder")):
        start(tmp_path / "run", init_from=str(tmp_path / "flow"), num_levels=17, data_scaling="full")
    run = start(tmp_path / "run", init_from=str(tmp_path / "flow"), **said)
    own = VDMPipeline.from_diffusers(tmp_path / "flow", **said)
    assert torch.equal(bound(run.model, run), bound(own.objective(), run))
    train_here(tmp_path / "tuned", init_from=str(tmp_path / "flow"), **said, max_train_steps=1, learning_rate=STILL)
    again = start(tmp_path / "again", init_from=str(tmp_path / "tuned"))
    assert torch.equal(bound(again.model, again), bound(own.objective(), again))


# ---- what is said, applied and refused --------------------------------------------------------------------------


def trained(ddpm: Path, output: Path, *words: object) -> int:
    """``vdm-hub train digits --init_from`` a DDPM, with more words."""
    forget_accelerator()
    usual = ("--max_train_steps", 1, "--num_sample_images", 0, "--evaluation_replicates", 0, "--report_to", "none")
    return vdm_hub_here("train", "digits", "--init_from", ddpm, "--output_dir", output, *usual, *words)


def test_a_dry_run_says_what_is_taken_from_where(ddpm: Path, tmp_path: Path, capsys: Any) -> None:
    before = contents(ddpm)
    assert trained(ddpm, tmp_path / "run", "--dry_run", "--prediction_type", "v_prediction") == 0
    said = capsys.readouterr().out
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    for parts in (("unet", "UNet2DModel"), ("noise_schedule", "discrete_betas"), ("prediction_type", "v_prediction")):
        assert any(all(part in note for part in parts) for note in notes), (parts, notes)
    assert "DDPMPipeline" in said and "clip_sample" not in said
    assert not (tmp_path / "run").exists() and contents(ddpm) == before


def test_the_process_may_be_another_than_the_models_and_begins_at_its_ends(
    ddpm: Path, tmp_path: Path, capsys: Any
) -> None:
    own = VDMPipeline.from_diffusers(ddpm, num_levels=17).process.scalar_gamma
    assert own is not None
    assert trained(ddpm, tmp_path / "run", "--noise_schedule", "learned_linear", "--decoder", "factorised") == 0
    assert "note: noise_schedule is" in capsys.readouterr().out
    given = parse_recipe([str(tmp_path / "run" / "recipe.yaml")])
    config = json.loads(given.diffusion.noise_schedule)["config"]
    assert (config["gamma_min"], config["gamma_max"]) == own.endpoints()
    pipe = VDMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.scheduler.config.decoder == "factorised" and pipe.scheduler.config.data_scaling == "full"
    assert "clip_sample" not in {name for name, value in pipe.scheduler.config.items() if value is True}
    assert trained(ddpm, tmp_path / "other") == 0
    assert "note: noise_schedule is" in capsys.readouterr().out, "the recipe's own is another"


def test_a_runs_recipe_repeats_it(ddpm: Path, tmp_path: Path) -> None:
    assert trained(ddpm, tmp_path / "one", "--noise_schedule", "learned_linear", "--max_train_steps", 2) == 2, "twice"
    assert trained(ddpm, tmp_path / "one", "--noise_schedule", "learned_linear") == 0
    forget_accelerator()
    assert vdm_hub_here("train", tmp_path / "one" / "recipe.yaml", "--output_dir", tmp_path / "two") == 0
    pipes = [VDMPipeline.from_pretrained(tmp_path / name / "pipeline") for name in ("one", "two")]
    assert weights_fingerprint(pipes[0]) == weights_fingerprint(pipes[1])
    records = [json.loads((tmp_path / name / "run.json").read_text())["init_from"] for name in ("one", "two")]
    assert records[0] == records[1] and records[0]["name"] == ddpm.name


def test_what_the_weights_are_bound_to_is_refused_with_both_values(vdm: Path, ddpm: Path, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], tuple[object, ...]]] = [
        ({"resolution": 6}, ("1x6x6", "1x8x8")),
        ({"first_stage_from": "somewhere", "model": "latent_vdm"}, ("first_stage_from", "init_from")),
    ]
    for fields, parts in refused:
        with pytest.raises(ConfigurationError, match=naming(*parts)):
            start(tmp_path / "run", init_from=str(vdm), **fields)
    with pytest.raises(ConfigurationError, match=naming("model_index.json")):
        start(tmp_path / "run", init_from=str(tmp_path))
    with pytest.raises(ConfigurationError, match=naming("freeze_first_stage", "init_from")):
        start(tmp_path / "run", model="latent_vdm", freeze_first_stage=True)
    assert trained(ddpm, tmp_path / "run", "--unet.layers_per_block", 2) == 2
    assert not (tmp_path / "run").exists()


def test_pickled_weights_are_not_read(ddpm: Path, tmp_path: Path) -> None:
    shutil.copytree(ddpm, tmp_path / "ddpm")
    (tmp_path / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny_unet_2d().state_dict(), tmp_path / "ddpm" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises((CheckpointError, ConfigurationError), match="safetensors"):
        start(tmp_path / "run", init_from=str(tmp_path / "ddpm"), num_levels=17)


# ---- data -------------------------------------------------------------------------------------------------------


def pictures(folder: Path, names: dict[str, int], seed: int = 0) -> str:
    """A folder of random 8x8 images of classes, so many of each."""
    draws = np.random.default_rng(seed)
    for name, count in names.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(draws.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


def test_classes_keep_their_numbers_and_held_out_images_stay_held_out(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", {"ant": 12, "bee": 12, "cat": 12})
    fields = {"dataset_name": data, "num_levels": 256, "label_column": "label"}
    train_here(tmp_path / "before", **fields, test_size=6)
    source = {"init_from": str(tmp_path / "before")}
    before = open_pipeline(str(tmp_path / "before" / "pipeline"))
    run = start(tmp_path / "same", dataset_name=data, **source)
    assert run.data.held_out_test is not None and before.held_out is not None
    assert run.data.held_out_test["size"] == 6 and run.data.notes == ()
    with pytest.raises(ConfigurationError, match=naming("test_size", 9, 6)):
        start(tmp_path / "run", dataset_name=data, test_size=9, **source)
    other = pictures(tmp_path / "other", {"cat": 12, "bee": 12}, seed=1)
    run = start(tmp_path / "other run", dataset_name=other, **source)
    assert set(run.data.train.labels.tolist()) == {1, 2}, "as the model numbers them"  # type: ignore[attr-defined]
    assert len(run.data.notes) == 1, "the model may have seen what is held out of another split"
    with pytest.raises(DataError, match=naming("dog")):
        start(tmp_path / "run", dataset_name=pictures(tmp_path / "dogs", {"cat": 12, "dog": 12}), **source)
    with pytest.raises(ConfigurationError, match=naming("condition_dropout", "0.1")):
        start(tmp_path / "run", dataset_name=data, condition_dropout=0.0, **source)


def test_preprocessing_is_that_of_the_model(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", {"ant": 20})
    train_here(
        tmp_path / "before",
        dataset_name=data,
        num_levels=256,
        resolution=4,
        center_crop=True,
        color="rgb",
        test_split=None,
    )
    run = start(tmp_path / "run", dataset_name=data, test_split=None, init_from=str(tmp_path / "before"))
    assert run.data.shape == (3, 4, 4)
    arguments = run.configuration.data
    assert (arguments.resolution, arguments.center_crop, arguments.color) == (4, True, "rgb")


# ---- going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokens", *(pytest.param(kind, marks=SLOW) for kind in ("learned", "captions"))])
def test_a_run_that_goes_on_needs_the_model_no_more(kind: str, tmp_path: Path) -> None:
    """It is gone: the run goes on as if undisturbed, also from before its first step."""
    fields = of_kind(kind, tmp_path)
    train_here(tmp_path / "before", **fields, max_train_steps=1)
    again = {"init_from": str(tmp_path / "before"), **needed(fields), "checkpointing_steps": 2}
    again |= {"tokenizer": str(tmp_path / "before")} if kind == "tokens" else {}
    train_here(tmp_path / "whole", **again)
    shutil.rmtree(tmp_path / "before")
    for name, gone in {"part": ["step-00000006"], "none": [f"step-0000000{n}" for n in (2, 4, 6)]}.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for step in gone:
            shutil.rmtree(tmp_path / name / "checkpoints" / step)
        for result in ("pipeline", "schedule.png", "history.json", "training_curve.png", "run.json"):
            place = tmp_path / name / result
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        train_here(tmp_path / name, **again, resume_from_checkpoint="latest")
        pipes = [open_pipeline(str(tmp_path / run / "pipeline")) for run in ("whole", name)]
        assert weights_fingerprint(pipes[0]) == weights_fingerprint(pipes[1])
        runs = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("whole", name)]
        assert runs[0]["init_from"] == runs[1]["init_from"]


def test_a_run_goes_on_with_the_model_that_it_began_from_alone(vdm: Path, ddpm: Path, tmp_path: Path) -> None:
    train_here(tmp_path / "run", init_from=str(vdm), max_train_steps=2)
    go_on = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(CheckpointError, match=naming("init_from", ddpm.name)):
        train_here(tmp_path / "run", init_from=str(ddpm), **go_on)
    shutil.rmtree(tmp_path / "run" / "initial")
    other = tmp_path / "other"
    shutil.copytree(vdm, other)
    train_here(tmp_path / "third", init_from=str(vdm), max_train_steps=3)
    shutil.rmtree(other / "pipeline")
    shutil.copytree(tmp_path / "third" / "pipeline", other / "pipeline")
    train_here(tmp_path / "moved", init_from=str(other), max_train_steps=2)
    shutil.rmtree(tmp_path / "moved" / "initial")
    shutil.rmtree(other)
    shutil.copytree(vdm, other)
    with pytest.raises(CheckpointError, match=naming("weights")):
        train_here(tmp_path / "moved", init_from=str(other), **go_on)


@pytest.mark.slow
def test_kills_change_nothing(vdm: Path, tmp_path: Path) -> None:
    fields = {name: value for name, value in SURVIVING.items() if name not in ("noise_schedule", "unet")}
    check_survival(tmp_path, "step:1,checkpoint:1,results:1", 1, fields | {"init_from": str(vdm)})


def test_two_processes_begin_and_train_as_one(vdm: Path, tmp_path: Path) -> None:
    fields = {"init_from": str(vdm), "train_batch_size": 8, "max_train_steps": 2}
    path = recipe(tmp_path / "recipe", tmp_path / "two", **fields)
    done = python(*TORCHRUN, "-m", "vdm_hub.train", path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    train_here(tmp_path / "one", **fields, gradient_accumulation_steps=2)
    both = [start(tmp_path / "x", init_from=str(tmp_path / name)) for name in ("one", "two")]
    torch.testing.assert_close(*map(weights, both), rtol=1e-4, atol=1e-6)  # sums in another order


def test_a_model_on_the_hub_is_pinned_by_its_commit(vdm: Path, tmp_path: Path) -> None:
    """The branch moves, and the recipe of the run goes back to where it was; the card names what it began from."""
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "cache") | {"HF_HUB_OFFLINE": "0"}
        words = ["publish", str(vdm), "me/vdm", "--license", "mit"]
        assert python("vdm_hub.commands", *words, **environment).returncode == 0
        path = recipe(tmp_path / "recipe", tmp_path / "run", init_from="me/vdm", max_train_steps=1)
        done = python("vdm_hub.train", path, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        commit = hub.repositories["me/vdm"].branches["main"]
        record = json.loads((tmp_path / "run" / "run.json").read_text())["init_from"]
        given = parse_recipe([str(tmp_path / "run" / "recipe.yaml")])
        assert record["name"] == "me/vdm" and record["commit"] == given.model.init_revision
        assert record["commit"] in str(commit)
        missing = recipe(tmp_path / "wrong", tmp_path / "wrong run", init_from="me/vdm", init_revision="nowhere")
        assert "RevisionNotFoundError" in python("vdm_hub.train", missing, **environment).stderr
        words = ["publish", str(tmp_path / "run"), "me/tuned", "--license", "mit"]
        assert python("vdm_hub.commands", *words, **environment).returncode == 0
        card = hub.repositories["me/tuned"].at("main").files["README.md"].content.decode()
        assert "base_model: me/vdm" in card and record["commit"] in card and record["weights"] in card
