"""Texts as windows of tokens: how documents are joined and cut, so that each byte is counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeAlias, TypedDict

import datasets
import numpy as np
import torch
from torch import Tensor

from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.examples import Examples
from vdm_hub.data.kinds import TOKENS, Units
from vdm_hub.data.tokenization import Encoded, Tokenization
from vdm_hub.errors import ConfigurationError, DataError, warn
from vdm_hub.hub.schemas import Record, Within


class Windows(TypedDict):
    """What a pipeline's config says of how texts become windows.

    Documents are encoded each by itself and joined, each followed by the token that ends a document, where there are
    several. The first window is the first ``length`` tokens; each further one begins with the last ``context`` tokens
    of the one before it, which are given. The last window is the last ``length`` tokens, of which those are given that
    were scored before; a text shorter than a window is filled up with one value, whatever the text, and what it is
    filled with is given, too. So a likelihood is one of texts of so many tokens.

    Attributes:
        length: L, the tokens of a window.
        context: How many of them are given, from the window before.
        text_column: The column of the training dataset that held the texts.
    """

    length: Annotated[int, Within(2, 2**20)]
    context: Annotated[int, Within(0, 2**20)]
    text_column: Annotated[str, Within(1, 1000)]


WindowsMapping: TypeAlias = Annotated[dict[str, Any], Record(Windows)]


@dataclass(frozen=True)
class Cut:
    """How a text is cut into windows: see `Windows`.

    >>> Cut(length=4, context=1).windows(9)
    ([0, 3, 5], [0, 1, 2])
    """

    length: int
    context: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.context < self.length:
            raise ConfigurationError(
                f"window_context is {self.context}, and window_length {self.length}: give a context shorter than a "
                f"window, as what is given is not scored."
            )

    @property
    def stride(self) -> int:
        """How many tokens a window scores, all but the first and the last."""
        return self.length - self.context

    def windows(self, tokens: int) -> tuple[list[int], list[int]]:
        """Where the windows of so many tokens begin, and how many tokens at the start of each are given."""
        starts, given, scored = [0], [0], min(self.length, tokens)
        while scored < tokens:
            start = min(scored - self.context, tokens - self.length)
            starts.append(start)
            given.append(scored - start)
            scored = start + self.length
        return starts, given


@dataclass(frozen=True)
class ContextFacts:
    """What was found of the contexts of some texts.

    Attributes:
        contexts: How many there are.
        characters: In all of them.
        unknown: How many characters the tokenizer does not know.
        altered: How many contexts decode to another text.
        shortened: Of how many the end alone was given.
        left_out: Of how many nothing was given.
    """

    contexts: int = 0
    characters: int = 0
    unknown: int = 0
    altered: int = 0
    shortened: int = 0
    left_out: int = 0

    def __add__(self, other: ContextFacts) -> ContextFacts:
        """The facts of two sets of contexts together."""
        return ContextFacts(**_sums(self, other))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not given of them, one sentence each."""
        found, of_all = [], f"of {self.contexts:,} contexts"
        if self.unknown:
            found.append(
                f"the tokenizer does not know {self.unknown:,} of {self.characters:,} characters of the contexts "
                f"({100 * self.unknown / self.characters:.3g} %): what was given says less than they do"
            )
        elif self.altered:
            found.append(f"the tokenizer changes {self.altered:,} {of_all}: decoding what was given gives others")
        if self.left_out:
            found.append(
                f"nothing was given of {self.left_out:,} {of_all}, as a window has no room for them beside the text: "
                f"these figures are of the text alone"
            )
        if self.shortened:
            found.append(
                f"{self.shortened:,} {of_all} are longer than a window has room for: their last tokens were given"
            )
        return tuple(found)


