"""A text encoder with its tokenizer, both of transformers: from texts to a vector for each token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]
from torch import Tensor, nn

from vdm_hub.data.captions import EMPTY
from vdm_hub.errors import shortened, warn
from vdm_hub.models.calls import evaluating
from vdm_hub.models.encodings import Encodings, stored

_UNSAID = 512  # tokens, where neither tokenizer nor config names a limit
_TOKENIZING = Lock()
_DIGESTS: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """An encoder with its tokenizer: from texts to a vector for each token.

    A text's encoding is a function of that text alone: each is encoded for itself, since a batch changes the last bits
    of what its members become.

    Args:
        encoder: Any model of transformers that gives ``last_hidden_state``; what it is trained to do stays as it is.
        tokenizer: Its own.
        max_length: The most tokens of a text, those of its ends included; what both take where not given.
    """

    encoder: Any
    tokenizer: Any
    max_length: int | None = None

    @property
    def width(self) -> int:
        """D, the size of the vector of a token."""
        config = getattr(self.encoder.config, "text_config", self.encoder.config)
        return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)  # OPT projects what it gives

    @property
    def limit(self) -> int:
        """The most tokens of a text."""
        known = [self.max_length, self.tokenizer.model_max_length, _positions(self.encoder)]
        return min((int(one) for one in known if one is not None and 0 < one < 10**9), default=_UNSAID)

    def tokens(self, texts: Sequence[str], noun: str = "caption") -> list[list[int]]:
        """The tokens of texts; those that are too long are cut, and that is said.

        Args:
            texts: Any.
            noun: What a text is, for that warning.
        """
        with _TOKENIZING:  # a tokenizer keeps how it was last asked to cut, for other threads and in what is saved
            found: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
            long = [place for place, one in enumerate(found) if len(one) > self.limit]
            again = [texts[place] for place in long]
            cut = self.tokenizer(again, truncation=True, max_length=self.limit)["input_ids"] if long else []
            self.tokenizer(EMPTY)
        if long:
            for place, one in zip(long, cut, strict=True):
                found[place] = one
            warn(
                f"{len(long)} of {len(texts)} different {noun}s have more than the {self.limit} tokens that the text "
                f"encoder is given, and are cut there; the first is {shortened(texts[long[0]], 200)}.",
                stacklevel=2,
            )
        return [one or [self._end] for one in found]

    @property
    def _end(self) -> int:
        """The token that stands for a text without any."""
        known = [self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id, 0]
        return next(one for one in known if one is not None)

    def encode(self, texts: Sequence[str], noun: str = "caption") -> Encodings:
        """The encodings of texts, in memory."""
        tokens = self.tokens(texts, noun)
        states = torch.cat(list(self._states(tokens)))
        return Encodings(states, torch.tensor([len(one) for one in tokens]), "")

    def stored(self, texts: Sequence[str], *, progress: bool = False) -> Encodings:
        """The encodings of texts, made at most once and kept on the disk: see `vdm_hub.models.encodings.stored`.

        Args:
            texts: The different ones.
            progress: Whether to show a progress bar while they are made.
        """
        return stored(self.digest, self.tokens(texts), self.width, partial(self._states, progress=progress))

    @torch.no_grad()
    def _states(self, tokens: Sequence[Sequence[int]], progress: bool = False) -> Iterator[Tensor]:
        bar: Any = tqdm
        with evaluating(self.encoder), torch.autocast(self._device.type, enabled=False):
            for one in bar(tokens, desc="encoding captions", unit="text", leave=False, disable=not progress):
                ids = torch.tensor([one], device=self._device)
                output = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
                yield output.last_hidden_state[0]

    @property
    def _device(self) -> torch.device:
        """The device on which it computes, which of an offloaded one is not where its weights are."""
        hook = getattr(self.encoder, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self.encoder.device)

    @property
    def digest(self) -> str:
        """The SHA-256 of the encoder's class, config and weights."""
        tensors = self.encoder.state_dict()
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors.values())
        known = _DIGESTS.get(self.encoder)
        if known is not None and known[0] == state:
            return known[1]
        config = {key: value for key, value in self.encoder.config.to_dict().items() if key not in _NOT_THE_MODELS}
        digest = hashlib.sha256(f"{type(self.encoder).__name__} {sorted(config.items(), key=str)}".encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        _DIGESTS[self.encoder] = state, digest.hexdigest()
        return digest.hexdigest()


_NOT_THE_MODELS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def _positions(encoder: Any) -> int | None:
    """The most positions of an encoder; a table that counts from its row of padding has as many fewer (RoBERTa's)."""
    config = encoder.config
    known: int | None = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    return known
