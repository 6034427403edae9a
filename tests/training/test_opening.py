"""What a run says of itself before its first step: its arguments, and those that will have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import configuration
from vdm_hub.recipes.arguments import Configuration, parse_recipe
from vdm_hub.training.opening import describe_recipe, without_effect

TEXTS = {"model": "tokens", "tokenizer": "byte", "window_length": 8, "unet": {}, "noise_schedule": "linear"}
TEXTS |= {"num_levels": 256}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lr_warmup_steps": 7}, "lr_warmup_steps is 7"),
        ({"lr_warmup_steps": 6}, None),
        ({"lr_warmup_steps": 1, "lr_scheduler": "constant"}, "lr_warmup_steps is 1"),
        ({"lr_warmup_steps": 0, "lr_scheduler": "constant"}, None),
        ({"validation_steps": 7, "validation_size": 9}, "validation_steps is 7"),
        ({"validation_steps": 6, "validation_size": 9}, None),
        ({"validation_size": 9}, "validation_steps is 0"),
        ({"sample_steps": 1}, "sample_steps is 1"),
        ({"sample_steps": 1, "num_sample_images": 1}, None),
        ({"test_size": 9, "test_split": "none", "evaluation_replicates": 0}, "evaluation_replicates is 0"),
        ({"test_size": 9, "test_split": "none", "evaluation_replicates": 1}, None),
        ({"use_ema": False, "ema_max_decay": 0.5}, "ema_max_decay"),
        ({"use_ema": False, "offload_ema": True}, "offload_ema"),
        ({"num_sample_images": 0, "num_inference_steps": 3}, "num_inference_steps"),
        ({"channels_last": True}, None),
        (TEXTS | {"channels_last": True}, "channels_last"),
        (TEXTS, None),
    ],
)
def test_what_comes_to_nothing_in_six_steps_is_said(given: dict[str, Any], named: str | None, tmp_path: Path) -> None:
    said = without_effect(configuration(tmp_path / "run", **{"num_inference_steps": 250} | given), 6)
    assert len(said) == (0 if named is None else 1) and all((named or "") in one for one in said), said


def test_a_dry_run_prints_a_recipe_and_a_run_one_paragraph(tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    dry = configuration(tmp_path / "run", dry_run=True, learning_rate=0.5)
    again.write_text(describe_recipe(dry))
    assert parse_recipe([str(again)]) == dry
    names = {"dataset_name": "well-known/" + "long-name-" * 7, "output_dir": "some-folder-" * 8}
    said = describe_recipe(Configuration.from_dict(names | {"max_train_steps": 5}, "mine"))
    first, *others = said.splitlines()
    assert first.startswith("mine: ") and others and all(line.startswith("  ") for line in others)
    assert all(name in said for name in names.values()), "no name is broken"
