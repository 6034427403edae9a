"""The interface of a split's data, whatever their kind, and the splits of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.conditions import ClassCondition
from vdm_hub.data.kinds import DataKind, Units
from vdm_hub.data.preprocessing import HeldOut

ABOUT_SITES = ("given", "attention_mask")
"""The entries of a batch that say something of each value, (B, *shape): what is given, and what is no padding."""


class Examples(ABC):
    """The data of a split, in memory or as a stream.

    Attributes:
        kind: What they are.
        is_stream: Whether they are read anew in each pass; else they are in memory, and are taken by number.
        num_levels: K: a value of a datum is one of 0..K-1.
        captions: Their captions, where there are some.
    """

    kind: ClassVar[DataKind]
    is_stream: ClassVar[bool]
    num_levels: int
    captions: Any = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a datum, without the batch."""

    @property
    @abstractmethod
    def count(self) -> int | None:
        """How many there are; ``None`` where only reading all of them would tell."""

    @abstractmethod
    def take(self, places: Any, offsets: Tensor | None = None) -> dict[str, Tensor]:
        """A batch of some of them.

        Args:
            places: Their numbers, int64, (B,); of a stream its rows.
            offsets: Draws in [0, 1), (B, 2), that say where those are cut that are larger than a datum; not given,
                where they are cut when they are measured.

        Returns:
            ``levels``, integers, (B, *shape), and what else is known of each: what it is conditioned on, and
            `ABOUT_SITES`.
        """

    @property
    def resized(self) -> bool:
        """Whether any was made smaller, or cut, before it became values."""
        return False

    def mirrored(self, batch: dict[str, Tensor], draws: Tensor) -> dict[str, Tensor]:
        """The batch with some of its data mirrored, of a kind that may be: where the draws, (B,), lie below 1/2."""
        raise NotImplementedError(f"{self.kind.data} are never mirrored")

    @abstractmethod
    def units(self, count: int) -> Units:
        """What the bits of the first so many are counted by."""

    @abstractmethod
    def augmentation(self, arguments: DataArguments) -> dict[str, bool]:
        """What a run does to them at each use, by name."""

    @abstractmethod
    def pipeline_arguments(self, arguments: DataArguments) -> dict[str, Any]:
        """What a pipeline is told of how data become values, by the names of its arguments."""


@dataclass(frozen=True)
class RunData:
    """The splits of a run, all of one kind and shape.

    Args:
        train: To train on.
        validation: Held out, to measure while training.
        test: To measure at the end.
        held_out: How many data of the training split are not trained on, but held out.
        summary: How many data each of them has, and what lies in the folder and is not used: one paragraph.
        held_out_test: How the test data were chosen, where they were held out of the training split.
        notes: What the reader of a figure on the test data must know, one sentence each.
        classes: Those of the label column, where one is asked for.
    """

    train: Examples
    validation: Examples | None
    test: Examples | None
    held_out: int = 0
    summary: str = ""
    held_out_test: HeldOut | None = None
    notes: tuple[str, ...] = ()
    classes: ClassCondition | None = None

    @property
    def kind(self) -> DataKind:
        """What the data are."""
        return self.train.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a datum: (C, H, W) of an image, (L,) of a window of tokens."""
        return self.train.shape

    @property
    def tokenization(self) -> Any:
        """What makes tokens of them, where they are texts."""
        return getattr(self.train, "tokenization", None)

    @property
    def num_levels(self) -> int:
        """The number of levels, K."""
        return self.train.num_levels
