"""What a recipe says of the process reaches it, each field by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import configuration
from vdm_hub.training.parts.setup import build_scheduler


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_timesteps", 50),
        ("prediction_type", "v_prediction"),
        ("conditioning", "flow_time"),
        ("data_scaling", "unit"),
        ("decoder", "ddpm"),
        ("noise_schedule", "cosine"),
        ("num_levels", 5),
    ],
)
def test_a_field_of_the_recipe_is_the_scheduler_s(field: str, value: Any, tmp_path: Path) -> None:
    plain, other = (build_scheduler(configuration(tmp_path, **given)).config[field] for given in ({}, {field: value}))
    assert str(value) in str(other) and str(value) not in str(plain)
