"""Networks of transformers as a process of tokens calls them: K logits of each site, the mask kept out of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_hub.data.tokenization import Tokenization
from vdm_hub.errors import ConfigurationError, in_one_line
from vdm_hub.hub.schemas import Count
from vdm_hub.models.loading import CheckedModel

_SINES = 64
"""The sines and cosines of a timestep that its embedding reads."""


class TokenTimeEmbedding(CheckedModel, ModelMixin, ConfigMixin):
    """A vector that is added to the embedding of every token, and says the timestep: zero before training.

    Args:
        width: Of the tokens' embeddings.

    >>> import torch
    >>> embedding = TokenTimeEmbedding(8)
    >>> embedding(torch.tensor([0.0, 500.0])).abs().max().item()
    0.0
    """

    @register_to_config
    def __init__(self, width: Count) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(_SINES, width)
        nn.init.zeros_(self.embedding.linear_2.weight)
        nn.init.zeros_(self.embedding.linear_2.bias)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps, (B,), as vectors, (B, width)."""
        found: Tensor = self.embedding(get_timestep_embedding(timestep, _SINES, True, 0).to(self.dtype))
        return found


class TokenNetwork(nn.Module):
    """A model of transformers that gives logits, called as a process of tokens calls its network.

    It takes values 0..K-1 and K for what is masked, (B, L), as `Tokenization` has them, and gives K logits of each
    site, (B, L, K), without that of the mask. The timestep is not read, as what is masked tells it, unless there is a
    `TokenTimeEmbedding`.

    Args:
        model: Any whose attention is not causal and whose first output are logits, (B, L, V): `BertForMaskedLM`,
            `ModernBertForMaskedLM`, `LlamaForCausalLM` with ``is_causal=False``, ...
        tokenization: The tokenizer: its ids are the rows of the model's embeddings.
        time_embedding: Tells the model the timestep.
    """

    def __init__(
        self, model: Any, tokenization: Tokenization, time_embedding: TokenTimeEmbedding | None = None
    ) -> None:
        super().__init__()
        self.model, self.time_embedding = model, time_embedding
        self.mask_id, self.num_values = tokenization.mask_id, tokenization.num_values
        self._pads = getattr(model.config.get_text_config(), "pad_token_id", None) is not None
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._first_position = _first_position(model) if takes_positions else 0
        self._repeated_blocks = sorted(getattr(model, "_no_split_modules", None) or ())
        self._supports_gradient_checkpointing = bool(getattr(model, "supports_gradient_checkpointing", False))
        config = model.config.get_text_config()
        if config.vocab_size < tokenization.num_ids:
            raise ConfigurationError(
                f"the {type(model).__name__} knows {config.vocab_size:,} tokens, and the tokenizer has "
                f"{tokenization.num_ids:,}, its mask among them: give the tokenizer of that network, or a network of "
                f"so many tokens."
            )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def enable_gradient_checkpointing(self) -> None:
        """Keep only what enters each block, and compute the rest again in the backward pass."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self, sample: Tensor, timestep: Tensor, attention_mask: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The logits, (B, L, K), in float32 or above.

        Args:
            sample: Values, K for what is masked, (B, L).
            timestep: (B,).
            attention_mask: Where there is a token, (B, L); everywhere where not given.
            return_dict: Nothing: the output is a tuple.
        """
        ids = self._ids(sample.long())
        told: dict[str, Tensor] = {"input_ids": ids}
        if self.time_embedding is not None:
            embedded = self.model.get_input_embeddings()(ids)
            told = {"inputs_embeds": embedded + self.time_embedding(timestep)[:, None].to(embedded.dtype)}
        # No token is padding here, whatever id a model takes for it: some would find lengths and positions by it.
        if attention_mask is None and self._pads:
            attention_mask = torch.ones_like(ids)
        if self._first_position:
            places = torch.arange(ids.shape[1], device=ids.device) + self._first_position
            told["position_ids"] = places.expand_as(ids)
        logits = self.model(**told, attention_mask=attention_mask, return_dict=False)[0]
        logits = self._without_mask(logits)
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)),)

    def _ids(self, levels: Tensor) -> Tensor:
        if self.mask_id == self.num_values:
            return levels
        ids = levels + (levels >= self.mask_id).to(levels.dtype)
        return torch.where(levels == self.num_values, self.mask_id, ids)

    def _without_mask(self, logits: Tensor) -> Tensor:
        if self.mask_id == self.num_values:
            return logits[..., : self.num_values]
        return torch.cat([logits[..., : self.mask_id], logits[..., self.mask_id + 1 : self.num_values + 1]], -1)


