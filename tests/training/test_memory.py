"""What a run needs of memory is counted before it is taken, and what can't fit is refused in words."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator

from naming import naming
from runs import UNET, as_process, configuration, contents, forget_accelerator, start, train_here
from vdm_hub import UNetVDMModel, VDMObjective, VDMScheduler
from vdm_hub.errors import ConfigurationError
from vdm_hub.objectives.hierarchical import HVAEObjective
from vdm_hub.training import memory
from vdm_hub.training.memory import host_memory, memory_needs

VAE = {"latent_shapes": [[1, 8, 8]], "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
SMALL: dict[str, Any] = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
AUTOENCODER: dict[str, Any] = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 2}
RUNGS: dict[str, dict[str, Any]] = {
    "vdm": {},
    "learned": {"noise_schedule": {"name": "learned_linear", "config": {"gamma_min": -7.0, "gamma_max": 5.0}}},
    "hvae": {"model": "hvae", "hvae": VAE, "unet": {}, "noise_schedule": "linear"},
    "latent_vdm": {"model": "latent_vdm", "first_stage": VAE},
    "without averages": {"use_ema": False},
    "checkpointed": {"gradient_checkpointing": True},
}


def counted(
    tmp_path: Path, *, processes: int = 1, accelerate: dict[str, Any] | None = None, **fields: Any
) -> memory.MemoryNeeds:
    forget_accelerator()
    accelerator = Accelerator(cpu=True, **accelerate or {})
    as_process(0, processes)
    return memory_needs(configuration(tmp_path / "run", **fields), (1, 8, 8), accelerator)


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
    compiled_before = len(torch._dynamo.utils.compilation_time_metrics)
    plain, whole = counted(tmp_path), counted(tmp_path, compile="whole")
    lowered = counted(tmp_path, accelerate={"mixed_precision": "bf16"})
    assert plain.fewest == plain.activations == 2 * lowered.fewest == lowered.activations
    for compiled in (whole, counted(tmp_path, compile="regional")):
        assert 0 < compiled.fewest < compiled.activations == plain.activations
    assert len(torch._dynamo.utils.compilation_time_metrics) == compiled_before, "nothing is compiled to be counted"
    doubled = counted(tmp_path, train_batch_size=32)
    assert doubled.activations == 2 * plain.activations


def test_each_figure_is_a_number_of_bytes_and_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights, gradients, two moments and an average, of which processes that shard have a part each."""
    plain, small = counted(tmp_path), counted(tmp_path, optimizer="adamw_8bit")
    (number,) = plain.parameters.values()
    assert list(plain.parameters) == ["network"], "a schedule without weights is not named"
    assert (plain.weights, plain.training) == (4 * number, 4 * 4 * number)
    assert small.training == 4 * (1.5 + 1) * number
    assert counted(tmp_path, use_ema=False).training == 4 * 3 * number
    monkeypatch.setattr(memory, "is_sharded", lambda accelerator: True)
    whole, half = counted(tmp_path), counted(tmp_path, processes=2)
    assert whole == plain and (half.weights, half.training) == (2 * number, 8 * number)
    assert all(type(value) is int for value in (half.weights, half.training, half.activations, half.fewest))
    mib = 2**20
    said = str(memory.MemoryNeeds({"network": 1234, "schedule": 5}, 3 * mib, 5 * mib, 7 * mib, mib))
    assert "1,234 of network and 5 of schedule" in said and "about 8.0 MiB" in said and "up to 7.0 MiB" in said


def test_processes_that_do_not_shard_have_all_of_it_each(tmp_path: Path) -> None:
    assert counted(tmp_path, processes=2) == counted(tmp_path)


def test_what_is_not_trained_has_weights_and_an_average_alone(tmp_path: Path) -> None:
    train_here(tmp_path / "stage", max_train_steps=1, **RUNGS["hvae"])
    free = counted(tmp_path, model="latent_vdm", first_stage_from=str(tmp_path / "stage"))
    frozen = counted(tmp_path, model="latent_vdm", first_stage_from=str(tmp_path / "stage"), freeze_first_stage=True)
    assert free.parameters == frozen.parameters and free.weights == frozen.weights
    assert free.training - frozen.training == 4 * 3 * frozen.parameters["first_stage"]


