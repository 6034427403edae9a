"""The memory that a run needs, known before any is taken: its networks are built on torch's meta device first."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vdm_hub.data.conditions import Condition
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.diffusion.latent_process import LatentProcess
from vdm_hub.errors import ConfigurationError, in_one_line
from vdm_hub.models.calls import Call
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.objectives.hierarchical import HVAEObjective
from vdm_hub.objectives.variational_bound import Objective, VDMObjective
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.parts.initial_models import InitialModel
from vdm_hub.training.parts.networks import count_parameters, on_meta_device
from vdm_hub.training.parts.processes import is_sharded, launched_processes
from vdm_hub.training.parts.setup import Shape, build_objective

_FLOAT = 4  # bytes: weights and all that belongs to them are float32, whatever the network computes in
_IMAGES = 2  # on which what a batch keeps is counted
_MIB = 2**20
_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # those of this process, and where all are described


@dataclass(frozen=True)
class MemoryNeeds:
    """The memory of a process of a run, in bytes.

    Attributes:
        parameters: How many there are, by the name of what they belong to.
        weights: The weights.
        training: Gradients, moments and the moving average, at the least.
        activations: What the forward pass of a micro-batch keeps for the backward pass, in float32.
        fewest: The same at the least, where the precision is lower or the network is compiled.
    """

    parameters: dict[str, int]
    weights: int
    training: int
    activations: int
    fewest: int

    def __str__(self) -> str:
        """A line for the parameters and one for the memory."""
        parameters = " and ".join(f"{count:,} of {name}" for name, count in self.parameters.items())
        state = (self.weights + self.training) / _MIB
        return (
            f"{'parameters':<16}{parameters}\n"
            f"{'memory':<16}about {state:,.1f} MiB for weights, gradients, moments and averages, and up to "
            f"{self.activations / _MIB:,.1f} MiB for what a batch keeps"
        )


def memory_needs(
    configuration: Configuration,
    shape: Shape,
    accelerator: Accelerator,
    condition: Condition | None = None,
    tokenization: Tokenization | None = None,
    initial: InitialModel | None = None,
) -> MemoryNeeds:
    """The memory that a process of a run will need, counted without taking any of it.

    Args:
        configuration: The recipe.
        shape: Of the images, (C, H, W), or of windows of tokens, (L,).
        accelerator: Its processes share what they shard.
        condition: What the network is told of each image.
        tokenization: Of texts, what makes tokens of them.
        initial: The model that the run begins from.

    Raises:
        ConfigurationError: The networks can't be built, or do not take such images.
    """
    training = configuration.training
    without = replace(configuration, training=replace(training, compile="none"))
    with on_meta_device():
        objective = build_objective(without, shape, condition, tokenization, initial)
    for part in (objective.body, getattr(getattr(objective, "process", None), "first_stage", None)):
        if part is not None:
            part.to("meta")  # what was trained before was loaded
    counts = {name: count_parameters(part) for name, part in objective.parts.items()}
    every, trained = sum(counts.values()), sum(p.numel() for p in objective.parameters() if p.requires_grad)
    moments = 0.5 if training.optimizer == "adamw_8bit" else 2
    shares = accelerator.num_processes if is_sharded(accelerator) else 1
    average = every / shares if training.use_ema else 0
    gradients = trained * (1 + moments) / shares
    try:
        kept = _kept(objective, shape, torch.device("meta"))
    except ConfigurationError:
        if tokenization is None or every * _FLOAT > host_memory():
            raise
        # Some models of transformers look at values, of which the meta device has none.
        objective = build_objective(without, shape, condition, tokenization, initial)
        kept = _kept(objective, shape, torch.device("cpu"))
    kept = kept * training.train_batch_size // _IMAGES
    return MemoryNeeds(
        {name: count for name, count in counts.items() if count},
        every * _FLOAT // shares,
        int((gradients + average) * _FLOAT),
        kept,
        int(kept * _least(training, accelerator)),
    )


def refuse_what_cannot_fit(needs: MemoryNeeds, accelerator: Accelerator) -> None:
    """Refuse a run that needs more memory than there is.

    Raises:
        ConfigurationError: With both figures, and the fields that decide.
    """
    beside = launched_processes("LOCAL_WORLD_SIZE")
    everything = needs.weights + needs.training + needs.fewest
    on_gpu = accelerator.device.type == "cuda"
    host = (
        beside * (needs.weights if on_gpu else everything) + psutil.Process().memory_info().rss
    )  # networks are built on the host
    places = {"this machine": (host, host_memory())}
    if on_gpu:
        places["the GPU"] = (everything, torch.cuda.mem_get_info(accelerator.device)[1])
    for place, (wanted, there_is) in places.items():
        if wanted > there_is:
            raise ConfigurationError(
                f"the run needs at least {wanted / _MIB:,.0f} MiB of memory ({sum(needs.parameters.values()):,} "
                f"parameters with gradients, moments and averages, and {needs.fewest / _MIB:,.0f} MiB for what a "
                f"batch keeps), and {place} has {there_is / _MIB:,.0f} MiB: give a smaller unet, network, hvae or "
                f"first_stage, or a smaller train_batch_size with more gradient_accumulation_steps, or "
                f"gradient_checkpointing."
            )


def host_memory() -> int:
    """The memory that this process may take, in bytes: the machine's, or what a container or a limit leaves of it."""
    limits = [psutil.virtual_memory().total, *_container_limits()]
    limits += [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min(limit for limit in limits if limit > 0)  # -1 is no limit


def _container_limits() -> Iterator[int]:
    """The limits of this process's control groups, and of the groups that these lie in (both versions of Linux')."""
    try:
        lines = _GROUPS[0].read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, kinds, group = line.split(":", 2)
        if number != "0" and "memory" not in kinds.split(","):
            continue
        root = _GROUPS[1] / ("" if number == "0" else "memory")
        name = "memory.max" if number == "0" else "memory.limit_in_bytes"
        place = root / group.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(root):
                break
            try:
                yield int((folder / name).read_text())
            except (OSError, ValueError):  # not seen from within a container; or "max"
                continue


def _least(training: TrainingArguments, accelerator: Accelerator) -> float:
    """The part of float32's activations that is kept at the least."""
    lowered = 1.0 if accelerator.mixed_precision == "no" else 0.5
    return lowered * (1.0 if training.compile == "none" else 0.25)


def _kept(objective: Objective, shape: tuple[int, ...], device: torch.device) -> int:
    """The bytes that the forward passes of the networks, which are on that device, keep of a few images."""
    levels = torch.zeros(_IMAGES, *shape, dtype=torch.uint8, device=device)
    if not isinstance(objective, VDMObjective):
        return _count(objective, lambda: _bound(objective, levels))  # it is told nothing
    process: Any = objective.process
    latents: tuple[int, ...] = shape
    total = 0
    if isinstance(process, LatentProcess):
        latents = process.latent_shape((1,))[1:]
        if isinstance(process.first_stage, MarkovianHVAE):
            stage = HVAEObjective(process.first_stage)
            total += _count(stage, lambda: _bound(stage, levels))
    network: Any = objective.body
    sample, timestep = torch.zeros(_IMAGES, *latents, device=device), torch.zeros(_IMAGES, device=device)
    size = process.context_size
    context = {} if size is None else {"context": torch.zeros(_IMAGES, size, device=device)}
    told = {} if objective.condition is None else objective.condition.example(_IMAGES, device)
    return total + _count(network, lambda: Call.of(network)(network, sample, timestep, **context, **told))


def _bound(objective: Any, levels: Tensor) -> object:
    with levels.device:
        batch, times = {"levels": levels}, torch.zeros(_IMAGES)
        return objective(batch, times, objective.draw_noise(batch, None))


def _count(module: nn.Module, run: Any) -> int:
    """The bytes of all that is kept beside the weights; views of one tensor count once."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its number stays its own
        return tensor

    module.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = run()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigurationError(
            f"the networks that the recipe describes do not take such data ({in_one_line(error)}): change unet, "
            f"network, hvae or first_stage."
        ) from error
    del result
    return sum(storage.nbytes() for storage in kept.values())
