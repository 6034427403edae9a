"""FSDP2 trains what DDP trains, and leaves what it leaves: weights, averages, moments, the pipeline."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import SUPPORTED_NODES

import tiny_tokens
from naming import naming
from runs import LEARNED, ROOT, TORCHRUN, configuration, forget_accelerator, python, recipe
from vdm_hub.errors import ConfigurationError
from vdm_hub.objectives.variational_bound import Bound
from vdm_hub.pipelines.by_name import PIPELINES
from vdm_hub.training.parts.shards import (
    average_gradients,
    check_shards,
    full_tensor,
    full_tensors,
    local_part,
    plan_shards,
    sharded_from_part,
    sharded_like,
)
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

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
}
BF16: dict[str, Any] = {"noise_schedule": LEARNED, "mixed_precision": "bf16"}
MORE: dict[str, dict[str, Any]] = {
    "bf16": BF16,
    "hvae": {"model": "hvae", "unet": {}, "noise_schedule": "linear", "hvae": STAGE},
    "latent_vdm": {"model": "latent_vdm", "first_stage": STAGE},
    "trained_first_stage": {"model": "latent_vdm", "first_stage": STAGE, "freeze_first_stage": False},
}
TOKENS = "tokens"
SHARDED = ("fsdp2",)
ENGINES = ("ddp", *SHARDED)


def fields_of(name: str, folder: Path) -> dict[str, Any]:
    return COMMON | (tiny_tokens.run_fields(folder) if name == TOKENS else (RUNS | MORE)[name])


def carry_out(jobs: list[list[str]], file: Path, **changes: str) -> str:
    file.write_text(json.dumps(jobs))
    done = python(*TORCHRUN, SCRIPT, str(file), ACCELERATE_USE_CPU="true", **changes)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def trainings(folder: Path, names: Iterable[str]) -> list[list[str]]:
    return [
        [
            engine,
            free_port(),
            recipe(folder / f"recipe-{name}-{engine}", folder / f"{name}-{engine}", **fields_of(name, folder)),
        ]
        for name in names
        for engine in ENGINES
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run by each engine."""
    folder = tmp_path_factory.mktemp("engines")
    carry_out(trainings(folder, RUNS), folder / "first.json")
    return folder


@pytest.fixture(scope="module")
def resumed(runs: Path) -> tuple[Path, str]:
    """Each sharded run once more from its own middle, and from DDP's; and dry runs."""
    folder, jobs = runs, []
    for engine in SHARDED:
        for start in (engine, "ddp"):
            output = folder / f"{engine}-from-{start}"
            shutil.copytree(folder / f"everything-{start}", output)
            for later in ("pipeline", "checkpoints/step-00000006"):
                shutil.rmtree(output / later)
            path = recipe(folder / f"recipe-{output.name}", output, **fields_of("everything", folder))
            jobs.append([engine, free_port(), path, "--resume_from_checkpoint", "latest"])
    for engine in ENGINES:
        wide = COMMON | BF16 | {"unet": DROPOUT | {"block_out_channels": [64]}}  # so that MiB can be compared
        dry = recipe(folder / f"recipe-dry-{engine}", folder / f"dry-{engine}", **wide)
        jobs.append([engine, free_port(), dry, "--dry_run", "true"])
    return folder, carry_out(jobs, folder / "second.json")


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("more")
    installed = tiny_tokens.install(folder / "site-packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(installed)
        carry_out(trainings(folder, [*MORE, TOKENS]), folder / "jobs.json", PYTHONPATH=f"{ROOT}:{installed}")
        yield folder


def free_port() -> str:
    """One that no program is given unasked, as it is used minutes later: those begin at 32,768."""
    while True:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("localhost", random.randrange(20_000, 32_000)))
            return str(found.getsockname()[1])


