"""From the name of a dataset of texts to windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets

from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.examples import RunData
from vdm_hub.data.held_out import number_to_hold_out
from vdm_hub.data.overlaps import overlaps
from vdm_hub.data.sequences import Cut, TokenStream, TokenWindows, encode_texts, stream_windows
from vdm_hub.data.sources import Source, UnknownSplitError, warn_of_no_test
from vdm_hub.data.texts import open_texts, texts_of
from vdm_hub.data.tokenization import Tokenization, open_tokenizer
from vdm_hub.errors import DataError, warn


def load_texts(arguments: DataArguments, tokenization: Tokenization | None = None) -> RunData:
    """Load the splits that the arguments name, tokenize them, and cut them into windows.

    Args:
        arguments: Of the recipe.
        tokenization: In place of the ``tokenizer`` of the arguments.

    Raises:
        DataError: A dataset, split or column is not there, or a text is none, empty, or not UTF-8.
        ConfigurationError: The tokenizer is none that can be used, or a context is no shorter than a window.
    """
    source = open_texts(arguments.source, arguments.dataset_config_name)
    parts = _parts(source, arguments)
    cut = Cut(arguments.window_length, arguments.window_context)
    train = _training_windows(source, parts["train"], arguments, cut, tokenization)

    def measured(use: str) -> TokenWindows | None:
        """The windows of a part that is measured, in memory."""
        if (split := parts.get(use)) is None:
            return None
        return encode_texts(_texts(source, split, arguments), train.tokenization, cut)

    validation, test = measured("validation"), measured("test")
    used = {"trains on": (train, "train"), "validates on": (validation, "validation"), "tests on": (test, "test")}
    said = ", ".join(
        f"{verb} {'none' if windows is None else f'{windows.words} of {parts[use]!r}'}"
        for verb, (windows, use) in used.items()
    )
    summary = f"data from {source.name!r}: {said}.{source.note}"
    return RunData(
        train, validation, test, summary=summary, notes=_notes(source, parts, arguments, train, validation, test)
    )


def load_windows(
    source: str,
    split: str,
    tokenization: Tokenization,
    cut: Cut,
    *,
    config_name: str | None = None,
    text_column: str = "text",
    max_windows: int | None = None,
    say: Callable[[str], None] | None = None,
) -> TokenWindows:
    """Load one split of texts into memory, to evaluate on.

    Args:
        source: A text file, a folder of text files or of Parquet files, a Parquet file, or a dataset on the Hub.
        split: The split's name; slices such as ``"test[:100]"`` are understood.
        tokenization: The model's tokenizer.
        cut: How its texts are cut into windows.
        config_name: The configuration of the dataset, where it has several.
        text_column: The column that holds the texts.
        max_windows: Take this many windows, from the start.
        say: Is called with what was read.

    Raises:
        DataError: As `load_texts`.
    """
    opened = open_texts(source, config_name)
    rows = _rows(opened, split)
    windows = encode_texts(_texts_in(rows, opened, split, text_column), tokenization, cut).first(max_windows)
    if say is not None:
        empty = len(rows) - windows.facts.documents
        left_out = f"; {empty:,} of {len(rows):,} documents are empty, and left out" if empty else ""
        say(f"data from {source!r}: reads {windows.words} of {split!r}{left_out}.{opened.note}")
    return windows


def _parts(source: Source, arguments: DataArguments) -> dict[str, str]:
    """The split of each use, by the use; what is held out is taken from the end of the training split.

    Raises:
        DataError: There is no such split, or so many documents can't be held out.
    """
    train, test = arguments.train_split, _test_split(source, arguments)
    found = {"train": train, "validation": arguments.validation_split, "test": test}
    held = {"validation": arguments.validation_size, "test": 0 if test is not None else arguments.test_size}
    if not any(held.values()):
        return {use: split for use, split in found.items() if split is not None}
    if arguments.streaming or not train.isidentifier():
        use = next(use for use, size in held.items() if size)
        how = "read as a stream" if arguments.streaming else "a part of splits"
        raise DataError(
            f"{use}_size is {held[use]}, and {train!r} is {how}: name a split, or a part of one, with --{use}_split."
        )
    left = rows = source.sizes[train]
    for use in ("test", "validation"):
        if held[use]:
            stop, left = left, left - number_to_hold_out(held[use], left)
            found[use] = f"{train}[{left}:{stop}]"
    if left < 1:
        raise DataError(f"{train!r} has {rows} documents, and all would be held out: hold out fewer, or none.")
    found["train"] = f"{train}[:{left}]"
    return {use: split for use, split in found.items() if split is not None}


def _test_split(source: Source, arguments: DataArguments) -> str | None:
    """The test split, where there is one; that there is none is said."""
    split = arguments.test_split
    if split is None:
        return None
    try:
        source.read(split, streaming=arguments.streaming)
    except UnknownSplitError as error:
        warn_of_no_test(error, split, arguments.test_size, stacklevel=4)
        return None
    if arguments.test_size:
        remedy = "to hold out a share all the same, set --test_split none"
        warn(f"the split {split!r} is there to be tested on, so test_size takes nothing: {remedy}.", stacklevel=4)
    return split


def _texts(source: Source, split: str, arguments: DataArguments) -> Iterator[str]:
    return _read(source, split, arguments.text_column, streaming=arguments.streaming)


def _read(source: Source, split: str, column: str, *, streaming: bool = False) -> Iterator[str]:
    """The texts of a split, or of a slice of one, which is of documents: see `_rows`."""
    yield from _texts_in(_rows(source, split, streaming=streaming), source, split, column)


def _rows(source: Source, split: str, *, streaming: bool = False) -> Any:
    """The rows of a split, or of a slice of one.

    Raises:
        DataError: There are none.
    """
    rows = source.read(split, streaming=streaming)
    if not streaming and not len(rows):
        sizes = ", ".join(f"{name!r} has {size:,}" for name, size in source.sizes.items())
        raise DataError(
            f"{split!r} of {source.name!r} has no document: slices are of documents, of which {sizes}. Name a split, "
            f"or a slice with at least one; part of a document is read by --max_images of an evaluation and "
            f"--max_train_samples of a training, which count windows."
        )
    return rows


def _texts_in(rows: Any, source: Source, split: str, column: str) -> Iterator[str]:
    """The texts of rows, but for empty ones."""
    with source.explained():
        yield from texts_of(rows, column, split)


def _training_windows(
    source: Source, split: str, arguments: DataArguments, cut: Cut, tokenization: Tokenization | None
) -> TokenWindows | TokenStream:
    texts = partial(_texts, source, split, arguments)
    if tokenization is None:
        tokenization = open_tokenizer(
            str(arguments.tokenizer), None if arguments.streaming else texts, arguments.vocabulary_size
        )
    if not arguments.streaming:
        return encode_texts(texts(), tokenization, cut, shifted=arguments.window_shift).first(
            arguments.max_train_samples
        )
    how = _Passes(source, split, arguments, tokenization, cut)
    stream = datasets.IterableDataset.from_generator(_windows, gen_kwargs={"how": how})
    if arguments.max_train_samples is not None:
        stream = stream.take(arguments.max_train_samples)
    return TokenStream(stream, tokenization, cut, arguments.shuffle_buffer_size)


@dataclass(frozen=True, eq=False)
class _Passes:
    """The passes over a stream of texts."""

    source: Source
    split: str
    arguments: DataArguments
    tokenization: Tokenization
    cut: Cut

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return stream_windows(_texts(self.source, self.split, self.arguments), self.tokenization, self.cut)


def _windows(how: _Passes) -> Iterator[dict[str, Any]]:
    yield from how


def _notes(
    source: Source,
    parts: Mapping[str, str],
    arguments: DataArguments,
    train: TokenWindows | TokenStream,
    validation: TokenWindows | None,
    test: TokenWindows | None,
) -> tuple[str, ...]:
    """What the reader of a figure on the test texts must know; what concerns the run is warned of."""
    found = overlaps(source, parts, streaming=arguments.streaming, data="documents")
    parts_read = {"training": train, "validation": validation, "test": test}
    lost = {use: () if part is None or part.is_stream else part.facts.notes for use, part in parts_read.items()}
    said = [f"of the {use} texts, {note}" for use, notes in lost.items() for note in notes]
    for note in (*found.values(), *said):
        warn(f"{note.rstrip('.')}.", stacklevel=4)
    return tuple(note for (_, measured), note in found.items() if measured == "test")
