"""The arguments of a network beside a sample and its timestep, and whether it is the one that a process needs."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError
from vdm_hub.models.conditions import classes_of, takes_text, text_width_of
from vdm_hub.models.registered_model import bare_network, config_of

_GIVEN = ("sample", "timestep", "return_dict", "context")  # by whoever calls the network
_TEXT = ("encoder_hidden_states", "encoder_attention_mask")


def named_arguments(network: nn.Module) -> list[str] | None:
    """The arguments that a user may give a network by name; ``None`` where it takes any name.

    >>> from vdm_hub import UNetVDMModel
    >>> named_arguments(UNetVDMModel(8, block_out_channels=(8,), norm_num_groups=4))
    ['class_labels']
    """
    parameters = list(inspect.signature(network.forward).parameters.values())
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    others = {*_GIVEN, *(() if takes_text(network) else _TEXT)}
    return [one.name for one in parameters[2:] if one.kind is not one.VAR_POSITIONAL and one.name not in others]


def check_context(context_size: int | None, network: nn.Module) -> None:
    """Refuse a network that can't be told what a process tells it, or that needs to be told what this one does not.

    Args:
        context_size: Of the process.
        network: Any; what its forward takes is looked at, and its config, where that says a length.

    Raises:
        ConfigurationError: It takes no context, or one of another length.
    """
    parameters = inspect.signature(network.forward).parameters
    takes_context = "context" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    unsaid = context_size if takes_context else None
    taken = getattr(getattr(network, "config", None), "context_size", unsaid)
    if taken != context_size:
        raise ConfigurationError(
            f"the process tells its network {context_size or 'no'} numbers beside the timestep, and "
            f"{type(network).__name__} takes {taken or 'none'}: use UNetVDMModel with context_size={context_size}."
        )


@dataclass(frozen=True)
class Call:
    """How a network is called: as all are, and with what its class asks for besides.

    Attributes:
        absent: Arguments without a default, which are ``None`` where nobody gives them.
        needed: Conditions without which it can't be called.
        only_class: The one class of a network that knows no other and must be told one.
        each: Whether it asks for a timestep for each datum, as diffusers' transformers do.

    >>> from diffusers import DiTTransformer2DModel
    >>> Call.of(DiTTransformer2DModel(1, 8, 1, num_layers=1, sample_size=8, num_embeds_ada_norm=10))
    Call(absent=(), needed=('class_labels',), only_class=None, each=True)
    """

    absent: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    only_class: int | None = None
    each: bool = False

    @classmethod
    def of(cls, network: nn.Module) -> Call:
        """The call of a network, any that is called as ``network(sample, timestep, return_dict=False, **given)[0]``.

        A network's own dropout of labels is switched off: what a condition leaves out is drawn from (seed, step,
        place), like all else.
        """
        for part in network.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0
        parameters = list(inspect.signature(bare_network(network).forward).parameters.values())
        named = [one for one in parameters[2:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        needs = {"class_labels": classes_of(network), "encoder_hidden_states": text_width_of(network)}
        table = config_of(network).get("num_embeds_ada_norm")
        return cls(
            absent=tuple(one.name for one in named if one.default is one.empty and one.name not in _GIVEN),
            needed=tuple(name for name, size in needs.items() if size is not None),
            only_class=table if table == 0 else None,
            each=parameters[0].name == "hidden_states",
        )

    def __call__(self, network: nn.Module, sample: Tensor, timestep: Tensor, **given: Any) -> Tensor:
        """The network's raw output.

        Raises:
            ConfigurationError: A condition is missing.
        """
        for name in self.needed:
            if given.get(name) is None:
                raise ConfigurationError(
                    f"{name} is missing, and this {type(network).__name__} is conditioned on it: give each image's."
                )
        arguments = dict.fromkeys(self.absent) | given
        if self.only_class is not None:
            arguments["class_labels"] = torch.full(sample.shape[:1], self.only_class, device=sample.device)
        if self.each:
            timestep = timestep.expand(sample.shape[0])
        output: Tensor = network(sample, timestep, return_dict=False, **arguments)[0]
        return output


def checked_output(output: Tensor, sample: Tensor, network: nn.Module, process: Any) -> Tensor:
    """The output of a network, which has `ForwardProcess.output_shape`: another might be broadcast, unsaid.

    Raises:
        ConfigurationError: It has another shape.
    """
    found, needed = tuple(output.shape[1:]), process.diffused.output_shape(sample.shape[1:])
    if found != needed:
        raise ConfigurationError(
            f"{type(bare_network(network)).__name__} gives an output of shape {found} for a sample of "
            f"{tuple(sample.shape[1:])}, and {type(process.diffused).__name__} needs {needed}: use a network with so "
            f"many output channels, or the process that this one was trained with."
        )
    return output


_BEING_EVALUATED: dict[nn.Module, int] = {}  # parts that were in training mode, and by how many they are evaluated


_MODES = threading.Lock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A block in ``eval`` mode; each submodule is put back afterwards: by the last thread, where several share one."""
    with _MODES:
        parts = [part for part in module.modules() if part.training or part in _BEING_EVALUATED]
        for part in parts:
            _BEING_EVALUATED[part] = _BEING_EVALUATED.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _MODES:
            for part in parts:
                _BEING_EVALUATED[part] -= 1
                if not _BEING_EVALUATED[part]:
                    del _BEING_EVALUATED[part]
                    part.training = True


@contextmanager
def counted_calls(network: nn.Module) -> Iterator[list[int]]:
    """The sizes of the batches that this thread calls the network with."""
    sizes: list[int] = []
    thread = threading.get_ident()  # others may measure by the same network

    def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            sizes.append(int(arguments[0].shape[0]))

    handle = network.register_forward_pre_hook(count)
    try:
        yield sizes
    finally:
        handle.remove()


def told(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that its network is told by name: all but the data, which part is given, and the indices.

    >>> list(told({"levels": torch.zeros(2, 3), "indices": torch.arange(2), "class_labels": torch.ones(2)}))
    ['class_labels']
    """
    return {name: value for name, value in batch.items() if name not in ("levels", "given", "indices")}


class CountedNetwork:
    """A network as float64 code sees it: called in its own precision, its calls counted per datum.

    Args:
        network: Any module called as ``network(sample, timestep, return_dict=False, **conditioning)[0]``.
        batch: What it is conditioned on, besides what `told` leaves out.
    """

    def __init__(self, network: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.network, self.call, self.evaluations = network, Call.of(network), 0
        floating = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
        # Half precisions get float32: the pipeline's network converts by itself, after its Fourier features.
        self._dtype = torch.float64 if not floating or torch.float64 in floating else torch.float32
        self._arguments = self._in_its_precision(told(batch))

    def __call__(self, sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        """The network's raw output, of the sample's dtype."""
        self.evaluations += sample.shape[0]
        arguments = self._arguments | self._in_its_precision(context)
        output = self.call(self.network, sample.to(self._dtype), timestep.to(self._dtype), **arguments)
        return output.to(sample.dtype)

    def _in_its_precision(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.to(self._dtype) if value.is_floating_point() else value for name, value in arguments.items()
        }

    def per_image(self, images: int) -> Tensor:
        """The number of calls so far for each image of the batch, (B,): all images of a batch are called together."""
        return torch.full((images,), self.evaluations / images, dtype=torch.float64)
