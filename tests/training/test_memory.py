"""What a run needs of memory is counted before it is taken, and what can't fit is refused in words."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from naming import naming
from runs import configuration, contents, forget_accelerator, start, train_here
from vdm_hub.errors import ConfigurationError
from vdm_hub.training import memory
from vdm_hub.training.memory import host_memory, memory_needs

VAE = {"latent_shapes": [[1, 8, 8]], "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
RUNGS: dict[str, dict[str, Any]] = {
    "vdm": {},
    "learned": {"noise_schedule": {"name": "learned_linear", "config": {"gamma_min": -7.0, "gamma_max": 5.0}}},
    "hvae": {"model": "hvae", "hvae": VAE, "unet": {}, "noise_schedule": "linear"},
    "latent_vdm": {"model": "latent_vdm", "first_stage": VAE},
    "without averages": {"use_ema": False},
    "checkpointed": {"gradient_checkpointing": True},
}


def counted(tmp_path: Path, **fields: Any) -> memory.MemoryNeeds:
    forget_accelerator()
    return memory_needs(configuration(tmp_path / "run", **fields), (1, 8, 8), Accelerator(cpu=True))


@pytest.mark.parametrize("rung", RUNGS)
def test_the_estimate_is_what_a_step_takes(rung: str, tmp_path: Path) -> None:
    needs = counted(tmp_path, **RUNGS[rung])
    run = start(tmp_path / "run", **RUNGS[rung])
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    assert sum(needs.parameters.values()) == parameters
    kept: dict[int, Any] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in run.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.optimise(next(run.batches()))
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    averages = [] if run.ema is None else run.ema.shadow_params
    state = 4 * (2 * parameters + sum(tensor.numel() for tensor in [*moments, *averages]))
    assert needs.weights + needs.training == pytest.approx(state, rel=0.01)
    found = sum(storage.nbytes() for cdata, storage in kept.items() if cdata not in weights)
    assert needs.activations == pytest.approx(found, rel=0.25), "the bound itself keeps some, too"


def test_lower_precision_and_compilation_lower_what_is_refused(tmp_path: Path) -> None:
    plain, compiled = counted(tmp_path), counted(tmp_path, compile="whole")
    lowered = counted(tmp_path, mixed_precision="no")
    assert plain.fewest == plain.activations == lowered.fewest
    assert 0 < compiled.fewest < compiled.activations == plain.activations
    doubled = counted(tmp_path, train_batch_size=32)
    assert doubled.activations == 2 * plain.activations


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"unet": {"block_out_channels": [1 << 16, 1 << 16]}},
        {"unet": {"_class_name": "UNet2DModel", "block_out_channels": [1 << 16, 1 << 16, 1 << 16, 1 << 16]}},
        {"model": "hvae", "hvae": {"block_out_channels": [1 << 16]}, "unet": {}, "noise_schedule": "linear"},
        {"model": "latent_vdm", "first_stage": VAE | {"block_out_channels": [1 << 16]}},
        {
            "train_batch_size": 10**6,
            "max_train_samples": 1437,
            "unet": {"block_out_channels": [2048], "norm_num_groups": 4},
        },
    ],
)
def test_what_cannot_fit_is_refused_before_memory_is_taken(
    fields: dict[str, Any], dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vdm_hub.training.state.run_state.training_batches", lambda *args, **more: pytest.fail("too late")
    )
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ConfigurationError, match=naming("MiB", "train_batch_size")):
        train_here(tmp_path / "run", dry_run=dry_run, **fields)
    assert contents(tmp_path) == {}
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_a_dry_run_shows_its_arguments_and_its_needs_also_where_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vdm_hub.recipes.arguments import parse_recipe

    (tmp_path / "again.yaml").write_text("")
    for fields in ({}, {"unet": {"block_out_channels": [1 << 16]}}):
        try:
            train_here(tmp_path / "run", dry_run=True, seed=7, **fields)
        except ConfigurationError:
            assert fields
        said = capsys.readouterr().out
        (tmp_path / "again.yaml").write_text(said.partition("\n\n")[0])
        again = parse_recipe([str(tmp_path / "again.yaml")])
        assert again == configuration(tmp_path / "run", dry_run=True, seed=7, **fields)
        assert re.search(r"parameters +[\d,]+ of network", said) and "MiB" in said
        assert said.index("seed: 7") < said.index("parameters ")
        assert ("a step" in said) == (not fields), "the step comes last"


def test_a_real_run_says_what_it_is_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(tmp_path / "run", max_train_steps=1, seed=7)
    before = capsys.readouterr().out.partition("trained")[0]
    assert "seed 7" in before and "parameters" in before and "1,437 images" in before
    assert "lr_warmup_steps is 2 and the run has 1 steps" in before
    assert len(before.splitlines()) < 12


def test_the_limit_is_that_of_the_container_or_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = host_memory()
    assert whole > 2**28
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (whole - 2**20, hard))
    try:
        assert host_memory() == whole - 2**20
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    set_group(tmp_path, monkeypatch)("0::/job/step", {"job": "1073741824", "job/step": "max"})
    assert host_memory() == 2**30
    set_group(tmp_path / "1", monkeypatch)("4:cpu,memory:/job", {"memory/job": "536870912"}, "memory.limit_in_bytes")
    assert host_memory() == 2**29
    set_group(tmp_path / "2", monkeypatch)("4:memory:/not/seen", {"memory": "268435456"}, "memory.limit_in_bytes")
    assert host_memory() == 2**28


def set_group(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A control group of this process, as the system's files tell of it."""

    def place(line: str, limits: dict[str, str], name: str = "memory.max") -> None:
        (folder / "groups").mkdir(parents=True)
        (folder / "cgroup").write_text(f"{line}\n")
        for group, limit in limits.items():
            (folder / "groups" / group).mkdir(parents=True, exist_ok=True)
            (folder / "groups" / group / name).write_text(limit)
        monkeypatch.setattr(memory, "_GROUPS", (folder / "cgroup", folder / "groups"))

    return place
