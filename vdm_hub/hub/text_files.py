"""The files of a text encoder and its tokenizer, as transformers saves them, checked before any is read."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vdm_hub.errors import CheckpointError, MissingFileError, shortened
from vdm_hub.hub.repositories import ModelFiles
from vdm_hub.hub.weights import WeightFiles, check_weights, weight_files

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""The components of a pipeline that are of transformers, where it does not say others."""
TOKENIZER = "tokenizer"
STEM = "model"
"""The name of transformers' weights, without what says variant, shard and format."""
TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(vocab|merges|bpe)\.(txt|codes)"
    r"|(spiece|tokenizer|sentencepiece|sentencepiece\.bpe)\.model"
)
ENCODER_FILE = re.compile(r"config\.json|model[\w.-]*\.(safetensors|safetensors\.index[\w.]*\.json)")
TEXT_FILE = re.compile(f"{ENCODER_FILE.pattern}|{TOKENIZER_FILE.pattern}")


def check_text_files(files: ModelFiles) -> dict[str, Any]:
    """Refuse a folder without an encoder or without its tokenizer, and one whose weights or code would have to be run.

    Returns:
        The encoder's config.

    Raises:
        MissingFileError: One is not there.
        CheckpointError: A config is damaged, or names code.
    """
    if CONFIG not in files:
        raise MissingFileError(
            f"{files.name} holds no text encoder (no {CONFIG}): name a folder that save_pretrained of a model of "
            f"transformers wrote, with its tokenizer beside it, or a Hub id."
        )
    check_tokenizer_files(files, "")
    encoder_weights(files, "")
    config = files.read_json(CONFIG)
    refuse_code(f"{files.name}: {CONFIG}", config)
    return config


def check_tokenizer_files(files: ModelFiles, component: str) -> None:
    """Refuse a folder without a tokenizer, or with one that is code.

    Args:
        files: The tokenizer's, or those of a pipeline.
        component: The tokenizer's folder in the pipeline; empty where the files are its own.

    Raises:
        MissingFileError: There is none.
        CheckpointError: Its config is damaged, or names code.
    """
    place = f"{component}/" if component else ""
    names = files.names_in(component)
    if not any(TOKENIZER_FILE.fullmatch(name) for name in names):
        raise MissingFileError(
            f"{files.name} holds no tokenizer{f' in {component}' if component else ''} (no tokenizer.json, no "
            f"vocabulary): save the tokenizer there too, with its save_pretrained."
        )
    if TOKENIZER_CONFIG in names:
        refuse_code(f"{files.name}: {place}{TOKENIZER_CONFIG}", files.read_json(f"{place}{TOKENIZER_CONFIG}"))


def encoder_weights(files: ModelFiles, component: str, variant: str | None = None) -> WeightFiles:
    """The files of an encoder's weights, all in safetensors.

    Raises:
        MissingFileError: There are none.
        CheckpointError: There are two sets of them, or the list of shards is damaged; or others would be added.
    """
    prefix = f"{component}/" if component else ""
    names, place = files.names_in(component), f"{files.name}/{component}" if component else files.name
    _refuse_adapters(names, place)
    return weight_files(names, variant, place, lambda name: files.read_json(f"{prefix}{name}"), STEM)


@dataclass(frozen=True)
class TextComponent:
    """A text encoder, or its tokenizer, in a pipeline, whose configs were found good."""

    files: ModelFiles
    component: str
    cls: type
    config: Mapping[str, Any]

    @classmethod
    def of(cls, files: ModelFiles, component: str, kind: type) -> TextComponent:
        """The component of a class, by its config.

        Raises:
            MissingFileError: A file is not there.
            CheckpointError: One is damaged, or of another class, or names code.
        """
        library: Any = sys.modules[kind.__module__.partition(".")[0]]
        is_tokenizer = component == TOKENIZER
        if not issubclass(kind, library.PreTrainedTokenizerBase if is_tokenizer else library.PreTrainedModel):
            raise CheckpointError(f"{files.name} has a {kind.__name__} as its {component}, which is none: refused.")
        if is_tokenizer:
            check_tokenizer_files(files, component)
            return cls(files, component, kind, {})
        path = f"{component}/{CONFIG}"
        if path not in files:
            raise MissingFileError(
                f"{files.name} has no {path}: it is incomplete. Save it again, or download it again."
            )
        config = files.read_json(path)
        refuse_code(f"{files.name}: {path}", config)
        if config.get("architectures") != [kind.__name__]:
            raise CheckpointError(
                f"{files.name}: {path} is of a {shortened(config.get('architectures'))}, and a {kind.__name__} was to "
                f"be loaded: it was changed. Save it again, or download it again."
            )
        return cls(files, component, kind, config)

    def weight_files(self, variant: str | None) -> WeightFiles | None:
        """The files of the encoder's weights; a tokenizer has none."""
        return encoder_weights(self.files, self.component, variant) if self.config else None

    def check_weights(self, weights: WeightFiles | None) -> None:
        """Hold the headers of the weights against the encoder of the config; of a tokenizer, fetch all that it is."""
        tokenizer = [name for name in self.files.names_in(self.component) if TOKENIZER_FILE.fullmatch(name)]
        for name in tokenizer if weights is None else weights.files:
            self.files.fetch(f"{self.component}/{name}")
        if weights is not None:
            place = f"{self.files.name}/{self.component}"
            check_weights(self.cls, self.config, weights, self.files.folder / self.component, place)


def refuse_code(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that has its class from code beside it.

    Raises:
        CheckpointError: It has.
    """
    if config.get("auto_map"):
        raise CheckpointError(
            f"{name} names code of its own (auto_map {shortened(config['auto_map'])}), which is never run: take an "
            f"encoder whose class transformers has."
        )


def _refuse_adapters(names: Collection[str], place: str) -> None:
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{place} holds an adapter (adapter_config.json), which would be put onto other weights: merge it into "
            f"its model, and save that."
        )
