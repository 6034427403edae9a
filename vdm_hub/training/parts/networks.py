"""The networks that a recipe describes; what follows from the data is taken from there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from vdm_hub import registry
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.errors import ConfigurationError, VDMHubError, in_one_line, unknown_name
from vdm_hub.models.calls import Call, check_context
from vdm_hub.models.conditions import Condition, arguments_for, check_condition
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import UNET_CLASSES

_SKETCHED = ContextVar("_SKETCHED", default=False)
_CAUSES = {
    "cross_attention_dim": "the text encoder's vectors ask for",
    "num_class_embeds": "the classes of the label column, and the null class of condition dropout, ask for",
    "num_embeds_ada_norm": "the classes of the label column ask for",
}
_DATA = 2  # in the call that tells what a network gives


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Within the block, networks that are described are built without memory, on torch's meta device."""
    token = _SKETCHED.set(True)
    try:
        yield
    finally:
        _SKETCHED.reset(token)


_CALLED: set[tuple[object, ...]] = set()
"""What was called once and answered is not called again: a run builds its network twice, first without memory."""


def is_sketched() -> bool:
    """Whether networks are built without memory here."""
    return _SKETCHED.get()


def build_network(
    configuration: Configuration,
    shape: Sequence[int],
    process: ForwardProcess,
    features: bool = True,
    condition: Condition | None = None,
) -> nn.Module:
    """The network that the recipe describes, its channels and size taken from the data where it is silent.

    Args:
        configuration: The recipe.
        shape: Of what is diffused, (C, H, W).
        process: It says the shape of the network's output, and what it is told beside the timestep.
        features: Whether it is images: Fourier features tell their levels apart, and latents have none.
        condition: What it is told of each image.

    Raises:
        ConfigurationError: The description is wrong, or of a network that can't take the data or the condition, or
            that gives what the process can't use: one call on torch's meta device, before any memory is taken, tells.
        MissingPluginError: A package brings the network that is not installed, or can't be imported.
    """
    cls = _network_class(configuration.model.unet_class, configuration.model.unet_package)
    context_size = process.context_size
    from_data = {
        "sample_size": _sample_size(*shape[1:]),
        "in_channels": shape[0],
        "out_channels": process.output_shape(shape)[0],
    }
    sizes = {} if condition is None else condition.sizes
    from_data |= arguments_for(sizes)
    others: dict[str, Any] = {"num_train_timesteps": configuration.diffusion.num_train_timesteps}
    others |= {"context_size": context_size} | ({} if features else {"fourier_features": ()})
    others["num_embeds_ada_norm"] = 0  # of DiT, where no class is told: its null class alone
    if from_data["out_channels"] != from_data["in_channels"]:
        others["add_input"] = False  # of another shape than the output
    takes = inspect.signature(cls).parameters
    from_data, others = ({key: value for key, value in one.items() if key in takes} for one in (from_data, others))
    _check_sides(cls, shape, configuration.model.unet_config)

    def built() -> Any:
        return build_described(cls, "unet", configuration.model.unet_config, from_data, others)

    data = (tuple(shape), tuple(process.output_shape(shape)), context_size, type(condition), repr(sizes))
    call = (cls, repr(configuration.model.unet_config), repr(others), *data)
    if call in _CALLED and not _SKETCHED.get():
        return cast(nn.Module, built())
    with on_meta_device(), torch.random.fork_rng(devices=[]):  # the run's own draws begin with its weights
        sketch = built()
        check_context(context_size, sketch)
        check_condition(sketch, sizes)
        _check_config(sketch, shape)
        if call not in _CALLED:
            _check_output(sketch, shape, process, condition)
            _CALLED.add(call)
    network: nn.Module = sketch if _SKETCHED.get() else built()
    return network


def _check_sides(cls: Any, shape: Sequence[int], described: Mapping[str, Any]) -> None:
    """Refuse data that a network of patches can't be laid over, in the words of its own arguments."""
    takes, (height, width) = inspect.signature(cls).parameters, shape[-2:]
    patch = described.get("patch_size", takes["patch_size"].default) if "patch_size" in takes else 1
    square = "sample_size" in takes and takes["sample_size"].annotation in (int, "int")
    if square and height != width:
        raise ConfigurationError(
            f"{cls.__name__} takes squares only (one sample_size), and the data are {_shape_word(shape)}: set "
            f"resolution, with center_crop, or use UNetVDMModel."
        )
    if isinstance(patch, int) and patch > 0 and (height % patch or width % patch):
        raise ConfigurationError(
            f"{cls.__name__} has patch_size={patch}, which does not divide the sides of data of shape "
            f"{_shape_word(shape)}: give a patch_size that does, or another resolution."
        )


