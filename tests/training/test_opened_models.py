"""The trained model that a run begins from, by itself: opened, held against the data, kept, and made into a module."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from huggingface_hub import constants

import tiny_tokens
from distributions import write_pixelwise
from naming import naming
from runs import configuration, start
from spaces import kinds
from tiny import tiny_pipeline, tiny_unet_2d
from training.test_taking_over import RANGE, TABLE, captions, classes, prepared
from vdm_hub import LatentVDMPipeline, VDMPipeline, VDMScheduler
from vdm_hub.data.loading import load_data
from vdm_hub.errors import CheckpointError, ConfigurationError
from vdm_hub.evaluation.provenance import weights_fingerprint
from vdm_hub.pipelines.by_name import open_pipeline
from vdm_hub.training.parts.initial_models import InitialModel, open_initial_model

COMMIT = "1234567890" * 4

pytestmark = pytest.mark.usefixtures("token_plugin")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a pipeline, each written once."""
    folder, known = tmp_path_factory.mktemp("saved"), dict[str, Path]()

    def save(name: str, make: Any) -> Path:
        if name not in known:
            known[name] = folder / name
            make().save_pretrained(known[name])
        return known[name]

    return save


def ddpm() -> DDPMPipeline:
    return DDPMPipeline(tiny_unet_2d(), DDPMScheduler(num_train_timesteps=50, beta_start=0.004, beta_end=0.2))


def flow() -> DDPMPipeline:
    return DDPMPipeline(tiny_unet_2d(), FlowMatchEulerDiscreteScheduler())


def opened(place: Path | str, tmp_path: Path, **fields: Any) -> InitialModel:
    found = open_initial_model(configuration(tmp_path / "run", init_from=str(place), **fields), tmp_path / "kept")
    assert found is not None
    return found


def of_texts(place: Path, tmp_path: Path, **fields: Any) -> InitialModel:
    texts = {"dataset_name": str(tmp_path / "a.txt"), "tokenizer": "character"} | fields
    (tmp_path / "a.txt").write_text(tiny_tokens.TEXT)
    return opened(place, tmp_path, model="tokens", **texts)


# ---- opened -----------------------------------------------------------------------------------------------------


def test_there_is_none_where_none_is_named(tmp_path: Path) -> None:
    assert open_initial_model(configuration(tmp_path / "run"), tmp_path) is None


def test_a_folder_s_model_is_named_by_its_last_part(saved: Any, tmp_path: Path) -> None:
    place = saved("prepared", prepared)
    found = opened(place, tmp_path)
    weights = weights_fingerprint(open_pipeline(str(place)))
    own = {"name": "prepared", "commit": None, "pipeline": "VDMPipeline", "weights": weights}
    assert found.record == own and found.name == "prepared" and not found.kept and found.said == []
    assert found.configuration.model.init_revision is None
    assert json.loads(found.configuration.diffusion.noise_schedule) == RANGE
    with pytest.raises(ConfigurationError, match=naming("init_revision", "v1")):
        opened(place, tmp_path, init_revision="v1")


def test_parts_are_named_by_the_model_and_not_by_its_place(saved: Any, tmp_path: Path) -> None:
    pipe = opened(saved("captions", captions), tmp_path, caption_column="text").pipeline
    assert pipe.unet.config["_name_or_path"] == "captions"
    assert pipe.text_encoder.config._name_or_path == "captions" == pipe.tokenizer.name_or_path
    assert "_name_or_path" not in pipe.scheduler.config


def test_a_run_that_goes_on_takes_the_model_that_it_kept(saved: Any, tmp_path: Path) -> None:
    place = saved("prepared", prepared)
    opened(place, tmp_path).keep(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"origin.json", "pipeline"}
    assert not list((tmp_path / "kept").rglob("*.bin"))
    assert not opened(place, tmp_path).kept, "one that begins does not"
    gone = {"init_from": str(tmp_path / "gone" / "prepared"), "resume_from_checkpoint": "latest"}
    again = open_initial_model(configuration(tmp_path / "run", **gone), tmp_path / "kept")
    assert again is not None and again.kept and again.record == opened(place, tmp_path).record
    assert again.configuration.diffusion == opened(place, tmp_path).configuration.diffusion
    with pytest.raises(ConfigurationError, match=naming("gone")):
        open_initial_model(configuration(tmp_path / "run", **gone), tmp_path / "nothing kept")
    (tmp_path / "kept" / "origin.json").write_text(json.dumps(again.record | {"weights": 3}))
    with pytest.raises(CheckpointError, match=naming("weights", "origin.json")):
        open_initial_model(configuration(tmp_path / "run", **gone), tmp_path / "kept")


