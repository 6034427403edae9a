"""A run on texts: what it writes, that it goes on as if undisturbed, and what it starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel

import tiny_tokens
from naming import naming
from runs import TORCHRUN, python, recipe, start, train_here, weights
from tiny_tokens import LENGTH, NETWORK, PROCESS, TEXT
from tiny_tokens import run_fields as fields
from vdm_hub import TokenPipeline
from vdm_hub.data.loading import load_data
from vdm_hub.data.sequences import Cut
from vdm_hub.data.text_loading import load_windows
from vdm_hub.data.tokenization import Tokenization, open_tokenizer
from vdm_hub.errors import CheckpointError, ConfigurationError, MissingPluginError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.recipes.arguments import Configuration, load_recipe, parse_recipe
from vdm_hub.training.parts.networks import on_meta_device
from vdm_hub.training.parts.setup import build_objective

pytestmark = pytest.mark.usefixtures("token_plugin")


def test_a_run_publishes_samples_and_measures_texts(tmp_path: Path, capsys: Any) -> None:
    drawn = {"num_sample_images": 3, "evaluation_replicates": 2, "sample_steps": 3, "report_to": "tensorboard"}
    held = {"validation_split": "validation", "validation_steps": 3}
    report = train_here(tmp_path / "run", **fields(tmp_path, **drawn, **held))
    run = tmp_path / "run"
    assert report is not None and report.bits_per_byte is not None
    said = json.loads((run / "evaluation.json").read_text())
    assert said["bits_per_byte"] == report.bits_per_byte and said["dataset"]["windows"] == report.num_images
    assert (run / "samples.txt").read_text().count("----") == 6 and not (run / "samples.png").exists()
    assert (run / "samples" / "step-00000003.txt").exists() and "bits/byte" in capsys.readouterr().out
    history = json.loads((run / "history.json").read_text())["validation"]
    assert history["step"] == [3, 6] and len(history["bits_per_byte"]) == 2
    pipe = TokenPipeline.from_pretrained(run / "pipeline")
    windows = load_windows(str(tmp_path / "a.txt"), "test", pipe.tokenization, pipe.cut)
    assert evaluate(pipe, windows, replicates=2, progress=False).per_image.equal(report.per_image)
    events = EventAccumulator(str(next((run / "logs").rglob("events*")).parent)).Reload()
    assert (
        "samples/text_summary" in events.Tags()["tensors"] and "validation/bits_per_byte" in events.Tags()["scalars"]
    )


def test_the_figure_of_texts_is_told_to_the_trackers_in_both_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run", **fields(tmp_path, evaluation_replicates=2))
    told: list[dict[str, float]] = []
    monkeypatch.setattr(run.trackers, "log", lambda values, step: told.append(values))
    report = run.finish()
    assert report is not None and report.bits_per_byte is not None
    figures = {"token": report.bits_per_dim, "byte": report.bits_per_byte}
    errors = {"test/standard_error": report.standard_error}
    assert told == [{f"test/bits_per_{unit}": value for unit, value in figures.items()} | errors]


def test_a_run_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    given = fields(tmp_path, checkpointing_steps=3)
    train_here(tmp_path / "whole", **given)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-00000006")
    shutil.rmtree(tmp_path / "part" / "pipeline")
    train_here(tmp_path / "part", **given, resume_from_checkpoint="latest")
    files = [tmp_path / name / "pipeline" / "network" / "model.safetensors" for name in ("whole", "part")]
    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "a.txt").write_text(TEXT.replace("cab", "dab"))
    with pytest.raises(CheckpointError, match="other"):
        train_here(tmp_path / "part", **given | {"max_train_steps": 9}, resume_from_checkpoint="latest")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_does_not_go_on_with_another_tokenizer_of_the_same_ids(tmp_path: Path, streaming: bool) -> None:
    """The letter f becomes h: in the order of letters, and so by its id, it is what it was."""
    place, others = str(tmp_path / "words"), [TEXT, TEXT.replace("f", "h").replace("g", "i")]
    made = [tiny_tokens.make_tokenizer("character", lambda text=text: [text]) for text in others]
    made[0].save_pretrained(place)
    given = fields(tmp_path, checkpointing_steps=3, streaming=streaming, tokenizer=place)
    train_here(tmp_path / "run", **given)
    made[1].save_pretrained(place)
    (tmp_path / "a.txt").write_text(others[1])
    with pytest.raises(CheckpointError, match="tokenizer"):
        train_here(tmp_path / "run", **given | {"max_train_steps": 9}, resume_from_checkpoint="latest")


def test_two_processes_train_as_one(tmp_path: Path, token_plugin: Path) -> None:
    same = {"network": NETWORK | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    path = recipe(tmp_path / "recipe", tmp_path / "two", **fields(tmp_path, **same, train_batch_size=8))
    places = f"{Path(__file__).resolve().parents[2]}:{token_plugin}"
    done = python(*TORCHRUN, "-m", "vdm_hub.train", path, ACCELERATE_USE_CPU="true", PYTHONPATH=places)
    assert done.returncode == 0, done.stderr
    train_here(tmp_path / "one", **fields(tmp_path, **same, train_batch_size=8, gradient_accumulation_steps=2))
    files = [tmp_path / name / "pipeline" / "network" / "model.safetensors" for name in ("one", "two")]
    first, second = map(load_file, files)
    for name in first:  # sums in another order
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("others", [{"streaming": True}, {"window_context": 3}, {"time_embedding": True}])
def test_other_ways_to_train(tmp_path: Path, others: dict[str, Any]) -> None:
    tokenizer = {"tokenizer": "byte"} if others.get("streaming") else {}
    report = train_here(tmp_path / "run", **fields(tmp_path, **others, **tokenizer, evaluation_replicates=1))
    assert report is not None and report.bits_per_byte is not None and report.bits_per_byte > 0
    pipe = TokenPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert (pipe.time_embedding is None) == ("time_embedding" not in others)
    assert pipe.cut == Cut(LENGTH, others.get("window_context", 0))


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PERCEIVER = {"_class_name": "PerceiverForMaskedLM", "d_model": 8, "d_latents": 8, "num_latents": 2, "num_blocks": 1}
PERCEIVER |= {"num_self_attends_per_block": 1, "num_self_attention_heads": 1, "num_cross_attention_heads": 1}
PERCEIVER |= {"qk_channels": 8, "v_channels": 8}
OF_XLM = {"emb_dim": 8, "n_layers": 1, "n_heads": 2}


@pytest.mark.parametrize(
    "described",
    [
        {"_class_name": "RobertaForMaskedLM"} | SMALL,
        {"_class_name": "MPNetForMaskedLM"} | SMALL,
        {"_class_name": "MegatronBertForMaskedLM"} | SMALL,
        {"_class_name": "XLMWithLMHeadModel"} | OF_XLM,
    ],
    ids=lambda one: one["_class_name"],
)
@pytest.mark.parametrize("told", [False, True])
def test_a_model_of_any_kind_trains_and_takes_no_token_for_padding(
    tmp_path: Path, described: dict[str, Any], told: bool
) -> None:
    """A model whose rows for two tokens are the same can't tell one from the other, padding or not."""
    given = fields(tmp_path, network=described, time_embedding=told, num_sample_images=0)
    train_here(tmp_path / "run", **given, max_train_steps=2)
    pipe = TokenPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    network, rows = pipe.token_network().eval(), pipe.network.get_input_embeddings().weight
    padding, other = pipe.network.config.pad_token_id, 4
    with torch.no_grad():
        rows[padding] = rows[other]
        first, second = (
            network(torch.tensor([[0, one, 5, one, one, one, 3, one]]), torch.ones(1))[0] for one in (padding, other)
        )
    torch.testing.assert_close(first, second)
    assert pipe.cut.length == LENGTH


