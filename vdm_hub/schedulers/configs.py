"""How the configs of diffusers' schedulers and of `VDMScheduler` become each other."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from vdm_hub import registry
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.errors import ConfigurationError, in_one_line, shortened, warn
from vdm_hub.registry import Serialised

STOCK_TARGETS = ("epsilon", "sample", "v_prediction")
"""The targets that a stock scheduler of the DDPM family knows."""


@dataclass(frozen=True)
class ShownSampler:
    """A sampler of diffusers that is shown to run a VDM's process: docs/samplers.md has the figures.

    Attributes:
        targets: What the network may predict.
        options: Its constructor's arguments that may be chosen, and their values; each is shown, and each two.
    """

    targets: tuple[str, ...] = STOCK_TARGETS
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_SPACINGS: dict[str, tuple[Any, ...]] = {"timestep_spacing": ("trailing", "linspace", "leading")}
_SIGMAS: dict[str, tuple[Any, ...]] = {"use_karras_sigmas": (True, False), "use_exponential_sigmas": (True, False)}
_ORDERS: dict[str, tuple[Any, ...]] = {"solver_order": (1, 2, 3), "lower_order_final": (True, False)}
_ENDS: dict[str, tuple[Any, ...]] = {"final_sigmas_type": ("zero", "sigma_min")}
_TWO_TARGETS = ("epsilon", "v_prediction")

SHOWN_SAMPLERS: dict[str, ShownSampler] = {
    "DDPMScheduler": ShownSampler(options=_SPACINGS | {"variance_type": ("fixed_small", "fixed_large")}),
    "DDPMParallelScheduler": ShownSampler(options=_SPACINGS),
    "DDIMScheduler": ShownSampler(options=_SPACINGS | {"set_alpha_to_one": (True, False)}),
    "DDIMParallelScheduler": ShownSampler(options=_SPACINGS | {"set_alpha_to_one": (True, False)}),
    "PNDMScheduler": ShownSampler(_TWO_TARGETS, _SPACINGS | {"skip_prk_steps": (True, False)}),
    "DPMSolverMultistepScheduler": ShownSampler(
        options=_SPACINGS
        | _SIGMAS
        | _ORDERS
        | _ENDS
        | {
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_type": ("midpoint", "heun"),
            "use_lu_lambdas": (True, False),
            "euler_at_final": (True, False),
        }
    ),
    "DPMSolverSinglestepScheduler": ShownSampler(
        options=_SIGMAS
        | {
            "solver_order": (1, 2, 3),
            "solver_type": ("midpoint", "heun"),
        }
    ),
    "UniPCMultistepScheduler": ShownSampler(
        options=_SPACINGS | _SIGMAS | _ORDERS | {"solver_type": ("bh1", "bh2"), "predict_x0": (True, False)}
    ),
    "DEISMultistepScheduler": ShownSampler(options=_SPACINGS | _SIGMAS | _ORDERS),
    "SASolverScheduler": ShownSampler(options=_SPACINGS | {"algorithm_type": ("data_prediction", "noise_prediction")}),
    "EulerDiscreteScheduler": ShownSampler(options=_SPACINGS | _SIGMAS | _ENDS),
    "EulerAncestralDiscreteScheduler": ShownSampler(_TWO_TARGETS, _SPACINGS),
    "HeunDiscreteScheduler": ShownSampler(options=_SPACINGS | _SIGMAS),
    "KDPM2DiscreteScheduler": ShownSampler(_TWO_TARGETS, _SPACINGS | _SIGMAS),
    "KDPM2AncestralDiscreteScheduler": ShownSampler(_TWO_TARGETS, _SPACINGS | _SIGMAS),
    "LMSDiscreteScheduler": ShownSampler(options=_SPACINGS | _SIGMAS),
}


def check_sampler(scheduler_class: Any, target: Serialised, chosen: Mapping[str, Any]) -> None:
    """Refuse a sampler, a target or an option that is not shown to run the process.

    Raises:
        ConfigurationError: Naming it, and what is shown.
    """
    name = getattr(scheduler_class, "__name__", repr(scheduler_class))
    shown = SHOWN_SAMPLERS.get(name)
    if shown is None or scheduler_class is not getattr(diffusers, name, None):
        raise ConfigurationError(
            f"{name} is not shown to run this process: choose one of {', '.join(SHOWN_SAMPLERS)}."
        )
    if target not in shown.targets:
        raise ConfigurationError(
            f"{name} samples by the targets {', '.join(shown.targets)}, and the network predicts {target!r}: choose "
            f"another sampler, VDMScheduler among them."
        )
    for option, value in chosen.items():
        values = shown.options.get(option, ())
        if not any(type(value) is type(known) and value == known for known in values):
            may_be = f"it may be {', '.join(map(repr, values))}" if values else f"give {', '.join(shown.options)} only"
            raise ConfigurationError(
                f"{name} with {option}={shortened(value)} is not shown to run this process: {may_be}."
            )


SHOWN_STEPS = 50
"""The numbers of steps in which the samplers are shown to run."""
_OTHER_STEPS = (250, SHOWN_STEPS, 20, 10)


def check_grid(scheduler: Any, steps: int, remedy: str | None = None) -> None:
    """Refuse a number of steps on which one of diffusers' samplers fails, or gives NaN.

    Several divide by a difference of two levels' log-SNRs, which some options and numbers of steps make zero; so that
    very grid is tried, on one number in place of an image.

    Args:
        scheduler: The sampler; it stays as it is.
        steps: How many steps it is to take.
        remedy: What to do where the caller has no other number of steps to give.

    Raises:
        ConfigurationError: Naming the number of steps, and one that would do.
    """
    if (failure := _failure(scheduler, steps)) is None:
        return
    if remedy is None:
        works = next((other for other in _OTHER_STEPS if _failure(scheduler, other) is None), None)
        remedy = (
            f"give num_inference_steps={works}, say" if works else "choose another sampler, or other options of it"
        )
    name = type(scheduler).__name__
    raise ConfigurationError(f"{name}, as it is configured, {failure} with num_inference_steps={steps}: {remedy}.")


def model_input(scheduler: Any, latents: Tensor, timestep: Any) -> Tensor:
    """What the network reads of the latents of a stock scheduler; some of them have no scale of their own."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def _failure(scheduler: Any, steps: int) -> str | None:
    """The failure of a sampler on a grid, if it fails."""
    trial, generator = copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
    noise = {"generator": generator} if "generator" in inspect.signature(trial.step).parameters else {}
    learned = str(trial.config.get("variance_type", "")).startswith("learned")
    try:
        trial.set_timesteps(steps)
        z = torch.ones(1, 1, 1, 1) * getattr(trial, "init_noise_sigma", 1.0)
        for timestep in trial.timesteps:
            model_input(trial, z, timestep)  # some refuse a step without it
            output = torch.randn((1, 1 + learned, 1, 1), generator=generator)
            z = trial.step(output, timestep, z, **noise).prev_sample
    except Exception as error:  # whatever a library of another version raises
        return f"fails ({type(error).__name__}: {in_one_line(error)[:200]})"
    return None if bool(z.isfinite().all()) else "gives NaN"


