"""A text comes back from a masked model's file, whose length is the likelihood of the order."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from vdm_hub import (
    ConfigurationError,
    DataError,
    TokenPipeline,
    TokenWindows,
    VariationalBound,
    VDMScheduler,
    load_windows,
    make_tokenizer,
)
from vdm_hub_codec import CodecReport, decode, encode
from vdm_hub_codec.container import Container
from vdm_hub_tokens import ExactOrder

LENGTH = 12
TEXT = "a bad cab faced a bag; fed, a gab ebbed. " * 3


def pipeline(context: int = 0, process: str = "absorbing") -> TokenPipeline:
    words = make_tokenizer("character", lambda: [TEXT])
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=LENGTH, initializer_range=0.5, **sizes)
    scheduler = VDMScheduler(num_levels=len(words) - 1, forward_process={"name": process, "package": "vdm-hub-tokens"})
    windows = {"length": LENGTH, "context": context, "text_column": "text"}
    return TokenPipeline(BertForMaskedLM(config).eval(), words, scheduler, windows=windows)


def windows(pipe: TokenPipeline, tmp_path: Any, text: str = TEXT) -> TokenWindows:
    (tmp_path / "text.txt").write_text(text)
    return load_windows(str(tmp_path / "text.txt"), "train", pipe.tokenization, pipe.cut)


@pytest.mark.parametrize(("context", "sites"), [(0, 1), (0, 5), (4, 3)])
def test_a_text_comes_back_on_another_batch(context: int, sites: int, tmp_path: Any) -> None:
    pipe = pipeline(context)
    given = windows(pipe, tmp_path)
    whole, report = encode(pipe, given, sites_at_once=sites, batch_size=2)
    text = pipe.tokenization.decode(given.tokens)
    assert decode(pipe, whole, batch_size=5).texts == [text]
    assert report.dimensions == len(given.tokens)


def test_the_length_is_the_likelihood_of_the_order(tmp_path: Any) -> None:
    pipe = pipeline()
    given = windows(pipe, tmp_path)
    _, report = encode(pipe, given)
    measured = pipe.log_likelihood(pipe.tokenization.decode(given.tokens), ExactOrder("left_to_right"), replicates=1)
    # Weights of 22 bits, and the network in float32 there.
    assert report.bound == pytest.approx(measured.bits_per_dim, rel=1e-4)
    assert report.standard_error_over_data == pytest.approx(measured.standard_error_over_images, rel=1e-3)


def test_texts_that_tokens_do_not_say_and_other_processes_are_refused(tmp_path: Any) -> None:
    pipe = pipeline()
    with pytest.raises(DataError, match="tokenizer"):
        encode(pipe, windows(pipe, tmp_path, "a bad ☃ face faced"))
    with pytest.raises(DataError, match="first 2 windows"):
        encode(pipe, windows(pipe, tmp_path).first(2))
    with pytest.raises(ConfigurationError, match="transitions"):
        encode(pipe, windows(pipe, tmp_path), transitions=4)


@pytest.mark.parametrize("context", [0, 4])
def test_a_text_comes_back_through_latents_of_values(context: int, tmp_path: Any) -> None:
    pipe = pipeline(context, "uniform")
    given = windows(pipe, tmp_path, TEXT * 4 + "fab")
    whole, report = encode(pipe, given, transitions=6, batch_size=9)
    assert bool(context) == any("4 tokens" in note for note in report.notes)
    assert decode(pipe, whole, batch_size=4).texts == [pipe.tokenization.decode(given.tokens)]
    assert (report.dimensions, report.transitions) == (len(given.tokens), 6)
    if not context:
        measured = pipe.log_likelihood(pipe.tokenization.decode(given.tokens), VariationalBound(6), replicates=8)
        error = measured.standard_error * 8**0.5  # of one draw
        assert report.bound == pytest.approx(measured.bits_per_dim, abs=5 * error + 0.1)


def test_tokens_beyond_whole_windows_cost_what_the_others_do_and_are_the_start(tmp_path: Path) -> None:
    """So the bound of a value is that of the whole windows, and the parts are the whole all the same."""
    pipe = pipeline(process="uniform")
    reports: dict[int, CodecReport] = {}
    for count in range(20 * LENGTH, 21 * LENGTH):  # of which a split has its share
        given = windows(pipe, tmp_path, (TEXT * 3)[: count * 5 // 4])
        if (beyond := len(given.tokens) - 20 * LENGTH) in (0, 1, LENGTH - 1):
            reports[beyond] = encode(pipe, given, transitions=6, batch_size=9)[1]
    assert len(reports) == 3
    for beyond, report in reports.items():
        assert report.dimensions == 20 * LENGTH + beyond and report.count == 20 + (beyond > 0)
        assert report.bound == reports[0].bound, "the windows are coded before the rest"
        parts = [report.bound, report.start, report.quantisation, report.labels, report.header]
        assert report.bits_per_dim == pytest.approx(sum(parts))
        assert report.started == reports[0].started + (beyond > 0)


def test_sites_at_once_is_of_masked_models(tmp_path: Any) -> None:
    pipe = pipeline(process="uniform")
    with pytest.raises(ConfigurationError, match="sites_at_once is 2"):
        encode(pipe, windows(pipe, tmp_path), transitions=4, sites_at_once=2)


def test_a_text_without_a_whole_window_is_refused_where_windows_are_coded(tmp_path: Any) -> None:
    pipe = pipeline(process="uniform")
    with pytest.raises(DataError, match="window"):
        encode(pipe, windows(pipe, tmp_path, "a bad cab"), transitions=4)


TEXTS = ["a bad cab", "faced a bag; fed,", "a", " a gab ebbed. " * 3]


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("has_end", [True, False])
def test_several_texts_come_back_each_by_itself(process: str, has_end: bool, tmp_path: Any) -> None:
    """By the token that ends each, or by their lengths where the tokenizer has none."""
    pipe = pipeline(process=process)
    if not has_end:
        pipe.tokenizer.eos_token = None
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    given = load_windows(str(tmp_path / "rows.jsonl"), "train", pipe.tokenization, pipe.cut)
    assert given.ended == has_end
    whole, report = encode(pipe, given, transitions=6 if process == "uniform" else None)
    assert decode(pipe, whole, batch_size=3).texts == TEXTS
    assert report.dimensions == sum(map(len, TEXTS)) + has_end * len(TEXTS)
    assert ("documents" in Container.from_bytes(whole).coder) == (not has_end)


def test_a_text_that_has_the_token_that_ends_it_comes_back(tmp_path: Any) -> None:
    pipe = pipeline()
    pipe.tokenizer.eos_token = "a"
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    whole, _ = encode(pipe, load_windows(str(tmp_path / "rows.jsonl"), "train", pipe.tokenization, pipe.cut))
    assert decode(pipe, whole).texts == TEXTS


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damage_of_texts_is_decoded(process: str, count: int, tmp_path: Any) -> None:
    """Behind a right checksum, too, with lengths and ends of documents in the description."""
    pipe = pipeline(process=process)
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    given = load_windows(str(tmp_path / "rows.jsonl"), "train", pipe.tokenization, pipe.cut)
    whole, _ = encode(pipe, given, transitions=2 if process == "uniform" else None)
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole) - 4, count):
        other = bytearray(whole)
        other[place] ^= int(generator.integers(1, 256))
        with pytest.raises(DataError):
            decode(pipe, bytes(other))
        try:  # the last word of an arithmetic code may end in other bits
            found = decode(pipe, bytes(other[:-4]) + struct.pack("<I", zlib.crc32(other[:-4])))
            assert found.texts == TEXTS
        except DataError:
            pass