@pytest.mark.filterwarnings("error:.*time_embedding")
def test_a_run_stands_for_its_tokenizer_too(tmp_path: Path) -> None:
    train_here(tmp_path / "run", **fields(tmp_path), max_train_steps=1)
    vocabulary = TokenPipeline.from_pretrained(tmp_path / "run" / "pipeline").tokenizer.get_vocab()
    for place in (tmp_path / "run", tmp_path / "run" / "pipeline", tmp_path / "run" / "pipeline" / "tokenizer"):
        assert open_tokenizer(str(place)).tokenizer.get_vocab() == vocabulary
    run = str(tmp_path / "run")
    tuned = start(tmp_path / "tuned", **fields(tmp_path, network_from=run, tokenizer=run))
    assert torch.equal(weights(tuned), weights(start(tmp_path / "run", **fields(tmp_path, network_from=run))))


def test_a_tokenizer_without_a_mask_gets_one_and_its_network_a_row(tmp_path: Path) -> None:
    words = tiny_tokens.make_tokenizer("character", lambda: [TEXT])
    without = tiny_tokens.without_mask(words)
    without.save_pretrained(tmp_path / "bert")
    tiny_tokens.network(len(without)).save_pretrained(tmp_path / "bert")
    given = fields(tmp_path, network_from=str(tmp_path / "bert"), tokenizer=str(tmp_path / "bert"))
    with pytest.warns(UserWarning, match="mask"):
        run = start(tmp_path / "run", **given)
    assert run.model.network.model.config.vocab_size == len(words) == Tokenization(words).num_ids


