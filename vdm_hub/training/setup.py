"""From a configuration to the parts of a run: network, process, objective, optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import Any

import diffusers
import torch
from torch import nn

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.likelihood.hierarchical import HierarchicalObjective, HVAEObjective
from vdm_hub.likelihood.variational_bound import Objective, VDMObjective
from vdm_hub.likelihood_pipeline import LikelihoodPipeline
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.models.noise_schedule_model import NoiseScheduleModel
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.pipeline_hvae import HVAEPipeline
from vdm_hub.pipeline_vdm import VDMPipeline
from vdm_hub.scheduling_vdm import VDMScheduler
from vdm_hub.training.arguments import Configuration
from vdm_hub.training.configuration import TrainingArguments

COMPILER = "inductor"
# UNetVDMModel's own repeated block; UNet2DModel names none, and these two are nearly all of it.
_REPEATED_BLOCKS = (*UNetVDMModel._repeated_blocks, "ResnetBlock2D", "Attention")


def build_network(configuration: Configuration, shape: tuple[int, int, int]) -> nn.Module:
    """The network that the recipe describes, its channels and size taken from the data where it is silent."""
    name = configuration.model.unet_class
    cls = UNetVDMModel if name == "UNetVDMModel" else getattr(diffusers, name)
    from_data = {
        "sample_size": shape[1] if shape[1] == shape[2] else list(shape[1:]),
        "in_channels": shape[0],
        "out_channels": shape[0],
    }
    others = {"num_train_timesteps": configuration.diffusion.num_train_timesteps}
    built: nn.Module = build_described(cls, "unet", configuration.model.unet_config, from_data, others)
    return built


def build_described(
    cls: Any,
    field: str,
    described: Mapping[str, Any],
    from_data: Mapping[str, Any],
    others: Mapping[str, Any] | None = None,
) -> Any:
    """An instance of a class of networks as a field of the recipe describes it.

    Args:
        cls: The class.
        field: The recipe's field, for messages.
        described: What it says.
        from_data: Arguments that the data decide; the field may only repeat them.
        others: Arguments that the field may give otherwise.

    Raises:
        ConfigurationError: An argument is unknown or wrong, or contradicts the data.
    """
    known = [parameter for parameter in inspect.signature(cls.__init__).parameters if parameter != "self"]
    for key in described:
        if key not in known:
            raise unknown_name(f"argument of {cls.__name__} in {field}", key, known)
    for key, value in from_data.items():
        if described.get(key) not in (None, value):
            raise ConfigurationError(
                f"the recipe's {field} has {key}={described[key]}, but the images are {_of_images(from_data)}: leave "
                f"{key} out (it follows the data), or train on such images."
            )
    try:
        return cls(**{**from_data, **(others or {}), **described, **from_data})
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{cls.__name__} can't be built from the recipe's {field}: {error}") from error


def build_scheduler(configuration: Configuration) -> VDMScheduler:
    """The scheduler whose config describes the process at the start of training."""
    diffusion = configuration.diffusion
    return VDMScheduler(
        num_train_timesteps=diffusion.num_train_timesteps,
        noise_schedule=diffusion.noise_schedule,
        prediction_type=diffusion.prediction_type,
        conditioning=diffusion.conditioning,
        num_levels=configuration.data.num_levels,
        data_scaling=diffusion.data_scaling,
        decoder=diffusion.decoder,
        forward_process=diffusion.forward_process,
    )


def build_objective(configuration: Configuration, shape: tuple[int, int, int]) -> Objective:
    """All that is trained in one module, initialised from the run's seed."""
    torch.manual_seed(configuration.training.seed)
    objective = _BUILDERS[configuration.model.model](configuration, shape)
    speed_up(objective, configuration.training)
    return objective


def _build_vdm(configuration: Configuration, shape: tuple[int, int, int]) -> Objective:
    network = build_network(configuration, shape)
    process = build_scheduler(configuration).build_process()
    return VDMObjective(network, process, configuration.diffusion.transitions)


def _build_hvae(configuration: Configuration, shape: tuple[int, int, int]) -> Objective:
    return HVAEObjective(build_hvae(configuration, shape, "hvae", configuration.model.hvae_config))


