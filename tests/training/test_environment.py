"""What accelerate would take from the environment: compared with the recipe, and refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from naming import naming
from runs import configuration, contents, forget_accelerator, train_here
from vdm_hub.errors import ConfigurationError
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.parts import processes
from vdm_hub.training.parts.processes import build_accelerator, check_environment
from vdm_hub.training.state.outputs import OutputFolder

WRONG = [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {}, "gradient_accumulation_steps"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many", {}, "gradient_accumulation_steps"),
    ("ACCELERATE_GRADIENT_CLIPPING", "0.5", {}, "max_grad_norm"),
    ("ACCELERATE_MIXED_PRECISION", "bf16", {"mixed_precision": "no"}, "mixed_precision"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", {"mixed_precision": "bf16"}, "mixed_precision"),
    ("ACCELERATE_MIXED_PRECISION", "BF16", {}, "bf16"),  # which accelerate takes for none, and says nothing
    ("ACCELERATE_MIXED_PRECISION", "bf17", {}, "bf16"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", {}, "bf16"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", {}, "fp16"),  # on a CPU
    ("ACCELERATE_DYNAMO_BACKEND", "inductor", {}, "compile"),
    ("ACCELERATE_DYNAMO_BACKEND", "EAGER", {}, "compile"),
    ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "perhaps", {}, "perhaps"),
    ("ACCELERATE_USE_FSDP", "true", {}, "ACCELERATE_USE_FSDP"),  # of one process, which shards nothing
    ("ACCELERATE_USE_FSDP", "1", {}, "ACCELERATE_USE_FSDP"),
    ("ACCELERATE_USE_DEEPSPEED", "True", {}, "fsdp2.yaml"),
    ("ACCELERATE_USE_DEEPSPEED", "1", {}, "ACCELERATE_USE_DEEPSPEED"),
    ("ACCELERATE_USE_MEGATRON_LM", "true", {}, "ACCELERATE_USE_MEGATRON_LM"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", {}, "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ("ACCELERATE_USE_CPU", "perhaps", {}, "ACCELERATE_USE_CPU"),
    ("ACCELERATE_TORCH_DEVICE", "meta", {}, "ACCELERATE_TORCH_DEVICE"),
    ("ACCELERATE_TORCH_DEVICE", "mps", {}, "ACCELERATE_TORCH_DEVICE"),
    ("ACCELERATE_TORCH_DEVICE", "cuda:0", {}, "ACCELERATE_TORCH_DEVICE"),
    ("ACCELERATE_USE_FSDP", "maybe", {}, "ACCELERATE_USE_FSDP"),  # read at the first step
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "maybe", {}, "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ("WORLD_SIZE", "abc", {}, "WORLD_SIZE"),
    ("WORLD_SIZE", "", {}, "WORLD_SIZE"),
    ("LOCAL_WORLD_SIZE", "x", {}, "LOCAL_WORLD_SIZE"),
    ("LOCAL_WORLD_SIZE", "-5", {}, "LOCAL_WORLD_SIZE"),
    ("LOCAL_RANK", "x", {}, "LOCAL_RANK"),
]


@pytest.mark.parametrize(("variable", "value", "fields", "named"), WRONG)
def test_a_variable_that_would_train_otherwise_is_refused_by_name(
    variable: str, value: str, fields: dict[str, object], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        train_here(tmp_path / "run", **fields)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("variable", "value", "fields", "precision"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {"gradient_accumulation_steps": 4}, "no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", {"gradient_accumulation_steps": 3}, "no"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", {}, "no"),
        ("ACCELERATE_MIXED_PRECISION", "no", {"mixed_precision": "bf16"}, "bf16"),  # as launchers say it by default
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"mixed_precision": "bf16"}, "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "", {}, "no"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", {}, "no"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", {}, "no"),
        ("ACCELERATE_USE_FSDP", "false", {}, "no"),
    ],
)
def test_what_agrees_with_the_recipe_is_taken(
    variable: str,
    value: str,
    fields: dict[str, object],
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    forget_accelerator()
    chosen = configuration(tmp_path / "run", **fields)
    accelerator = build_accelerator(chosen, (folder := OutputFolder(chosen)).path, folder.logs)
    assert accelerator.gradient_accumulation_steps == chosen.training.gradient_accumulation_steps
    assert accelerator.mixed_precision == precision
    assert accelerator.state.dynamo_plugin.backend == "NO"
    forget_accelerator()


def test_a_precision_that_the_recipe_leaves_open_is_the_launcher_s_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train_here(tmp_path / "run", max_train_steps=1)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["mixed_precision"] == "bf16"
    assert "--mixed_precision bf16" in told["command"]


def test_the_accelerator_is_the_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trackers and its places; what is sharded, and the engine, are checked; and tf32 is what was asked for."""
    asked: list[str] = []
    monkeypatch.setattr(processes, "is_sharded", lambda accelerator: True)
    monkeypatch.setattr(processes, "check_shards", lambda accelerator, training: asked.append("shards"))
    monkeypatch.setattr(processes, "refuse_engine", lambda kind: asked.append(f"engine {kind.value}"))
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        for allowed in (False, True):
            forget_accelerator()
            fields = {"report_to": "tensorboard", "allow_tf32": allowed}
            accelerator = build_accelerator(configuration(tmp_path, **fields), tmp_path / "run", tmp_path / "logs")
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert [str(tracker) for tracker in accelerator.log_with] == ["tensorboard"]
    assert (accelerator.project_dir, accelerator.logging_dir) == (str(tmp_path / "run"), str(tmp_path / "logs"))
    assert asked == ["engine NO", "shards"] * 2


def test_a_precision_that_is_the_launcher_s_ends_no_check() -> None:
    both = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "inductor"}
    with pytest.raises(ConfigurationError, match=naming("ACCELERATE_DYNAMO_BACKEND", "inductor", "compile")):
        check_environment(TrainingArguments(max_train_steps=1), both)


@pytest.mark.parametrize("precision", ["bf16", None])
def test_where_a_setting_may_come_from_is_named(precision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    training = TrainingArguments(max_train_steps=1, mixed_precision=precision)
    said = f"mixed_precision, which is {precision or 'what the launcher says'}"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    assert processes._sources_of_settings(training) == said
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes._sources_of_settings(training) == f"ACCELERATE_USE_CPU, RANK in the environment, or {said}"
