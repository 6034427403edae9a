"""Each number of a recipe has a range, at both ends; what acts only with something else is refused, or said."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from runs import TINY, configuration, train_here
from vdm_hub.errors import ConfigurationError
from vdm_hub.recipes.arguments import FIELDS, GROUPS, Configuration

NUMBERS = {
    field.name: field
    for group in GROUPS
    for field in fields(group)
    if any(word in str(FIELDS[field.name]) for word in ("int", "float", "Share"))
}
LARGE = {"learning_rate", "adam_epsilon", "adam_weight_decay", "max_grad_norm", "early_stopping_threshold"}
LARGE |= {"ema_inv_gamma", "ema_power"}  # without an upper bound but that they are finite
TEXTS = {"tokenizer": "byte", "model": "tokens", "num_levels": 256, "unet": {}}
BESIDE: dict[str, dict[str, Any]] = {
    "num_train_epochs": {"max_train_steps": None},
    "shuffle_buffer_size": {"streaming": True},
    "early_stopping_patience": {"validation_steps": 1, "validation_size": 9},
    "early_stopping_threshold": {"validation_steps": 1, "validation_size": 9, "early_stopping_patience": 1},
    "validation_images": {"validation_steps": 1, "validation_size": 9},
    "validation_steps": {"validation_size": 9},
    "num_classes": {"label_column": "label"},
    "condition_dropout": {"label_column": "label"},
    "vocabulary_size": TEXTS | {"tokenizer": "bpe"},
    "window_length": TEXTS,
    "window_context": TEXTS | {"window_length": 2**20},
    "caption_max_length": {"caption_column": "text", "text_encoder": "an-encoder"},
}


def build(name: str, value: Any) -> Configuration:
    return Configuration.from_dict(TINY | BESIDE.get(name, {}) | {name: value})


def test_every_number_says_its_range() -> None:
    assert len(NUMBERS) > 25
    for name, field in NUMBERS.items():
        assert field.metadata["bounds"], name


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_taken_within_its_range_and_refused_beyond(name: str) -> None:
    beyond = (-1, math.inf, -math.inf, math.nan, "1e999", "-1", *(() if name in LARGE else (2**63, 2**64, 10**400)))
    for value in beyond:
        with pytest.raises(ConfigurationError, match=name) as caught:
            build(name, value)
        assert len(str(caught.value)) < 1000
    bounds = NUMBERS[name].metadata["bounds"]
    for word, step in (("at least", -1), ("at most", 1)):
        if word in bounds:
            build(name, bounds[word])
            with pytest.raises(ConfigurationError, match=rf"{name} is .* at (least|most)"):
                build(name, bounds[word] + step)
    for word in ("above", "below"):
        if word in bounds:
            with pytest.raises(ConfigurationError, match=name):
                build(name, float(bounds[word]))


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    train_here(tmp_path / "run", seed=2**63 - 1, max_train_steps=1, num_sample_images=1, evaluation_replicates=1)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["seed"] == 2**63 - 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"validation_steps": 5}, "validation_size"),
        ({"early_stopping_patience": 3, "validation_size": 9}, "validation_steps"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_patience"),
        ({"validation_images": 5, "validation_size": 9}, "validation_steps"),
        ({"shuffle_buffer_size": 5}, "streaming"),
        ({"center_crop": True}, "resolution"),
        ({"hub_model_id": "me/it"}, "push_to_hub"),
        ({"hub_private_repo": True}, "push_to_hub"),
        ({"num_sample_images": 2**31}, "num_sample_images"),
        ({"model": "latent_vdm", "freeze_first_stage": True}, "first_stage_from"),
    ],
)
def test_what_would_have_no_effect_is_refused_with_what_it_needs(
    given: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configuration(tmp_path / "run", **given)
    assert named in str(caught.value)
    assert all(name in str(caught.value) for name in [next(iter(given))] if name not in ("model", "num_sample_images"))


def test_every_default_is_within_its_range() -> None:
    for group in GROUPS:
        for field in fields(group):
            assert field.default is not MISSING
    Configuration.from_dict({"dataset_name": "digits", "max_train_steps": 1})
