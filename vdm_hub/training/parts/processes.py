"""The processes of a run, as accelerate sees them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, TorchDynamoPlugin, str_to_bool
from torch import Tensor

from vdm_hub.errors import ConfigurationError, explained, unknown_name
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.parts.shards import check_shards


def build_accelerator(configuration: Configuration, folder: Path, logs: Path) -> Accelerator:
    """The accelerator of a run.

    Args:
        configuration: The run's.
        folder: Its output folder.
        logs: Where its trackers write, within that folder.

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
    check_environment(training, os.environ)
    launched = launched_processes("WORLD_SIZE")
    remedy = f"change {_sources_of_settings(training)}, or run `accelerate config`"
    with explained("accelerate can't run this", remedy, ConfigurationError):
        accelerator = Accelerator(
            # All that it would take from the environment where it is not told.
            mixed_precision=training.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=training.gradient_accumulation_steps),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            log_with=list(training.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(logs)),
        )
        torch.zeros((), device=accelerator.device)
    _check_built(accelerator, training)
    refuse_engine(accelerator.distributed_type)
    if is_sharded(accelerator):
        check_shards(accelerator, training)
    if launched != accelerator.num_processes:
        raise ConfigurationError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes} each on its own: "
            f"they would train {launched} models into one folder. On CPUs set ACCELERATE_USE_CPU=true; else run "
            f"`accelerate config`."
        )
    if training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def launched_processes(variable: str) -> int:
    """The number of processes that a launcher gives in the environment; one where it gives none.

    Raises:
        ConfigurationError: It is none.
    """
    text = os.environ.get(variable, "1")
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ConfigurationError(
            f"{variable} is {text!r} in the environment, which is no number of processes: take it out, or start the "
            f"run with `accelerate launch` or torchrun, which set it."
        )
    return int(text)


def _sources_of_settings(training: TrainingArguments) -> str:
    """Words for all that accelerate reads, for a message."""
    launchers = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED")
    variables = sorted(name for name in os.environ if name.startswith("ACCELERATE_") or name in launchers)
    precision = f"mixed_precision, which is {training.mixed_precision or 'what the launcher says'}"
    return f"{', '.join(variables)} in the environment, or {precision}" if variables else precision


def check_environment(training: TrainingArguments, environment: Mapping[str, str]) -> None:
    """Refuse variables by which accelerate would train otherwise than the recipe says, or would ignore a wish.

    A precision that the recipe leaves open is the launcher's.

    Raises:
        ConfigurationError: Naming the variable, its value and the field.

    >>> check_environment(TrainingArguments(max_train_steps=1), {"ACCELERATE_MIXED_PRECISION": "bf16"})
    """
    agreeing = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", {"auto"}),
        "ACCELERATE_GRADIENT_CLIPPING": ("max_grad_norm", {"auto", "none"}),
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", {"no"}),  # which launchers say where they were told nothing
        "ACCELERATE_DYNAMO_BACKEND": ("compile", {"no"}),
    }
    for variable, (field, silent) in agreeing.items():
        value, wanted = environment.get(variable, ""), getattr(training, field)
        if not value or value.lower() in silent or _same(value, wanted):
            continue
        if field == "mixed_precision" and wanted is None:
            if value not in ("fp16", "bf16"):
                raise unknown_name(f"precision in {variable}", value, ("no", "fp16", "bf16"))
            continue
        raise ConfigurationError(
            f"{variable} is {value!r} in the environment, and {field} is {wanted!r}: say it in the recipe, or by "
            f"--{field}, and leave it out of the environment or the launcher's configuration."
        )
    for variable, value in environment.items():
        if variable.startswith("ACCELERATE_USE_") and value:
            # Some are read in the midst of a step.
            with explained(f"{variable} is {value!r} in the environment", "say true or false", ConfigurationError):
                str_to_bool(value)
    for engine in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _is_true(environment, variable := f"ACCELERATE_USE_{engine}"):
            raise ConfigurationError(
                f"{variable} is {environment[variable]!r} in the environment, an engine that is not supported: take "
                f"it out, and use FSDP2 (scripts/accelerate/fsdp2.yaml), which shards weights, gradients and moments, "
                f"or DDP (ddp.yaml)."
            )


def _same(value: str, wanted: object) -> bool:
    if isinstance(wanted, (int, float)):
        try:
            return float(value) == wanted
        except ValueError:
            return False
    return value == wanted


def _is_true(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() in ("true", "1", "yes", "y", "t", "on")


def _check_built(accelerator: Accelerator, training: TrainingArguments) -> None:
    """Refuse an accelerator that is not as the recipe says."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigurationError("mixed_precision is fp16, which accelerate ignores on a CPU: use bf16, or no.")
    if accelerator.device.type == "meta":
        raise ConfigurationError("ACCELERATE_TORCH_DEVICE is 'meta', on which nothing is computed: take it out.")
    variable = "ACCELERATE_USE_FSDP"
    if _is_true(os.environ, variable) and not is_sharded(accelerator):
        raise ConfigurationError(
            f"{variable} is {os.environ[variable]!r} in the environment, and accelerate runs "
            f"{accelerator.distributed_type.value} on {accelerator.num_processes} x {accelerator.device.type}, which "
            f"shards nothing: take it out, or start several processes on GPUs."
        )
    found = {
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
    }
    for field, value in found.items():
        wanted = getattr(training, field)
        if wanted not in (None, value):
            raise ConfigurationError(
                f"{field} is {wanted!r} in the recipe, and accelerate made it {value!r}: look at what its environment "
                f"says, or run `accelerate config`."
            )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every parameter."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def refuse_engine(kind: DistributedType) -> None:
    """Refuse an engine under which the moving average and the checkpoints would be those of one process's shards.

    Raises:
        ConfigurationError: It is DeepSpeed or Megatron-LM.
    """
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigurationError(
            f"accelerate was configured for {kind.value}, which is not supported. Use FSDP2 "
            f"(scripts/accelerate/fsdp2.yaml), which shards weights, gradients and moments, or MULTI_GPU (ddp.yaml)."
        )


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on its device; to a GPU from pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
