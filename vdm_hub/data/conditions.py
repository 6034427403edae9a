"""The condition of an image, which a network is told beside the timestep: its class, or its caption."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, TypeAlias, TypedDict

import torch
from torch import Tensor

from vdm_hub.errors import ConfigurationError, explained, in_one_line, shortened, unknown_name
from vdm_hub.hub.schemas import Record, Within

CLASS_LABELS = "class_labels"
"""The name under which a batch holds the classes of its images, and under which a network is given them."""

MOST_CLASSES = 2**24


class Classes(TypedDict):
    """What a pipeline's config says of the classes that its model is conditioned on.

    Attributes:
        count: C, how many there are; the null class, of which training tells nothing, is number C.
        names: Their names, in their order; ``None`` where they have none.
        dropout: The share of training images whose class was replaced by the null class; 0: there is none.
        column: The column of the training dataset that held them.
    """

    count: Annotated[int, Within(1, MOST_CLASSES)]
    names: Annotated[list[Annotated[str, Within(0, 1000)]], Within(1, MOST_CLASSES)] | None
    dropout: Annotated[float, Within(0, 1)]
    column: Annotated[str, Within(1, 1000)]


ClassesMapping: TypeAlias = Annotated[dict[str, Any], Record(Classes)]

ClassLabels: TypeAlias = Tensor | Sequence[int | str] | int | str
"""Classes by number or by name: one of each image, or one alone."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """What an image may be, as a network is told it: some classes, or some captions.

    Args:
        condition: What the network is told of each datum.
        numbers: The condition's entry of each candidate, int64, (C,).
        names: Of the candidates.

    >>> two = ClassCondition(3, ("cat", "dog", "eel")).choose(["eel", 0])
    >>> two.names, two.told(torch.tensor([0])), two.places(torch.tensor([0, 2, 2])).tolist()
    (('eel', 'cat'), {'class_labels': tensor([2])}, [1, 0, 0])
    """

    condition: Condition
    numbers: Tensor
    names: tuple[str, ...]

    def told(self, chosen: Tensor) -> dict[str, Tensor]:
        """The network's arguments for some candidates, by their places, (M,)."""
        return self.condition.told({self.condition.entry: self.numbers[chosen]})

    def places(self, numbers: Tensor) -> Tensor:
        """The place of each datum's own entry among the candidates, (N,), where all are there."""
        return (numbers[:, None] == self.numbers).int().argmax(1)

    def prior(self, given: Sequence[float] | Tensor | None = None) -> Tensor:
        """``p(c)`` of the candidates, (C,), float64; uniform where none is given.

        Raises:
            ConfigurationError: It has another length, or is no distribution.
        """
        count = len(self.names)
        if given is None:
            return torch.full((count,), 1 / count, dtype=torch.float64)
        with explained("the prior is no list of numbers", "give one for each candidate", ConfigurationError):
            chances = torch.as_tensor(given, dtype=torch.float64, device="cpu")
        if chances.shape != (count,):
            raise ConfigurationError(
                f"the prior is {shortened(given)}, of shape {tuple(chances.shape)}, and there are {count} candidates: "
                f"give one number for each, {count} numbers that sum to 1."
            )
        total = float(chances.sum())
        if not bool((chances > 0).all()) or not math.isclose(total, 1, rel_tol=1e-6):
            raise ConfigurationError(
                f"the prior is {shortened(given)}, which sums to {total:g}: give {count} numbers above 0 that sum to "
                f"1, one for each candidate."
            )
        return chances / total


