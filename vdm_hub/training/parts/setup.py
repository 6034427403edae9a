"""From a configuration to the parts of a run: network, process, objective, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeAlias

import torch

from vdm_hub.data.conditions import Condition
from vdm_hub.data.preprocessing import HeldOut, Preprocessing
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.latent_process import LatentProcess
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.registered_model import RegisteredModel
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.objectives.hierarchical import HierarchicalObjective, HVAEObjective
from vdm_hub.objectives.tokens import TokenObjective
from vdm_hub.objectives.variational_bound import Objective, VDMObjective
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.hvae import HVAEPipeline
from vdm_hub.pipelines.latent_vdm import LatentVDMPipeline
from vdm_hub.pipelines.tokens import TokenPipeline
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.schedulers.vdm import VDMScheduler
from vdm_hub.training.parts.first_stages import build_first_stage
from vdm_hub.training.parts.initial_models import InitialModel
from vdm_hub.training.parts.networks import build_hvae, build_network
from vdm_hub.training.parts.token_networks import build_token_network

Shape: TypeAlias = tuple[int, ...]
COMPILER = "inductor"
# UNetVDMModel's own repeated block; diffusers' networks name none, and these are nearly all of them.
_REPEATED_BLOCKS = (*UNetVDMModel._repeated_blocks, "ResnetBlock2D", "Attention", "BasicTransformerBlock")


def build_scheduler(configuration: Configuration, num_levels: int | None = None) -> VDMScheduler:
    """The scheduler whose config describes the process at the start of training.

    Args:
        configuration: The recipe.
        num_levels: K, where the recipe does not say it.
    """
    diffusion = configuration.diffusion
    return VDMScheduler(
        num_train_timesteps=diffusion.num_train_timesteps,
        noise_schedule=diffusion.noise_schedule,
        prediction_type=diffusion.prediction_type,
        conditioning=diffusion.conditioning,
        num_levels=num_levels or configuration.data.num_levels,
        data_scaling=diffusion.data_scaling,
        decoder=diffusion.decoder,
        forward_process=diffusion.forward_process,
    )


def build_objective(
    configuration: Configuration,
    shape: Shape,
    condition: Condition | None = None,
    tokenization: Tokenization | None = None,
    initial: InitialModel | None = None,
) -> Objective:
    """The module of all that is trained, initialised from the run's seed, or with the weights of a trained model.

    Args:
        configuration: The recipe.
        shape: Of the images, (C, H, W), or of windows of tokens, (L,).
        condition: What the network is told of each image.
        tokenization: Of texts, what makes tokens of them.
        initial: The model that the run begins from.
    """
    torch.manual_seed(configuration.training.seed)
    if initial is not None:
        objective = initial.objective(shape, condition)
    else:
        told: Any = condition if tokenization is None else tokenization
        objective = _BUILDERS[configuration.model.model](configuration, shape, told)
    speed_up(objective, configuration.training)
    return objective


def _build_vdm(configuration: Configuration, shape: Shape, condition: Condition | None) -> Objective:
    process = build_scheduler(configuration).build_process()
    network = build_network(configuration, shape, process, condition=condition)
    return VDMObjective(network, process, configuration.diffusion.transitions, condition)


def _build_hvae(configuration: Configuration, shape: Shape, condition: Condition | None) -> Objective:
    return HVAEObjective(build_hvae(configuration, shape, "hvae", configuration.model.hvae_config))


def _build_latent_vdm(configuration: Configuration, shape: Shape, condition: Condition | None) -> Objective:
    gaussian = build_scheduler(configuration).build_process()
    if not isinstance(gaussian, GaussianProcess):
        raise ConfigurationError(
            f"forward_process is {configuration.diffusion.forward_process!r}, and latents are diffused by gaussian."
        )
    process = LatentProcess(build_first_stage(configuration, shape), gaussian)
    process.normalises = configuration.model.scale_latents
    process.frozen = configuration.model.freeze_first_stage
    network = build_network(configuration, process.latent_shape((1,))[1:], process, False, condition)
    return VDMObjective(network, process, configuration.diffusion.transitions, condition)


def _build_tokens(configuration: Configuration, shape: Shape, tokenization: Tokenization) -> Objective:
    process = build_scheduler(configuration, tokenization.num_values).build_process()
    network = build_token_network(configuration, shape[0], tokenization)
    scored = shape[0] - configuration.data.window_context
    return TokenObjective(network, process, configuration.diffusion.transitions, scored=scored)


_BUILDERS: dict[str, Callable[[Configuration, Shape, Any], Objective]] = {
    "tokens": _build_tokens,
    "vdm": _build_vdm,
    "hvae": _build_hvae,
    "latent_vdm": _build_latent_vdm,
}


def speed_up(objective: Objective, arguments: TrainingArguments) -> None:
    """Set memory layout, gradient checkpointing and compilation in place: the names of the weights stay as they are.

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
        repeated = repeated_blocks(objective)
        for block in network.modules():
            if type(block).__name__ in repeated:
                block.compile(backend=COMPILER, fullgraph=True)