def last(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


def assert_alike(folder: Path, name: str, engine: str) -> None:
    ddp, sharded = (load_checkpoint(last(folder / f"{name}-{one}")) for one in ("ddp", engine))
    assert ddp.tensors.keys() == sharded.tensors.keys()
    for group, tensors in ddp.tensors.items():
        assert tensors.keys() == sharded.tensors[group].keys()
        for key, tensor in tensors.items():
            assert sharded.tensors[group][key].dtype == tensor.dtype == torch.float32 or not tensor.is_floating_point()
            # Two addends have one sum; what differs is which kernel rounds, in bfloat16 within a step of its own.
            tolerance = 2e-4 if name == "bf16" else 2e-6
            torch.testing.assert_close(sharded.tensors[group][key], tensor, rtol=tolerance, atol=tolerance)
    histories = [json.loads((folder / f"{name}-{one}" / "history.json").read_text()) for one in ("ddp", engine)]
    for part, columns in histories[0].items():
        for column, values in columns.items():
            # A standard error of two replicates is a difference of means near 2, so their last bits weigh more in it.
            exact = 1e-4 if column == "standard_error" else 1e-5
            assert histories[1][part][column] == pytest.approx(values, rel=1e-3 if name == "bf16" else exact), column


def assert_whole(folder: Path, name: str, engine: str) -> None:
    run, ddp = folder / f"{name}-{engine}", folder / f"{name}-ddp"
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert written == {str(path.relative_to(ddp)) for path in ddp.rglob("*") if path.is_file()}
    index = json.loads((run / "pipeline" / "model_index.json").read_text())
    pipe = PIPELINES[index["_class_name"]].from_pretrained(run / "pipeline")
    kept = load_checkpoint(last(run)).tensors
    published = kept.get("best") or kept["ema"]
    shapes = {tuple(parameter.shape) for parameter in pipe.main_model.parameters()}
    assert shapes <= {tuple(tensor.shape) for tensor in published.values()}
    told = [json.loads((one / "run.json").read_text())["mixed_precision"] for one in (run, ddp)]
    assert told[0] == told[1] == fields_of(name, folder).get("mixed_precision", "no")


@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("name", RUNS)
def test_all_engines_train_the_same_and_leave_it_whole(runs: Path, name: str, engine: str) -> None:
    assert_alike(runs, name, engine)
    assert_whole(runs, name, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize("name", [*MORE, TOKENS])
def test_so_they_do_in_bfloat16_on_every_rung_and_on_texts(more: Path, name: str, engine: str) -> None:
    assert_alike(more, name, engine)
    assert_whole(more, name, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED)
def test_a_run_goes_on_from_its_own_checkpoint_bit_for_bit_and_from_ddps(
    resumed: tuple[Path, str], engine: str
) -> None:
    folder = resumed[0]
    own, later = (last(folder / name) for name in (f"everything-{engine}", f"{engine}-from-{engine}"))
    for file in own.glob("*.safetensors"):
        assert file.read_bytes() == (later / file.name).read_bytes(), file.name
    whole, other = (load_checkpoint(last(folder / name)).tensors for name in ("everything-ddp", f"{engine}-from-ddp"))
    for group, tensors in whole.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(other[group][name], tensor, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
def test_each_process_holds_a_part(resumed: tuple[Path, str]) -> None:
    """Of five sizes of the weights on two processes FSDP2 keeps a half."""
    whole, fsdp2 = (float(found) for found in re.findall(r"state +([\d.]+) MiB", resumed[1]))
    assert fsdp2 / whole == pytest.approx(0.5, abs=0.02)


# ---- parts of tensors -------------------------------------------------------------------------------------------


def as_two(work: Callable[[int], None], folder: Path) -> None:
    """Do it as each of two processes, forked from this one, that are a group over gloo."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    children = [_forked(work, rank, address, folder / f"{rank}.txt") for rank in range(2)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0, 0], "\n".join(path.read_text() for path in sorted(folder.glob("?.txt")))


def _forked(work: Callable[[int], None], rank: int, address: dict[str, str], errors: Path) -> int:
    if child := os.fork():
        return child
    status = 1
    try:
        os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        forget_accelerator()
        work(rank)
        status = 0
    except BaseException:
        errors.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def test_whole_tensors_and_parts_of_them_are_made_of_each_other(tmp_path: Path) -> None:
    """Of rows that two processes can share evenly, and of such that they can't."""

    def work(rank: int) -> None:
        Accelerator(cpu=True)
        mesh, is_first = init_device_mesh("cpu", (2,)), rank == 0
        for rows in (6, 5):
            whole = torch.arange(2.0 * rows).reshape(2, rows).T  # of other strides than its shape's
            own = whole.chunk(2)[rank]
            sharded = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
            part = local_part(sharded)
            assert type(part) is Tensor and part.requires_grad and part.is_leaf and torch.equal(part, own)
            assert part.data_ptr() == sharded.to_local().data_ptr()
            assert not local_part(sharded.detach()).requires_grad
            again = sharded_from_part(part * 2, sharded)
            assert isinstance(again, DTensor) and not again.requires_grad
            assert (again.shape, again.stride(), again.placements) == (whole.shape, sharded.stride(), (Shard(0),))
            assert torch.equal(full_tensor(again), whole * 2) and torch.equal(full_tensor(whole), whole)
            like = sharded_like(whole + rank, sharded)  # nothing is sent for what all have
            assert isinstance(like, DTensor) and like.placements == (Shard(0),)
            assert torch.equal(like.to_local(), own + rank)
            kept = full_tensors({"sharded": sharded, "whole": whole}, is_first)
            assert list(kept) == (["sharded", "whole"] if is_first else [])
            assert all(type(one) is Tensor and torch.equal(one, whole) for one in kept.values())
            assert kept.get("whole", whole) is whole
            for change in (local_part, lambda one: sharded_from_part(one, one), lambda one: sharded_like(one, one)):
                assert change(whole) is whole

    as_two(work, tmp_path)


def test_gradients_of_whole_parameters_are_averaged(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        first.grad = torch.tensor([1.0, 2.0]) * (1 + 2 * rank)
        average_gradients(Accelerator(cpu=True), [first, second])
        assert first.grad.tolist() == [2.0, 4.0] and second.grad is None

    as_two(work, tmp_path)


class Block(nn.Linear):
    pass


class OtherBlock(nn.Linear):
    pass


class Model(nn.Module):
    def __init__(self, tied: bool, schedule: nn.Module | None) -> None:
        super().__init__()
        self.first, self.second, self.other = Block(2, 2), Block(2, 2), OtherBlock(2, 2)
        if tied:
            self.second.weight = self.other.weight
        self.parts = {} if schedule is None else {"schedule": schedule}


@pytest.mark.parametrize("tied", [False, True])
def test_repeated_blocks_are_sharded_each_by_itself_and_the_schedule_not_at_all(tied: bool) -> None:
    """But for blocks that share a parameter, and where the user names others."""
    schedule = nn.Linear(1, 1)
    for given in (None, ["OtherBlock"]):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        plugin.transformer_cls_names_to_wrap = given
        accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        assert plan_shards(accelerator, Model(tied, None), ["Block", "Linear"]) == []  # type: ignore[arg-type]
        assert plugin.ignored_modules is None
        assert plugin.transformer_cls_names_to_wrap == (given or (["Linear"] if tied else ["Block", "Linear"]))
        whole = plan_shards(accelerator, Model(tied, schedule), [])  # type: ignore[arg-type]
        assert whole == list(schedule.parameters()) and plugin.ignored_modules == [schedule]


def accelerator_of(plugin: FullyShardedDataParallelPlugin, precision: str | None = "no") -> Any:
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision)


def test_parameters_stay_in_float32_and_the_bound_is_looked_into(tmp_path: Path) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    plugin.set_mixed_precision("bf16")
    for _ in range(2):
        check_shards(accelerator_of(plugin, "bf16"), configuration(tmp_path).training)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy()
    assert plugin.cpu_ram_efficient_loading is False and Bound in SUPPORTED_NODES


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fsdp_version", 1),
        ("cpu_offload", True),
        ("cpu_offload", CPUOffloadPolicy()),
        ("activation_checkpointing", True),
    ],
)
def test_what_a_plugin_asks_for_that_is_not_supported_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    setattr(plugin, field, value)
    with pytest.raises(ConfigurationError, match=naming("ddp.yaml")):
        check_shards(accelerator_of(plugin), configuration(tmp_path).training)


@pytest.mark.parametrize(
    "changes",
    [{"channels_last": True}, {"compile": "regional"}, {"optimizer": "prodigy"}, {"mixed_precision": "fp16"}],
)
def test_what_shards_do_not_allow_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    training = configuration(tmp_path, **changes).training
    accelerator = accelerator_of(FullyShardedDataParallelPlugin(fsdp_version=2), training.mixed_precision)
    with pytest.raises(ConfigurationError, match=rf"{next(iter(changes))}.*ddp\.yaml"):
        check_shards(accelerator, training)
