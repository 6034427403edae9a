"""The network of a diffusion of tokens, as a recipe describes it, or trained before."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from vdm_hub.data.tokenization import Tokenization
from vdm_hub.errors import CheckpointError, ConfigurationError, explained, shortened, unknown_name, warn
from vdm_hub.files import expanded
from vdm_hub.hub.places import INDEX, pipeline_folder
from vdm_hub.hub.repositories import ModelFiles, open_files
from vdm_hub.hub.text_files import CONFIG, encoder_weights, refuse_code
from vdm_hub.hub.weights import check_finite_weights
from vdm_hub.models.installed_encoders import loaded_in_silence
from vdm_hub.models.token_networks import (
    TokenNetwork,
    TokenTimeEmbedding,
    check_token_model,
    positions_of,
    token_embeddings,
)
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.parts.networks import is_sketched

_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask")


def build_token_network(configuration: Configuration, length: int, tokenization: Tokenization) -> TokenNetwork:
    """The network of a recipe, on torch's meta device within `on_meta_device`.

    Args:
        configuration: The recipe.
        length: L.
        tokenization: The tokenizer.

    Raises:
        ConfigurationError: It is described wrongly, is of another vocabulary, takes no such windows, or is causal.
    """
    source = configuration.model.network_from
    model = _described(configuration, length, tokenization) if source is None else _trained(source, tokenization)
    check_token_model(model, length)
    embeddings: Any = token_embeddings(model)
    embeddings.padding_idx = None  # no token is padding, so that each learns
    width = embeddings.weight.shape[1]
    return TokenNetwork(model, tokenization, _time_embedding(configuration, width))


def _time_embedding(configuration: Configuration, width: int) -> TokenTimeEmbedding | None:
    """What tells the network the timestep, where the recipe has it: that of `network_from`, where this has one."""
    source, wanted = configuration.model.network_from, configuration.model.time_embedding
    if source is not None:
        files = _files_of(source)
        listed = files.read_json(INDEX).get("time_embedding") if INDEX in files else None
        was_told = isinstance(listed, list) and any(listed)
        if was_told and not wanted:
            warn(
                f"the network of {source} was trained with a time_embedding, and the recipe has none, so that it is "
                f"left out: set time_embedding to true to go on with it."
            )
        if was_told and wanted and not is_sketched():
            loaded: TokenTimeEmbedding = TokenTimeEmbedding.from_pretrained(
                _place_of(source), subfolder="time_embedding"
            )
            return loaded
    with torch.device("meta") if is_sketched() else nullcontext():
        return TokenTimeEmbedding(width) if wanted else None


def _described(configuration: Configuration, length: int, tokenization: Tokenization) -> PreTrainedModel:
    """A new model of the class and config that the recipe gives."""
    cls: Any = getattr(transformers, configuration.model.network_class, None)
    is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
    if not is_model or getattr(cls, "config_class", None) is None:
        raise ConfigurationError(
            f"_class_name of network is {configuration.model.network_class!r}, and transformers "
            f"{transformers.__version__} has no such model: give one such as BertForMaskedLM."
        )
    described = configuration.model.network_config
    of_data = {"vocab_size": tokenization.num_ids}
    for name, value in of_data.items():
        if described.get(name) not in (None, value):
            raise ConfigurationError(
                f"the recipe's network has {name}={described[name]}, and the tokenizer asks for {value}: leave it out."
            )
    _check_known(cls, described)
    known = cls.config_class().to_dict()
    others = {"max_position_embeddings": length, **_special_tokens(tokenization, known.get("pad_token_id"))}
    others = {name: value for name, value in others.items() if name in known}
    with explained(f"{cls.__name__} can't be built from the recipe's network", "mend it", ConfigurationError):
        model = _built(cls, cls.config_class(**{**others, **described, **of_data}))
        lacking = length - (positions_of(model) or length)
        if lacking > 0 and "max_position_embeddings" not in described:
            others["max_position_embeddings"] = length + lacking
            model = _built(cls, cls.config_class(**{**others, **described, **of_data}))
    return model


def _built(cls: Any, config: Any) -> PreTrainedModel:
    """A new model, on torch's meta device where networks are sketched."""
    if is_sketched():
        try:
            with torch.device("meta"):
                sketched: PreTrainedModel = cls(config)
            return sketched
        except (RuntimeError, NotImplementedError):  # some look at values while they are built
            sketched = cls(config).to("meta")
            sketched.tie_weights()
            return sketched
    model: PreTrainedModel = cls(config)
    return model