@dataclass(frozen=True)
class TextFacts:
    """What was found of some texts when they were encoded.

    Attributes:
        documents: How many there are.
        characters: In all of them.
        unknown: How many characters the tokenizer does not know.
        altered: How many documents decode to another text.
        before: What was found of the contexts that stand before them.
    """

    documents: int = 0
    characters: int = 0
    unknown: int = 0
    altered: int = 0
    before: ContextFacts = ContextFacts()

    def __add__(self, other: TextFacts) -> TextFacts:
        """The facts of two sets of texts together."""
        return TextFacts(**_sums(self, other))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is lost on the way, one sentence each."""
        found = []
        if self.unknown:
            share = 100 * self.unknown / max(self.characters, 1)
            found.append(
                f"the tokenizer does not know {self.unknown:,} of {self.characters:,} characters ({share:.3g} %), so "
                f"that there is no figure in bits/byte"
            )
        elif self.altered:
            found.append(
                f"the tokenizer changes {self.altered:,} of {self.documents:,} documents, as decoding gives others, "
                f"so that there is no figure in bits/byte"
            )
        return (*found, *self.before.notes)

    @property
    def whole(self) -> bool:
        """Whether the tokens say all of the texts: then a likelihood of tokens is one of texts."""
        return not (self.unknown or self.altered)


def _sums(first: Any, second: Any) -> dict[str, Any]:
    """The sum of each field of two dataclasses, by its name."""
    return {one.name: getattr(first, one.name) + getattr(second, one.name) for one in fields(first)}


class _Texts(Examples):
    """What windows in memory and those of a stream have in common."""

    kind = TOKENS
    tokenization: Tokenization
    cut: Cut

    @property
    def num_levels(self) -> int:  # type: ignore[override]
        """The number of values of a token, K: all of the vocabulary but the mask."""
        return self.tokenization.num_values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a window, (L,)."""
        return (self.cut.length,)

    def pipeline_arguments(self, arguments: DataArguments) -> dict[str, Any]:
        """The tokenizer, and how texts became windows."""
        windows: Windows = {
            "length": self.cut.length,
            "context": self.cut.context,
            "text_column": arguments.text_column,
        }
        return {"tokenizer": self.tokenization.tokenizer, "windows": windows}


