"""The parts of a card's text that differ from rung to rung of the ladder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import singledispatch

from markupsafe import Markup

from vdm_hub import registry
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.registered_model import RegisteredModel, bare_network
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.hvae import HVAEPipeline
from vdm_hub.pipelines.latent_vdm import LatentVDMPipeline
from vdm_hub.pipelines.tokens import TokenPipeline
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.publishing.markdown import code, markdown
from vdm_hub.schedulers.families import process_config

_VDM_PAPER = Markup(
    "The model class is that of Kingma, Salimans, Poole and Ho, *Variational Diffusion Models* ([arXiv\n"
    "2107.00630](https://arxiv.org/abs/2107.00630))"
)

_VAE_PAPER = Markup(
    "The model class is that of Kingma and Welling, *Auto-Encoding Variational Bayes* ([arXiv\n"
    "1312.6114](https://arxiv.org/abs/1312.6114))"
)
_HIERARCHY = Markup(
    ", in the Markovian hierarchy of Luo, *Understanding Diffusion Models: A\nUnified Perspective* "
    "([arXiv 2208.11970](https://arxiv.org/abs/2208.11970), eq. 23 and 24)"
)

_TOKENS_PAPER = Markup(
    "The model class is that of Austin, Johnson, Ho, Tarlow and van den Berg, *Structured Denoising Diffusion Models\n"
    "in Discrete State-Spaces* ([arXiv 2107.03006](https://arxiv.org/abs/2107.03006))"
)


@dataclass(frozen=True)
class Wording:
    """The texts of a card for one kind of model.

    Attributes:
        kind: What the model is, with its article.
        tags: For the Hub, besides those that all rungs share.
        structure: Its networks, and what lies between data and prior, as Markdown.
        source: Where the model class comes from, as Markdown.
        steps: Whether a sample takes as many network evaluations as are asked for.
        no_twin: Why there is no stock twin of such a model; empty where there may be one.
    """

    kind: str
    tags: tuple[str, ...]
    structure: Markup
    source: Markup
    steps: bool = True
    no_twin: str = ""


@singledispatch
def wording_of(pipeline: LikelihoodPipeline) -> Wording:
    """The words for a pipeline.

    Raises:
        ConfigurationError: Its class is none of the ladder's.
    """
    raise ConfigurationError(f"{type(pipeline).__name__} is no pipeline that has a card: publish one of vdm_hub.")


@wording_of.register
def _(pipeline: VDMPipeline) -> Wording:
    return Wording(
        kind=f"A {_conditional(pipeline)}variational diffusion model (VDM)",
        tags=("variational-diffusion", "vdm"),
        structure=markdown("{} {}", _network(pipeline), _process(pipeline)),
        source=markdown("{}.", _VDM_PAPER),
    )


@wording_of.register
def _(pipeline: LatentVDMPipeline) -> Wording:
    stage = pipeline.first_stage
    latents = "x".join(map(str, pipeline.latent_shape))
    return Wording(
        kind=f"A {_conditional(pipeline)}latent variational diffusion model (a VDM of an autoencoder's latents)",
        tags=("variational-diffusion", "vdm", "latent-diffusion"),
        structure=markdown(
            "First stage: {}, {} parameters, latents of shape {}. {} {}",
            code(type(stage).__name__),
            f"{stage.num_parameters():,}",
            latents,
            _network(pipeline),
            _process(pipeline),
        ),
        source=markdown(
            "{}, on the latents of a\nvariational autoencoder as in Vahdat, Kreis and Kautz, *Score-based Generative "
            "Modeling in Latent Space* ([arXiv\n2106.05931](https://arxiv.org/abs/2106.05931)).",
            _VDM_PAPER,
        ),
        no_twin="its pipelines of latents have no autoencoder over levels, which this model has.",
    )


@wording_of.register
def _(pipeline: HVAEPipeline) -> Wording:
    model = pipeline.hvae
    shapes = ", ".join("x".join(map(str, shape)) for shape in model.latent_shapes)
    one = model.depth == 1
    return Wording(
        kind="A variational autoencoder (VAE)"
        if one
        else f"A hierarchical variational autoencoder (HVAE) with {model.depth} latents",
        tags=("variational-autoencoder", "vae" if one else "hierarchical-vae"),
        structure=markdown(
            "Network: {}, {} parameters; {}; {} levels.",
            code(type(model).__name__),
            f"{model.num_parameters():,}",
            f"latent of shape {shapes}" if one else f"latents of shape {shapes}, from the data up",
            model.num_levels,
        ),
        source=markdown("{}.", _VAE_PAPER if one else _VAE_PAPER + _HIERARCHY),
        steps=False,
        no_twin="it has no pipeline of hierarchical VAEs.",
    )


@wording_of.register
def _(pipeline: TokenPipeline) -> Wording:
    packages = ", ".join(plugin_packages(pipeline))
    whose = f"the package {packages}'s" if packages else "a plugin's"
    return Wording(
        kind="A diffusion model",
        tags=("discrete-diffusion", "diffusion-language-model"),
        structure=_tokens(pipeline),
        source=markdown("{}.", _TOKENS_PAPER),
        no_twin=f"it has no sampler of such a process of tokens. No code is carried for readers without vdm_hub "
        f"either, as the process is {whose}, which one file of vdm_hub would lack.",
    )


def _tokens(pipeline: TokenPipeline) -> Markup:
    """The network and the process of a model of texts."""
    network, config = pipeline.network, pipeline.scheduler.config
    name, fields, _ = registry.parse_serialised("forward_processes", config["forward_process"])
    told = "told" if pipeline.time_embedding is not None else "not told"
    chosen = ", ".join(f"{field} {value}" for field, value in fields.items())
    return markdown(
        "Network: {} of transformers, {} parameters, whose attention is not causal, {} the timestep. Process: {} "
        "diffusion{} of {} values of a token.",
        code(type(network).__name__),
        f"{network.num_parameters():,}",
        told,
        name,
        markdown(" ({})", code(chosen)) if chosen else "",
        f"{pipeline.num_levels:,}",
    )


def plugin_packages(pipeline: LikelihoodPipeline) -> dict[str, str]:
    """The plugin packages that a pipeline's config names, with the versions that it was saved with."""
    scheduler = pipeline.components.get("scheduler")
    named = {} if scheduler is None else registry.packages(process_config(scheduler.config))
    for component in pipeline.components.values():
        if isinstance(component, RegisteredModel):
            named |= registry.packages(component.config)
    return {package: re.sub(r"[^\w.+!-]", "", version) for package, version in named.items()}


