"""FSDP2 trains what DDP trains, and leaves what DDP leaves: the weights, their average, the moments, the pipeline."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from runs import LEARNED, ROOT, TORCHRUN, configuration, python, recipe
from vdm_hub.errors import ConfigurationError
from vdm_hub.pipelines import PIPELINES
from vdm_hub.training.checkpoints import checkpoints, load_checkpoint
from vdm_hub.training.shards import check_shards

SCRIPT = str(ROOT / "tests" / "training" / "sharded.py")
# Adam's first steps are signs of gradients, which rounding may turn at zero: so its epsilon is large.
COMMON: dict[str, Any] = {"max_train_steps": 6, "train_batch_size": 8, "checkpointing_steps": 3, "adam_epsilon": 1e-3}
DROPOUT = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.1}
STAGE = {"latent_shapes": [[2, 4, 4]], "block_out_channels": [8], "norm_num_groups": 4}
RUNS: dict[str, dict[str, Any]] = {
    "everything": {
        "noise_schedule": LEARNED,
        "gradient_accumulation_steps": 2,
        "unet": DROPOUT,
        "validation_size": 40,
        "validation_steps": 3,
        "early_stopping_patience": 5,
        "sample_steps": 3,
        "num_sample_images": 4,
        "evaluation_replicates": 2,
        "gradient_checkpointing": True,
    },
    "bf16": {"noise_schedule": LEARNED, "mixed_precision": "bf16"},
    "hvae": {"model": "hvae", "unet": {}, "noise_schedule": "linear", "hvae": STAGE},
    "latent_vdm": {"model": "latent_vdm", "first_stage": STAGE},
}


def fields_of(name: str) -> dict[str, Any]:
    return COMMON | RUNS[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every run by both engines; FSDP2 once more from FSDP2's middle, and from DDP's; and a dry run of each."""
    folder = tmp_path_factory.mktemp("engines")
    jobs: list[list[str]] = []
    for name in RUNS:
        for engine in ("ddp", "fsdp2"):
            output = folder / f"{name}-{engine}"
            jobs.append([engine, free_port(), recipe(folder / f"recipe-{name}-{engine}", output, **fields_of(name))])
    first = folder / "first.json"
    first.write_text(json.dumps(jobs))
    done = python(*TORCHRUN, SCRIPT, str(first), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-4000:]
    jobs = []
    for engine in ("ddp", "fsdp2"):
        output = folder / f"resumed-from-{engine}"
        shutil.copytree(folder / f"everything-{engine}", output)
        for later in ("pipeline", "checkpoints/step-00000006"):
            shutil.rmtree(output / later)
        path = recipe(folder / f"recipe-{output.name}", output, **fields_of("everything"))
        jobs.append(["fsdp2", free_port(), path, "--resume_from_checkpoint", "latest"])
        dry = recipe(folder / f"recipe-dry-{engine}", folder / f"dry-{engine}", **fields_of("bf16"))
        jobs.append([engine, free_port(), dry, "--dry_run", "true"])
    second = folder / "second.json"
    second.write_text(json.dumps(jobs))
    again = python(*TORCHRUN, SCRIPT, str(second), ACCELERATE_USE_CPU="true")
    assert again.returncode == 0, again.stderr[-4000:]
    return folder, again.stdout


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def last(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


@pytest.mark.parametrize("name", RUNS)
def test_both_engines_train_the_same(runs: tuple[Path, str], name: str) -> None:
    ddp, sharded = (load_checkpoint(last(runs[0] / f"{name}-{engine}")) for engine in ("ddp", "fsdp2"))
    assert ddp.tensors.keys() == sharded.tensors.keys()
    for group, tensors in ddp.tensors.items():
        assert tensors.keys() == sharded.tensors[group].keys()
        for key, tensor in tensors.items():
            assert sharded.tensors[group][key].dtype == tensor.dtype == torch.float32 or not tensor.is_floating_point()
            # Two addends have one sum; what differs is which kernel rounds, in bfloat16 within a step of its own.
            tolerance = 2e-4 if name == "bf16" else 2e-6
            torch.testing.assert_close(sharded.tensors[group][key], tensor, rtol=tolerance, atol=tolerance)
    histories = [
        json.loads((runs[0] / f"{name}-{engine}" / "history.json").read_text()) for engine in ("ddp", "fsdp2")
    ]
    for part, columns in histories[0].items():
        for column, values in columns.items():
            assert histories[1][part][column] == pytest.approx(values, rel=1e-3 if name == "bf16" else 1e-5), column


def test_a_run_goes_on_from_its_own_checkpoint_bit_for_bit_and_from_the_other_engines(runs: tuple[Path, str]) -> None:
    folder = runs[0]
    own, resumed = (last(folder / name) for name in ("everything-fsdp2", "resumed-from-fsdp2"))
    for file in own.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes(), file.name
    whole, other = (load_checkpoint(last(folder / name)).tensors for name in ("everything-ddp", "resumed-from-ddp"))
    for name, tensor in whole["objective"].items():
        torch.testing.assert_close(other["objective"][name], tensor, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_left_is_whole(runs: tuple[Path, str], name: str) -> None:
    run = runs[0] / f"{name}-fsdp2"
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    ddp = runs[0] / f"{name}-ddp"
    expected = {str(path.relative_to(ddp)) for path in ddp.rglob("*") if path.is_file()}
    assert written == expected
    index = json.loads((run / "pipeline" / "model_index.json").read_text())
    pipe = PIPELINES[index["_class_name"]].from_pretrained(run / "pipeline")
    kept = load_checkpoint(last(run)).tensors
    published = kept.get("best") or kept["ema"]
    shapes = {tuple(parameter.shape) for parameter in pipe.main_model.parameters()}
    assert shapes <= {tuple(tensor.shape) for tensor in published.values()}


def test_each_process_holds_a_part(runs: tuple[Path, str]) -> None:
    """Weights, gradients, moments and averages: about half of each on two processes."""
    whole, part = (float(found) for found in re.findall(r"state +([\d.]+) MiB", runs[1]))
    assert 0.4 < part / whole < 0.75


@pytest.mark.parametrize(
    "changes",
    [{"channels_last": True}, {"compile": "regional"}, {"optimizer": "prodigy"}, {"mixed_precision": "fp16"}],
)
def test_what_shards_do_not_allow_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    training = configuration(tmp_path, **changes).training
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=training.mixed_precision
    )
    with pytest.raises(ConfigurationError, match=rf"{next(iter(changes))}.*ddp\.yaml"):
        check_shards(accelerator, training)
