"""The first stage of a latent VDM: a new one as the recipe describes it, or a trained one from a folder or the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL
from torch import nn

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.files import expanded
from vdm_hub.hub.places import INDEX, pipeline_folder
from vdm_hub.hub.repositories import ModelFiles, open_files
from vdm_hub.models.first_stages import AutoencoderKLFirstStage
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.parts.networks import build_described, build_hvae

_TRAINED: dict[str, Any] = {cls.__name__: cls for cls in (MarkovianHVAE, AutoencoderKLFirstStage, AutoencoderKL)}
_COMPONENTS = ("hvae", "first_stage", "vae")  # in pipelines of ours and of diffusers


def build_first_stage(configuration: Configuration, shape: tuple[int, ...]) -> nn.Module:
    """The first stage that the recipe describes, or starts from.

    Raises:
        ConfigurationError: There is none at ``first_stage_from``, or it is of other images than the data.
    """
    model = configuration.model
    if model.first_stage_from is not None:
        stage, untrained = _trained(configuration, shape, model.first_stage_from)
        if model.freeze_first_stage:
            stage.requires_grad_(False)
            for parameter in untrained:
                parameter.requires_grad_(True)
        return stage
    described = model.first_stage_config
    if model.first_stage_class == MarkovianHVAE.__name__:
        if described.get("depth", 1) != 1:
            raise ConfigurationError(
                f"first_stage has depth {described['depth']}: a latent VDM's first stage has one latent: leave it out."
            )
        return build_hvae(configuration, shape, "first_stage", described)
    ours = ("data_scaling", "initial_scale")
    channels = {"in_channels": shape[0], "out_channels": shape[0]}
    sizes = channels | {"sample_size": max(shape[1:])}  # which diffusers' autoencoder takes one number for
    config = {key: value for key, value in described.items() if key not in ours}
    autoencoder = build_described(AutoencoderKL, "first_stage", config, sizes)
    return _with_levels(configuration, shape, autoencoder, {key: described[key] for key in ours if key in described})


def _trained(
    configuration: Configuration, shape: tuple[int, ...], source: str
) -> tuple[nn.Module, list[nn.Parameter]]:
    """The trained first stage, and what of it is new: diffusers' autoencoder has no scale of a likelihood."""
    source = str(pipeline_folder(expanded(source)))
    files = open_files(source)
    folder, name = _find(files)
    if name not in _TRAINED:
        raise unknown_name(f"class of the first stage in {source}", name, list(_TRAINED))
    arguments = {**files.pinned, **({"subfolder": folder} if folder else {}), "use_safetensors": True}
    stage = _TRAINED[name].from_pretrained(source, **arguments)
    given = configuration.model.first_stage_config
    named = json.loads(configuration.model.first_stage).get("_class_name")
    if named is not None and named != name:
        raise ConfigurationError(
            f"first_stage says {named}, and first_stage_from holds a {name}: leave _class_name out, or change either."
        )
    if isinstance(stage, AutoencoderKL):
        with_levels = _with_levels(configuration, shape, stage, given)
        return with_levels, [with_levels.log_scale]
    if given:
        raise ConfigurationError(
            f"first_stage gives {sorted(given)}, and first_stage_from a trained one, which has its own: leave one out."
        )
    found = (*stage.image_shape, stage.num_levels)
    wanted = (*shape, configuration.data.num_levels)
    if found != wanted:
        raise ConfigurationError(
            f"the first stage in {source} is of images {_words(found)}, and the data are {_words(wanted)}: train one "
            f"on these data, or bring the data to its size."
        )
    return stage, []


def _find(files: ModelFiles) -> tuple[str, str]:
    """The folder of the first stage within a pipeline or a model's own, and its class."""
    if INDEX in files:
        index = files.read_json(INDEX)
        for component in _COMPONENTS:
            if isinstance(index.get(component), list) and len(index[component]) == 2:
                return component, str(index[component][1])
        raise ConfigurationError(
            f"the pipeline in {files.name} ({index.get('_class_name')}) has no first stage: give one with a component "
            f"{', '.join(_COMPONENTS[:-1])} or {_COMPONENTS[-1]}, such as that of the recipe digits_vae."
        )
    if "config.json" not in files:
        raise ConfigurationError(
            f"{files.name} holds neither a pipeline ({INDEX}) nor a model (config.json): give first_stage_from a "
            f"folder such as runs/digits_vae, or a Hub id."
        )
    return "", str(files.read_json("config.json").get("_class_name"))


def _with_levels(
    configuration: Configuration, shape: tuple[int, ...], autoencoder: AutoencoderKL, given: dict[str, Any]
) -> AutoencoderKLFirstStage:
    if autoencoder.config.in_channels != shape[0]:
        raise ConfigurationError(
            f"the autoencoder is for images of {autoencoder.config.in_channels} channels; the data have {shape[0]}."
        )
    arguments = {"sample_size": _size(shape), "num_levels": configuration.data.num_levels}
    unknown = set(given) - {"data_scaling", "initial_scale"}
    if unknown:
        raise ConfigurationError(
            f"first_stage gives {sorted(unknown)}, and first_stage_from a trained AutoencoderKL: only data_scaling "
            f"and initial_scale may be given with it."
        )
    return AutoencoderKLFirstStage.from_autoencoder(autoencoder, **arguments, **given)


def _size(shape: Sequence[int]) -> int | tuple[int, int]:
    return shape[1] if shape[1] == shape[2] else (shape[1], shape[2])


def _words(found: tuple[int, ...]) -> str:
    return f"{found[0]}x{found[1]}x{found[2]} of {found[3]} levels"
