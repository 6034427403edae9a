"""Every optimiser goes on bit for bit where its checkpoint was written; one that is not installed is named."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from naming import naming
from runs import LEARNED, contents, start, train_here
from vdm_hub.errors import ConfigurationError
from vdm_hub.recipes.arguments import FIELDS
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

# bitsandbytes keeps moments of fewer than 4,096 values in 32 bits.
WIDE = {"block_out_channels": [32], "layers_per_block": 1, "norm_num_groups": 4}
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def test_every_optimizer_is_covered() -> None:
    assert {"adamw", "muon", *PACKAGES} == set(get_args(FIELDS["optimizer"]))


# Where it is installed, diffusers imports it in every process and lets it speak; so the test extra does without.
with_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        "muon",
        pytest.param("prodigy", marks=pytest.mark.slow),
        pytest.param("adamw_8bit", marks=with_bitsandbytes),
    ],
)
def test_a_resumed_run_equals_the_undisturbed_one(optimizer: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"optimizer": optimizer, "noise_schedule": LEARNED, "lr_scheduler": "constant"}
    fields |= {"learning_rate": 1.0} if optimizer == "prodigy" else {}
    if optimizer == "adamw_8bit":
        fields |= {"unet": WIDE}
    train_here(tmp_path / "calm", **fields)
    train_here(tmp_path / "parts", **fields, max_train_steps=3)
    train_here(tmp_path / "parts", **fields, resume_from_checkpoint="latest")
    assert contents(tmp_path / "parts" / "pipeline") == contents(tmp_path / "calm" / "pipeline")


@with_bitsandbytes
def test_moments_of_8_bits_stay_so_in_the_checkpoint(tmp_path: Path) -> None:
    train_here(tmp_path / "run", optimizer="adamw_8bit", unet=WIDE, max_train_steps=1)
    tensors = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1]).tensors["optimizer"]
    assert {value.dtype for name, value in tensors.items() if name.endswith("state1")} == {torch.uint8, torch.float32}


def test_prodigys_own_step_size_is_in_the_checkpoint(tmp_path: Path) -> None:
    train_here(tmp_path / "run", optimizer="prodigy", learning_rate=1.0, lr_scheduler="constant")
    state = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1]).state
    (group,) = state["optimizer"]["groups"]
    assert group["d"] > 1e-6, "it starts there, and rises"
    assert json.dumps(group)


@pytest.mark.parametrize("optimizer", PACKAGES)
def test_one_that_is_not_installed_says_how_to_install_it(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = PACKAGES[optimizer]
    for name in (package, f"{package}.optim"):  # Python then raises the error of a package that is not there
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=naming("pip install", package)):
        start(tmp_path / "run", optimizer=optimizer)


def test_an_unknown_one_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match=r"prodigi.*prodigy"):
        TrainingArguments(max_train_steps=1, optimizer="prodigi")  # type: ignore[arg-type]
