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

# What they shard, nothing here gathers: see scripts/accelerate/README.md.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def build_accelerator(configuration: Configuration, folder: OutputFolder) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ConfigurationError: A tracker is not installed, the device lacks the precision, the launcher started more
            processes than accelerate knows of, or it shards what checkpoints and the moving average need whole.
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
    except ValueError as error:
        raise ConfigurationError(
            f"accelerate can't run this ({in_one_line(error)}): change mixed_precision, which is "
            f"{training.mixed_precision or 'what the launcher says'}, or run `accelerate config`."
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigurationError("mixed_precision is fp16, which accelerate ignores on a CPU: use bf16, or no.")
    refuse_shards(accelerator.distributed_type)
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


def refuse_shards(kind: DistributedType) -> None:
    """Refuse engines under which the moving average and the checkpoints would be those of one process's shards.

    Raises:
        ConfigurationError: It is FSDP, DeepSpeed or Megatron-LM.
    """
    if kind in _SHARDED:
        raise ConfigurationError(
            f"accelerate was configured for {kind.value}, which shards parameters or the optimiser's state: the "
            f"moving average and the checkpoints of this trainer would hold one process's part, without an error. Use "
            f"MULTI_GPU (scripts/accelerate/ddp.yaml), with gradient_checkpointing where memory is short."
        )


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on its device; to a GPU from pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