def test_a_model_of_the_hub_is_that_of_its_commit(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--me--vdm"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "old").write_text(COMMIT[::-1])
    prepared().save_pretrained(repository / "snapshots" / COMMIT)
    kinds.hvae().save_pretrained(repository / "snapshots" / COMMIT[::-1])
    found = opened("me/vdm", tmp_path)
    assert found.record["commit"] == COMMIT == found.configuration.model.init_revision and found.name == "me/vdm"
    assert f"commit {COMMIT[:12]}," in str(found)
    old = opened("me/vdm", tmp_path, init_revision="old", model="hvae")
    assert old.record["pipeline"] == "HVAEPipeline" and old.record["commit"] == COMMIT[::-1]


def test_a_pipeline_of_diffusers_has_the_levels_of_the_recipe_and_what_its_family_leaves_open(
    saved: Any, tmp_path: Path
) -> None:
    place = saved("ddpm", ddpm)
    found = opened(place, tmp_path, num_levels=9)
    assert found.record["pipeline"] == "DDPMPipeline" and found.pipeline.num_levels == 9
    other = opened(place, tmp_path, num_levels=9, decoder="factorised", data_scaling="unit").pipeline
    assert other.process.fields() == found.pipeline.process.fields(), "a chain says both; the run's may be others"
    sampled = prepared()
    sampled.scheduler = sampled.scheduler.to_diffusers(UniPCMultistepScheduler)
    sampled.save_pretrained(tmp_path / "sampled")
    assert opened(tmp_path / "sampled", tmp_path, decoder="ddpm").configuration.diffusion.decoder == "ddpm"
    place, given = saved("flow", flow), {"num_levels": 9, "data_scaling": "full"}
    assert opened(place, tmp_path, **given, decoder="factorised").pipeline.process.scaling.name == "full"
    with pytest.raises(ConfigurationError, match=naming("decoder")):
        opened(place, tmp_path, **given)
    with pytest.raises(ConfigurationError, match=naming("data_scaling")):
        opened(place, tmp_path, num_levels=9, decoder="factorised")


# ---- what is said -----------------------------------------------------------------------------------------------


def test_a_reader_is_told_what_comes_from_where(saved: Any, tmp_path: Path) -> None:
    said = str(opened(saved("prepared", prepared), tmp_path, prediction_type="v_prediction"))
    weights = weights_fingerprint(open_pipeline(str(saved("prepared", prepared))))
    assert said.split("\n")[0] == f"begins from prepared (VDMPipeline, weights {weights[:19]}...)"
    assert "v_prediction" in said and "gaussian" in said and "'resolution': 8" in said and "told" not in said
    assert len([line for line in said.split("\n") if line.startswith("note: prediction_type")]) == 1
    assert max(map(len, said.split("\n"))) <= 119
    classified = str(opened(saved("classes", classes), tmp_path))
    assert "a class of each image" in classified and "levels:" not in classified
    hierarchy = str(opened(saved("hvae", kinds.hvae), tmp_path, model="hvae"))
    assert "process" not in hierarchy
    texts = str(of_texts(saved("tokens", tiny_tokens.pipeline), tmp_path))
    assert f"{len(tiny_tokens.tokenizer()):,} tokens" in texts and "tiny_masking" in texts


# ---- data -------------------------------------------------------------------------------------------------------


def test_texts_are_cut_into_the_tokens_of_the_model(saved: Any, tmp_path: Path) -> None:
    place = saved("tokens", tiny_tokens.pipeline)
    for words, more in (("character", {}), ("bpe", {"vocabulary_size": 300}), (str(place), {})):
        found = of_texts(place, tmp_path, tokenizer=words, **more)
        assert found.tokenization is not None and found.tokenization.num_ids == len(tiny_tokens.tokenizer())
    with pytest.raises(ConfigurationError, match=naming("byte", 258, len(tiny_tokens.tokenizer()))):
        _ = of_texts(place, tmp_path, tokenizer="byte").tokenization
    assert replace(of_texts(place, tmp_path, tokenizer="byte"), kept=True).tokenization is not None
    assert opened(saved("prepared", prepared), tmp_path).tokenization is None
    data: Any = object()
    assert found.fit(data) is data


def test_images_are_of_the_model_s_shape_and_classes(saved: Any, tmp_path: Path) -> None:
    data = load_data(configuration(tmp_path).data)
    assert opened(saved("prepared", prepared), tmp_path).fit(data).test is data.test
    with pytest.raises(ConfigurationError, match=naming("1x8x8", "3x8x8", "--resolution 8")):
        opened(saved("colours", kinds.colours), tmp_path).fit(data)
    digits = load_data(configuration(tmp_path, label_column="label").data)
    found = opened(saved("ten", lambda: classes(names="9876543210")), tmp_path, label_column="label").fit(digits)
    assert found.classes is not None and found.classes.names == tuple("9876543210")
    assert found.classes.column == "label"
    assert torch.equal(found.train.labels, 9 - digits.train.labels)  # type: ignore[attr-defined]


def test_who_may_have_seen_what_is_held_out_is_told(saved: Any, tmp_path: Path) -> None:
    """Held out of the same images: as many of them, or it is refused; of others, a note."""
    found = opened(saved("prepared", prepared), tmp_path)
    before: Any = found.pipeline.held_out
    data = replace(load_data(configuration(tmp_path).data), held_out_test=None)
    assert found.fit(data) is data
    same = replace(data, held_out_test=dict(before))  # type: ignore[arg-type]
    assert found.fit(same).notes == ()
    for other in ({"size": 7}, {"label_column": "label"}):
        with pytest.raises(ConfigurationError, match=naming("test_size", before["size"], before["images"])):
            found.fit(replace(data, held_out_test={**before, **other}))  # type: ignore[typeddict-item]
    for other in ({"split": "other"}, {"images": 41}):
        fitted = found.fit(replace(data, held_out_test={**before, **other}, notes=("one",)))  # type: ignore[typeddict-item]
        assert fitted.notes[0] == "one" and len(fitted.notes) == 2 and "prepared" in fitted.notes[1]
    unknown = opened(saved("plain", tiny_pipeline), tmp_path)
    assert len(unknown.fit(same).notes) == 1


def test_a_run_reads_its_data_as_the_model_does(saved: Any, tmp_path: Path) -> None:
    """By its tokenizer, of texts that lack letters, and by its numbers of classes."""
    texts = tmp_path / "a.txt"
    texts.write_text("a bad cab, abba. " * 30)
    place = saved("tokens", tiny_tokens.pipeline)
    fields = {"init_from": str(place), "model": "tokens", "dataset_name": str(texts), "tokenizer": "character"}
    read = start(tmp_path / "texts", **fields).data.tokenization
    assert read.tokenizer.get_vocab() == open_pipeline(str(place)).tokenizer.get_vocab()
    place = saved("ten", lambda: classes(names="9876543210"))
    images = start(tmp_path / "images", init_from=str(place), label_column="label").data
    assert images.classes is not None and images.classes.names == tuple("9876543210")


# ---- what is trained --------------------------------------------------------------------------------------------


def objective(model: InitialModel, shape: tuple[int, ...] = (1, 8, 8)) -> Any:
    return model.objective(shape, model.pipeline.condition)


def test_weights_are_copies(saved: Any, tmp_path: Path) -> None:
    for name, make in (("prepared", prepared), ("hvae", kinds.hvae)):
        found = opened(saved(name, make), tmp_path, **({"model": "hvae"} if name == "hvae" else {}))
        made, before = objective(found), weights_fingerprint(found.pipeline)
        for parameter in made.parameters():
            assert parameter.requires_grad
            torch.nn.init.zeros_(parameter)
        assert weights_fingerprint(found.pipeline) == before
    told = opened(saved("captions", captions), tmp_path, caption_column="text")
    copy = told._copy()
    assert copy.text_encoder is told.pipeline.text_encoder and copy.unet is not told.pipeline.unet


def test_the_process_is_the_model_s_but_for_what_is_asked_for(saved: Any, tmp_path: Path) -> None:
    place = saved("prepared", prepared)
    own = objective(opened(place, tmp_path, transitions=7))
    assert own.process.fields() | {} == open_pipeline(str(place)).process.fields() and own.transitions == 7
    asked = {"prediction_type": "v_prediction", "data_scaling": "full", "decoder": "ddpm", "num_levels": 33}
    asked |= {"num_train_timesteps": 300, "conditioning": "flow_time", "noise_schedule": "cosine"}
    described = VDMScheduler(**objective(opened(place, tmp_path, **asked)).process.fields()).config
    for name, value in asked.items():
        found = described[name]
        assert (found["name"] if isinstance(found, dict) else found) == value, name
    assert described["noise_schedule"]["config"] == pytest.approx(RANGE["config"])


def test_another_schedule_does_not_get_the_weights_of_the_models(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = {"name": "learned_linear", "config": {"gamma_min": -7.0, "gamma_max": 4.0}}
    place = saved("learned", lambda: tiny_pipeline(noise_schedule=learned))
    assert isinstance(open_pipeline(str(place)), VDMPipeline)
    other = {"name": "learned_monotone", "config": {"gamma_min": -6.0, "gamma_max": 3.0, "hidden_features": 8}}
    for asked in ({}, {"noise_schedule": other}):
        made = objective(opened(place, tmp_path, **asked)).process.diffused.scalar_gamma
        ends = (-6.0, 3.0) if asked else (-7.0, 4.0)
        assert made.endpoints() == pytest.approx(ends)
    carried = saved("carried", lambda: tiny_pipeline(noise_schedule=other))
    assert objective(opened(carried, tmp_path)).process.diffused.scalar_gamma.endpoints() == pytest.approx((-6, 3))
    monkeypatch.syspath_prepend(write_pixelwise(tmp_path / "fakes"))
    pixelwise = {"name": "pixelwise", "config": {"size": 8}, "package": "fakes"}
    pipe = tiny_pipeline(noise_schedule=pixelwise)
    torch.nn.init.constant_(pipe.noise_schedule.module.bend, 0.25)
    pipe.save_pretrained(tmp_path / "pixelwise")
    made = objective(opened(tmp_path / "pixelwise", tmp_path)).process
    assert bool((made.schedule.bend == 0.25).all())
    assert objective(opened(carried, tmp_path, noise_schedule="linear")).process.diffused.scalar_gamma.endpoints() == (
        pytest.approx((-6.0, 3.0))
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_latents_stay_those_that_the_network_knows(frozen: bool, saved: Any, tmp_path: Path) -> None:
    place = saved("latent", kinds.latent)
    process = objective(opened(place, tmp_path, model="latent_vdm", freeze_first_stage=frozen)).process
    assert not process.normalises and process.frozen is frozen
    assert all(one.requires_grad is not frozen for one in process.first_stage.parameters())
    assert isinstance(open_pipeline(str(place)), LatentVDMPipeline)


def test_every_token_of_a_text_learns_and_those_before_the_context_are_scored(saved: Any, tmp_path: Path) -> None:
    found = of_texts(saved("tokens", tiny_tokens.pipeline), tmp_path, window_context=3, transitions=5)
    found.pipeline.network.get_input_embeddings().padding_idx = 0
    made = objective(found, (8,))
    assert made.network.model.get_input_embeddings().padding_idx is None
    assert made.scored == 5 and made.transitions == 5
    assert made.process.num_levels == found.pipeline.num_levels
    with pytest.raises(ConfigurationError, match=naming(9)):
        objective(found, (9,))


def test_a_chain_of_betas_keeps_what_its_samplers_do(saved: Any, tmp_path: Path) -> None:
    place = saved(
        "clipping",
        lambda: DDPMPipeline(tiny_unet_2d(), DDPMScheduler(num_train_timesteps=50, variance_type="fixed_large")),
    )
    found = opened(place, tmp_path, num_levels=9)
    own = objective(found)
    assert own.sampling["variance_type"] == "fixed_large" and own.sampling["clip_sample"] is True
    assert found.configuration.diffusion.noise_schedule == "discrete_betas", "of which there is but this one"
    assert own.process.fields() == found.pipeline.process.fields()
    short = {"name": "discrete_betas", "config": {"betas": [0.1, 0.2, 0.3]}}
    assert (
        objective(opened(place, tmp_path, num_levels=9, noise_schedule=short)).process.fields()["noise_schedule"]
        == short
    )
    table = opened(saved("table", lambda: tiny_pipeline(noise_schedule=TABLE)), tmp_path)
    assert objective(table).process.fields() == table.pipeline.process.fields()
    other = objective(opened(place, tmp_path, num_levels=9, noise_schedule="linear"))
    assert "clip_sample" not in other.sampling
    for field in ("data_scaling", "decoder", "prediction_type"):
        assert other.process.fields()[field] == own.process.fields()[field], "which the schedule decided"
