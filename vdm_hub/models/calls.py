"""What a network is called with beside a sample and its timestep, and whether it is the one that a process needs."""

from __future__ import annotations

import inspect

from torch import nn

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
