"""Prompts as users know them from diffusers, and what a network is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdm_hub.data.captions import EMPTY
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.models.text_conditions import TextCondition

Prompt: TypeAlias = str | Sequence[str]
"""A text for each image, or one for all."""
Told: TypeAlias = dict[str, Tensor]
"""The ``encoder_hidden_states``, (B, L, D), and the ``encoder_attention_mask``, (B, L), of a network."""


def encoded(
    condition: TextCondition,
    prompt: Prompt | None,
    embeds: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    name: str = "prompt",
) -> Told:
    """What a network is told of prompts, given as texts or as what an encoder made of them.

    Args:
        condition: The captions that the model is conditioned on.
        prompt: The texts.
        embeds: In their place (B, L, D).
        mask: (B, L), with ``embeds``; all are tokens where not given.
        name: What messages call the prompt.

    Raises:
        ConfigurationError: Neither is given, or both, or one that is none; or there is no encoder.
    """
    if (prompt is None) == (embeds is None):
        both = f"both {name} and {name}_embeds are" if prompt is not None else f"neither {name} nor {name}_embeds is"
        raise ConfigurationError(f"{both} given, and the model is conditioned on captions: give one of the two.")
    if embeds is not None:
        return _checked(embeds, mask, name, condition.width)
    if mask is not None:
        raise ConfigurationError(f"{name}_attention_mask belongs to {name}_embeds, which are not given: leave it out.")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not (isinstance(texts, list | tuple) and texts and all(isinstance(one, str) for one in texts)):
        raise ConfigurationError(
            f"{name} is {shortened(prompt)}: give a text, or a list of texts, one for each image."
        )
    different = list(dict.fromkeys(texts))
    return condition.encoded(different, "prompt").take(torch.tensor([different.index(one) for one in texts]))


def _checked(embeds: Any, mask: Any, name: str, width: int) -> Told:
    is_floating = isinstance(embeds, Tensor) and embeds.is_floating_point()
    if not (is_floating and embeds.ndim == 3 and embeds.shape[-1] == width):
        what = f"of shape {tuple(embeds.shape)}" if isinstance(embeds, Tensor) else shortened(embeds)
        raise ConfigurationError(
            f"{name}_embeds are {what}: give floating-point numbers, (B, L, D), with the D = {width} that the network "
            f"attends to."
        )
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if not (isinstance(mask, Tensor) and mask.shape == embeds.shape[:2]):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else shortened(mask)
        raise ConfigurationError(
            f"{name}_attention_mask is {what}: give one number for each of the {tuple(embeds.shape[:2])} tokens."
        )
    odd, empty = mask[(mask != 0) & (mask != 1)], (mask == 0).all(1).nonzero()
    if len(odd) or len(empty):
        what = f"holds {odd[0].item()}" if len(odd) else f"has no token in row {int(empty[0])}"
        raise ConfigurationError(
            f"{name}_attention_mask {what}: give 1 where there is a token and 0 where there is none, and each row at "
            f"least one token."
        )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask.bool()}


def one_for_each(told: Told, batch_size: int, name: str = "prompt") -> Told:
    """What is told of so many images: the prompt of each, or one of all.

    Args:
        told: Of each prompt.
        batch_size: Images in all.
        name: What messages call the prompt.

    Raises:
        ConfigurationError: There are neither as many nor one.
    """
    count = len(told["encoder_attention_mask"])
    if count not in (1, batch_size):
        raise ConfigurationError(
            f"{count} {name}s were given for {batch_size} images: give one {name} for each, or one for all."
        )
    return {key: value.expand(batch_size, *value.shape[1:]) for key, value in told.items()}


def of_one_length(first: Told, second: Told) -> tuple[Told, Told]:
    """Both padded to the longer of their lengths, so that a network may be told them in one batch."""
    length = max(one["encoder_attention_mask"].shape[1] for one in (first, second))
    return _padded(first, length), _padded(second, length)


def _padded(told: Mapping[str, Tensor], length: int) -> Told:
    states, mask = told["encoder_hidden_states"], told["encoder_attention_mask"]
    room = length - mask.shape[1]
    return {"encoder_hidden_states": pad(states, (0, 0, 0, room)), "encoder_attention_mask": pad(mask, (0, room))}


def negative_of(prompt: Prompt | None, embeds: Tensor | None) -> Prompt | None:
    """The negative prompt, the empty text where none is given in any form."""
    return EMPTY if prompt is None and embeds is None else prompt