DDPM_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "prediction_type",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
)
"""The config fields that a `VDMScheduler` and diffusers' `DDPMScheduler` both read."""

# Overrides that give another process, whose schedule the recorded conditioning must not follow.
_PROCESS_KEYS = {
    "noise_schedule",
    "trained_betas",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "rescale_betas_zero_snr",
}


_UNREAD: dict[str, Serialised] = {
    "noise_schedule": "linear",
    "prediction_type": "epsilon",
    "conditioning": "affine",
    "decoder": "factorised",
}
"""The values in a config for a process that has none of these."""


def unread_fields(process: ForwardProcess, config: Mapping[str, Any]) -> dict[str, Serialised]:
    """The config values that replace what this process has no use for, with a warning for each.

    No reader of the config shall be told of it, or to install it.
    """
    if isinstance(process, GaussianProcess):
        return {}
    read = process.fields()
    unread = {key: value for key, value in _UNREAD.items() if key not in read and config[key] != value}
    for key in unread:
        warn(f"{type(process).__name__} reads no {key}: {config[key]!r} is left out.", stacklevel=4)
    return unread


def is_beta_table(noise_schedule: Serialised) -> bool:
    """Whether a serialised schedule is a table of betas, as the DDPM family's is."""
    return registry.parse_serialised("noise_schedules", noise_schedule)[0] == "discrete_betas"


def as_vdm_config(config: dict[str, Any], overrides: Mapping[str, Any], vdm: type) -> dict[str, Any]:
    """The config for class ``vdm`` from any scheduler's (a copy: it changes); see `VDMScheduler.from_config`."""
    if config.get("noise_schedule") is not None:
        if overrides and not is_beta_table(config["noise_schedule"]):
            config.pop("trained_betas", None)  # a derived table must not outlive what it was derived from
    elif "beta_schedule" in config:
        config = _from_ddpm_family(config)
    else:
        _refuse_foreign(config, vdm)
    return config


