"""`TokenPipeline`: what is saved is what is loaded, holes are filled, and the bound is that of the enumeration."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    EuroBertConfig,
    EuroBertForMaskedLM,
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

import tiny_tokens
from naming import naming
from tiny import seeded
from tiny_text import tiny_tokenizer
from tiny_tokens import LENGTH, PROCESS, network, pipeline, tokenizer
from vdm_hub import TokenPipeline, TokenTimeEmbedding, UNetVDMModel, VariationalBound, VDMScheduler
from vdm_hub.data.sequences import Cut, encode_texts
from vdm_hub.data.texts import open_texts
from vdm_hub.data.tokenization import MASK, Tokenization
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError, MissingPluginError, NonFiniteLossError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.evaluation.measuring import ReplicateStages
from vdm_hub.evaluation.tables import write_table
from vdm_hub.models.token_networks import TokenNetwork, check_token_model
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.opening import without_effect

TEXTS = ["abc def", "gab", "fed cab bag face"]


pytestmark = pytest.mark.usefixtures("token_plugin")


@pytest.fixture(scope="module")
def pipe() -> TokenPipeline:
    return pipeline()


@pytest.fixture
def saved(pipe: TokenPipeline, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


# ---- saved and loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [TokenPipeline, DiffusionPipeline])
@pytest.mark.parametrize("told", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, loader: Any, told: bool) -> None:
    embedding = TokenTimeEmbedding(8) if told else None
    if embedding is not None:
        torch.nn.init.normal_(embedding.embedding.linear_2.weight)
    first = pipeline(time_embedding=embedding)
    first.save_pretrained(tmp_path)
    second = loader.from_pretrained(tmp_path)
    second.set_progress_bar_config(disable=True)
    assert type(second) is TokenPipeline and second.config.windows == first.config.windows
    draws = [one(3, num_inference_steps=4, generator=seeded()) for one in (first, second)]
    assert torch.equal(draws[0].ids, draws[1].ids) and draws[0].texts == draws[1].texts
    reports = [one.log_likelihood(TEXTS, replicates=2) for one in (first, second)]
    assert torch.equal(reports[0].per_image, reports[1].per_image)


def test_the_index_names_transformers_and_nothing_else_that_is_not_ours(saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["network"] == ["transformers", "BertForMaskedLM"] and index["tokenizer"][0] == "transformers"
    assert index["scheduler"] == ["vdm_hub", "VDMScheduler"]


@pytest.mark.parametrize(
    ("component", "named"),
    [
        ("network", ["diffusers", "UNet2DModel"]),
        ("network", ["vdm_hub", "UNetVDMModel"]),
        ("network", ["transformers", "BertConfig"]),
        ("tokenizer", ["transformers", "BertForMaskedLM"]),
        ("network", ["os", "system"]),
        ("scheduler", ["transformers", "BertForMaskedLM"]),
    ],
)
def test_another_component_is_refused(saved: Path, component: str, named: list[str]) -> None:
    index = saved / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {component: named}))
    with pytest.raises(CheckpointError):
        TokenPipeline.from_pretrained(saved)


def test_other_weights_and_code_are_refused(saved: Path) -> None:
    weights = load_file(saved / "network" / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:-1].clone()}, saved / "network" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=naming(name)):
        TokenPipeline.from_pretrained(saved)
    config = saved / "network" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(CheckpointError, match="auto_map"):
        TokenPipeline.from_pretrained(saved)


def test_a_missing_plugin_is_named(saved: Path) -> None:
    config = saved / "scheduler" / "scheduler_config.json"
    process = {"name": "absorbing_of_another", "package": "vdm-hub-of-another", "config": {}}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"forward_process": process}))
    with pytest.raises(MissingPluginError, match="vdm-hub-of-another"):
        TokenPipeline.from_pretrained(saved)


def test_a_folder_without_its_tokenizer_is_refused(saved: Path) -> None:
    shutil.rmtree(saved / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer"):
        TokenPipeline.from_pretrained(saved)


# ---- what does not belong together ----------------------------------------------------------------------------------


def scheduler(levels: int) -> VDMScheduler:
    return VDMScheduler(num_levels=levels, forward_process=PROCESS)


def test_parts_of_other_sizes_are_refused() -> None:
    words = tokenizer()
    with pytest.raises(ConfigurationError, match=naming("num_levels", len(words) - 1)):
        TokenPipeline(network(len(words)), words, scheduler(5))
    with pytest.raises(ConfigurationError, match=naming("tokens", len(words) - 2)):
        TokenPipeline(network(len(words) - 2), words, scheduler(len(words) - 1))
    with pytest.raises(ConfigurationError, match=naming("positions", LENGTH, 99)):
        windows = {"length": 99, "context": 0, "text_column": "text"}
        TokenPipeline(network(len(words)), words, scheduler(len(words) - 1), windows=windows)


@pytest.mark.parametrize("fields", [{}, {"forward_process": "gaussian"}, {"noise_schedule": "learned_linear"}])
def test_processes_of_images_are_refused(fields: dict[str, Any]) -> None:
    words = tokenizer()
    with pytest.raises(ConfigurationError, match=naming("GaussianProcess", "absorbing", "vdm-hub-tokens")):
        TokenPipeline(network(len(words)), words, VDMScheduler(num_levels=len(words) - 1, **fields))


SIZES: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 12}
LAYERS: dict[str, Any] = {"num_hidden_layers": 1, "max_position_embeddings": 16, "pad_token_id": None}


def test_causal_networks_and_those_without_logits_are_refused() -> None:
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    for model in (gpt, LlamaForCausalLM(LlamaConfig(**SIZES, **LAYERS))):
        with pytest.raises(ConfigurationError, match="causal"):
            check_token_model(model, 8)
    with pytest.raises(ConfigurationError, match="logits"):
        check_token_model(BertModel(BertConfig(**SIZES, **LAYERS)), 8)


def test_a_causal_network_is_refused_at_any_length_and_one_that_sees_a_part_of_both_sides_is_not() -> None:
    local = {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": None}
    others = {"bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None}
    windows = {"local_attention": 4, "layer_types": ["sliding_attention"] * 2}
    heads = {"num_key_value_heads": 2, "sliding_window": 4}
    flaubert = {"vocab_size": 12, "emb_dim": 8, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    both_sides = [
        MistralForCausalLM(MistralConfig(**SIZES, **local, **heads, is_causal=False)),
        ModernBertForMaskedLM(ModernBertConfig(**SIZES, **local, **others, **windows)),
        *(FlaubertWithLMHeadModel(FlaubertConfig(**flaubert, pad_index=pad, pad_token_id=pad)) for pad in range(12)),
    ]
    left_side = [
        MistralForCausalLM(MistralConfig(**SIZES, **local, **heads)),
        FlaubertWithLMHeadModel(FlaubertConfig(**flaubert, causal=True)),
    ]
    for length in (2, 3, 8, 64):
        for model in both_sides:
            check_token_model(model, length)
        for model in left_side:
            with pytest.raises(ConfigurationError, match="causal"):
                check_token_model(model, length)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BertForMaskedLM(BertConfig(**SIZES, **LAYERS)),
        lambda: EuroBertForMaskedLM(EuroBertConfig(**SIZES, **LAYERS)),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **LAYERS, is_causal=False)),
        lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, **LAYERS, bos_token_id=None, eos_token_id=None)),
    ],
    ids=["bert", "eurobert", "llama", "modernbert"],
)
def test_bidirectional_networks_give_a_logit_for_each_token_but_the_mask(build: Any) -> None:
    torch.manual_seed(0)
    model, words = build().eval(), Tokenization(tokenizer())
    check_token_model(model, 16)
    levels = torch.randint(0, words.num_values + 1, (2, 16), generator=seeded())
    logits = TokenNetwork(model, words)(levels, torch.zeros(2))[0]
    assert logits.shape == (2, 16, words.num_values) and bool(logits.isfinite().all())


def test_a_mask_in_the_midst_of_the_ids_is_left_out_of_the_logits() -> None:
    words = Tokenization(tiny_tokenizer())
    model = network(words.num_ids)
    levels = torch.tensor([[0, 3, 4, words.num_values, 9]])
    ids = words.ids_of(levels)
    assert ids.tolist() == [[0, 3, 5, words.mask_id, 10]]
    whole = model(input_ids=ids).logits
    kept = [place for place in range(words.num_ids) if place != words.mask_id]
    assert torch.equal(TokenNetwork(model, words)(levels, torch.zeros(1))[0], whole[..., kept])


def test_the_timestep_is_told_where_it_is_to_be() -> None:
    words = Tokenization(tokenizer())
    model, embedding = network(words.num_ids), TokenTimeEmbedding(8)
    levels, times = torch.zeros(2, LENGTH), torch.tensor([1.0, 900.0])
    plain, told = TokenNetwork(model, words), TokenNetwork(model, words, embedding)
    torch.testing.assert_close(told(levels, times)[0], plain(levels, times)[0])  # zero before training
    torch.nn.init.normal_(embedding.embedding.linear_2.weight)
    rows = told(levels, times)[0]
    assert not torch.allclose(rows[0], rows[1]) and torch.equal(plain(levels, times)[0][0], plain(levels, times)[0][1])


# ---- samples --------------------------------------------------------------------------------------------------------


def test_samples_have_no_mask_and_the_length_that_is_asked_for(pipe: TokenPipeline) -> None:
    drawn = pipe(5, length=6, num_inference_steps=3, generator=seeded())
    assert drawn.ids.shape == (5, 6) and not bool((drawn.ids == pipe.tokenizer.mask_token_id).any())
    assert drawn.texts == [pipe.tokenization.decode(pipe.tokenization.levels_of(row.numpy())) for row in drawn.ids]
    assert pipe(2, generator=seeded()).ids.shape == (2, LENGTH)


def test_holes_are_filled_and_what_is_given_stays(pipe: TokenPipeline) -> None:
    for prompt in (f"a{MASK}c{MASK}{MASK}f", [0, None, 2, None, None, 5]):
        drawn = pipe(4, prompt=prompt, num_inference_steps=4, generator=seeded())
        assert [text[0] + text[2] + text[-1] for text in drawn.texts] == ["acf"] * 4 or prompt[0] == 0
        assert all(row[2] == drawn.ids[0, 2] for row in drawn.ids) and drawn.ids.shape == (4, 6)
    continued = pipe(2, prompt=["ab", "g"], num_inference_steps=4, generator=seeded())
    assert [text[:1] for text in continued.texts] == ["a", "a", "g", "g"] and continued.ids.shape == (4, LENGTH)


def test_ids_are_given_as_a_list_a_tensor_or_a_drawn_text(pipe: TokenPipeline) -> None:
    drawn = pipe(3, num_inference_steps=4, generator=seeded()).ids[:, :4]
    for prompt in (drawn, list(drawn), drawn.tolist(), drawn.numpy()):
        assert torch.equal(pipe(prompt=prompt, length=LENGTH, num_inference_steps=4).ids[:, :4], drawn)
    assert torch.equal(pipe(prompt=drawn[0], length=6, num_inference_steps=4).ids[:, :4], drawn[:1])


def test_what_a_callback_gives_takes_the_place_of_the_latents(pipe: TokenPipeline) -> None:
    found = pipe(2, num_inference_steps=4, callback_on_step_end=lambda *_: {"latents": torch.zeros(2, LENGTH).long()})
    assert not bool(found.ids.any())


@pytest.mark.parametrize("network", [None, torch.nn.Linear(3, 3), "bert"])
def test_what_is_no_network_is_refused(network: Any) -> None:
    words = tokenizer()
    with pytest.raises(ConfigurationError, match=naming("network", type(network).__name__, "BertForMaskedLM")):
        TokenPipeline(network, words, scheduler(len(words) - 1))


def test_a_callback_sees_a_text_that_opens(pipe: TokenPipeline) -> None:
    masked: list[int] = []

    def look(pipe: Any, step: int, timestep: Any, seen: dict[str, Any]) -> None:
        masked.append(sum(text.count(MASK) for text in seen["texts"]))
        assert set(seen) == set(pipe._callback_tensor_inputs)

    pipe(8, num_inference_steps=8, generator=seeded(), callback_on_step_end=look)
    assert masked == sorted(masked, reverse=True) and masked[0] > masked[-1] == 0 and len(masked) == 8


def test_without_temperature_the_likeliest_tokens_are_drawn(pipe: TokenPipeline) -> None:
    drawn = pipe(3, num_inference_steps=1, temperature=0, generator=seeded())
    masks = torch.full((1, LENGTH), pipe.num_levels)
    likeliest = pipe.token_network()(masks, torch.zeros(1))[0].argmax(-1)
    assert torch.equal(drawn.ids, pipe.tokenization.ids_of(likeliest).expand(3, -1))


def test_a_network_that_gives_nan_is_said_to() -> None:
    pipe = pipeline()
    with torch.no_grad():
        next(iter(pipe.network.parameters())).fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match=naming(2, "weights")):
        pipe(num_samples=2, num_inference_steps=2)


def test_samples_are_those_of_their_generators(pipe: TokenPipeline) -> None:
    both = pipe(2, num_inference_steps=4, generator=[seeded(1), seeded(2)]).ids
    assert torch.equal(both[1:], pipe(1, num_inference_steps=4, generator=[seeded(2)]).ids)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"length": 99}, "length"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": [0, 99]}, "99"),
        ({"prompt": "abcdefgabc"}, "10"),
        ({"prompt": ["ab", f"aö{MASK}"]}, "ö"),
        ({"prompt": "a\ud800"}, "ud800"),
        ({"generator": [torch.Generator()] * 3}, "3"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        *(({"prompt": one}, "prompt is") for one in (5, 1.5, b"a", [], {}, ["a", 5], [["a"]], [[], "a"])),
        ({"prompt": [f"a{MASK}", None]}, "None"),
        ({"callback_on_step_end": 5}, "5"),
        ({"callback_on_step_end": lambda *_: 5}, "5"),
        ({"callback_on_step_end": lambda *_: {"latents": 5}}, "5"),
        *(
            ({"callback_on_step_end": lambda *_, one=one: {"latents": one}}, "latents")
            for one in (torch.full((1, LENGTH), -1.0), torch.full((1, LENGTH), 99), torch.full((1, LENGTH), 0.5))
        ),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2, LENGTH)}}, r"\(2, 8\)"),
    ],
)
def test_arguments_out_of_range_are_refused(pipe: TokenPipeline, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        pipe(**given)


# ---- likelihood -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_bound_is_the_mean_over_all_orders(pipe: TokenPipeline) -> None:
    text, words = "bad", pipe.tokenization
    levels, called = torch.from_numpy(words.encode(text).levels).long(), pipe.token_network()
    whole = torch.full((LENGTH,), 0)
    whole[:3] = levels
    mask = (torch.arange(LENGTH) < 3).long()[None]
    total = 0.0
    for order in itertools.permutations(range(3)):
        seen = whole.clone()
        seen[:3] = words.num_values
        seen[3:] = words.filler
        for place in order:
            logits = called(seen[None], torch.zeros(1), attention_mask=mask)[0][0, place]
            total -= float(torch.log_softmax(logits, -1)[levels[place]])
            seen[place] = levels[place]
    exact = total / math.factorial(3) / (3 * math.log(2))
    method = VariationalBound(pilot_evaluations=0, times_per_datum=8)
    report = pipe.log_likelihood([text] * 64, method, replicates=16, batch_size=64)  # 64 independent estimates
    assert report.bits_per_byte == pytest.approx(report.bits_per_dim)
    assert abs(report.bits_per_dim - exact) < 4 * report.standard_error < 0.5


@torch.no_grad()
def test_the_bound_after_a_context_is_the_mean_over_the_orders_of_the_rest(pipe: TokenPipeline) -> None:
    context, text, words = "fac", "bad", pipe.tokenization
    levels, called = torch.from_numpy(words.encode(context + text).levels).long(), pipe.token_network()
    mask = (torch.arange(LENGTH) < len(levels)).long()[None]
    total = 0.0
    for order in itertools.permutations(range(3, 6)):
        seen = torch.full((LENGTH,), words.filler)
        seen[:3], seen[3:6] = levels[:3], words.num_values
        for place in order:
            logits = called(seen[None], torch.zeros(1), attention_mask=mask)[0][0, place]
            total -= float(torch.log_softmax(logits, -1)[levels[place]])
            seen[place] = levels[place]
    exact = total / math.factorial(3) / (3 * math.log(2))
    method = VariationalBound(pilot_evaluations=0, times_per_datum=8)
    report = pipe.log_likelihood([text] * 64, method, replicates=16, contexts=context, batch_size=64)
    assert (report.dimensions, report.bits_per_byte) == (3, pytest.approx(report.bits_per_dim))
    assert abs(report.bits_per_dim - exact) < 4 * report.standard_error < 0.5


def test_contexts_are_one_for_all_or_one_each_and_cut_where_there_is_no_room(pipe: TokenPipeline) -> None:
    def nats(*contexts: Any) -> torch.Tensor:
        report = pipe.log_likelihood(["bad", "cab"], replicates=2, contexts=contexts[0] if contexts else None)
        assert report.bits_per_byte is not None
        return torch.stack(list(report.terms_per_image.values()))

    assert torch.equal(nats("fa"), nats(["fa", "fa"])) and torch.equal(nats(["", ""]), nats())
    assert not torch.equal(nats("fa"), nats("ga"))
    long = pipe.log_likelihood("bad", replicates=2, contexts="gabbed face")
    assert torch.equal(long.per_image, pipe.log_likelihood("bad", replicates=2, contexts=" face").per_image)
    assert "contexts" in str(long.details["notes"])
    unknown = pipe.log_likelihood("bad", replicates=2, contexts="fö")
    assert unknown.bits_per_byte is not None and "1 of 2 characters of the contexts" in str(unknown)
    several = pipe.log_likelihood("a bad cab faced a bag", replicates=2, contexts="fed ")
    assert several.details["windows_of_texts"] == [3] and several.to_dict()["bytes"] == 21
    for wrong in (["a"], ["a", 3], 3, "\ud800"):
        with pytest.raises(DataError, match=r"contexts|ud800"):
            pipe.log_likelihood(["bad", "cab"], contexts=wrong)  # type: ignore[arg-type]


def test_a_report_counts_each_token_and_byte_once(pipe: TokenPipeline) -> None:
    report = pipe.log_likelihood(TEXTS, replicates=2)
    said, size = report.to_dict(), sum(map(len, TEXTS))
    assert said["tokens"] == said["bytes"] == size and said["windows_of_texts"] == [1, 1, 2]
    nats = torch.stack(list(report.terms_per_image.values())).sum()
    assert said["bits_per_byte"] == pytest.approx(float(nats) / 2 / size / math.log(2))
    assert said["perplexity"] == pytest.approx(2 ** said["bits_per_token"])
    assert "bits/byte" in str(report)
    (line,) = (one for one in str(report).splitlines() if "perplexity" in one)
    assert f"{report.perplexity * math.log(2) * report.standard_error:.4f} (Monte Carlo)" in line


def test_unknown_characters_leave_bits_by_token_alone(pipe: TokenPipeline) -> None:
    report = pipe.log_likelihood("ab☃cd", replicates=2)
    assert report.bits_per_byte is None and report.to_dict()["bits_per_byte"] is None
    assert "1 of 5 characters" in str(report) and "bits/byte   " not in str(report)


def test_what_fills_a_window_changes_nothing(pipe: TokenPipeline) -> None:
    called = pipe.token_network()
    short = torch.tensor([[1, 2, 3]])
    long = torch.tensor([[1, 2, 3, 5, 5, 6, 4, 0]])
    mask = (torch.arange(LENGTH) < 3).long()[None]
    given = called(long, torch.zeros(1), attention_mask=mask)[0][:, :3]
    torch.testing.assert_close(given, called(short, torch.zeros(1))[0])


def test_evaluation_and_pipeline_agree_whatever_the_batches(pipe: TokenPipeline) -> None:
    windows = encode_texts([TEXTS[2] * 3], pipe.tokenization, pipe.cut)
    reports = [evaluate(pipe, windows, replicates=3, batch_size=size, progress=False) for size in (2, 5)]
    own = pipe.log_likelihood(TEXTS[2] * 3, replicates=3)
    torch.testing.assert_close(reports[0].per_image, reports[1].per_image)
    torch.testing.assert_close(own.per_image, reports[0].per_image)
    assert reports[0].standard_error == pytest.approx(own.standard_error)


@pytest.mark.parametrize(("text", "whole"), [(TEXTS[2] * 3, True), (TEXTS[2] * 3 + "☃", False), ("é☃ö" * 9, False)])
def test_a_table_of_windows_has_the_figures_of_the_report_and_no_others(
    pipe: TokenPipeline, tmp_path: Path, text: str, whole: bool
) -> None:
    windows = encode_texts([text], pipe.tokenization, pipe.cut)
    report = evaluate(pipe, windows, replicates=2, progress=False)
    write_table(report, tmp_path / "rows.parquet", windows)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    assert sum(rows["bits"]) / sum(rows["tokens"]) == pytest.approx(report.bits_per_dim)
    assert (report.bits_per_byte is not None) is whole
    if whole:
        assert sum(rows["bits"]) / sum(rows["bytes"]) == pytest.approx(report.bits_per_byte)
    else:
        assert rows["bytes"] == [None] * len(windows)


@pytest.mark.parametrize(("text", "unit"), [("abcabc bag" * 3, "bits/byte"), ("xabcabc bag" * 3, "bits/token")])
def test_the_unit_of_a_target_is_that_of_the_figure_and_is_said(pipe: TokenPipeline, text: str, unit: str) -> None:
    windows, target = encode_texts([text], pipe.tokenization, pipe.cut), 0.05
    stages = ReplicateStages(8, target)
    report = evaluate(pipe, windows, replicates=stages, progress=False)
    assert report.to_dict()["target"]["unit"] == report.units.leading == unit
    assert (report.bits_per_byte is None) == (unit == "bits/token")
    assert report.reached == (report.leading_error <= target) and f"{target:g} {unit}" in str(report)
    assert any("target" in note and unit in note for note in report.details.get("notes", ())) == (unit == "bits/token")


def test_a_longer_context_is_given_and_not_scored() -> None:
    words = pipeline(context=4)
    report = words.log_likelihood("abcdefgabcde", replicates=2)
    assert report.to_dict()["tokens"] == 12 and report.num_images == 2


@pytest.mark.parametrize("texts", ["", [], ["a", ""], 3, "\ud800", ["a", "b\udfff"]])
def test_what_is_no_text_is_refused(pipe: TokenPipeline, texts: Any) -> None:
    with pytest.raises(DataError):
        pipe.log_likelihood(texts)


def test_windows_of_another_tokenizer_are_refused(pipe: TokenPipeline) -> None:
    others = encode_texts(["abc"], Tokenization(tiny_tokenizer()), Cut(4))
    with pytest.raises(DataError, match="tokenizer"):
        evaluate(pipe, others, progress=False)


def test_other_networks_than_those_of_transformers_are_refused() -> None:
    words = tokenizer()
    unet: Any = UNetVDMModel(8, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ConfigurationError, match=naming("UNetVDMModel", "BertForMaskedLM")):
        TokenPipeline(unet, words, scheduler(len(words) - 1))


# ---- words ----------------------------------------------------------------------------------------------------------


@contextmanager
def refused(error: type[Exception], *named: object) -> Iterator[None]:
    """A refusal that speaks of texts, and of nothing that only images have."""
    with pytest.raises(error, match=naming(*named)) as caught:
        yield
    assert not re.search(r"image|pixel|picture", str(caught.value))


def test_what_is_said_of_texts_is_of_texts(pipe: TokenPipeline, tmp_path: Path) -> None:
    levels = torch.full((2, LENGTH), pipe.num_levels)
    with refused(DataError, pipe.num_levels - 1, "tokenizer"):
        pipe.objective()({"levels": levels}, torch.rand(2), {"marginal": torch.rand(2, LENGTH)})
    with refused(DataError, "nosuch.txt", "a text file"):
        open_texts(str(tmp_path / "nosuch.txt"))
    broken = pipeline()
    torch.nn.init.constant_(broken.network.get_input_embeddings().weight, torch.nan)
    windows = encode_texts(TEXTS, broken.tokenization, broken.cut)
    for measure in (lambda: broken.log_likelihood(TEXTS), lambda: evaluate(broken, windows, progress=False)):
        with refused(NonFiniteLossError, "window"):
            measure()
    with refused(ConfigurationError, "BertForMaskedLM"):
        check_token_model(BertForSequenceClassification(BertConfig(**SIZES, **LAYERS)), 8)
    held = {"validation_split": "validation", "max_train_steps": 3}
    (said,) = without_effect(Configuration.from_dict(tiny_tokens.run_fields(tmp_path) | held), 3000)
    assert "windows are held out" in said and "image" not in said
    (said,) = without_effect(
        Configuration.from_dict(tiny_tokens.run_fields(tmp_path) | {"channels_last": True, "max_train_steps": 3}), 3000
    )
    assert "channels_last" in said