def _special_tokens(tokenization: Tokenization, padding: int | None) -> dict[str, int | None]:
    """The numbers of special tokens; a config's own defaults are those of another tokenizer.

    Args:
        tokenization: The tokenizer.
        padding: That which the config takes for padding by itself. It stays where the tokenizer has none, as some
            models are not built without; no token is taken for padding all the same, see `TokenNetwork`.
    """
    tokenizer = tokenization.tokenizer
    found = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    if found["pad_token_id"] is None and padding is not None and 0 <= padding < tokenization.num_ids:
        found["pad_token_id"] = padding
    return found


def _check_known(cls: Any, described: Mapping[str, Any]) -> None:
    """Refuse arguments that a config would keep, and no model would read."""
    known = cls.config_class().to_dict().keys() | {"is_causal", "attn_implementation"}
    unknown = [name for name in described if name not in known]
    if unknown:
        raise unknown_name(f"argument of {cls.__name__} in network", unknown[0], known)


def _trained(source: str, tokenization: Tokenization) -> PreTrainedModel:
    """The model of a folder or a Hub id: of transformers' own, or the network of a pipeline of tokens."""
    files = _files_of(source)
    component = "network" if INDEX in files else ""
    prefix = f"{component}/" if component else ""
    if f"{prefix}{CONFIG}" not in files:
        raise ConfigurationError(
            f"network_from is {source!r}, which holds no model of transformers (no {prefix}{CONFIG}): name the folder "
            f"that its save_pretrained wrote, a Hub id, or a run of tokens."
        )
    config = files.read_json(f"{prefix}{CONFIG}")
    refuse_code(f"{files.name}: {prefix}{CONFIG}", config)
    cls = _class_of(source, config)
    with explained(f"the network of {source} can't be loaded", "name another", CheckpointError):
        model = _load(files, component, cls)
    lacking = tokenization.num_ids - model.config.get_text_config().vocab_size
    if lacking == 1 and tokenization.mask_id == tokenization.num_ids - 1:
        model.resize_token_embeddings(tokenization.num_ids, mean_resizing=False)
        warn(f"the network of {source} has no row for the mask that was added to its tokenizer: it gets one.")
    if lacking < 0:
        warn(
            f"the network of {source} has {-lacking} rows beyond the tokenizer's {tokenization.num_ids:,} tokens, "
            f"which are never used: look whether the tokenizer is its own."
        )
    return model


def _files_of(source: str) -> ModelFiles:
    return open_files(_place_of(source))


def _place_of(source: str) -> str:
    """The folder that a name stands for, a run's its pipeline's; else the name, a Hub id."""
    place = pipeline_folder(expanded(source))
    return str(place) if place.is_dir() else source


def _class_of(source: str, config: Mapping[str, Any]) -> Any:
    """The class that a saved config names, or the masked language model of its kind."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    named = [str(name) for name in config.get("architectures") or ()]
    candidates = [*(name for name in named if "For" in name or "LMHead" in name), MASKED.get(config.get("model_type"))]
    found = next((getattr(transformers, name) for name in candidates if name and hasattr(transformers, name)), None)
    if found is None:
        raise ConfigurationError(
            f"network_from is {source!r}, a {shortened(named or config.get('model_type'))}, and transformers "
            f"{transformers.__version__} has no model of that kind with logits of each token: name another."
        )
    return found


def _load(files: ModelFiles, component: str, cls: Any) -> PreTrainedModel:
    """The model of a folder whose config was read; a sketch of it needs no more of its files."""
    folder = files.folder / component
    if is_sketched():
        return _built(cls, AutoConfig.from_pretrained(folder, local_files_only=True))
    for name in encoder_weights(files, component).files:
        files.fetch(f"{component}/{name}" if component else name)
    model, missing = loaded_in_silence(cls, folder)
    if missing:
        warn(
            f"the weights of {files.name} lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} of a "
            f"{cls.__name__}: they begin at random."
        )
    check_finite_weights(files.name, model)
    loaded: PreTrainedModel = model
    return loaded
