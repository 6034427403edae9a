"""The caption of an image as a condition: an encoder's vectors, one for each token, which a network attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vdm_hub.data.captions import CAPTIONS, ImageCaptions, StreamCaptions
from vdm_hub.data.conditions import Candidates, Condition
from vdm_hub.errors import ConfigurationError, DataError, shortened
from vdm_hub.models.encodings import Encodings
from vdm_hub.models.text_encoders import TextEncoder


@dataclass(frozen=True)
class TextCondition(Condition):
    """The captions that a model is conditioned on.

    Args:
        width: D, the size of the vector of a token.
        column: The column of the training dataset that held the captions, or the classes that they were made from.
        template: What they were made by, from the names of classes.
        max_length: The most tokens of a caption.
        dropout: The share of training images whose caption is replaced by the empty text, so that the model also
            learns ``p(x)``, which guidance asks for; 0 for none.
        examples: A few captions, for pictures.
        encodings: Of the captions at hand, by their numbers; the empty text is number 0.
        text: The encoder and its tokenizer, where they are at hand.
    """

    width: int
    column: str = "text"
    template: str | None = None
    max_length: int = 512
    dropout: float = 0.0
    examples: tuple[str, ...] = ()
    encodings: Encodings | None = field(default=None, repr=False, compare=False)
    text: TextEncoder | None = field(default=None, repr=False, compare=False)

    entry = CAPTIONS
    argument = "prompt"
    noun = "caption"

    @classmethod
    def from_config(cls, width: int, config: Mapping[str, Any], text: TextEncoder | None = None) -> TextCondition:
        """The condition of a `Captions` mapping, and of a network of such a width."""
        return cls(width, **{**config, "examples": tuple(config["examples"])}, text=text)

    @property
    def sizes(self) -> dict[str, int]:
        """The width of what a network attends to."""
        return {"text_width": self.width}

    @property
    def choices(self) -> tuple[str, ...]:
        """The examples."""
        return self.examples

    def pipeline_arguments(self) -> dict[str, Any]:
        """The `Captions` mapping of a pipeline's config, and the encoder with its tokenizer."""
        names = ("column", "template", "max_length", "dropout")
        config = {name: getattr(self, name) for name in names} | {"examples": list(self.examples)}
        text = {} if self.text is None else {"text_encoder": self.text.encoder, "tokenizer": self.text.tokenizer}
        return {"captions": config} | text

    def of_images(self, captions: ImageCaptions | StreamCaptions | None) -> TextCondition:
        """The condition with the encodings of the captions of some images, made at most once.

        Raises:
            DataError: They have none.
            ConfigurationError: There is no encoder at hand.
        """
        if captions is None:
            raise DataError(
                "the network is conditioned on captions, and the images have none: name the column that holds them "
                "with --caption_column, or that of their classes with --label_column and a --caption_template."
            )
        return replace(self, encodings=self._text.stored(captions.texts))

    def encoded(self, texts: Sequence[str], noun: str = "caption") -> Encodings:
        """The encodings of texts, made now.

        Args:
            texts: Any.
            noun: What a text is, where it must be cut.

        Raises:
            ConfigurationError: There is no encoder at hand.
        """
        return self._text.encode(texts, noun)

    @property
    def _text(self) -> TextEncoder:
        if self.text is None:
            raise ConfigurationError(
                "the pipeline has no text_encoder and tokenizer, so that a text says nothing to it: load it with "
                "both, or give prompt_embeds."
            )
        return self.text

    def choose(self, given: Sequence[int | str] | None = None) -> Candidates:
        """Some captions, as texts, which are encoded now: see `Condition.choose`; there is no list of all."""
        texts = [one for one in given or () if isinstance(one, str)]
        if isinstance(given, str) or len(texts) != len(given or ()) or len(set(texts)) != max(len(texts), 2):
            raise ConfigurationError(
                f"candidates are {shortened(given)}, and the model is told captions: give at least two texts, each "
                f"once, such as ['a photo of a shirt', 'a photo of a bag']."
            )
        told = replace(self, encodings=self.encoded(texts))
        return Candidates(told, torch.arange(len(texts)), tuple(texts))

    def hide(self, batch: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """The batch with the empty text in place of the captions that are hidden.

        Args:
            batch: With ``captions``, their numbers, (B,).
            hidden: Which of them, bool, (B,).
        """
        numbers = batch[CAPTIONS]
        return {**batch, CAPTIONS: numbers.masked_fill(hidden.to(numbers.device), 0)}

    def told(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with encodings in place of the captions' numbers, all batches of one shape."""
        assert self.encodings is not None
        others = {name: value for name, value in batch.items() if name != CAPTIONS}
        told = self.encodings.take(batch[CAPTIONS].cpu())
        return others | {name: value.to(batch[CAPTIONS].device) for name, value in told.items()}

    @property
    def record(self) -> dict[str, str]:
        """The fingerprint of the encoder and of all captions."""
        return {} if self.encodings is None else {"text_encodings": self.encodings.key}

    def key(self, numbers: Tensor) -> str:
        """The SHA-256 of what some images are told: the encodings, and which of them."""
        assert self.encodings is not None
        return f"{super().key(numbers)} {self.encodings.key}"

    def example(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """The network's arguments of some batch, for whoever looks at shapes alone."""
        length = self.max_length if self.encodings is None else self.encodings.longest
        return {
            "encoder_hidden_states": torch.zeros(batch_size, length, self.width, device=device),
            "encoder_attention_mask": torch.ones(batch_size, length, dtype=torch.bool, device=device),
        }