def repeated_blocks(objective: Objective) -> list[str]:
    """The classes of blocks that a network repeats: what is compiled, or sharded, each for itself."""
    known = {*_REPEATED_BLOCKS, *getattr(objective.body, "_repeated_blocks", ())}
    return sorted({type(block).__name__ for block in objective.modules()} & known)


@singledispatch
def build_pipeline(
    objective: Objective,
    preprocessing: Preprocessing | None = None,
    held_out: HeldOut | None = None,
    **described: Any,
) -> LikelihoodPipeline:
    """The pipeline of an objective as it is now.

    A learned schedule is baked into the scheduler's config, or carried with its weights where no config can hold it.

    Args:
        objective: All that was trained.
        preprocessing: How the images that it was trained on became levels.
        held_out: How its test images were held out of them.
        described: Of texts, the ``tokenizer``, and the ``windows`` that they are cut into.
    """
    raise ConfigurationError(f"{type(objective).__name__} belongs to no pipeline.")


@build_pipeline.register
def _(objective: HierarchicalObjective, preprocessing: Any = None, held_out: Any = None) -> HVAEPipeline:
    return HVAEPipeline(objective.model, preprocessing, held_out)


@build_pipeline.register
def _(objective: TokenObjective, *, tokenizer: Any, windows: Any = None, held_out: Any = None) -> TokenPipeline:
    network = objective.network
    scheduler = VDMScheduler(**objective.process.fields())
    return TokenPipeline(network.model, tokenizer, scheduler, network.time_embedding, windows)


@build_pipeline.register
def _(objective: VDMObjective, preprocessing: Any = None, held_out: Any = None) -> VDMPipeline:
    process = objective.process
    carried = process.carried_schedule()
    parts: dict[str, Any] = {
        "unet": objective.network,
        "scheduler": VDMScheduler(**process.fields(), **objective.sampling),
        "noise_schedule": None if carried is None else RegisteredModel.carrying(carried),
        "preprocessing": preprocessing,
        "held_out": held_out,
        **({} if objective.condition is None else objective.condition.pipeline_arguments()),
    }
    if isinstance(process, LatentProcess):
        return LatentVDMPipeline(process.first_stage, **parts, latent_scaling=process.scaling())
    weights = RegisteredModel.carrying(process) if process.has_weights else None
    return VDMPipeline(**parts, forward_process=weights)


def count_steps(arguments: TrainingArguments, steps_per_epoch: int | None) -> int:
    """The optimiser steps of a run, from the batches of an epoch; ``None`` for a stream, whose length is not known.

    Raises:
        ConfigurationError: Epochs of a stream; or one optimiser step would see a datum twice.

    >>> count_steps(TrainingArguments(num_train_epochs=3, gradient_accumulation_steps=2), steps_per_epoch=5)
    7
    """
    accumulation = arguments.gradient_accumulation_steps
    if steps_per_epoch is not None and accumulation > steps_per_epoch:
        raise ConfigurationError(
            f"gradient_accumulation_steps is {accumulation}, and an epoch has {steps_per_epoch} batches: one "
            f"optimiser step would see data twice. Set it to at most {steps_per_epoch}, or train_batch_size "
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