class Condition(ABC):
    """What a network is told of each datum: an entry of a batch, how it is hidden, and what the network is to take.

    Attributes:
        entry: The name under which a batch holds it, a whole number for each datum, (B,).
        argument: The name under which a pipeline is given it.
        noun: What it is, in words, after "given the".
        dropout: The share of training data whose condition is hidden.
        column: The column of the training dataset that held it.
        template: What it was made by, from the classes of that column.
    """

    entry: ClassVar[str]
    argument: ClassVar[str]
    noun: ClassVar[str]
    dropout: float
    column: str
    template: str | None = None

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """What the shape of a network that is told it follows from."""

    @abstractmethod
    def pipeline_arguments(self) -> dict[str, Any]:
        """What a pipeline is given, so that it knows of it: its config, and components."""

    @property
    @abstractmethod
    def choices(self) -> Sequence[int | str]:
        """What a pipeline may be told, by the ``argument``: each class, or a few captions."""

    def name_of(self, choice: Any) -> str:
        """One of the ``choices`` for a reader."""
        return str(choice)

    def choices_of(self, words: Sequence[str]) -> list[int | str]:
        """What a user wrote on a command line, as the ``argument`` takes it."""
        return list(words)

    @abstractmethod
    def choose(self, given: Sequence[int | str] | None = None) -> Candidates:
        """The candidates that an image's condition is to be found among, each once.

        Args:
            given: What a pipeline may be told; ``None`` for all that there is.

        Raises:
            ConfigurationError: One is none that the model knows, or is given twice, or they are fewer than two.
        """

    @abstractmethod
    def hide(self, batch: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """The batch with the null class, or the empty text, in place of the labels or captions that are hidden.

        Args:
            batch: With the ``entry``, (B,).
            hidden: Which of them, bool, (B,).
        """

    def told(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the network's arguments in place of the ``entry``."""
        return dict(batch)

    @abstractmethod
    def example(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """The network's arguments of some batch, for whoever looks at shapes alone."""

    @property
    def record(self) -> dict[str, str]:
        """What the record of a run says of it, beside its recipe."""
        return {}

    def key(self, numbers: Tensor) -> str:
        """The SHA-256 of what some data are told, by their numbers, int64."""
        return f"sha256:{hashlib.sha256(numbers.numpy().tobytes()).hexdigest()}"

    def check_null(self) -> None:
        """Refuse to tell a model nothing that was trained without condition dropout.

        Raises:
            ConfigurationError: It knows no datum without its condition.
        """
        if self.dropout == 0:
            raise ConfigurationError(
                f"the model was trained without condition dropout, so that it knows no image without its {self.noun}: "
                f"leave guidance out, or train one with --condition_dropout 0.1."
            )


@dataclass(frozen=True)
class ClassCondition(Condition):
    """The classes that a model is conditioned on, by number and by name.

    Args:
        count: C, how many there are.
        names: Their names, in their order.
        dropout: The share of training images whose class is replaced by the null class, number C, so that the model
            also learns ``p(x)``, which guidance asks for (Ho and Salimans, arXiv 2207.12598, algorithm 1); 0 for none.
        column: The column of the training dataset that holds them.

    Raises:
        ConfigurationError: There are not as many names as classes, or two classes of one name.

    >>> fashion = ClassCondition(3, ("shirt", "sandal", "sneaker"), dropout=0.1)
    >>> fashion.numbers(["sneaker", 0]).tolist(), fashion.null_number, fashion.embeddings
    ([2, 0], 3, 4)
    """

    count: int
    names: tuple[str, ...] | None = None
    dropout: float = 0.0
    column: str = "label"

    entry = argument = CLASS_LABELS
    noun = "class"

    def __post_init__(self) -> None:
        if self.names is not None and (len(self.names) != self.count or len(set(self.names)) != self.count):
            raise ConfigurationError(
                f"{self.count} classes have the names {shortened(list(self.names))}: give each one of its own."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClassCondition:
        """The condition of a `Classes` mapping."""
        names = config["names"]
        return cls(config["count"], None if names is None else tuple(names), config["dropout"], config["column"])

    @property
    def choices(self) -> range:
        """The numbers of the classes."""
        return range(self.count)

    def pipeline_arguments(self) -> dict[str, Any]:
        """The `Classes` mapping of a pipeline's config."""
        return {"classes": asdict(self) | {"names": None if self.names is None else list(self.names)}}

    @property
    def null_number(self) -> int | None:
        """The number of the null class, C; ``None`` where training knew none."""
        return self.count if self.dropout > 0 else None

    @property
    def embeddings(self) -> int:
        """How many classes the network knows: C, and the null class where there is one."""
        return self.count + (self.dropout > 0)

    @property
    def sizes(self) -> dict[str, int]:
        """What a network's table of classes follows from: how many there are, and whether there is a null class."""
        return {"classes": self.count, "null": int(self.dropout > 0)}

    def name_of(self, choice: Any) -> str:
        """The name of the class of a number, or that where it has none.

        >>> ClassCondition(2).name_of(1)
        '1'
        """
        return str(choice) if self.names is None else self.names[choice]

    def numbers(self, given: ClassLabels) -> Tensor:
        """Classes by number or name as numbers, int64.

        Args:
            given: One of each image, (B,), or one alone, which gives ().

        Raises:
            ConfigurationError: A number is out of range or of another type, or a name is unknown; the message holds
                the nearest one.
        """
        if isinstance(given, str):
            return torch.tensor(self._number(given))
        if hasattr(given, "tolist") and not isinstance(given, Tensor):  # of numpy
            given = given.tolist()
        if isinstance(given, list | tuple) and not given:
            raise ConfigurationError(f"class_labels are {shortened(given)}: give a class for each image.")
        if isinstance(given, list | tuple) and any(isinstance(one, str) for one in given):
            numbers = [self.numbers(one) for one in given]
            if any(one.ndim for one in numbers):
                raise ConfigurationError(f"class_labels are {shortened(given)}: give one class for each image.")
            return torch.stack(numbers)
        try:
            labels = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"class_labels are {shortened(given)}, no numbers ({in_one_line(error)}): give a class's number, or "
                f"its name, for each image."
            ) from error
        return self._checked(labels)

    def _number(self, name: str) -> int:
        if self.names is None:
            raise ConfigurationError(
                f"class_labels hold {name!r}, and the model's classes have no names: give numbers from 0 to "
                f"{self.count - 1}."
            )
        if name not in self.names:
            raise unknown_name("name in class_labels", name, self.names)
        return self.names.index(name)

    def _checked(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ConfigurationError(
                f"class_labels are {labels.dtype}: give whole numbers from 0 to {self.count - 1}{self._or_names}."
            )
        wrong = (labels < 0) | (labels >= self.count)
        if bool(wrong.any()):
            raise ConfigurationError(
                f"class_labels hold {labels[wrong].flatten()[0].item()}: give whole numbers from 0 to "
                f"{self.count - 1}{self._or_names}."
            )
        return labels.long()

    @property
    def _or_names(self) -> str:
        return "" if self.names is None else f", or names such as {self.names[-1]!r}"

    def choices_of(self, words: Sequence[str]) -> list[int | str]:
        """Classes by name, and by number where no class has that name.

        >>> ClassCondition(3, ("cat", "dog", "2")).choices_of(["2", "1", "cat"])
        ['2', 1, 'cat']
        """
        names = self.names or ()
        return [word if word in names or not word.isdecimal() else int(word) for word in words]

    def choose(self, given: Sequence[int | str] | None = None) -> Candidates:
        """All classes, or some by number or name: see `Condition.choose`."""
        if isinstance(given, str | int):
            raise ConfigurationError(f"candidates is {shortened(given)}: give a list of classes, by number or name.")
        names = [self.name_of(number) for number in range(self.count)]
        asked = list(range(self.count)) if given is None else list(given)
        chosen = [_place(one, names) for one in asked]
        if len(chosen) < 2 or len(set(chosen)) < len(chosen):
            raise ConfigurationError(
                f"candidates are {shortened(asked)}: give at least two, each once, of {shortened(names, 300)}."
            )
        return Candidates(self, torch.tensor(chosen), tuple(names[number] for number in chosen))

    def hide(self, batch: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """The batch with the null class in place of those that are hidden.

        Args:
            batch: With ``class_labels``, (B,).
            hidden: Which of them, bool, (B,).
        """
        labels = batch[CLASS_LABELS]
        assert self.null_number is not None
        return {**batch, CLASS_LABELS: labels.masked_fill(hidden.to(labels.device), self.null_number)}

    def example(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """The network's arguments of some batch, for whoever looks at shapes alone."""
        return {CLASS_LABELS: torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def null(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """The network's arguments of a batch that is told nothing.

        Raises:
            ConfigurationError: The model was trained without condition dropout, so it knows no null class.
        """
        self.check_null()
        return {CLASS_LABELS: torch.full((batch_size,), self.count, device=device)}


def _place(candidate: int | str, names: Sequence[str]) -> int:
    if isinstance(candidate, str) and candidate in names:
        return names.index(candidate)
    if hasattr(candidate, "__index__") and not isinstance(candidate, bool) and 0 <= int(candidate) < len(names):
        return int(candidate)
    raise unknown_name(f"class (of 0 to {len(names) - 1})", candidate, names)
