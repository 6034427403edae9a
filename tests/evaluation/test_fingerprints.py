"""A model is its weights and all that they are used with: what changes one figure changes the fingerprint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import tiny_tokens
from naming import naming
from tiny import tiny_pipeline, tiny_unet
from vdm_hub import CheckpointError, TokenPipeline, UNetVDMModel, VDMPipeline, evaluate, load_split
from vdm_hub import model_fingerprint as fingerprint
from vdm_hub.evaluation.provenance import component_configs, weights_fingerprint

pytestmark = pytest.mark.usefixtures("token_plugin")


def swapped(pipe: Any) -> TokenPipeline:
    """The same network with two tokens that change their ids."""
    words = copy.deepcopy(pipe.tokenizer)
    text = words.backend_tokenizer.to_str()
    vocabulary = words.get_vocab()
    first, second = sorted(token for token in vocabulary if len(token) == 1)[:2]
    told = json.loads(text)
    ids = told["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    words._tokenizer = Tokenizer.from_str(json.dumps(told))
    return TokenPipeline(pipe.network, words, pipe.scheduler, pipe.time_embedding, pipe.config["windows"])


def other_groups(pipe: Any) -> VDMPipeline:
    unet = UNetVDMModel(**{**pipe.unet.config, "norm_num_groups": 2})
    unet.load_state_dict(pipe.unet.state_dict())
    return VDMPipeline(unet.eval(), pipe.scheduler)


def other_heads(pipe: Any) -> TokenPipeline:
    network = copy.deepcopy(pipe.network)
    network.config.num_attention_heads = 1 if network.config.num_attention_heads > 1 else 2
    return TokenPipeline(network, pipe.tokenizer, pipe.scheduler, pipe.time_embedding, pipe.config["windows"])


def renamed(pipe: Any) -> VDMPipeline:
    classes = {**pipe.config["classes"], "names": ["b", "a"]}
    return VDMPipeline(pipe.unet, pipe.scheduler, classes=classes)


def told() -> VDMPipeline:
    classes = {"count": 2, "names": ["a", "b"], "dropout": 0.0, "column": "label"}
    return VDMPipeline(tiny_unet(num_class_embeds=2), tiny_pipeline().scheduler, classes=classes)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "groups": (tiny_pipeline, other_groups),
    "tokens": (tiny_tokens.pipeline, swapped),
    "heads": (tiny_tokens.pipeline, other_heads),
    "names of classes": (told, renamed),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_weights_do_not_tell_makes_another_model(change: str) -> None:
    make, change_it = CHANGES[change]
    pipe = make()
    other = change_it(pipe)
    assert weights_fingerprint(pipe) == weights_fingerprint(other) and pipe.description() == other.description()
    assert fingerprint(pipe) != fingerprint(other)


def test_how_a_text_was_cut_last_is_no_part_of_a_tokenizer() -> None:
    pipe = tiny_tokens.pipeline()
    before = fingerprint(pipe)
    pipe.tokenizer("abc", truncation=True, max_length=2)
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_tokens.pipeline, told])
def test_a_model_stays_the_same_through_its_folder_and_another_tells(make: Any, tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    loaded = type(pipe).from_pretrained(tmp_path / "two")
    assert fingerprint(loaded) == fingerprint(pipe)
    assert json.loads(json.dumps(component_configs(pipe))) == component_configs(pipe)
    with torch.no_grad():
        next(next(one for one in loaded.components.values() if isinstance(one, torch.nn.Module)).parameters()).add_(1)
    assert fingerprint(loaded) != fingerprint(pipe)


def test_a_journal_of_the_same_weights_in_another_network_is_refused(tmp_path: Path) -> None:
    images, pipe = load_split("digits", "test[:3]", num_levels=17), tiny_pipeline()
    arguments: dict[str, Any] = {"replicates": 1, "progress": False, "journal": tmp_path / "journal"}
    evaluate(pipe, images, **arguments)
    with pytest.raises(CheckpointError, match=naming("components")):
        evaluate(other_groups(pipe), images, **arguments)
