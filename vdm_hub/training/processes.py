"""The processes of a run, as accelerate sees them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from vdm_hub.errors import ConfigurationError, in_one_line
from vdm_hub.training.arguments import Configuration
from vdm_hub.training.outputs import OutputFolder
from vdm_hub.training.shards import check_shards
from vdm_hub.training.zero import check_zero, has_zero


def build_accelerator(configuration: Configuration, folder: OutputFolder) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ConfigurationError: A tracker is not installed, the device lacks the precision, the launcher started more
            processes than accelerate knows of, or its engine is one that is not supported.
    """
    training = configuration.training
    if missing := set(training.trackers) - {str(tracker) for tracker in get_available_trackers()}:
        packages = " ".join(name.replace("_", "-") for name in sorted(missing))
        raise ConfigurationError(
            f"report_to names {', '.join(sorted(missing))}, which is not installed: `pip install {packages}`, or take "
            f"it out of report_to."
        )
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            log_with=list(training.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.logs)),
        )
    except ImportError as error:
        raise ConfigurationError(f"accelerate can't run this ({in_one_line(error)}).") from error
    except ValueError as error:
        raise ConfigurationError(
            f"accelerate can't run this ({in_one_line(error)}): change mixed_precision, which is "
            f"{training.mixed_precision or 'what the launcher says'}, or run `accelerate config`."
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigurationError("mixed_precision is fp16, which accelerate ignores on a CPU: use bf16, or no.")
    refuse_engine(accelerator.distributed_type)
    if is_sharded(accelerator):
        check_shards(accelerator, training)
    if has_zero(accelerator):
        check_zero(accelerator, training)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ConfigurationError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes} each on its own: "
            f"they would train {launched} models into one folder. On CPUs set ACCELERATE_USE_CPU=true; else run "
            f"`accelerate config`."
        )
    if training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every parameter."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def refuse_engine(kind: DistributedType) -> None:
    """Refuse an engine under which the moving average and the checkpoints would be those of one process's shards.

    Raises:
        ConfigurationError: It is Megatron-LM.
    """
    if kind == DistributedType.MEGATRON_LM:
        raise ConfigurationError(
            f"accelerate was configured for {kind.value}, which shards networks of its own kinds only. Use FSDP2 "
            f"(scripts/accelerate/fsdp2.yaml), or MULTI_GPU (ddp.yaml)."
        )


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on its device; to a GPU from pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