def test_what_can_not_be_trained_is_refused(tmp_path: Path) -> None:
    words = tiny_tokens.make_tokenizer("character", lambda: [TEXT])
    words.save_pretrained(tmp_path / "gpt")
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "gpt")
    tiny_tokens.network(len(words)).save_pretrained(tmp_path / "bert")
    place = str(tmp_path / "gpt")
    for others, named in (
        ({"network_from": place, "tokenizer": place}, ("causal",)),
        ({"network_from": str(tmp_path / "bert"), "tokenizer": "byte"}, ("tokenizer", 258)),
        ({"network": PERCEIVER}, ("PerceiverForMaskedLM", "embeddings")),
        ({"model": "vdm"}, ("model", "tokens")),
        ({"forward_process": "gaussian"}, ("GaussianProcess", "absorbing")),
        ({"tokenizer": None}, ("tokenizer",)),
    ):
        with pytest.raises(ConfigurationError, match=naming(*named)):
            start(tmp_path / "run", **fields(tmp_path, **others))


def test_a_recipe_of_a_missing_plugin_names_it(tmp_path: Path) -> None:
    process = {"name": "absorbing_of_another", "package": "vdm-hub-of-another"}
    with pytest.raises(MissingPluginError, match="vdm-hub-of-another"):
        start(tmp_path / "run", **fields(tmp_path, forward_process=process))


@pytest.mark.parametrize(("name", "millions"), [("shakespeare", 1.01), ("python_source", 2.94)])
def test_a_recipe_of_the_package_has_its_network(tmp_path: Path, name: str, millions: float) -> None:
    _, values, _ = load_recipe(name)
    assert values["forward_process"] == {"name": "absorbing", "package": "vdm-hub-tokens"}
    (tmp_path / "a.txt").write_text("".join(map(chr, range(32, 97))) * 40)
    place = {"train_data_dir": str(tmp_path / "a.txt"), "dataset_name": None, "output_dir": str(tmp_path / "run")}
    chosen = Configuration.from_dict(values | place | {"forward_process": PROCESS, "report_to": "none"})
    data = load_data(chosen.data)
    with on_meta_device():
        objective = build_objective(chosen, data.shape, None, data.tokenization)
    assert sum(one.numel() for one in objective.parameters()) / 1e6 == pytest.approx(millions, abs=0.3)


def test_keys_of_the_network_are_given_one_by_one(tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe", tmp_path / "run", **fields(tmp_path))
    read = parse_recipe([path, "--network.hidden_size", "16"])
    assert read.model.network_config["hidden_size"] == 16 and read.model.network_config["num_hidden_layers"] == 1
