"""What a network can be told of an image, by whatever names its class has for it: a class, a caption."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError
from vdm_hub.models.registered_model import bare_network, config_of


class Condition(Protocol):
    """What a network is told of each datum, as far as its construction goes."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """What `arguments_for` makes arguments of."""

    def example(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """The network's arguments of some batch, for whoever looks at shapes alone."""


def classes_of(network: nn.Module) -> int | None:
    """The rows of a network's table of classes, a null class included; ``None`` where its config names no table.

    >>> from diffusers import DiTTransformer2DModel
    >>> classes_of(DiTTransformer2DModel(1, 8, 1, num_layers=1, sample_size=8, num_embeds_ada_norm=10))  # and a null
    11
    """
    config = config_of(network)
    if config.get("class_embed_type") is not None:  # classes told by numbers or vectors of another kind
        return None
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"])
    own = config.get("num_embeds_ada_norm") if takes(network, "class_labels") else None
    return own + 1 if own else None  # diffusers' DiT keeps a row for the null class beside them


def keeps_null(network: nn.Module) -> bool:
    """Whether a network's table has a row for a null class whether or not it is asked for, as diffusers' DiT's has."""
    return classes_of(network) is not None and config_of(network).get("num_class_embeds") is None


def takes_classes(network: nn.Module) -> bool:
    """Whether a network takes ``class_labels``: it has a table, or its config leaves open how it reads them."""
    config = config_of(network)
    kinds = ("num_class_embeds", "num_embeds_ada_norm", "class_embed_type")
    if classes_of(network) is not None or config.get("class_embed_type") is not None:
        return True
    return takes(network, "class_labels") and not any(kind in config for kind in kinds)


def text_width_of(network: nn.Module) -> int | None:
    """The width D of the ``encoder_hidden_states``, (B, L, D), that a network attends to; ``None`` where it does not.

    >>> from vdm_hub import UNetVDMModel
    >>> text_width_of(UNetVDMModel(8, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=384))
    384
    """
    # The modules tell: a config may have a width, diffusers' 1280, and blocks without attention to it.
    attending: list[Any] = [part for part in network.modules() if getattr(part, "is_cross_attention", False)]
    if not attending:
        return None
    return int(config_of(network).get("encoder_hid_dim") or attending[0].cross_attention_dim)


def takes_text(network: nn.Module) -> bool:
    """Whether a network takes ``encoder_hidden_states``: it attends to them, or its config leaves that open."""
    says = "cross_attention_dim" in config_of(network)
    return text_width_of(network) is not None or (takes(network, "encoder_hidden_states") and not says)


def takes(network: nn.Module, name: str) -> bool:
    """Whether the forward of a network has an argument of that name, or takes any."""
    parameters = inspect.signature(bare_network(network).forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def arguments_for(sizes: Mapping[str, int]) -> dict[str, int]:
    """The arguments of networks' constructors that make them take a condition; each class knows some of them.

    Args:
        sizes: ``classes``, how many there are, with ``null``, 1 where there is a null class after them; and
            ``text_width``, that of an encoder's hidden states. What is not told is not in it.

    >>> arguments_for({"classes": 10, "null": 1})
    {'num_class_embeds': 11, 'num_embeds_ada_norm': 10}
    """
    found: dict[str, int] = {}
    if "classes" in sizes:
        rows = sizes["classes"] + sizes.get("null", 0)
        found |= {"num_class_embeds": rows, "num_embeds_ada_norm": sizes["classes"]}
    return found | ({"cross_attention_dim": sizes["text_width"]} if "text_width" in sizes else {})


def check_condition(network: nn.Module, sizes: Mapping[str, int]) -> None:
    """Refuse a network that can't be told what a condition tells, or that needs to be told what it does not.

    Args:
        network: Any; its config and its modules are looked at, and what its forward takes.
        sizes: As `arguments_for` has them; empty for an unconditional model.

    Raises:
        ConfigurationError: It takes none, or classes of another number or captions of another width; or it needs
            some that there are not.
    """
    check_classes(network, sizes.get("classes"), sizes.get("null", 0))
    _check_text(network, sizes.get("text_width"))


def check_classes(network: nn.Module, classes: int | None, null: int = 0) -> None:
    """Refuse a network for other classes, as `check_condition` does.

    Raises:
        ConfigurationError: It knows none, or others, or needs some where there are none.
    """
    name, rows, kind = (
        type(bare_network(network)).__name__,
        classes_of(network),
        config_of(network).get("class_embed_type"),
    )
    if classes is None:
        if rows is not None or kind is not None:
            table = f"class_embed_type={kind}" if kind is not None else f"a table of {rows} classes"
            raise ConfigurationError(
                f"{name} has {table}, and there is no condition that gives class_labels: leave its classes out, or "
                f"train it with labels."
            )
        return
    wanted = f"class_labels of {classes} classes" + (" and a null class" if null else "")
    if kind is not None or not takes_classes(network):
        what = f"has class_embed_type={kind}" if kind is not None else "has no table of classes"
        raise ConfigurationError(
            f"the condition gives {wanted}, and {name} {what}: use UNetVDMModel, UNet2DModel or UNet2DConditionModel "
            f"with num_class_embeds={classes + null}, or DiTTransformer2DModel with num_embeds_ada_norm={classes}."
        )
    if rows is not None and rows != classes + (1 if keeps_null(network) else null):
        raise ConfigurationError(
            f"the condition gives {wanted}, and {name} has a table of {rows}: leave num_class_embeds and "
            f"num_embeds_ada_norm out, which follow from the labels, or give the classes that it was trained with."
        )


def _check_text(network: nn.Module, width: int | None) -> None:
    name, taken = type(bare_network(network)).__name__, text_width_of(network)
    if width is None and taken is not None:
        raise ConfigurationError(
            f"{name} attends to encoder_hidden_states of width {taken}, and no condition gives them: use "
            f"blocks without cross-attention (of diffusers': DownBlock2D, UNetMidBlock2D, UpBlock2D), UNet2DModel, or "
            f"UNetVDMModel without cross_attention_dim; or train it with captions."
        )
    if width is None or taken == width or (taken is None and takes_text(network)):
        return
    what = "attends to none" if taken is None else f"takes those of width {taken}"
    raise ConfigurationError(
        f"the condition gives encoder_hidden_states of width {width}, and {name} {what}: use UNetVDMModel with "
        f"cross_attention_dim={width}, or UNet2DConditionModel with that and blocks with cross-attention."
    )