def _conditional(pipeline: VDMPipeline) -> str:
    return "" if pipeline.condition is None else f"{pipeline.condition.noun}-conditional "


def _network(pipeline: VDMPipeline) -> Markup:
    name, size = code(type(bare_network(pipeline.unet)).__name__), f"{pipeline.unet.num_parameters():,}"
    return markdown("Network: {}, {} parameters.", name, size)


def _process(pipeline: VDMPipeline) -> Markup:
    config = process_config(pipeline.scheduler.config)
    schedule = registry.parse_serialised("noise_schedules", config["noise_schedule"])[0]
    target = registry.parse_serialised("parameterizations", config["prediction_type"])[0]
    process = registry.parse_serialised("forward_processes", config.get("forward_process") or "gaussian")[0]
    carried = ", with weights of its own" if pipeline.noise_schedule is not None else ""
    gaussian, described = pipeline.process.diffused, markdown("Process: {} diffusion", process)
    if "noise_schedule" not in gaussian.fields():  # a process without gamma has none, nor a target
        return markdown("{}, {} levels.", described, gaussian.num_levels)
    described += markdown(", noise schedule {}{}", code(schedule), carried)
    if gaussian.scalar_gamma is not None:
        least, most = (float(gamma) for gamma in gaussian.scalar_gamma.endpoints())
        described += markdown(" with log SNR from {} to {}", f"{-least:.2f}", f"{-most:.2f}")
    return markdown("{}, target {}, {} levels.", described, code(target), gaussian.num_levels)
