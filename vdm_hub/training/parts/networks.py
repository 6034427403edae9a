"""The networks that a recipe describes; what follows from the data is taken from there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import diffusers
import torch
from torch import nn

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.models.calls import check_context
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.recipes.arguments import Configuration

_SKETCHED = ContextVar("_SKETCHED", default=False)


@contextmanager
def sketched() -> Iterator[None]:
    """Within the block, networks that are described are built without memory, on torch's meta device."""
    token = _SKETCHED.set(True)
    try:
        yield
    finally:
        _SKETCHED.reset(token)


def build_network(
    configuration: Configuration, shape: Sequence[int], features: bool = True, context_size: int | None = None
) -> nn.Module:
    """The network that the recipe describes, its channels and size taken from the data where it is silent.

    Args:
        configuration: The recipe.
        shape: Of what is diffused, (C, H, W).
        features: Whether it is images: Fourier features tell their levels apart, and latents have none.
        context_size: Of the process, which gives the network a vector so long beside the timestep.

    Raises:
        ConfigurationError: The description is wrong, or of a network that takes no context where there is one.
    """
    name = configuration.model.unet_class
    cls = UNetVDMModel if name == "UNetVDMModel" else getattr(diffusers, name)
    from_data = {
        "sample_size": _sample_size(*shape[1:]),
        "in_channels": shape[0],
        "out_channels": shape[0],
    }
    others: dict[str, Any] = {"num_train_timesteps": configuration.diffusion.num_train_timesteps}
    if cls is UNetVDMModel:
        others |= {"context_size": context_size} | ({} if features else {"fourier_features": ()})
    built: Any = build_described(cls, "unet", configuration.model.unet_config, from_data, others)
    check_context(context_size, built)
    network: nn.Module = built
    return network


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
    known = list(inspect.signature(cls).parameters)
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
        with torch.device("meta") if _SKETCHED.get() else nullcontext():
            return cls(**{**from_data, **(others or {}), **described, **from_data})
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{cls.__name__} can't be built from the recipe's {field}: {error}") from error


def build_hvae(
    configuration: Configuration, shape: tuple[int, int, int], field: str, described: Mapping[str, Any]
) -> MarkovianHVAE:
    """The hierarchical VAE that a field of the recipe describes."""
    from_data = {
        "sample_size": _sample_size(*shape[1:]),
        "in_channels": shape[0],
        "num_levels": configuration.data.num_levels,
    }
    built: MarkovianHVAE = build_described(MarkovianHVAE, field, described, from_data)
    return built


def _sample_size(height: int, width: int) -> int | list[int]:
    return height if height == width else [height, width]


def _of_images(from_data: Mapping[str, Any]) -> str:
    size = from_data["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    levels = f" of {from_data['num_levels']} levels" if "num_levels" in from_data else ""
    return f"{from_data['in_channels']}x{height}x{width}{levels}"
