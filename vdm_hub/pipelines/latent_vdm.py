"""`LatentVDMPipeline`: samples and likelihood of a diffusion of a first stage's latents."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from vdm_hub.data.captions import CaptionsMapping
from vdm_hub.data.conditions import ClassesMapping
from vdm_hub.data.levels import images_from_levels, levels_from_images
from vdm_hub.data.preprocessing import HeldOutMapping, PreprocessingMapping
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.latent_process import LatentProcess
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.hub.schemas import Record, check_arguments
from vdm_hub.models.registered_model import RegisteredModel, config_of
from vdm_hub.pipelines.vdm import VDMPipeline

_INTERFACE = ("image_shape", "latent_shape", "num_levels", "posterior", "log_likelihood", "draw_levels")


class LatentScaling(TypedDict):
    """The ``shift`` and ``scale`` of the latents, one number a channel, or one for all."""

    shift: list[float]
    scale: list[float]


Scaling = Annotated[dict[str, Any], Record(LatentScaling)]

_AS_THEY_ARE: dict[str, Any] = {"shift": [0.0], "scale": [1.0]}


class LatentVDMPipeline(VDMPipeline):
    """A variational diffusion model of latents: call it for images, ask it for their likelihood.

    Steps, samplers and schedules are those of `VDMPipeline`; ``output_type="latent"`` leaves what the last step left.

    Args:
        first_stage: `MarkovianHVAE` of depth 1, `AutoencoderKLFirstStage`, or a model called alike.
        unet: The network, in the latents' shape; a vector of D entries is (D, 1, 1).
        scheduler: `VDMScheduler`, with the images' ``num_levels``, or a stock scheduler made from its config.
        noise_schedule: For schedules that have weights at inference.
        latent_scaling: ``{"shift": [...], "scale": [...]}``: the diffusion sees ``(y - shift) / scale``, channel by
            channel. y itself where not given.
        preprocessing: How images become the model's levels, as `vdm_hub.data.preprocessing.Preprocessing` has it.
        held_out: How its test images were held out, as `vdm_hub.data.preprocessing.HeldOut` has it.
        forward_process: As of `VDMPipeline`; latents are diffused by a Gaussian process, which needs none.
        classes: What it is conditioned on, as `vdm_hub.data.conditions.Classes` has it.
        captions: What it is conditioned on, as `vdm_hub.data.captions.Captions` has it.
        text_encoder: As of `VDMPipeline`.
        tokenizer: As of `VDMPipeline`.

    Example:
        >>> from vdm_hub import LatentVDMPipeline, MarkovianHVAE, UNetVDMModel, VDMScheduler
        >>> stage = MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(2, 4, 4)], block_out_channels=(8,))
        >>> unet = UNetVDMModel(
        ...     sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8,), layers_per_block=1,
        ...     norm_num_groups=4, fourier_features=(),
        ... )
        >>> pipe = LatentVDMPipeline(stage, unet, VDMScheduler(num_levels=17))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe(batch_size=2, num_inference_steps=4, output_type="pt").images
        >>> images.shape, list(pipe.bits_per_dim(images).terms)
        (torch.Size([2, 1, 8, 8]), ['reconstruction', 'prior', 'diffusion', 'latent'])
    """

    model_cpu_offload_seq = "text_encoder->unet->first_stage"

    def __init__(
        self,
        first_stage: ModelMixin,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        noise_schedule: RegisteredModel | None = None,
        latent_scaling: Scaling = _AS_THEY_ARE,
        preprocessing: PreprocessingMapping | None = None,
        held_out: HeldOutMapping | None = None,
        forward_process: RegisteredModel | None = None,
        classes: ClassesMapping | None = None,
        captions: CaptionsMapping | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: object | None = None,
    ) -> None:
        text: Any = {"text_encoder": text_encoder, "tokenizer": tokenizer}
        super().__init__(unet, scheduler, noise_schedule, forward_process=forward_process, **text)
        _check_first_stage(first_stage)
        check_arguments(type(self), {"latent_scaling": latent_scaling})
        _check_network(first_stage, unet)
        self.register_modules(first_stage=first_stage)
        # A mapping: diffusers takes a list in a pipeline's index for the library and class of a component.
        self.register_to_config(latent_scaling={name: list(values) for name, values in latent_scaling.items()})
        self._check_text(classes, captions)
        self._register_images(preprocessing, held_out, classes, captions)

    @classmethod
    def from_diffusers(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse a checkpoint of diffusers, which has no likelihood of its first stage.

        Raises:
            ConfigurationError: Always: diffusers' latent pipelines have no likelihood of the data.
        """
        raise ConfigurationError(
            "diffusers' latent pipelines have no p(x|y) over levels, so no likelihood: build a LatentVDMPipeline of "
            "AutoencoderKLFirstStage.from_autoencoder(vae, num_levels=...), their unet and a VDMScheduler, and train "
            "or measure it."
        )

    @property
    def process(self) -> LatentProcess:
        """The process of the scheduler's config, on the latents."""
        process = super().process
        if not isinstance(process, GaussianProcess):
            raise ConfigurationError(
                f"the scheduler's process is {type(process).__name__}, and latents are diffused by a Gaussian one."
            )
        return LatentProcess(self.first_stage, process, **self.config.latent_scaling).to(self._execution_device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the images."""
        channels, height, width = self.first_stage.image_shape
        return int(channels), int(height), int(width)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape (C, H, W) of the latents as the network sees them."""
        return self.process.latent_shape((1,))[1:]

    def clipped_objective(self, transitions: int | None) -> None:
        """No objective: latents have no range to clip to."""

    def description(self) -> dict[str, Any]:
        """The configs of scheduler and first stage, and the latents' scaling."""
        stage = {name: value for name, value in self.first_stage.config.items() if not name.startswith("_")}
        return super().description() | {"first_stage": stage, "latent_scaling": self.config.latent_scaling}

    def examine(self, levels: Tensor) -> tuple[dict[str, Any], list[str]]:
        """The mean and the deviation of the latents, and a note where they carry nothing."""
        description, notes = self.process.examine(levels.split(256))
        return {"latents": description}, notes

    @torch.no_grad()
    def encode(self, images: Any, generator: Generator = None, mean: bool = False) -> Tensor:
        """Latents of images, drawn from ``q(y|x)``, as the diffusion sees them: (B, *latent_shape).

        Args:
            images: As `log_likelihood` takes them.
            generator: Of the draws; one, or a list with one per image.
            mean: Take the mean instead of a draw.

        Raises:
            DataError: A pixel is none of the K levels, or the images have another shape.
        """
        levels, process = levels_from_images(images, self.num_levels).to(self._execution_device), self.process
        if tuple(levels.shape[1:]) != self.image_shape:
            raise DataError(
                f"the images are {tuple(levels.shape[1:])} (channels, height, width); the first stage's are "
                f"{self.image_shape}: resize or convert them first."
            )
        centre, scale = process.posterior(process.encode(levels))
        return centre if mean else centre + scale * normal_noise(scale.shape, generator, scale.device)

    @torch.no_grad()
    def reconstruct(self, images: Any, output_type: str = "pil") -> Any:
        """The images as the first stage keeps them: encoded and decoded at the mean.

        Args:
            images: As `log_likelihood` takes them.
            output_type: ``pil``, ``np`` or ``pt``, as of a call.
        """
        levels = self.process.quantise(self.encode(images, mean=True))
        return images_from_levels(levels, self.num_levels, output_type)


def _check_first_stage(stage: Any) -> None:
    missing = [name for name in _INTERFACE if not hasattr(stage, name)]
    if missing:
        remedy = " AutoencoderKLFirstStage.from_autoencoder(vae, num_levels=...) gives it one."
        raise ConfigurationError(
            f"{type(stage).__name__} is no first stage: it has no {', '.join(missing)}, so no likelihood over levels."
            + (remedy if isinstance(stage, AutoencoderKL) else "")
        )


def _check_network(stage: Any, unet: ModelMixin) -> None:
    latent = tuple(stage.latent_shape)
    latent = (*latent, *(1,) * (3 - len(latent)))
    config = config_of(unet)
    size = config.get("sample_size")
    size = (size, size) if isinstance(size, int) else tuple(size) if size is not None else latent[1:]
    if (config.get("in_channels"), *size) != latent:
        raise ConfigurationError(
            f"the first stage's latents are {'x'.join(map(str, latent))} (channels, height, width), and the network "
            f"takes {'x'.join(map(str, (config.get('in_channels'), *size)))}: give one of the latents' shape."
        )


LatentVDMPipeline.__module__ = "vdm_hub"
