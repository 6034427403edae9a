"""Tokenizers of texts: from a folder, the Hub, or made on the spot; what is lost on the way is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from vdm_hub.errors import ConfigurationError, DataError, VDMHubError, explained, shortened, warn
from vdm_hub.files import expanded
from vdm_hub.hub.places import INDEX, pipeline_folder
from vdm_hub.hub.repositories import open_files
from vdm_hub.hub.text_files import TOKENIZER_FILE, check_tokenizer_files

MASK, END, UNKNOWN = "[MASK]", "[END]", "[UNK]"
"""The special tokens of a tokenizer that is made here: the mask, the end of a document, an unknown character."""

_MADE_FROM_TEXTS = ("character", "bpe")
MADE = ("byte", *_MADE_FROM_TEXTS)
"""The tokenizers that are made on the spot."""

TOKENIZER = "tokenizer"
"""The folder of a pipeline that holds its tokenizer."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The values of a text.

    Attributes:
        levels: Each 0..K-1, int32, (N,).
        sizes: The UTF-8 bytes that each stands for, int32, (N,): each byte of the text is counted once.
        characters: How many the text has.
        unknown: How many of its characters the tokenizer does not know, so that no token says them.
        altered: Whether decoding gives another text, for whichever reason.
    """

    levels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    characters: int
    unknown: int
    altered: bool


class Tokenization:
    """A tokenizer as a process of K values sees it.

    The process knows values 0..K-1, all tokens but the mask, and marks what is masked as K. Where the mask is not the
    last of the tokenizer's ids, those above it are one lower as values.

    Args:
        tokenizer: A fast tokenizer of transformers, with a mask token.

    Raises:
        ConfigurationError: It is none, or has no mask token.

    >>> byte = Tokenization(make_tokenizer("byte"))
    >>> byte.num_values, byte.encode("ab").levels.tolist(), byte.decode([97, 98, byte.num_values])
    (257, [97, 98], 'ab[MASK]')
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigurationError(
                f"the tokenizer is a {type(tokenizer).__name__}, which does not say which bytes a token stands for: "
                f"give a fast one of transformers, such as AutoTokenizer loads from a tokenizer.json."
            )
        if tokenizer.mask_token_id is None:
            raise ConfigurationError("the tokenizer has no mask token: add one with `with_mask`.")
        self.tokenizer = tokenizer
        self.mask_id = int(tokenizer.mask_token_id)
        self.num_ids = max(tokenizer.get_vocab().values()) + 1
        self.num_values = self.num_ids - 1
        self._tried: dict[str, bool] = {}

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer of texts in which nothing is special: a text that spells a mask is no mask."""
        plain = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = True
        return plain

    @property
    def end(self) -> int | None:
        """The value that ends a document, where the tokenizer has such a token."""
        known = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        found = next((one for one in known if one is not None), None)
        return None if found is None else int(self.levels_of(np.array([found]))[0])

    @property
    def filler(self) -> int:
        """The value behind a text that is shorter than a window, the same of every text: the `end`, or else 0."""
        return self.end or 0

    def levels_of(self, ids: Integers) -> Integers:
        """Ids of the tokenizer as values; the mask as K."""
        levels = ids - (ids > self.mask_id)
        return np.where(ids == self.mask_id, self.num_values, levels)

    def ids_of(self, levels: Tensor) -> Tensor:
        """Values as ids of the tokenizer; K as the mask."""
        ids = levels + (levels >= self.mask_id).to(levels.dtype)
        return torch.where(levels == self.num_values, self.mask_id, ids)

    def encode(self, text: str) -> Encoded:
        """The values of a text, in which nothing is special.

        Raises:
            DataError: The tokenizer makes a mask of a part of it, or it has half of a pair of surrogates.
        """
        _check_characters(text, "text", DataError)
        found = self._plain.encode(text, add_special_tokens=False)
        ids = np.array(found.ids, dtype=np.int64)
        spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        if (masked := np.flatnonzero(ids == self.mask_id)).size:
            start, stop = spans[masked[0]]
            raise DataError(
                f"the tokenizer takes {shortened(text[start:stop])} in the text for its mask token, which stands for "
                f"nothing: take that out of the text, or give another tokenizer."
            )
        again = self._plain.decode(ids.tolist(), skip_special_tokens=False)
        return Encoded(
            self.levels_of(ids).astype(np.int32),
            _bytes_of_spans(text, spans),
            len(text),
            len(self._unknown_places(text, ids, spans)),
            again != text,
        )

    def _unknown_places(self, text: str, ids: Integers, spans: Integers) -> list[int]:
        """Where a text has characters that no token says: those of the unknown token, and those that are dropped."""
        # Where characters are dropped, `tokenizers` says other spans than those of the tokens.
        unknown = {place for start, stop in spans[np.isin(ids, self._unknown_ids)] for place in range(start, stop)}
        if dropped := self._dropped(set(text)):
            unknown |= {place for place, character in enumerate(text) if character in dropped}
        return sorted(unknown)

    def _dropped(self, characters: set[str]) -> set[str]:
        """Those that the tokenizer drops; each character is tried once."""
        for one in characters - self._tried.keys():
            self._tried[one] = self._is_dropped(one)
        return {one for one in characters if self._tried[one]}

    @cached_property
    def _unknown_ids(self) -> list[int]:
        """The ids for what the tokenizer does not know, by its own word and by that of the model in it."""
        names = {self.tokenizer.unk_token, getattr(self._plain.model, "unk_token", None)} - {None}
        return [one for name in names if (one := self._plain.token_to_id(name)) is not None]

    def _is_dropped(self, character: str) -> bool:
        """Whether a model of pairs without an unknown token has no token for a character.

        White space is no part of a word where words are split before.
        """
        model, splits = self._plain.model, self._plain.pre_tokenizer is not None
        if not isinstance(model, models.BPE) or model.unk_token or (splits and character.isspace()):
            return False
        said: str = self._plain.decode(self._plain.encode(character, add_special_tokens=False).ids)
        return not (said.strip() if splits else said)

    def prompt(self, text: str) -> list[int]:
        """The values of a text with holes: its mask tokens are K.

        Raises:
            ConfigurationError: It has a character that the tokenizer does not know.

        >>> Tokenization(make_tokenizer("byte")).prompt("a[MASK]c")
        [97, 257, 99]
        """
        _check_characters(text, "prompt", ConfigurationError)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = np.array(found["input_ids"], dtype=np.int64), np.array(found["offset_mapping"], dtype=np.int64)
        spans = spans.reshape(-1, 2)
        named = {
            place
            for start, stop in spans[np.isin(ids, self.tokenizer.all_special_ids)]
            for place in range(start, stop)
            if text[start:stop].strip() in self.tokenizer.all_special_tokens
        }
        if unknown := [place for place in self._unknown_places(text, ids, spans) if place not in named]:
            characters = "".join(dict.fromkeys(text[place] for place in unknown))
            raise ConfigurationError(
                f"the tokenizer does not know {len(unknown):,} of the {len(text):,} characters of the prompt "
                f"{shortened(text)}: {shortened(characters)}. Take them out, or write a hole "
                f"({self.tokenizer.mask_token}) in their place."
            )
        return [int(one) for one in self.levels_of(ids)]

    def decode(self, levels: Sequence[int] | Tensor) -> str:
        """The text of values; K as the mask token. A text ends with the token that ends documents."""
        ids = self.ids_of(torch.as_tensor(levels, dtype=torch.int64).cpu()).tolist()
        text: str = self._plain.decode(ids, skip_special_tokens=False)
        return text


def _check_characters(text: str, what: str, error_class: type[VDMHubError]) -> None:
    """Refuse half of a pair of surrogates in a text, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise error_class(
            f"the {what} has {text[error.start]!a} at character {error.start:,}, half of a pair of surrogates, which "
            f"has no bytes in UTF-8: take it out, or read the text anew where it came from, as UTF-8 with "
            f"errors='replace'."
        ) from error


