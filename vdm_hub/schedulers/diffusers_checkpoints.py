"""A checkpoint of diffusers' unconditional pipelines as the network and the process of a VDM.

Nothing of a repository is used before it was looked at: first the list of components, then the scheduler's and the
network's configs, and only then are weights downloaded.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, VQModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from vdm_hub.errors import ConfigurationError, explained, warn
from vdm_hub.hub.checks import check_pipeline
from vdm_hub.hub.places import INDEX
from vdm_hub.hub.repositories import HUB_ARGUMENTS, ModelFiles, open_files
from vdm_hub.models.calls import Call
from vdm_hub.models.loading import REMEDY
from vdm_hub.schedulers.configs import is_beta_table
from vdm_hub.schedulers.families import check_knowable, family_of, own_loop, process_config, with_process
from vdm_hub.schedulers.vdm import VDMScheduler

PipelineSource: TypeAlias = str | os.PathLike[str] | DiffusionPipeline

OWN_PIPELINE = "VDMPipeline"
_PARTS = {"unet", "scheduler"}
_ARGUMENTS = (*HUB_ARGUMENTS, "dtype", "variant")
_AUTOENCODERS = {"autoencoder", "first_stage", "image_vae", "movq", "vae", "vqgan", "vqvae"}
_LATENT_PARTS = ({"transformer", "vae", "scheduler"}, {"unet", "vqvae", "scheduler"}, {"unet", "vae", "scheduler"})
_NETWORKS = ("transformer", "unet")
_OF_PROMPTS = ("text_", "tokenizer", "image_encoder", "prior")
_OTHER_VARIANCES = ("fixed_large", "fixed_large_log", "learned", "learned_range")


def pipeline_class(source: str | os.PathLike[str], revision: str | None = None) -> str:
    """The class that a folder's or a repository's model_index.json names, at a revision of it.

    Raises:
        ConfigurationError: There is no model_index.json.
        OSError: There is no such repository.
    """
    return str(_read(open_files(source, revision=revision), INDEX).get("_class_name"))


def is_latent(source: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Whether the pipeline of a folder or a repository diffuses the latents of an autoencoder.

    Raises:
        ConfigurationError: There is no model_index.json.
        OSError: There is no such repository.
    """
    index = _read(open_files(source, revision=revision), INDEX)
    return any(_is_component(key, index[key]) for key in _AUTOENCODERS & index.keys())


def scheduler_of_pipeline(
    pipeline: DiffusionPipeline, overrides: Mapping[str, Any], arguments: Collection[str] = ()
) -> SchedulerMixin:
    """The scheduler for a stock pipeline in memory, whose network is one that it can be given to: see `_scheduler`.

    Args:
        pipeline: A pipeline of diffusers.
        overrides: Fields of the `VDMScheduler` that the stock config does not know, or knows wrongly.
        arguments: What else the caller was given; none of it means anything here.

    Raises:
        ConfigurationError: The pipeline is no unconditional pixel-space model of the DDPM family.
    """
    if arguments:
        raise ConfigurationError(f"{', '.join(sorted(arguments))} is for folders and Hub ids, not for a pipeline.")
    name = type(pipeline).__name__
    _check_components(name, name, {key for key, part in pipeline.components.items() if part is not None})
    vdm, scheduler = _scheduler(name, type(pipeline.scheduler).__name__, pipeline.scheduler.config, overrides)
    _check_network(name, type(pipeline.unet), pipeline.unet.config, vdm)
    return _that_samples(name, pipeline.unet.config, vdm, scheduler)


