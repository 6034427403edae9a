"""From a configuration to the parts of a run: network, process, objective, optimiser."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import nn

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.likelihood.variational_bound import VDMObjective
from vdm_hub.models.noise_schedule_model import NoiseScheduleModel
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.pipeline_vdm import VDMPipeline
from vdm_hub.scheduling_vdm import VDMScheduler
from vdm_hub.training.arguments import Configuration
from vdm_hub.training.configuration import TrainingArguments

COMPILER = "inductor"
# UNetVDMModel's own repeated block; UNet2DModel names none, and these two are nearly all of it.
_REPEATED_BLOCKS = (*UNetVDMModel._repeated_blocks, "ResnetBlock2D", "Attention")


def build_network(configuration: Configuration, shape: tuple[int, int, int]) -> nn.Module:
    """The network that the recipe describes, its channels and size taken from the data where it is silent."""
    name, arguments = configuration.model.unet_class, dict(configuration.model.unet_config)
    cls = UNetVDMModel if name == "UNetVDMModel" else getattr(diffusers, name)
    known = [parameter for parameter in inspect.signature(cls.__init__).parameters if parameter != "self"]
    for key in arguments:
        if key not in known:
            raise unknown_name(f"argument of {name} in unet", key, known)
    channels, height, width = shape
    size = height if height == width else [height, width]
    from_data = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "num_train_timesteps": configuration.diffusion.num_train_timesteps,
    }
    for key in ("sample_size", "in_channels", "out_channels"):
        if arguments.get(key) not in (None, from_data[key]):
            raise ConfigurationError(
                f"the recipe's unet has {key}={arguments[key]}, but the images are {channels}x{height}x{width}: leave "
                f"{key} out (it follows the data), or train on images of that size."
            )
    try:
        return cls(**(from_data | arguments))
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the network {name} can't be built from the recipe's unet: {error}") from error


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


def build_objective(configuration: Configuration, shape: tuple[int, int, int]) -> VDMObjective:
    """Network and process in one module, initialised from the run's seed."""
    torch.manual_seed(configuration.training.seed)
    network = build_network(configuration, shape)
    process = build_scheduler(configuration).build_process()
    objective = VDMObjective(network, process, configuration.diffusion.transitions)
    speed_up(objective, configuration.training)
    return objective


def speed_up(objective: VDMObjective, arguments: TrainingArguments) -> None:
    """Memory layout, gradient checkpointing and compilation, all in place: the names of the weights stay as they are.

    Compiled whole, network and bound are one graph while training; what evaluates or samples calls the network alone,
    which then is not compiled, and so is not compiled anew for each size of a batch.
    """
    network: Any = objective.network
    if arguments.channels_last:
        network.to(memory_format=torch.channels_last)
    if arguments.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if arguments.compile == "whole":
        objective.compile(backend=COMPILER)
    elif arguments.compile == "regional":
        for block in network.modules():
            if type(block).__name__ in _REPEATED_BLOCKS:
                block.compile(backend=COMPILER, fullgraph=True)


def build_pipeline(objective: VDMObjective) -> VDMPipeline:
    """The pipeline of an objective as it is now.

    A learned schedule is baked into the scheduler's config, or carried with its weights where no config can hold it.
    """
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
