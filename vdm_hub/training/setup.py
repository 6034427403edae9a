"""From a configuration to the parts of a run: network, process, objective, optimiser."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.likelihood.variational_bound import Objective, VDMObjective
from vdm_hub.models.noise_schedule_model import NoiseScheduleModel
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.pipeline_vdm import VDMPipeline
from vdm_hub.scheduling_vdm import VDMScheduler
from vdm_hub.training.arguments import Configuration
from vdm_hub.training.configuration import TrainingArguments


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
    return VDMObjective(network, build_scheduler(configuration).build_process(), configuration.diffusion.transitions)


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


def build_optimizer(objective: Objective, arguments: TrainingArguments, learning_rate: float) -> torch.optim.AdamW:
    """AdamW; the noise schedule's parameters are not decayed: zero is no better a log-SNR than any other."""
    schedule = {id(parameter) for parameter in _process_parameters(objective)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in objective.parameters() if id(p) not in schedule]},
        {"params": [p for p in objective.parameters() if id(p) in schedule], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        weight_decay=arguments.adam_weight_decay,
        eps=arguments.adam_epsilon,
        fused=True,
    )


def build_ema(configuration: Configuration, model: torch.nn.Module, device: torch.device) -> EMAModel | None:
    """The moving average of the weights, with diffusers' warm-up; ``None`` where the recipe wants none."""
    training = configuration.training
    if not training.use_ema:
        return None
    ema = EMAModel(
        model.parameters(),
        decay=training.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=training.ema_inv_gamma,
        power=training.ema_power,
        foreach=True,
    )
    ema.to(device)
    return ema


def _process_parameters(objective: Objective) -> list[nn.Parameter]:
    process = getattr(objective, "process", None)
    return list(process.parameters()) if isinstance(process, nn.Module) else []