def scheduler_of_repository(
    source: str | os.PathLike[str], overrides: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[SchedulerMixin, ModelFiles]:
    """The scheduler for a folder or a Hub id (see `_scheduler`), and its files, checked, of one commit.

    Args:
        source: A folder, or a Hub id.
        overrides: Fields of the `VDMScheduler` that the stock config does not know, or knows wrongly.
        arguments: ``revision``, ``token``, ``variant``, ``dtype``, ...

    Raises:
        ConfigurationError: The pipeline is no unconditional pixel-space model of the DDPM family, or its weights are
            not in safetensors.
        OSError: There is no such repository.
    """
    files, index, components = _opened(source, arguments)
    _check_components(files.name, str(index.get("_class_name")), set(components))
    network = _network_class(files.name, *components["unet"])
    made: list[SchedulerMixin] = []

    def accept() -> None:
        config = _read(files, "scheduler/scheduler_config.json")
        vdm, scheduler = _scheduler(files.name, str(components["scheduler"][1]), config, overrides)
        described = _read(files, "unet/config.json")
        _check_network(files.name, network, described, vdm)
        made.append(_that_samples(files.name, described, vdm, scheduler))

    check_pipeline(files, None, variant=arguments.get("variant"), accept=accept)
    return made[0], files


@dataclass(frozen=True)
class LatentCheckpoint:
    """What a latent pipeline of diffusers is made of, as a latent VDM takes it.

    Attributes:
        network: Its transformer or U-Net.
        autoencoder: Its `AutoencoderKL` or `VQModel`.
        scheduler: Its own scheduler, which carries the VDM's config.
        class_names: Of a class-conditional one, where it names its classes.
        name: For messages.
    """

    network: Any
    autoencoder: Any
    scheduler: SchedulerMixin
    class_names: tuple[str, ...] | None
    name: str


def latent_checkpoint(
    source: PipelineSource, overrides: Mapping[str, Any], arguments: Mapping[str, Any]
) -> LatentCheckpoint:
    """The parts of a `DiTPipeline`, an `LDMPipeline` or another one of a network, an autoencoder and a scheduler.

    Args:
        source: A folder, a Hub id, or a pipeline in memory.
        overrides: Fields of the `VDMScheduler` that the stock config does not know, or knows wrongly.
        arguments: As `scheduler_of_repository` takes them.

    Raises:
        ConfigurationError: It is made of other parts, or its scheduler is of no family that is known.
        CheckpointError: A file is damaged, or its weights are not in safetensors.
        OSError: There is no such repository.
    """
    if isinstance(source, DiffusionPipeline):
        if arguments:
            raise ConfigurationError(f"{', '.join(sorted(arguments))} is for folders and Hub ids, not for a pipeline.")
        name, parts = type(source).__name__, {k: part for k, part in source.components.items() if part is not None}
        _check_latent(name, name, set(parts))
        labels: Mapping[str, int] = getattr(source, "labels", {})
        named = {
            number: ", ".join(word for word, one in labels.items() if one == number) for number in labels.values()
        }
        scheduler, config = type(parts["scheduler"]).__name__, parts["scheduler"].config
        return _latent_checkpoint(name, parts, scheduler, config, overrides, named)
    files, index, components = _opened(source, arguments)
    _check_latent(files.name, str(index.get("_class_name")), set(components))
    check_pipeline(files, None, variant=arguments.get("variant"))
    options = {"variant": arguments.get("variant"), "torch_dtype": arguments.get("dtype"), "use_safetensors": True}
    with explained(f"{files.name} can't be loaded", REMEDY):
        parts = {
            key: getattr(diffusers, value[1]).from_pretrained(files.folder / key, **options)
            for key, value in components.items()
            if key != "scheduler"
        }
    config = _read(files, "scheduler/scheduler_config.json")
    with explained(f"id2label of {files.name} holds no names of classes", "leave it out"):
        named = {int(number): str(name) for number, name in (index.get("id2label") or {}).items()}
    return _latent_checkpoint(files.name, parts, str(components["scheduler"][1]), config, overrides, named)


def notes_on_bound(config: Mapping[str, Any], transitions: int | None = None) -> list[str]:
    """Which model a DDPM-family config's bound is that of, where its sampler asks for another, one sentence each.

    A clipped estimate of the data is another model: the bound is that of the network unclipped, and the clipped one's
    is reported beside it. So is a number of transitions that the checkpoint was not made for.

    >>> notes_on_bound({"noise_schedule": "linear", "clip_sample": True})  # VDMScheduler's own steps never clip
    []
    """
    config = process_config(config)
    schedule = config.get("noise_schedule")
    is_table = "beta_schedule" in config if schedule is None else is_beta_table(schedule)
    if not is_table or config.get("final_sigmas_type", "zero") != "zero":
        return []
    notes = []
    clips = [key for key in ("clip_sample", "thresholding") if config.get(key)]
    if clips:
        notes.append(
            f"the sampler clips its estimates ({clips[0]}=True); the bound is that of the model unclipped, and beside "
            f"it stands that of the clipped one."
        )
    own = int(config.get("num_train_timesteps", 1000)) - 1
    if transitions not in (None, own):
        between = " Between its betas the table is interpolated." if own % transitions else ""
        notes.append(
            f"{transitions} transitions are not the checkpoint's own chain, which has {own} (the first of its betas "
            f"is the decoder's).{between}"
        )
    variance = config.get("variance_type")
    if variance in _OTHER_VARIANCES:
        if transitions is None:
            notes.append(
                f"the sampler draws with another variance than the posterior's (variance_type={variance!r}); in "
                f"continuous time the bound is the same for both."
            )
        else:
            notes.append(f"the reverse steps have the checkpoint's own variance (variance_type={variance!r}).")
    if config.get("rescale_betas_zero_snr") or (config.get("trained_betas") or [0])[-1] == 1:
        notes.append("the last SNR is zero, gamma infinite there; the bound starts from alpha_bar = 2^-24 instead.")
    return notes


# ---- what is taken over, and what not -------------------------------------------------------------------------------


def _opened(
    source: str | os.PathLike[str], arguments: Mapping[str, Any]
) -> tuple[ModelFiles, dict[str, Any], dict[str, Any]]:
    """The files of a folder or a Hub id, its index, and the components that are there."""
    unknown = set(arguments) - set(_ARGUMENTS)
    if unknown:
        raise ConfigurationError(
            f"from_diffusers knows no {', '.join(sorted(unknown))}: it takes num_levels, data_scaling, decoder, "
            f"prediction_type, variance_type, {', '.join(_ARGUMENTS)}."
        )
    files = open_files(source, **{key: value for key, value in arguments.items() if key in HUB_ARGUMENTS})
    index = _read(files, INDEX)
    return files, index, {key: value for key, value in index.items() if _is_component(key, value)}


def _latent_checkpoint(
    name: str,
    parts: Mapping[str, Any],
    scheduler: str,
    config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    named: Mapping[int, str],
) -> LatentCheckpoint:
    network = next(parts[key] for key in _NETWORKS if key in parts)
    autoencoder = next(part for key, part in parts.items() if key in _AUTOENCODERS)
    _check_latent_network(name, network, autoencoder, dict(config) | {"_class_name": scheduler})
    if not isinstance(autoencoder, AutoencoderKL | VQModel):
        raise ConfigurationError(
            f"the autoencoder of {name} is a {type(autoencoder).__name__}: an AutoencoderKL or a VQModel is given a "
            f"likelihood here. Build a LatentVDMPipeline with a first stage of your own."
        )
    # What decodes latents is the first stage; the process's own scaling and decoder are of no latent model.
    unread = {"data_scaling": "full", "decoder": "factorised", "variance_type": None}
    of_betas = {"variance_type": None} if "beta_schedule" in config else {}
    vdm, stock = _scheduler(name, scheduler, dict(config) | of_betas, {**overrides, **unread})
    if stock is vdm:
        stock = with_process(getattr(diffusers, scheduler).from_config(config), vdm)
    names = tuple(named[number] for number in sorted(named))
    complete = sorted(named) == list(range(len(named))) and len(names) > 0
    return LatentCheckpoint(network, autoencoder, stock, names if complete else None, name)


def _check_latent_network(source: str, network: Any, autoencoder: Any, config: Mapping[str, Any]) -> None:
    """Refuse a network that is none of the autoencoder's latents, or gives what its family's does not."""
    stated = autoencoder.config
    latent = stated.get("vq_embed_dim") or stated.get("latent_channels")
    inputs, outputs = network.config.get("in_channels"), network.config.get("out_channels")
    # Of a transformer DiTPipeline itself leaves out the second half, whatever the scheduler.
    only_mean = family_of(config) is not None and not Call.of(network).each
    allowed = {inputs} if only_mean else {inputs, 2 * (inputs or 0)}
    if inputs != latent or outputs not in allowed:
        more = ", or twice as many where it predicts a variance" if len(allowed) > 1 else ""
        raise ConfigurationError(
            f"the network of {source} has {inputs} input and {outputs} output channels, and the latents have "
            f"{latent}: a network of this family takes as many and gives as many{more}."
        )


def _check_latent(source: str, pipeline: str, components: set[str]) -> None:
    if components in _LATENT_PARTS:
        return
    missing = sorted(key for key in components if key.startswith(_OF_PROMPTS))
    why = f"its network needs what {', '.join(missing)} make of a prompt" if missing else "it is made of other parts"
    raise ConfigurationError(
        f"{source} is a {pipeline} ({', '.join(sorted(components)) or 'no components'}), and {why}: from_diffusers "
        f"takes latent models of a transformer or unet, an AutoencoderKL (vae) or VQModel (vqvae) and a scheduler, "
        f"such as a DiTPipeline or an LDMPipeline."
    )


def _read(files: ModelFiles, path: str) -> dict[str, Any]:
    if path not in files:
        raise ConfigurationError(f"{files.name} holds no pipeline that could be taken over: it has no {path}.")
    return files.read_json(path)


def _is_component(key: str, value: Any) -> bool:
    """Whether an entry of model_index.json is a component that is there, ``[library, class]``."""
    return not key.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value


def _network_class(source: str, library: object, name: object) -> Any:
    network = getattr(diffusers, str(name), None) if library == "diffusers" else None
    if not (isinstance(network, type) and issubclass(network, ModelMixin)):
        raise ConfigurationError(
            f"the network of {source} is {name!r} of {library!r}: only diffusers' own classes are taken over, such as "
            f"UNet2DModel. Build the network yourself and give VDMPipeline(unet, VDMScheduler.from_config(...))."
        )
    return network


def _check_components(source: str, pipeline: str, components: set[str]) -> None:
    if pipeline == OWN_PIPELINE:
        raise ConfigurationError(f"{source} is a VDMPipeline already: load it with VDMPipeline.from_pretrained.")
    if components == _PARTS:
        return
    listed = ", ".join(sorted(components)) or "no components"
    if of_prompts := sorted(key for key in components if key.startswith(_OF_PROMPTS)):
        reason = f"its network needs what {', '.join(of_prompts)} make of a prompt, and no likelihood is read of such"
    elif components & _AUTOENCODERS:
        reason = (
            "it diffuses the latents of an autoencoder: LatentVDMPipeline.from_diffusers takes a DiTPipeline or an "
            "LDMPipeline, whose first stage is given a likelihood"
        )
    else:
        reason = "it is made of other parts"
    raise ConfigurationError(
        f"{source} is a {pipeline} ({listed}), and {reason}: from_diffusers takes an unconditional model of images, a "
        f"pipeline of unet and scheduler alone, such as a DDPMPipeline or a DDIMPipeline."
    )


def _check_network(source: str, network: type, config: Mapping[str, Any], scheduler: VDMScheduler) -> None:
    parameters = list(inspect.signature(network.forward).parameters.values())  # type: ignore[attr-defined]
    needed = [p.name for p in parameters[3:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise ConfigurationError(
            f"the network of {source}, {network.__name__}, needs {', '.join(needed)} beside image and timestep: "
            f"from_diffusers takes networks of an unconditional model, such as UNet2DModel."
        )
    channels, outputs, variance = config.get("in_channels"), config.get("out_channels"), scheduler.config.variance_type
    learned = str(variance).startswith("learned")
    if outputs != (1 + learned) * (channels or 0):
        predicts = " (the second half predicts a variance)" if outputs == 2 * (channels or 0) else ""
        if not is_beta_table(scheduler.config.noise_schedule):
            raise ConfigurationError(
                f"the network of {source} has {channels} input and {outputs} output channels, and one of its family "
                f"gives as many as it takes: it predicts something else."
            )
        raise ConfigurationError(
            f"the network of {source} has {channels} input and {outputs} output channels{predicts}, and its "
            f"variance_type is {variance!r}: a learned variance takes twice the channels, a fixed one as many. Give "
            f"the variance_type that it was trained with, such as learned_range."
        )


def _that_samples(
    source: str, network: Mapping[str, Any], vdm: VDMScheduler, scheduler: SchedulerMixin
) -> SchedulerMixin:
    """The checkpoint's own scheduler, or the VDM's where diffusers has no loop for such images; that is said."""
    loop = own_loop(scheduler)
    if loop is None or network.get("in_channels") == 3:
        return scheduler
    warn(
        f"{source} is sampled by VDMScheduler's own steps: the loop of diffusers' {loop.__name__} draws 3 channels, "
        f"and its network has {network.get('in_channels')}."
    )
    return vdm


def _scheduler(
    source: str, name: str, config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[VDMScheduler, SchedulerMixin]:
    """The `VDMScheduler` of a stock config, and the scheduler that samples as the checkpoint does.

    Of the DDPM family they are one; other families are sampled by their own scheduler, which carries the VDM's config.
    """
    stock = dict(config) | {"_class_name": name}
    check_knowable(source, stock)
    if (family := family_of(stock)) is not None:
        vdm = VDMScheduler(**family.fields(source, stock, overrides))
        return vdm, with_process(getattr(diffusers, name).from_config(stock), vdm)
    given = {"num_levels": 256} | {key: value for key, value in overrides.items() if value is not None}
    scheduler: VDMScheduler = VDMScheduler.from_config(config, **given)
    if scheduler.config.prediction_type == "epsilon" and bool(torch.as_tensor(scheduler.alphas_cumprod)[-1] == 0):
        raise ConfigurationError(
            f"the betas of {source} end at an SNR of zero (rescale_betas_zero_snr, or a last beta of 1): gamma is "
            f"infinite there, and a network that predicts the noise says nothing of the data. Such betas need a "
            f"network with the target v_prediction or sample; if it is one, give prediction_type."
        )
    return scheduler, scheduler