def positions_of(model: Any) -> int | None:
    """How many tokens a model takes at once, where its config says so."""
    config = model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if known is None or known < 1:
        return None
    return int(known) - _first_position(model)


def _first_position(model: Any) -> int:
    """The number of a text's first position: models after RoBERTa count from behind that of the padding."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and "position" in name.rpartition(".")[2]:
            return int(padding) + 1
    return 0


def token_embeddings(model: Any) -> nn.Module:
    """The embeddings of a model's tokens, a row each.

    Raises:
        ConfigurationError: It has none.
    """
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module) or getattr(found, "weight", None) is None:
        raise ConfigurationError(
            f"the {type(model).__name__} has no table of embeddings of its tokens: give a model that has one, such as "
            f"BertForMaskedLM."
        )
    return found


def check_token_model(model: Any, length: int) -> None:
    """Refuse a model that takes no windows of a length, gives no logits, or whose attention is causal.

    A change of a token in the middle must reach logits before it; that is tried on the model itself, with tokens that
    are no special ones, as a model may read where a text ends from those.

    Raises:
        ConfigurationError: It is such a model.
    """
    name, most = type(model).__name__, positions_of(model)
    if most is not None and length > most:
        raise ConfigurationError(
            f"windows are {length:,} tokens long, and the {name} has {most:,} positions: give a window_length of at "
            f"most so many, or a network with more (max_position_embeddings)."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigurationError(f"the {name} has an encoder and a decoder: give a model of one stack, such as BERT.")
    device, size = next(model.parameters()).device, model.config.get_text_config().vocab_size
    if device.type == "meta":
        return
    ordinary = _ordinary_ids(model, size).to(device)
    turn, middle = torch.arange(length, device=device), length // 2
    ids = ordinary[turn % len(ordinary)][None]
    changed = torch.where(turn == middle, ordinary[(turn + 1) % len(ordinary)], ids)
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            first, second = (model(input_ids=one, return_dict=False)[0] for one in (ids, changed))
    except Exception as error:  # any library's model may raise anything
        raise ConfigurationError(
            f"the {name} can't be called on {length} tokens ({type(error).__name__}: {in_one_line(error)}): give a "
            f"model of transformers that gives logits of each token, such as BertForMaskedLM."
        ) from error
    finally:
        model.train(was_training)
    if first.ndim != 3 or first.shape[:2] != ids.shape or first.shape[2] < size:
        raise ConfigurationError(
            f"the {name} gives an output of shape {tuple(first.shape)} for {length} tokens of {size}: give a model "
            f"with a head that gives logits of each token, such as {masked_model_of(model.config.model_type)}."
        )
    if middle and len(ordinary) > 1 and torch.equal(first[:, :middle], second[:, :middle]):
        raise ConfigurationError(
            f"the attention of the {name} is causal: no logits depend on a token after them, and each token here is "
            f"found from those on both sides. Give a masked language model, or a bidirectional one (of Llama's kind "
            f"by is_causal=False in its config)."
        )


def masked_model_of(kind: str | None) -> str:
    """The masked language model of a kind of models of transformers; BERT's where that has none.

    >>> masked_model_of("roberta"), masked_model_of("gpt2")
    ('RobertaForMaskedLM', 'BertForMaskedLM')
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as NAMES

    found = NAMES.get(kind)
    return found if isinstance(found, str) and "ForConditional" not in found else "BertForMaskedLM"


def _ordinary_ids(model: Any, size: int) -> Tensor:
    """The ids that a model's config gives no meaning; all, where fewer than two are left."""
    told = model.config.get_text_config().to_dict()
    named = [value for name, value in told.items() if name.endswith(("_token_id", "_index"))]
    special = {one for value in named for one in (value if isinstance(value, list) else [value])}
    found = [one for one in range(size) if one not in special]
    return torch.tensor(found if len(found) > 1 else range(size))


TokenTimeEmbedding.__module__ = "vdm_hub"
