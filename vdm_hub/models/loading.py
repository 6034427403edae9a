"""The loading of every component of this package: from files that were checked, and only what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # vdm_hub exports it, where diffusers looks
from torch import nn

from vdm_hub.errors import ConfigurationError, explained, shortened
from vdm_hub.hub.checks import check_component, is_checked
from vdm_hub.hub.outgoing import SearchedUpload
from vdm_hub.hub.repositories import HUB_ARGUMENTS, open_files
from vdm_hub.hub.weights import check_finite_weights, replacing_weights

REMEDY = "check the arguments, and save it again, or download it again"


class CheckedLoading(SearchedUpload):
    """Put before diffusers' ``ModelMixin`` or ``SchedulerMixin``: refuses what was not saved so, or was changed.

    The files are those of a folder, or of one commit on the Hub, held against its listing. Weights are read from
    safetensors only, after their headers were compared with the network of the config.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load from a folder or a Hub id, with the arguments of diffusers.

        Raises:
            ConfigurationError: ``use_safetensors=False`` was asked for, or the name is neither a folder nor a Hub id.
            CheckpointError: A file is damaged, or not what was saved.
            HubError: There is no such repository, or it can't be reached.
        """
        if issubclass(cls, nn.Module):
            refuse_pickles(kwargs)
        source, loads = pretrained_model_name_or_path, super().from_pretrained  # type: ignore[misc]
        if is_checked(Path(source).parent):  # of a pipeline
            return loads(source, **kwargs)
        files = open_files(source, **{key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs})
        component = str(kwargs.get("subfolder") or "")
        check_component(files, component, cls, kwargs.get("variant"))
        place = f"{source}/{component}" if component else str(source)
        with explained(f"{place} can't be loaded", REMEDY):
            loaded = loads(files.folder, **kwargs)
        part = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(part, nn.Module):
            check_finite_weights(place, part)
            part.register_to_config(_name_or_path=str(source))  # type: ignore[operator]
        return loaded

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """Build from a mapping, with untrained weights, as diffusers does; a name would be fetched from somewhere.

        Raises:
            ConfigurationError: It is no mapping.
        """
        if not isinstance(config, Mapping):
            raise ConfigurationError(
                f"config is {shortened(config)}: give a mapping, such as another one's .config, or load a folder or a "
                f"Hub id with from_pretrained."
            )
        return super().from_config(config, **kwargs)  # type: ignore[misc]


class CheckedModel(CheckedLoading):
    """Put before diffusers' ``ModelMixin``: loads what was saved, and saves in the place of what was there."""

    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, *arguments: Any, **kwargs: Any) -> None:
        """Save as diffusers does; what the folder held of an earlier save's weights is replaced."""
        with replacing_weights(Path(save_directory), kwargs.get("variant")):
            super().save_pretrained(str(save_directory), *arguments, **kwargs)  # type: ignore[misc]


def refuse_pickles(arguments: dict[str, Any]) -> None:
    """Make diffusers read safetensors alone.

    Args:
        arguments: Of its ``from_pretrained``; they change.

    Raises:
        ConfigurationError: Something else was asked for.
    """
    if arguments.get("use_safetensors") is False:
        raise ConfigurationError("use_safetensors=False would unpickle weights: convert them to safetensors.")
    arguments["use_safetensors"] = True
