"""What a network is called with beside a sample and its timestep, and whether it is the one that a process needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.errors import ConfigurationError

_GIVEN = ("sample", "timestep", "return_dict", "context")  # by whoever calls the network


def named_arguments(network: nn.Module) -> list[str] | None:
    """What a user may give a network by name, or ``None`` where it takes any name.

    >>> from vdm_hub import UNetVDMModel
    >>> named_arguments(UNetVDMModel(8, block_out_channels=(8,), norm_num_groups=4))
    ['class_labels']
    """
    parameters = list(inspect.signature(network.forward).parameters.values())
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return [one.name for one in parameters[2:] if one.kind is not one.VAR_POSITIONAL and one.name not in _GIVEN]


def check_context(context_size: int | None, network: nn.Module) -> None:
    """Refuse a network that can't be told what a process tells it, or that needs to be told what this one does not.

    Args:
        context_size: Of the process.
        network: Any; what its forward takes is looked at, and its config, where that says a length.

    Raises:
        ConfigurationError: It takes no context, or one of another length.
    """
    parameters = inspect.signature(network.forward).parameters
    told = "context" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    unsaid = context_size if told else None
    taken = getattr(getattr(network, "config", None), "context_size", unsaid)
    if taken != context_size:
        raise ConfigurationError(
            f"the process tells its network {context_size or 'no'} numbers beside the timestep, and "
            f"{type(network).__name__} takes {taken or 'none'}: use UNetVDMModel with context_size={context_size}."
        )


@torch.no_grad()
def check_gamma_shape(process: ForwardProcess, shape: Sequence[int]) -> None:
    """Refuse a schedule with a gamma for each pixel of data of another shape.

    Args:
        process: Any; only a Gaussian one has such a schedule.
        shape: Of a datum, as the network takes it.

    Raises:
        ConfigurationError: Naming both shapes.
    """
    if not isinstance(process, GaussianProcess) or process.schedule.scalar:
        return
    device = next((one.device for one in process.parameters()), torch.device("cpu"))
    noise = process.draw_context((1, *shape), torch.Generator().manual_seed(0), device)
    gamma = process.schedule.bind(None, noise)[1](torch.full((1,), 0.5, dtype=torch.float64, device=device))
    own = tuple(gamma.shape[1:])
    if len(own) > len(shape) or any(one not in (1, size) for one, size in zip(own, shape, strict=False)):
        raise ConfigurationError(
            f"{type(process.schedule).__name__} has a gamma for each pixel of {own}, and the network takes "
            f"{tuple(shape)}: give the schedule the shape of the network's data."
        )
