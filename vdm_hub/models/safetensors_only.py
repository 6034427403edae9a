"""Weights come from safetensors, whichever of diffusers' doors they come through."""

from __future__ import annotations

from typing import Any

from vdm_hub.errors import ConfigurationError


class SafetensorsOnly:
    """Put before a diffusers mixin: its ``from_pretrained`` then unpickles nothing."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load from a folder or a Hub id; weights are read from safetensors only.

        Raises:
            ConfigurationError: ``use_safetensors=False`` was asked for.
        """
        if kwargs.get("use_safetensors") is False:
            raise ConfigurationError("use_safetensors=False would unpickle weights: convert them to safetensors.")
        return super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, **kwargs | {"use_safetensors": True}
        )