def _bytes_of_spans(text: str, spans: Integers) -> npt.NDArray[np.int32]:
    """The bytes that each token stands for, (N,): what no token covers belongs to the next one, or to the last.

    >>> _bytes_of_spans("a ☃", np.array([[0, 1], [2, 3], [2, 3]])).tolist()  # three bytes, of which two tokens share
    [1, 4, 0]
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    width = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(width)])
    if not len(spans):
        return np.zeros(0, dtype=np.int32)
    ends = upto[np.maximum.accumulate(spans[:, 1])]
    ends[-1] = upto[-1]
    return np.diff(ends, prepend=0).astype(np.int32)


def make_tokenizer(name: str, texts: Callable[[], Iterable[str]] = tuple, vocabulary_size: int | None = None) -> Any:
    """A tokenizer made on the spot, with the tokens `END` and `MASK`, and `UNKNOWN` where it may need it.

    Args:
        name: ``byte``, whose tokens are the 256 bytes; ``character``, those of the texts; or ``bpe``, byte pairs
            (Sennrich et al., arXiv 1508.07909) on bytes, so that it knows every text.
        texts: Gives the texts that it is made from.
        vocabulary_size: Of ``bpe``: how many tokens without the mask.

    Returns:
        A ``PreTrainedTokenizerFast`` of transformers, whose last token is the mask.

    >>> len(make_tokenizer("character", lambda: ["abc"]))
    6
    """
    from transformers import PreTrainedTokenizerFast  # here, as other data need it not

    special = [END, MASK]
    if name == "character":
        characters = sorted({character for text in texts() for character in text})
        vocabulary = {character: number for number, character in enumerate([*characters, UNKNOWN])}
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
        model.decoder = decoders.Fuse()
        special = [UNKNOWN, *special]
    else:
        model = _of_bytes(texts, vocabulary_size if name == "bpe" else None)
    model.add_special_tokens(special)
    named = {"mask_token": MASK, "eos_token": END} | ({"unk_token": UNKNOWN} if UNKNOWN in special else {})
    return PreTrainedTokenizerFast(tokenizer_object=model, **named)


def _of_bytes(texts: Callable[[], Iterable[str]], vocabulary_size: int | None) -> Tokenizer:
    """A model of bytes; with a size, of pairs of them, learned from texts."""
    # One character for each byte: those that print stand for themselves, the others for some above 255.
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    alphabet = [chr(byte if byte in shown else next(hidden)) for byte in range(256)]
    vocabulary = {character: byte for byte, character in enumerate(alphabet)}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]) if vocabulary_size is None else models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=vocabulary_size is not None)
    model.decoder = decoders.ByteLevel()
    if vocabulary_size is not None:
        trainer = trainers.BpeTrainer(vocab_size=vocabulary_size - 1, initial_alphabet=alphabet, show_progress=False)
        model.train_from_iterator(texts(), trainer)
        if model.get_vocab_size() < vocabulary_size - 1:
            warn(
                f"vocabulary_size is {vocabulary_size:,}, and the texts have pairs for {model.get_vocab_size() + 1:,} "
                f"tokens only: so many there are.",
                stacklevel=3,
            )
    return model


def open_tokenizer(
    name: str, texts: Callable[[], Iterable[str]] | None = None, vocabulary_size: int | None = None
) -> Tokenization:
    """The tokenizer of a recipe: one of `MADE`, or that of a place; a mask that is missing is added.

    Args:
        name: The kind to make; or a folder or a Hub id, of a tokenizer or of a pipeline that has one.
        texts: Gives the training texts, where a tokenizer may be made from them.
        vocabulary_size: Of ``bpe``.

    Raises:
        ConfigurationError: It is no tokenizer that says which bytes a token stands for.
        CheckpointError: A file is missing, damaged, or code.
        HubError: There is no such repository, or it can't be reached.
        DataError: It is to be made from texts that are read as a stream.
    """
    if name in MADE:
        if name in _MADE_FROM_TEXTS and texts is None:
            raise DataError(
                f"tokenizer is {name!r}, which is made from the training texts, and these are read as a stream: give "
                f"a folder with a tokenizer that was made before, or 'byte', or leave --streaming out."
            )
        return Tokenization(make_tokenizer(name, texts or tuple, vocabulary_size))
    from transformers import AutoTokenizer  # here, as other data need it not

    place = pipeline_folder(expanded(name))
    files = open_files(str(place) if place.is_dir() else name)
    component = TOKENIZER if INDEX in files else ""
    check_tokenizer_files(files, component)
    for path in files.names_in(component):
        if TOKENIZER_FILE.fullmatch(path) or path == "config.json":
            files.fetch(f"{component}/{path}" if component else path)
    remedy = f"name {', '.join(MADE)}, or the folder or Hub id of a fast tokenizer of transformers"
    with explained(f"the tokenizer {name} can't be loaded", remedy, ConfigurationError):
        tokenizer = AutoTokenizer.from_pretrained(
            files.folder / component, trust_remote_code=False, local_files_only=True
        )
    tokenizer.name_or_path = name
    return Tokenization(with_mask(tokenizer))


def with_mask(tokenizer: Any) -> Any:
    """The tokenizer, with a mask token as its last where it had none, which is said."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
        warn(
            f"the tokenizer {tokenizer.name_or_path or 'given'} has no mask token: {MASK} is added, as number "
            f"{tokenizer.mask_token_id}.",
            stacklevel=3,
        )
    return tokenizer