def _refuse_foreign(config: Mapping[str, Any], vdm: type) -> None:
    # A scheduler built in code does not say its class in its config; its keys tell that it is not ours.
    foreign = {key for key in config if not key.startswith("_")} - set(inspect.signature(vdm).parameters)
    name = config.get("_class_name", vdm.__name__)
    if foreign or name != vdm.__name__:
        whose = f"a {name} config" if name != vdm.__name__ else f"a config with {', '.join(sorted(foreign)[:4])}"
        raise ConfigurationError(
            f"{whose} has neither a noise_schedule nor betas, so it describes no process that VDMScheduler knows. "
            f"Build one with a noise_schedule and prediction_type that match the network."
        )


def _from_ddpm_family(config: dict[str, Any]) -> dict[str, Any]:
    # A code-built stock scheduler lists every key there, which would drop them all.
    config.pop("_use_default_values", None)
    stock = getattr(diffusers, str(config.get("_class_name")), DDPMScheduler)
    # Old files leave out keys that were added later: their class's default holds, not ours.
    # A config from code says no class, but holds all of its keys.
    parameters = inspect.signature(stock).parameters if "_class_name" in config else {}
    defaults = {key: parameters[key].default for key in DDPM_KEYS if key in parameters}
    config = defaults | config | {"noise_schedule": "discrete_betas", "final_sigmas_type": "zero"}
    if config.get("variance_type") is None:  # DPM-Solver's way to say that the network predicts no variance
        config["variance_type"] = "fixed_small"
    return config


def changes_process(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Whether overrides replace a beta table while the network still reads its noise levels through that table."""
    is_table = config.get("noise_schedule") is not None and is_beta_table(config["noise_schedule"])
    read_through = (overrides.get("conditioning") or config.get("conditioning") or "table") == "table"
    return is_table and read_through and not _PROCESS_KEYS.isdisjoint(overrides)


def derived_betas(process: ForwardProcess) -> list[float] | None:
    """The table that lets stock samplers run a continuous process: entry i is the noise level whose timestep is i.

    Rounding errors of the float32 betas are fed back into the next one, so that diffusers' cumulative product stays
    within float32's rounding of the true alpha-bar. ``None`` where there is no single noise level per time, or the
    network reads it as no integer, or the table would hold steps that lead nowhere.
    """
    if not isinstance(process, GaussianProcess) or process.scalar_gamma is None:
        return None
    if not process.conditioning.integer_timesteps:
        return None
    steps = torch.arange(process.num_train_timesteps, dtype=torch.float64)
    alpha_bar = torch.sigmoid(-process.conditioning.inverse(steps)).numpy()
    betas, product = [], 1.0
    for target in alpha_bar:
        if product == 0:  # nothing is left before the table ends, as where a conditioning's own table is shorter
            return None
        beta = np.float32(1 - target / product)
        product *= float(np.float32(1) - beta)
        betas.append(float(beta))
    return betas


def check_betas(given: list[float] | None, derived: list[float] | None) -> None:
    """Refuse a table that contradicts the noise schedule beside it."""
    if given is None:
        return
    if derived is None or len(given) != len(derived) or not np.allclose(given, derived, rtol=1e-4, atol=1e-7):
        raise ConfigurationError(
            "trained_betas disagrees with the noise_schedule of the same config. Leave trained_betas out (it is "
            "derived), or set noise_schedule to 'discrete_betas' if the table is meant."
        )


def check_steps(conditioning: Serialised | None, steps: int) -> None:
    """Refuse a conditioning that has its own number of timesteps beside the scheduler's."""
    if conditioning is not None:
        own = registry.parse_serialised("conditionings", conditioning)[1].get("num_train_timesteps", steps)
        if own != steps:
            raise ConfigurationError(
                f"the conditioning has num_train_timesteps {own!r}, and the scheduler {steps}: give it to the "
                f"scheduler alone, which passes it on."
            )


def without_steps(conditioning: Serialised | None) -> Serialised | None:
    """The conditioning's form without the number of timesteps, which the scheduler's config holds already."""
    if conditioning is None:
        return None
    name, arguments, package = registry.parse_serialised("conditionings", conditioning)
    arguments.pop("num_train_timesteps", None)
    if package is not None and isinstance(conditioning, Mapping):
        return {**conditioning, "config": arguments}
    return {"name": name, "config": arguments} if arguments else name
