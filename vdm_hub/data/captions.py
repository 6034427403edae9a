"""The captions of images: the different texts of a split, and which of them each image has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from vdm_hub.errors import DataError, shortened
from vdm_hub.hub.schemas import Record, Within

CAPTIONS = "captions"
"""The name under which a batch holds the captions of its images, by their numbers, (B,)."""
EMPTY = ""
"""The text of number 0, which stands for no caption: condition dropout tells it, and guidance by default."""
LONGEST = 10_000
MOST_EXAMPLES = 100


class Captions(TypedDict):
    """What a pipeline's config says of the captions that its model is conditioned on.

    Attributes:
        column: The column of the training dataset that held them, or the classes that they were made from.
        template: What they were made from classes by, such as ``a photo of a {label}``; ``None`` where they were
            there.
        max_length: The most tokens of a caption, those of its ends included; what is longer is cut.
        dropout: The share of training images whose caption was replaced by the empty text; 0: none was.
        examples: A few captions, for pictures.
    """

    column: Annotated[str, Within(1, 1000)]
    template: Annotated[str, Within(1, LONGEST)] | None
    max_length: Annotated[int, Within(1, 2**20)]
    dropout: Annotated[float, Within(0, 1)]
    examples: Annotated[list[Annotated[str, Within(0, LONGEST)]], Within(0, MOST_EXAMPLES)]


CaptionsMapping: TypeAlias = Annotated[dict[str, Any], Record(Captions)]


@dataclass(frozen=True)
class ImageCaptions:
    """The captions of some images.

    Args:
        texts: The different texts, the empty one first.
        numbers: Which of them each image has, int64 of shape (N,).

    >>> captions = ImageCaptions.of(["a cat", "a dog", "a cat"])
    >>> captions.texts, captions.numbers.tolist()
    (('', 'a cat', 'a dog'), [1, 2, 1])
    """

    texts: tuple[str, ...]
    numbers: Tensor

    @classmethod
    def of(cls, captions: Sequence[str]) -> ImageCaptions:
        """The captions of images, one of each."""
        known = {EMPTY: 0}
        numbers = [known.setdefault(one, len(known)) for one in captions]
        return cls(tuple(known), torch.tensor(numbers, dtype=torch.int64))

    def examples(self, count: int) -> tuple[str, ...]:
        """The first so many different texts, but for the empty one."""
        return self.texts[1 : 1 + count]


@dataclass(frozen=True)
class StreamCaptions:
    """The captions of a stream, whose texts were read before.

    Args:
        column: The column that holds them, or the classes that they are made from.
        numbers: The number of each different text, the empty one first.
        of_class: The caption of each class, where they are made from classes.

    >>> captions = StreamCaptions.of_classes("label", ["a cat", "a dog"])
    >>> captions.texts, captions.of_labels(torch.tensor([1, 0])).tolist()
    (('', 'a cat', 'a dog'), [2, 1])
    """

    column: str
    numbers: Mapping[str, int]
    of_class: tuple[str, ...] | None = None

    @classmethod
    def of_texts(cls, column: str, texts: Iterable[Any]) -> StreamCaptions:
        """The captions of a column of text, of which the different ones are kept in memory."""
        numbers = {EMPTY: 0}
        for row, one in enumerate(texts):
            if not isinstance(one, str):
                raise no_caption(row, column, one)
            numbers.setdefault(one, len(numbers))
        return cls(column, numbers)

    @classmethod
    def of_classes(cls, column: str, captions: Sequence[str]) -> StreamCaptions:
        """The captions of a column of classes."""
        texts = ImageCaptions.of(captions).texts
        return cls(column, {text: number for number, text in enumerate(texts)}, tuple(captions))

    @property
    def texts(self) -> tuple[str, ...]:
        """The different texts, the empty one first."""
        return tuple(self.numbers)

    def of_labels(self, labels: Tensor) -> Tensor:
        """The captions of images of these classes, by number."""
        assert self.of_class is not None
        return torch.tensor([self.numbers[one] for one in self.of_class])[labels]

    def of_rows(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """The captions of rows, by number.

        Raises:
            DataError: One is none of those that were there before.
        """
        texts = [row[self.column] for row in rows]
        unknown = next((one for one in texts if one not in self.numbers), None)
        if unknown is not None:
            raise DataError(
                f"the stream's column {self.column!r} holds {shortened(unknown)}, which was not there when its "
                f"captions were read: a file has changed. Put it back as it was, or train anew."
            )
        return torch.tensor([self.numbers[one] for one in texts])

    def examples(self, count: int) -> tuple[str, ...]:
        """The first so many different texts, but for the empty one."""
        return self.texts[1 : 1 + count]


def described_captions(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where the captions of a model's training came from, for whoever reads other images like those."""
    if config is None:
        return {}
    named = "caption_column" if config["template"] is None else "label_column"
    return {named: config["column"], "caption_template": config["template"]}


def no_caption(row: int, column: str, found: object) -> DataError:
    """The error for a row without a caption."""
    return DataError(
        f"row {row} of the column {column!r} holds {shortened(found)} instead of a caption: leave the images without "
        f"one out, or give them an empty text."
    )