def _check_config(network: Any, shape: Sequence[int]) -> None:
    """Refuse a network whose config does not say the data's shape: a pipeline samples by what it says."""
    config, wanted = getattr(network, "config", {}), {"in_channels": shape[0], "sample_size": _sample_size(*shape[1:])}
    for key, value in wanted.items():
        said = config.get(key)
        if (list(said) if isinstance(said, tuple) else said) not in (value, [value, value]):
            raise ConfigurationError(
                f"the config of {type(network).__name__} says {key}={said}, and the data are {_shape_word(shape)}: "
                f"its constructor must take {key} and register it, as a pipeline samples what that says; or use "
                f"UNetVDMModel."
            )


def _check_output(
    network: nn.Module, shape: Sequence[int], process: ForwardProcess, condition: Condition | None
) -> None:
    """Refuse a network that raises on such data, or gives another shape than the process uses: one call tells."""
    told = {} if process.context_size is None else {"context": (_DATA, process.context_size)}
    wanted, name = (_DATA, *process.output_shape(shape)), type(network).__name__
    remedy = "change the recipe's unet, or use UNetVDMModel."
    with torch.no_grad(), torch.device("meta"):
        try:
            context = {key: torch.zeros(size) for key, size in told.items()}
            context |= {} if condition is None else condition.example(_DATA, torch.device("meta"))
            output = Call.of(network)(network, torch.zeros(_DATA, *shape), torch.zeros(_DATA), **context)
        except Exception as error:  # a plugin's network may raise anything
            arguments = "".join(f", {key}" for key in context)
            raise ConfigurationError(
                f"{name} can't be called as network(sample, timestep, return_dict=False{arguments}) with data of "
                f"shape {_shape_word(shape)} on torch's meta device; it raised {type(error).__name__}: "
                f"{in_one_line(error)}. Mend it, or {remedy}"
            ) from error
    found = tuple(output.shape) if isinstance(output, torch.Tensor) else None
    if found != wanted:
        what = f"a {type(output).__name__}" if found is None else f"an output of shape {_shape_word(found[1:])}"
        raise ConfigurationError(
            f"{name} gives {what} for data of shape {_shape_word(shape)}, and the process needs "
            f"{_shape_word(wanted[1:])}: {remedy}"
        )


def _shape_word(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"


def _network_class(name: str, package: str | None) -> Any:
    """The class of a network by its registered name, or that of one of diffusers' models.

    Raises:
        ConfigurationError: There is none.
        MissingPluginError: It can't be imported, or its package is not installed.
    """
    if package is not None:
        return registry.lookup("networks", name, package).load()
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, ModelMixin):
        return found
    known = {one.name for one in registry.registrations("networks")}
    raise unknown_name("_class_name of unet", name, known | {*UNET_CLASSES})


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
                f"the recipe's {field} has {key}={described[key]}, but {_CAUSES.get(key, 'the images are')} "
                f"{'' if key in _CAUSES else _of_images(from_data) + ', which asks for'} {key}={value}: leave {key} "
                f"out, as it follows from that, or train on what asks for {described[key]}."
            )
    try:
        with torch.device("meta") if _SKETCHED.get() else nullcontext():
            return cls(**{**from_data, **(others or {}), **described, **from_data})
    except VDMHubError:
        raise
    except Exception as error:  # a plugin's constructor may raise anything
        raise ConfigurationError(
            f"{cls.__name__} can't be built from the recipe's {field}: {type(error).__name__}: {in_one_line(error)}"
        ) from error


def build_hvae(
    configuration: Configuration, shape: tuple[int, ...], field: str, described: Mapping[str, Any]
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
    if "sample_size" not in from_data:
        return f"of {from_data['in_channels']} channels"
    size = from_data["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    levels = f" of {from_data['num_levels']} levels" if "num_levels" in from_data else ""
    return f"{from_data['in_channels']}x{height}x{width}{levels}"


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a module, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())