@dataclass(frozen=True, eq=False)
class TokenWindows(_Texts):
    """Windows of tokens, of texts that are held in memory as one sequence.

    Args:
        tokens: Values 0..K-1, int32, (N,): of all documents, joined.
        sizes: The UTF-8 bytes that each stands for, (N,).
        tokenization: The tokenizer.
        cut: How the sequence is cut.
        facts: What was found of the texts.
        shifted: Whether each window begins at a random place at each use, up to a stride later: for training.
        most: Only the first so many windows.
        known: How many tokens at the beginning are given, too.
        lengths: How many tokens each document has, without the one that ends it, (D,); all are one where not given.
        ended: Whether each document is followed by the token that ends it.

    >>> from vdm_hub.data.tokenization import make_tokenizer
    >>> byte = Tokenization(make_tokenizer("byte"))
    >>> windows = encode_texts(["abcdefg"], byte, Cut(4))
    >>> batch = windows.take(torch.arange(2))
    >>> batch["levels"].tolist(), batch["given"].sum(1).tolist()
    ([[97, 98, 99, 100], [100, 101, 102, 103]], [0, 1])
    >>> windows.units(2).per_datum, windows.units(2).bytes_per_value
    (3.5, 1.0)
    """

    tokens: Tensor
    sizes: Tensor
    tokenization: Tokenization
    cut: Cut
    facts: TextFacts = TextFacts()
    shifted: bool = False
    most: int | None = None
    known: int = 0
    lengths: Tensor | None = None
    ended: bool = False
    is_stream: ClassVar[bool] = False

    @property
    def documents(self) -> list[Tensor]:
        """The tokens of each document, without the one that ends it.

        >>> from vdm_hub.data.tokenization import make_tokenizer
        >>> windows = encode_texts(["ab", "c"], Tokenization(make_tokenizer("byte")), Cut(4))
        >>> windows.tokens.tolist(), [one.tolist() for one in windows.documents]
        ([97, 98, 256, 99, 256], [[97, 98], [99]])
        """
        if self.lengths is None:
            return [self.tokens]
        parts = self.tokens.split((self.lengths + int(self.ended)).tolist())
        return [part[: len(part) - int(self.ended)] for part in parts]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where each window begins, (windows,), and how many tokens at its start are given, (windows,)."""
        starts, given = self.cut.windows(len(self.tokens))
        if self.shifted:  # what lies in two of them is trained on twice, at other places each time
            given = [0, *[self.cut.context] * (len(given) - 1)]
        given[0] = self.known
        return torch.tensor(starts[: self.most]), torch.tensor(given[: self.most])

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.places[0])

    @property
    def count(self) -> int:
        """The number of windows."""
        return len(self.places[0])

    @property
    def words(self) -> str:
        """How many there are, of how many tokens and bytes."""
        first = "" if self.most is None else "the first "
        return f"{first}{len(self):,} windows, of {len(self.tokens):,} tokens for {int(self.sizes.sum()):,} bytes,"

    @property
    def levels(self) -> Tensor:
        """All windows, (windows, L), as they are measured."""
        return self.take(torch.arange(len(self)))["levels"]

    @property
    def _filled(self) -> int:
        """How many tokens a text shorter than a window lacks."""
        return max(self.cut.length - len(self.tokens), 0)

    def take(self, places: Tensor, offsets: Tensor | None = None) -> dict[str, Tensor]:
        """A batch of windows: see `Examples.take`.

        Returns:
            ``levels``, int64, (B, L); ``given``, where any window has some; and ``attention_mask``, where the text is
            shorter than a window.
        """
        length, given = self.cut.length, self.places[1]
        starts, already = self.places[0][places], given[places]
        if self.shifted and offsets is not None:
            room = max(len(self.tokens) - length, 0)
            starts = (starts + (offsets[:, 0].double() * self.cut.stride).long()).clamp(max=room)
        sites = torch.arange(length)
        filled = sites >= length - self._filled
        where = (starts[:, None] + sites).clamp(max=len(self.tokens) - 1)
        # A network may read what it is told to leave out, so that no token of the text may stand there.
        batch = {"levels": torch.where(filled, self.tokenization.filler, self.tokens[where].long())}
        if self._filled or bool(given.any()):
            batch["given"] = (sites < already[:, None]) | filled
        if self._filled:
            batch["attention_mask"] = (~filled).long().expand(len(places), -1).contiguous()
        return batch

    def scored(self) -> tuple[Tensor, Tensor]:
        """How many tokens each window scores, and how many bytes these stand for, int64, (windows,)."""
        starts, already = self.places
        ends = (starts + self.cut.length).clamp(max=len(self.tokens))
        upto = torch.cat([torch.zeros(1, dtype=torch.int64), self.sizes.long().cumsum(0)])
        return ends - starts - already, upto[ends] - upto[starts + already]

    def units(self, count: int) -> Units:
        """Bits are counted by token and by byte, each of those that the first so many windows score once."""
        each, sizes = (part[:count] for part in self.scored())
        tokens, size = int(each.sum()), int(sizes.sum())
        by_token = size / tokens if self.facts.whole and size else None
        return Units(TOKENS, tokens / len(each), by_token, self.facts.notes, each)

    def augmentation(self, arguments: DataArguments) -> dict[str, bool]:
        """Whether windows begin at random places."""
        return {"window_shift": self.shifted}

    def first(self, count: int | None) -> TokenWindows:
        """The first so many windows."""
        return self if count is None else replace(self, most=count)


def encode_texts(
    texts: Iterable[str], tokenization: Tokenization, cut: Cut, *, ends: bool | None = None, shifted: bool = False
) -> TokenWindows:
    """Texts as windows in memory.

    Args:
        texts: The documents.
        tokenization: The tokenizer.
        cut: How they are cut.
        ends: Whether each is followed by the token that ends a document; where there are several, if not said.
        shifted: As of `TokenWindows`.

    Raises:
        DataError: There are none.
    """
    tokens: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    found: dict[str, Any] = {"documents": 0, "characters": 0, "unknown": 0, "altered": 0}
    end = tokenization.end
    for text in texts:
        encoded = tokenization.encode(text)
        found["documents"] += 1
        found["characters"] += encoded.characters
        found["unknown"] += encoded.unknown
        found["altered"] += encoded.altered
        tokens += [encoded.levels, _end_of(end, end)]
        sizes += [encoded.sizes, _end_of(end, 0)]
    if not tokens or not sum(len(part) for part in tokens[::2]):
        raise _no_tokens(found["characters"])
    lengths = torch.tensor([len(part) for part in tokens[::2]])
    ended = found["documents"] > 1 if ends is None else ends
    if not ended:
        tokens, sizes = tokens[::2], sizes[::2]
    joined, counted = (torch.from_numpy(np.concatenate(parts)) for parts in (tokens, sizes))
    return TokenWindows(
        joined,
        counted,
        tokenization,
        cut,
        TextFacts(**found),
        shifted,
        lengths=lengths,
        ended=ended and end is not None,
    )


def encode_pair(context: str, text: str, tokenization: Tokenization) -> tuple[Encoded, Encoded]:
    """A context, and a text after it as it is encoded there: by itself, where a token would belong to both."""
    first, alone, whole = (tokenization.encode(one) for one in (context, text, context + text))
    count = len(first.levels)
    if len(whole.levels) > count and np.array_equal(whole.levels[:count], first.levels):
        alone = replace(alone, levels=whole.levels[count:], sizes=whole.sizes[count:])
    return first, alone


def _no_tokens(characters: int) -> DataError:
    why = f"the tokenizer has none for their {characters:,} characters" if characters else "they are empty"
    return DataError(f"the texts have no tokens, as {why}: give others, or a tokenizer that knows these.")


def encode_after(text: str, context: str, tokenization: Tokenization, cut: Cut) -> TokenWindows:
    """A text as windows, after a context that is given and in no term.

    The tokens are those of both together, unless one would belong to both: then each is encoded by itself. As much of
    the context's end is given as a window has room for beside the text; where the text alone takes several windows,
    as much as each is given of the one before. What is not given of it is among the facts.

    >>> from vdm_hub.data.tokenization import make_tokenizer
    >>> after = encode_after("cd", "ab", Tokenization(make_tokenizer("byte")), Cut(8))
    >>> after.take(torch.arange(1))["given"].tolist(), after.units(1).per_datum
    ([[True, True, False, False, True, True, True, True]], 2.0)
    """
    first, alone = encode_pair(context, text, tokenization)
    levels, count = alone.levels, len(first.levels)
    if not len(levels):
        raise _no_tokens(alone.characters)
    room = cut.length - len(levels) if len(levels) <= cut.length else cut.context
    kept = min(count, room)
    start = count - kept
    before = ContextFacts(
        contexts=1,
        characters=first.characters,
        unknown=first.unknown,
        altered=int(first.altered),
        shortened=int(0 < kept < count),
        left_out=int(kept == 0 < count),
    )
    facts = TextFacts(1, alone.characters, alone.unknown, int(alone.altered), before)
    tokens = torch.from_numpy(np.concatenate([first.levels[start:], levels]))
    counted = torch.from_numpy(np.concatenate([first.sizes[start:], alone.sizes]))
    return TokenWindows(tokens, counted, tokenization, cut, facts, known=kept)


def encode_each(
    texts: Sequence[str], tokenization: Tokenization, cut: Cut, contexts: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], Units, list[int]]:
    """The windows of some texts as one batch: no window holds two texts, and each text follows its context, if given.

    Returns:
        The batch with ``levels``, ``given`` and ``attention_mask``, (B, L); what its bits are counted by; and how many
        windows each text has.
    """
    parts: list[dict[str, Tensor]] = []
    found: list[tuple[Tensor, Tensor]] = []
    facts = TextFacts()
    for place, text in enumerate(texts):
        context = "" if contexts is None else contexts[place]
        windows = (
            encode_after(text, context, tokenization, cut) if context else encode_texts([text], tokenization, cut)
        )
        batch = windows.take(torch.arange(len(windows)))
        whole = torch.ones_like(batch["levels"])
        parts.append({"given": whole.new_zeros(whole.shape).bool(), "attention_mask": whole} | batch)
        found.append(windows.scored())
        facts = facts + windows.facts
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if bool(joined["attention_mask"].all()):
        del joined["attention_mask"]
    if not bool(joined["given"].any()):
        del joined["given"]
    each, sizes = (torch.cat(part) for part in zip(*found, strict=True))
    tokens, size = int(each.sum()), int(sizes.sum())
    by_token = size / tokens if facts.whole else None
    units = Units(TOKENS, tokens / len(each), by_token, facts.notes, each)
    return joined, units, [len(part) for part, _ in found]


def _end_of(end: int | None, value: int | None) -> np.ndarray:
    return np.array([] if end is None else [value], dtype=np.int32)


@dataclass(frozen=True, eq=False)
class TokenStream(_Texts):
    """Windows of tokens, of texts that are read as a stream: cut at the same places in every pass.

    Args:
        dataset: Of windows, as `stream_windows` gives them.
        tokenization: The tokenizer.
        cut: How the texts are cut.
        shuffle_buffer_size: Windows in the shuffle buffer of training.
    """

    dataset: datasets.IterableDataset
    tokenization: Tokenization
    cut: Cut
    shuffle_buffer_size: int = 1
    is_stream: ClassVar[bool] = True
    num_workers: ClassVar[int] = 0

    words: ClassVar[str] = "a stream of windows"
    facts: ClassVar[TextFacts] = TextFacts()

    @property
    def count(self) -> None:
        """Nothing: only reading all of it would tell."""

    def take(
        self, rows: Sequence[Mapping[str, Any]], offsets: Tensor | None = None, indices: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """A batch of windows: see `Examples.take`."""
        levels = torch.tensor([row["levels"] for row in rows])
        if self.cut.context == 0:
            return {"levels": levels}
        already = torch.tensor([row["already"] for row in rows])
        return {"levels": levels, "given": torch.arange(self.cut.length) < already[:, None]}

    def units(self, count: int) -> Units:
        """Bits are counted by token: how many bytes these are is not known beforehand."""
        return Units(TOKENS, float(self.cut.stride))

    def augmentation(self, arguments: DataArguments) -> dict[str, bool]:
        """Nothing: the windows of a stream begin at fixed places."""
        return {"window_shift": False}


def stream_windows(documents: Iterable[str], tokenization: Tokenization, cut: Cut) -> Iterator[dict[str, Any]]:
    """The windows of documents that are joined as they come; what is left at the end, less than a window, is left out.

    >>> from vdm_hub.data.tokenization import make_tokenizer
    >>> byte = Tokenization(make_tokenizer("byte"))
    >>> [row["levels"] for row in stream_windows(["abc", "de"], byte, Cut(3))]
    [[97, 98, 99], [256, 100, 101]]
    """
    held: list[int] = []
    already, has_warned = 0, False
    for text in documents:
        encoded = tokenization.encode(text)
        if (encoded.unknown or encoded.altered) and not has_warned:
            has_warned = True
            notes = TextFacts(1, encoded.characters, encoded.unknown, int(encoded.altered)).notes
            warn(f"in a document of the stream {notes[0]}.", stacklevel=2)
        held += encoded.levels.tolist()
        held += [] if tokenization.end is None else [tokenization.end]
        while len(held) >= cut.length:
            yield {"levels": held[: cut.length], "already": already}
            held, already = held[cut.stride :], cut.context