@pytest.mark.parametrize("rung", ["vdm", "latent_vdm", "an autoencoder's latents", "classes", "context"])
def test_what_a_batch_keeps_is_what_autograd_saves_of_the_networks(rung: str, tmp_path: Path) -> None:
    """Of two images, told what they are told, with dropout, whatever mode they were left in."""
    if rung == "context":
        process = VDMScheduler(num_levels=17).build_process()
        telling = type("Telling", (type(process),), {"context_size": 3})
        process.__class__ = telling
        network = UNetVDMModel(8, in_channels=1, out_channels=1, context_size=3, dropout=0.1, **SMALL)
        objective: Any = VDMObjective(network, process)
    else:
        stage = {"model": "latent_vdm", "first_stage": {"_class_name": "AutoencoderKL", **AUTOENCODER}}
        others = {"classes": {"label_column": "label"}, "an autoencoder's latents": stage}
        more: dict[str, Any] = (RUNGS | others)[rung]
        objective = start(tmp_path / "run", **{"unet": UNET | {"dropout": 0.1}} | more).model
    network = objective.body
    kept: dict[int, Any] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    told = {"context": torch.zeros(2, 3)} if rung == "context" else {}
    told |= {"class_labels": torch.zeros(2, dtype=torch.long)} if rung == "classes" else {}
    latents = tuple(objective.process.latent_shape((2, 1, 8, 8)))
    network.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [network(torch.zeros(latents), torch.zeros(2), return_dict=False, **told)]
        if rung == "latent_vdm":
            batch = {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}
            stage = HVAEObjective(objective.process.first_stage)
            outputs.append(stage(batch, torch.zeros(2), stage.draw_noise(batch, None)))
    found = sum(storage.nbytes() for storage in kept.values())
    del outputs
    objective.eval()
    assert memory._kept(objective, (1, 8, 8), torch.device("cpu")) == found


@pytest.mark.parametrize("place", ["this machine", "the GPU"])
def test_a_run_is_refused_where_it_needs_more_than_there_is(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host holds the weights of all its processes, and nothing else of the run."""
    gib, own = 2**30, psutil.Process().memory_info().rss
    needs = memory.MemoryNeeds({"network": 1}, 8 * gib, 16 * gib, 64 * gib, 32 * gib)
    gpu = place == "the GPU"
    accelerator: Any = SimpleNamespace(device=torch.device("cuda" if gpu else "cpu"))
    total, processes = 56 * gib, 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    on_host = processes * (8 * gib if gpu else total)
    room = gib  # what this process may take in between
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total))
    monkeypatch.setattr(memory, "host_memory", lambda: own + on_host + room)
    memory.refuse_what_cannot_fit(needs, accelerator)
    if gpu:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total, total - 1))
        with pytest.raises(ConfigurationError, match=naming("GPU", "MiB", "train_batch_size")):
            memory.refuse_what_cannot_fit(needs, accelerator)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total))
    monkeypatch.setattr(memory, "host_memory", lambda: on_host + own // 2)
    with pytest.raises(ConfigurationError, match=naming("this machine", "MiB", "train_batch_size")):
        memory.refuse_what_cannot_fit(needs, accelerator)


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
    set_group(tmp_path / "3", monkeypatch)("0::/a:b", {"a:b": "0"})  # no limit
    assert host_memory() == whole
    lines = "4:cpu:/job\n5:memory:/job"  # the first is of another kind
    set_group(tmp_path / "4", monkeypatch)(lines, {"memory/job": "1073741824"}, "memory.limit_in_bytes")
    (tmp_path / "4" / "memory.limit_in_bytes").write_text("4096")  # of no group
    assert host_memory() == 2**30
    set_group(tmp_path / "5", monkeypatch)("4:cpu:/job", {"memory/job": "4096"}, "memory.limit_in_bytes")
    assert host_memory() == whole
    both = "0::/a\n4:memory:/b"
    set_group(tmp_path / "6", monkeypatch)(both, {"memory/b": "1073741824"}, "memory.limit_in_bytes")
    assert host_memory() == 2**30
    set_group(tmp_path / "7", monkeypatch)("0::/a:b", {"a:b": "1073741824"})
    assert host_memory() == 2**30


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
