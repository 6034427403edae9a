"""What a recipe says where a run begins from a trained model: which fields that answers, and which differences."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from vdm_hub import registry
from vdm_hub.errors import ConfigurationError, VDMHubError, shortened
from vdm_hub.models.registered_model import bare_network
from vdm_hub.models.text_conditions import TextCondition
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.hvae import HVAEPipeline
from vdm_hub.pipelines.latent_vdm import LatentVDMPipeline
from vdm_hub.pipelines.tokens import TokenPipeline
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.recipes.arguments import Configuration, defaults
from vdm_hub.recipes.configuration import OF_A_MODEL, meaning
from vdm_hub.schedulers.vdm import VDMScheduler

MODELS: dict[str, Any] = {
    "vdm": VDMPipeline,
    "hvae": HVAEPipeline,
    "latent_vdm": LatentVDMPipeline,
    "tokens": TokenPipeline,
}
"""The class of the pipeline of each model that a recipe may name."""

PROCESS = ("noise_schedule", "prediction_type", "conditioning", "data_scaling", "decoder", "num_train_timesteps")
_LONG = 200  # characters of a form that a recipe holds by its name alone: a table of betas


def take_over(
    configuration: Configuration, pipeline: LikelihoodPipeline, name: str
) -> tuple[Configuration, list[str]]:
    """The recipe with what a trained model answers, and a line for each difference to what was asked for.

    Args:
        configuration: The recipe. What it asks for holds against the model, but for what its weights are bound to.
        pipeline: The model.
        name: Its name, for messages.

    Raises:
        ConfigurationError: It is another kind of model, or something is asked for that its weights are not made for.
    """
    model = configuration.model.model
    if type(pipeline) is not MODELS[model]:
        other = next(kind for kind, cls in MODELS.items() if type(pipeline) is cls)
        raise ConfigurationError(
            f"init_from is {name!r}, a {type(pipeline).__name__}, and model is {model!r}: give a recipe of that kind "
            f"(--model {other}), or another checkpoint."
        )
    taking = _Taking(configuration, name)
    _take_networks(taking, pipeline)
    if isinstance(pipeline, TokenPipeline):
        windows = pipeline.cut
        taking.take("window_length", windows.length)
        taking.take("window_context", windows.context)
    else:
        _take_images(taking, pipeline)
        _take_condition(taking, pipeline)
    if pipeline.process is not None:
        _take_process(taking, pipeline)
    return taking.configuration(), taking.said


class _Taking:
    """A recipe while a model's answers take the place of what nobody asked for."""

    def __init__(self, configuration: Configuration, name: str) -> None:
        self._configuration, self._name = configuration, name
        self.asked, self._recipe = configuration.asked, configuration.to_dict()
        self._usual, self._values = defaults(), dict[str, Any]()
        self.said: list[str] = []

    def recipe(self, field: str) -> Any:
        """What the recipe has, asked for or not."""
        return self._recipe[field]

    def is_asked(self, field: str, own: Any) -> bool:
        """Whether a value is asked for that is another than the model's own."""
        asked = self.asked.get(field)
        return asked is not None and not _same(field, asked, own)

    def take(self, field: str, own: Any) -> None:
        """The model's own value, unless another is asked for."""
        if self.is_asked(field, own):
            self.put(field, self.asked[field])
            self.said.append(
                f"{field} is {_shown(self.asked[field])} as asked for, and {self._name} has {_shown(own)}"
            )
            return
        given = self._recipe[field]
        if given != self._usual[field] and not _same(field, given, own):
            self.said.append(f"{field} is {_shown(own)}, that of {self._name}, and not {_shown(given)} of the recipe")
        self.put(field, own)

    def bound(self, field: str, own: Any, why: str) -> None:
        """The model's own value, which its weights are bound to.

        Raises:
            ConfigurationError: Another is asked for.
        """
        if self.is_asked(field, own):
            raise ConfigurationError(
                f"{field} is {_shown(self.asked[field])}, and {self._name} has {_shown(own)}: {why}. Leave {field} "
                f"out, or train without init_from."
            )
        self.take(field, own)

    def network(self, field: str, name: str, own: Mapping[str, Any]) -> None:
        """Leave a network's description out of the recipe, after all that was asked for is found in the model's.

        Raises:
            ConfigurationError: It is another network.
        """
        for key, value in json.loads(self.asked.get(field) or "{}").items():
            if key != "_package" and _plain(own.get(key)) != _plain(value):
                raise ConfigurationError(
                    f"{field}.{key} is {_shown(value)}, and the network of {self._name}, a {name}, has "
                    f"{_shown(own.get(key))}: trained weights fit no other network. Leave {field}.{key} out, or train "
                    f"without init_from."
                )
        if not self.asked.get(field) and self._recipe[field] != self._usual[field]:
            self.said.append(f"{field} is that of {self._name}, a {name}, and not the recipe's")
        self.put(field, "{}")

    def put(self, field: str, value: Any) -> None:
        """Set the field to a value; nothing is said."""
        self._values[field] = value

    def configuration(self) -> Configuration:
        """The recipe as the run has it: from now on all of this is asked for."""
        values = {field: _text(field, value) for field, value in self._values.items()}
        groups = {
            group: replace(part, **{one.name: values[one.name] for one in fields(part) if one.name in values})
            for group in ("data", "diffusion", "model")
            for part in (getattr(self._configuration, group),)
        }
        made = replace(self._configuration, **groups)
        return replace(made, asked={name: value for name, value in made.to_dict().items() if name in OF_A_MODEL})


