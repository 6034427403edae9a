"""Weights come from safetensors, whichever of diffusers' doors they come through, and only whole and finite ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vdm_hub.errors import CheckpointError, ConfigurationError

_SHOWN = 3
# How torch and diffusers say that a tensor of the file has not the shape that the config gives it.
_WORDS_FOR_SHAPES = ("size mismatch", "expected shape")


class SafetensorsOnly:
    """Put before a diffusers mixin: its ``from_pretrained`` then unpickles nothing."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load from a folder or a Hub id; weights are read from safetensors only.

        Raises:
            ConfigurationError: ``use_safetensors=False`` was asked for.
            CheckpointError: A file of weights is damaged, or of another network than the config's.
        """
        if kwargs.get("use_safetensors") is False:
            raise ConfigurationError("use_safetensors=False would unpickle weights: convert them to safetensors.")
        with _damage_explained(_place(pretrained_model_name_or_path, kwargs)):
            return super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, **kwargs | {"use_safetensors": True}
            )


class WholeWeights(SafetensorsOnly):
    """Put before diffusers' ModelMixin: weights that are missing, too many, or not finite are refused as well."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load from a folder or a Hub id; weights are read from safetensors only, and all of them must be there.

        Raises:
            ConfigurationError: ``use_safetensors=False`` was asked for.
            CheckpointError: The weights are damaged, not those of the config's network, or not finite.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs | {"output_loading_info": True})
        place = _place(pretrained_model_name_or_path, kwargs)
        check_names(place, info.get("missing_keys", ()), info.get("unexpected_keys", ()))
        check_finite(place, model)
        return (model, info) if kwargs.get("output_loading_info") else model


def check_names(place: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse weights that are not those of the network.

    Args:
        place: Where they come from, for the message.
        missing: Tensors that the network has and the file has not.
        unexpected: Tensors that the file has and the network has not.

    Raises:
        CheckpointError: There are any.
    """
    for words, names in (
        ("lack", sorted(missing)),
        ("hold, beyond those of its config's network,", sorted(unexpected)),
    ):
        if names:
            raise CheckpointError(
                f"the weights of {place} {words} {_listed(names)}: config and weights do not belong together. Save "
                f"the model again, or download it again."
            )


def check_finite(place: str, network: nn.Module) -> None:
    """Refuse weights that no computation can use.

    Raises:
        CheckpointError: Some are NaN or infinite.
    """
    broken = [name for name, tensor in network.state_dict().items() if not _is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"the weights of {place} are NaN or infinite in {_listed(broken)}: the model diverged, or was converted "
            f"to a precision that can't hold them. Publish or load another checkpoint of it."
        )


def check_stock_weights(network: nn.Module) -> None:
    """`check_names` and `check_finite` for a network of diffusers' own class, after it was loaded from a folder.

    Raises:
        CheckpointError: Its files hold other tensors than it has, or some that are not finite.
    """
    folder = Path(str(getattr(network, "config", {}).get("_name_or_path", "")))
    files = sorted(folder.glob("*.safetensors"))
    if files:
        held = dict.fromkeys(name for file in files for name in _tensor_names(file))
        modernise = getattr(network, "_fix_state_dict_keys_on_load", None)
        if modernise is not None:  # names of attention blocks before diffusers 0.15
            modernise(held)
        own = network.state_dict().keys()
        check_names(str(folder), own - held.keys(), held.keys() - own)
    check_finite(str(folder), network)


def _tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _is_finite(tensor: torch.Tensor) -> bool:
    # Eight-bit floats know no isfinite, and weights offloaded elsewhere have no values here.
    if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.is_meta:
        return True
    return bool(torch.isfinite(tensor).all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _place(name: Any, arguments: Mapping[str, Any]) -> str:
    subfolder = arguments.get("subfolder")
    return f"{name}/{subfolder}" if subfolder else str(name)


@contextmanager
def _damage_explained(place: str) -> Iterator[None]:
    """Turn what diffusers raises of weights into an error that says so, and leave all others as they are."""
    try:
        yield
    except RecursionError as error:
        raise CheckpointError(f"a config of {place} is nested too deeply: no config is; refused.") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if any(isinstance(cause, SafetensorError) for cause in _causes(error)):
            raise CheckpointError(
                f"the weights of {place} can't be read, as a file is truncated or no safetensors file: "
                f"{text.rstrip('. ')}. Download or save it again."
            ) from error
        if any(words in text for words in _WORDS_FOR_SHAPES):
            raise CheckpointError(
                f"the weights of {place} are not those of its config's network: {text[:300].rstrip('.')}."
            ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
