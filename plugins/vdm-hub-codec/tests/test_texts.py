"""A text comes back from a masked model's file, whose length is the likelihood of the order."""

from __future__ import annotations

from typing import Any

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
from vdm_hub_codec import decode, encode
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
    assert decode(pipe, whole, batch_size=5) == text
    assert report.dimensions == len(given.tokens)


def test_the_length_is_the_likelihood_of_the_order(tmp_path: Any) -> None:
    pipe = pipeline()
    given = windows(pipe, tmp_path)
    _, report = encode(pipe, given)
    measured = pipe.log_likelihood(pipe.tokenization.decode(given.tokens), ExactOrder("left_to_right"), replicates=1)
    # Weights of 22 bits, and the network in float32 there.
    assert report.bound == pytest.approx(measured.bits_per_dim, rel=1e-4)


def test_texts_that_tokens_do_not_say_and_other_processes_are_refused(tmp_path: Any) -> None:
    pipe = pipeline()
    with pytest.raises(DataError, match="tokenizer does not know"):
        encode(pipe, windows(pipe, tmp_path, "a bad ☃ face faced"))
    (tmp_path / "two").mkdir()
    for name in "abcdef":  # a place each for validation and test
        (tmp_path / "two" / f"{name}.txt").write_text(TEXT)
    with pytest.raises(DataError, match="documents"):
        encode(pipe, load_windows(str(tmp_path / "two"), "train", pipe.tokenization, pipe.cut))
    with pytest.raises(ConfigurationError, match="transitions"):
        encode(pipe, windows(pipe, tmp_path), transitions=4)


@pytest.mark.parametrize("context", [0, 4])
def test_a_text_comes_back_through_latents_of_values(context: int, tmp_path: Any) -> None:
    pipe = pipeline(context, "uniform")
    given = windows(pipe, tmp_path, TEXT * 4 + "fab")
    if context:
        with pytest.warns(UserWarning, match="4 tokens"):
            whole, report = encode(pipe, given, transitions=6, batch_size=9)
    else:
        whole, report = encode(pipe, given, transitions=6, batch_size=9)
    assert decode(pipe, whole, batch_size=4) == pipe.tokenization.decode(given.tokens)
    assert (report.dimensions, report.transitions) == (len(given.tokens), 6)
    if not context:
        measured = pipe.log_likelihood(pipe.tokenization.decode(given.tokens), VariationalBound(6), replicates=8)
        error = measured.standard_error * 8**0.5  # of one draw
        assert report.bound == pytest.approx(measured.bits_per_dim, abs=5 * error + 0.1)


def test_a_text_without_a_whole_window_is_refused_where_windows_are_coded(tmp_path: Any) -> None:
    pipe = pipeline(process="uniform")
    with pytest.raises(DataError, match="window"):
        encode(pipe, windows(pipe, tmp_path, "a bad cab"), transitions=4)