def build_hvae(
    configuration: Configuration, shape: tuple[int, int, int], field: str, described: Mapping[str, Any]
) -> MarkovianHVAE:
    """The hierarchical VAE that a field of the recipe describes."""
    from_data = {
        "sample_size": shape[1] if shape[1] == shape[2] else list(shape[1:]),
        "in_channels": shape[0],
        "num_levels": configuration.data.num_levels,
    }
    built: MarkovianHVAE = build_described(MarkovianHVAE, field, described, from_data)
    return built


def _of_images(from_data: Mapping[str, Any]) -> str:
    size = from_data["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    levels = f" of {from_data['num_levels']} levels" if "num_levels" in from_data else ""
    return f"{from_data['in_channels']}x{height}x{width}{levels}"


_BUILDERS: dict[str, Callable[[Configuration, tuple[int, int, int]], Objective]] = {
    "vdm": _build_vdm,
    "hvae": _build_hvae,
}


def speed_up(objective: Objective, arguments: TrainingArguments) -> None:
    """Memory layout, gradient checkpointing and compilation, all in place: the names of the weights stay as they are.

    Compiled whole, network and bound are one graph while training; what evaluates or samples calls the network alone,
    which then is not compiled, and so is not compiled anew for each size of a batch.
    """
    network: Any = objective.body
    if arguments.channels_last:
        network.to(memory_format=torch.channels_last)
    if arguments.gradient_checkpointing:
        if not getattr(network, "_supports_gradient_checkpointing", False):
            raise ConfigurationError(f"{type(network).__name__} knows no gradient checkpointing: leave it out.")
        network.enable_gradient_checkpointing()
    if arguments.compile == "whole":
        objective.compile(backend=COMPILER)
    elif arguments.compile == "regional":
        for block in network.modules():
            if type(block).__name__ in _REPEATED_BLOCKS:
                block.compile(backend=COMPILER, fullgraph=True)


@singledispatch
def build_pipeline(objective: Objective) -> LikelihoodPipeline:
    """The pipeline of an objective as it is now.

    A learned schedule is baked into the scheduler's config, or carried with its weights where no config can hold it.
    """
    raise ConfigurationError(f"{type(objective).__name__} belongs to no pipeline.")


@build_pipeline.register
def _(objective: HierarchicalObjective) -> HVAEPipeline:
    return HVAEPipeline(objective.model)


@build_pipeline.register
def _(objective: VDMObjective) -> VDMPipeline:
    carried = objective.process.carried_schedule()
    return VDMPipeline(
        unet=objective.network,
        scheduler=VDMScheduler(**objective.process.fields()),
        noise_schedule=None if carried is None else NoiseScheduleModel.from_schedule(carried),
    )


def count_steps(arguments: TrainingArguments, steps_per_epoch: int | None) -> int:
    """The optimiser steps of a run, from the batches of an epoch; ``None`` for a stream, whose length is not known.

    Raises:
        ConfigurationError: Epochs of a stream; or one optimiser step would see an image twice.

    >>> count_steps(TrainingArguments(num_train_epochs=3, gradient_accumulation_steps=2), steps_per_epoch=5)
    7
    """
    accumulation = arguments.gradient_accumulation_steps
    if steps_per_epoch is not None and accumulation > steps_per_epoch:
        raise ConfigurationError(
            f"gradient_accumulation_steps is {accumulation}, and an epoch has {steps_per_epoch} batches: one "
            f"optimiser step would see images twice. Set it to at most {steps_per_epoch}, or train_batch_size "
            f"to fewer."
        )
    if arguments.max_train_steps is not None:
        return arguments.max_train_steps
    if steps_per_epoch is None:
        raise ConfigurationError("a streamed dataset does not know its length: give max_train_steps, not epochs.")
    return (arguments.num_train_epochs or 0) * steps_per_epoch // accumulation


def learning_rate(arguments: TrainingArguments, processes: int) -> float:
    """AdamW's learning rate, scaled where the recipe says so."""
    rate = arguments.learning_rate
    if arguments.scale_lr:
        rate *= arguments.train_batch_size * arguments.gradient_accumulation_steps * processes
    return rate