def _take_networks(taking: _Taking, pipeline: LikelihoodPipeline) -> None:
    main = bare_network(pipeline.main_model)
    if isinstance(pipeline, TokenPipeline):
        taking.network("network", *_described(main, main.config.to_dict()))
        taking.bound("time_embedding", pipeline.time_embedding is not None, "its network was trained so")
        return
    field = "hvae" if isinstance(pipeline, HVAEPipeline) else "unet"
    taking.network(field, *_described(main, getattr(main, "config", {})))
    if isinstance(pipeline, LatentVDMPipeline):
        stage = pipeline.first_stage
        config = {**stage.config.get("autoencoder_config", {}), **stage.config}
        named = type(stage.autoencoder).__name__ if "autoencoder_config" in stage.config else type(stage).__name__
        taking.network("first_stage", named, {**config, "_class_name": named})
        if not taking.recipe("scale_latents"):
            taking.said.append(
                "scale_latents has no effect, as the network knows latents of the shift and scale they had"
            )


def _described(network: Any, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name = type(network).__name__
    return name, {**config, "_class_name": name}


def _take_images(taking: _Taking, pipeline: LikelihoodPipeline) -> None:
    """The preprocessing, as far as the model knows it, and how many test images were held out of its own."""
    if pipeline.process is None or isinstance(pipeline, LatentVDMPipeline):
        taking.bound("num_levels", pipeline.num_levels, "its decoder has so many")
    else:
        taking.take("num_levels", pipeline.num_levels)
    if (known := pipeline.preprocessing) is not None:
        for field in ("resolution", "center_crop", "color"):
            taking.take(field, known[field])
    if (held_out := pipeline.held_out) is not None:
        taking.take("test_size", held_out["size"])


def _take_condition(taking: _Taking, pipeline: LikelihoodPipeline) -> None:
    """What the network is told of an image; which column holds it, the recipe knows better where it says so."""
    condition, column = pipeline.condition, taking.recipe("label_column")
    if condition is None:
        for field in ("label_column", "caption_column", "caption_template", "text_encoder"):
            taking.bound(field, None, "its network is told nothing of an image")
        usual = defaults()["condition_dropout"]
        taking.bound("condition_dropout", usual, "its network is told nothing of an image")
        return
    if not isinstance(condition, TextCondition):
        for field in ("caption_column", "caption_template", "text_encoder"):
            taking.bound(field, None, "its network is told classes")
        taking.put("label_column", column or condition.column)
        if (taking.asked.get("condition_dropout", condition.dropout) > 0) == (condition.dropout > 0):
            taking.take("condition_dropout", condition.dropout)
        else:
            taking.bound("condition_dropout", condition.dropout, "its network has a row for no class, or has none")
        return
    if taking.recipe("caption_column") is None and (column is None or taking.recipe("caption_template") is None):
        if taking.is_asked("label_column", None) and condition.template is None:
            taking.bound("label_column", None, "its network is told captions, so give caption_column")
        taking.put("caption_column" if condition.template is None else "label_column", column or condition.column)
        taking.take("caption_template", condition.template)
    taking.take("condition_dropout", condition.dropout)
    if condition.text is not None and taking.asked.get("text_encoder") is None:
        taking.take("text_encoder", None)


def vdm_scheduler(pipeline: Any) -> VDMScheduler:
    """The scheduler whose config is the model's process; the pipeline's own may be one of diffusers."""
    scheduler = pipeline.scheduler
    found: VDMScheduler = (
        scheduler if isinstance(scheduler, VDMScheduler) else VDMScheduler.from_config(scheduler.config)
    )
    return found


def _take_process(taking: _Taking, pipeline: Any) -> None:
    config = vdm_scheduler(pipeline).config
    taking.bound("forward_process", config["forward_process"], "its network was trained for that process")
    for field in PROCESS:
        own = config[field]
        if field == "noise_schedule" and taking.is_asked(field, own):
            taking.asked = {**taking.asked, field: _with_ends(taking.asked[field], pipeline.process)}
        taking.take(field, own)


def _with_ends(asked: str, process: Any) -> str:
    """A schedule that is asked for, from the gamma to the gamma of the model's own where it is not said otherwise."""
    cls, config = registry.resolve_class("noise_schedules", asked)
    own = process.diffused.scalar_gamma
    if own is None or not {"gamma_min", "gamma_max"} <= inspect.signature(cls).parameters.keys():
        return asked
    name, _, package = registry.parse_serialised("noise_schedules", asked)
    first, last = own.endpoints()
    described = {"name": name, "config": {"gamma_min": first, "gamma_max": last, **config}}
    return json.dumps(described | ({} if package is None else {"package": package}))


def differs(field: str, given: Any, own: Any) -> bool:
    """Whether a value that is given means something else than a model's own; see `_same`."""
    return given is not None and not _same(field, given, own)


def _same(field: str, given: Any, own: Any) -> bool:
    """Whether a value means what a model has; a registered name alone does, whatever arguments it has there."""
    kind = registry.SERIALISED_FIELDS.get(field)
    if kind is None or given is None or own is None:
        return bool(meaning(field, given) == meaning(field, own))
    (name, config, package), (own_name, _, own_package) = (
        registry.parse_serialised(kind, form) for form in (given, own)
    )
    built_in = registry.BUILT_IN_PACKAGE
    if (name, package or built_in) != (own_name, own_package or built_in):
        return False
    return not config or _complete(kind, given) == _complete(kind, own)


def _complete(kind: str, form: Any) -> Any:
    """What is written of what a form describes, whatever it leaves to defaults, where it can be built by itself."""
    try:
        return _plain(registry.serialise(kind, registry.build(kind, form)))
    except VDMHubError:
        return _plain(registry.parse_serialised(kind, form)[1])


def _text(field: str, value: Any) -> Any:
    """A value as a recipe has it: of a long form its name, by which it is the model's own."""
    if not isinstance(value, Mapping):
        return value
    text = json.dumps(_plain(dict(value)))
    return text if len(text) <= _LONG else value["name"]


def _plain(value: Any) -> Any:
    """A value as JSON has it, so that tuples and lists are alike."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    return shortened(_plain(value))
