"""`LatentVDMPipeline`: samples and likelihood of a diffusion of a first stage's latents."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import torch
from diffusers import AutoencoderKL, VQModel
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
from vdm_hub.errors import ConfigurationError, DataError, shortened
from vdm_hub.hub.schemas import Record, check_arguments
from vdm_hub.models.conditions import classes_of, keeps_null
from vdm_hub.models.first_stages import NOT_FITTED, AutoencoderKLFirstStage, VQModelFirstStage
from vdm_hub.models.registered_model import RegisteredModel, config_of
from vdm_hub.objectives.variational_bound import VDMObjective
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.registry import Serialised
from vdm_hub.schedulers.diffusers_checkpoints import PipelineSource, latent_checkpoint
from vdm_hub.schedulers.families import process_config

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
    def from_diffusers(
        cls,
        source: PipelineSource,
        num_levels: int | None = None,
        *,
        data_scaling: str | None = None,
        decoder: Serialised | None = None,
        prediction_type: Serialised | None = None,
        variance_type: str | None = None,
        **arguments: Any,
    ) -> LatentVDMPipeline:
        """A latent checkpoint of diffusers as a VDM: its samples as ever, and a likelihood once its scale is fitted.

        Network, process, scaling of the latents and classes are taken over. Its autoencoder says nothing of
        ``p(x|y)``: `AutoencoderKLFirstStage` and `VQModelFirstStage` give it one, whose scale `fit_first_stage` fits
        on some images; until then there is no likelihood. A transformer's prediction of a variance is not read, as
        diffusers' own pipeline does not read it: the reverse steps have the posterior's.

        Args:
            source: A folder, a Hub id, or a pipeline in memory: a `DiTPipeline`, an `LDMPipeline`, or another one of
                a transformer or U-Net, an `AutoencoderKL` or `VQModel`, and a scheduler that
                `VDMPipeline.from_diffusers` takes.
            num_levels: K, how many levels the images have that it was trained on; 256 for a table of betas, if not
                given.
            data_scaling: Where those levels lie, if not from -1 to 1, as diffusers' latent pipelines have it.
            decoder: None: a latent model's is its first stage.
            prediction_type: What the network predicts, if its config is wrong about it.
            variance_type: None: it is the posterior's.
            arguments: As of `VDMPipeline.from_diffusers`, of folders and Hub ids.

        Raises:
            ConfigurationError: It is a model of another kind, such as one of text.
            CheckpointError: A file is damaged, belongs to another network, or should not be where it is.
            OSError: There is no such repository, or it can't be reached.
        """
        for name, value in (("decoder", decoder), ("variance_type", variance_type)):
            if value is not None:
                raise ConfigurationError(
                    f"{name} is {shortened(value)}, and a latent model is decoded by its first stage and diffused "
                    f"with the posterior's variance: leave it out."
                )
        overrides = {"num_levels": num_levels, "prediction_type": prediction_type}
        taken = latent_checkpoint(source, overrides, arguments)
        levels = int(process_config(taken.scheduler.config)["num_levels"])
        stage: Any = VQModelFirstStage if isinstance(taken.autoencoder, VQModel) else AutoencoderKLFirstStage
        config, factor = taken.autoencoder.config, 2 ** (len(taken.autoencoder.config.block_out_channels) - 1)
        size = taken.network.config.sample_size
        first_stage = stage.from_autoencoder(
            taken.autoencoder,
            sample_size=size * factor if isinstance(size, int) else tuple(side * factor for side in size),
            num_levels=levels,
            data_scaling=data_scaling or "full",
            fitted_on=NOT_FITTED,
        )
        scaling = {"shift": [config.get("shift_factor") or 0.0], "scale": [1 / config.get("scaling_factor", 1.0)]}
        pipe = cls(
            first_stage,
            taken.network,
            taken.scheduler,
            latent_scaling=scaling,
            classes=_classes(taken.network, taken.class_names),
        )
        pipe.register_to_config(_name_or_path=taken.name)
        return pipe

    def fit_first_stage(self, images: Any, seed: int = 0) -> None:
        """Fit the scale of an autoencoder that was trained without a likelihood, by that of some images.

        Args:
            images: As `log_likelihood` takes them: of the training split, if test images are to be measured.
            seed: Of the draws from ``q(y|x)``.

        Raises:
            ConfigurationError: The first stage is one that was trained with its scale.
            DataError: A pixel is none of the K levels, or the images have another shape.
        """
        if self.first_stage.config.get("fitted_on") is None:
            raise ConfigurationError(
                f"the scale of this {type(self.first_stage).__name__} was trained with it: there is nothing to fit."
            )
        self.first_stage.fit(self._levels_of(images), seed)

    def objective(self, transitions: int | None = None) -> VDMObjective:
        """The bound of this pipeline as a module.

        Raises:
            ConfigurationError: The scale of its first stage is still to be fitted.
        """
        if not getattr(self.first_stage, "is_fitted", True):
            raise ConfigurationError(
                "the model's autoencoder has no likelihood yet: fit its scale first, on images that are not measured, "
                "with pipe.fit_first_stage(images), or vdm-hub evaluate --fit_split 'train[:256]'."
            )
        return super().objective(transitions)

    def notes(self, transitions: int | None) -> list[str]:
        """Notes as of `VDMPipeline`, and on a first stage whose scale was fitted."""
        notes = super().notes(transitions)
        if images := self.first_stage.config.get("fitted_on"):
            scale = ", ".join(f"{value:.3g}" for value in self.first_stage.log_scale.exp().tolist())
            notes.append(
                f"the autoencoder was trained without a likelihood: p(x|y) is a discretised Gaussian around its "
                f"image, whose scale ({scale}) was fitted on {images:,} images"
            )
        if self.process.gaussian.unread_half:
            notes.append("the network's prediction of a variance is not read, as in its own pipeline")
        return notes

    @property
    def process(self) -> LatentProcess:
        """The process of the scheduler's config, on the latents."""
        process = super().process
        if not isinstance(process, GaussianProcess):
            raise ConfigurationError(
                f"the scheduler's process is {type(process).__name__}, and latents are diffused by a Gaussian one."
            )
        has_more = config_of(self.unet).get("out_channels") == 2 * config_of(self.unet).get("in_channels", 0)
        process.unread_half = has_more and not process.variance.learned
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
        levels, process = self._levels_of(images), self.process
        centre, scale = process.posterior(process.encode(levels))
        return centre if mean else centre + scale * normal_noise(scale.shape, generator, scale.device)

    def _levels_of(self, images: Any) -> Tensor:
        """The levels of images that the first stage takes."""
        levels = levels_from_images(images, self.num_levels).to(self._execution_device)
        if tuple(levels.shape[1:]) != self.image_shape:
            raise DataError(
                f"the images are {tuple(levels.shape[1:])} (channels, height, width); the first stage's are "
                f"{self.image_shape}: resize or convert them first."
            )
        return levels

    @torch.no_grad()
    def reconstruct(self, images: Any, output_type: str = "pil") -> Any:
        """The images as the first stage keeps them: encoded and decoded at the mean.

        Args:
            images: As `log_likelihood` takes them.
            output_type: ``pil``, ``np`` or ``pt``, as of a call.
        """
        levels = self.process.quantise(self.encode(images, mean=True))
        return images_from_levels(levels, self.num_levels, output_type)


def _classes(network: Any, names: tuple[str, ...] | None) -> dict[str, Any] | None:
    """The classes of a checkpoint's network, as a pipeline's config has them."""
    rows = classes_of(network)
    if rows is None:
        return None
    # diffusers' transformer drops a tenth of its labels in training, by its constructor's default.
    count, dropout = (rows - 1, 0.1) if keeps_null(network) else (rows, 0.0)
    named = list(names) if names is not None and len(names) == count else None
    return {"count": count, "names": named, "dropout": dropout, "column": "label"}


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
