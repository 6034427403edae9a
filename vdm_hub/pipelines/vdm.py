"""`VDMPipeline`: samples from a variational diffusion model, and its likelihood."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.data.captions import CaptionsMapping
from vdm_hub.data.conditions import ClassesMapping, ClassLabels
from vdm_hub.data.levels import images_from_levels
from vdm_hub.data.preprocessing import HeldOutMapping, PreprocessingMapping
from vdm_hub.diffusion.draws import Generator
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.gaussian_process import BoundGaussian, GaussianProcess
from vdm_hub.diffusion.noise_schedules import NoiseSchedule, TabulatedSchedule
from vdm_hub.diffusion.samplers import ANCESTRAL, Sampler, build_sampler
from vdm_hub.errors import CheckpointError, ConfigurationError, NonFiniteLossError, shortened, unknown_name
from vdm_hub.fields import whole_number
from vdm_hub.hub.places import INDEX
from vdm_hub.hub.repositories import HUB_ARGUMENTS, ModelFiles
from vdm_hub.models.calls import Call, check_context, checked_output, evaluating, named_arguments
from vdm_hub.models.conditions import classes_of, keeps_null, takes_classes, text_width_of
from vdm_hub.models.registered_model import RegisteredModel, bare_network, config_of
from vdm_hub.models.text_conditions import TextCondition
from vdm_hub.models.text_encoders import TextEncoder
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.objectives.variational_bound import VDMObjective
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.guidance import GUIDER, GuidedNetwork, build_guider
from vdm_hub.pipelines.prompts import Prompt, encoded, negative_of, of_one_length, one_for_each
from vdm_hub.registry import Serialised
from vdm_hub.schedulers.configs import check_grid, check_sampler, model_input
from vdm_hub.schedulers.diffusers_checkpoints import (
    PipelineSource,
    notes_on_bound,
    scheduler_of_pipeline,
    scheduler_of_repository,
)
from vdm_hub.schedulers.families import family_of, own_loop, process_config
from vdm_hub.schedulers.vdm import VDMScheduler, time_tensor

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class VDMPipeline(LikelihoodPipeline):
    """A variational diffusion model: call it for samples, ask it for a likelihood.

    The scheduler given is kept as it is, so a stock sampler may be swapped in
    (``pipe.scheduler = pipe.scheduler.to_diffusers(UniPCMultistepScheduler)``). Likelihoods are always those of the
    VDM that the scheduler's config describes.

    Args:
        unet: The network: `UNetVDMModel`, diffusers' `UNet2DModel`, `UNet2DConditionModel` or `DiTTransformer2DModel`,
            or any model called alike.
        scheduler: `VDMScheduler`, or a stock scheduler made from its config.
        noise_schedule: For schedules that have weights at inference; made from the scheduler's where that has some, so
            that they are saved.
        preprocessing: How images become the model's levels, as `vdm_hub.data.preprocessing.Preprocessing` has it.
        held_out: How its test images were held out, as `vdm_hub.data.preprocessing.HeldOut` has it.
        forward_process: For processes with weights of their own; made from the scheduler's where it has some.
        classes: What it is conditioned on, as `vdm_hub.data.conditions.Classes` has it.
        captions: What it is conditioned on, as `vdm_hub.data.captions.Captions` has it.
        text_encoder: Of captions, an encoder of transformers, as wide as what the network attends to.
        tokenizer: The text encoder's.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["noise_schedule", "forward_process", "text_encoder", "tokenizer"]
    _left_out_where_none = (*LikelihoodPipeline._left_out_where_none, "forward_process", "text_encoder", "tokenizer")
    _may_be_left = ("text_encoder", "tokenizer")  # prompts may be given as embeddings
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        noise_schedule: RegisteredModel | None = None,
        preprocessing: PreprocessingMapping | None = None,
        held_out: HeldOutMapping | None = None,
        forward_process: RegisteredModel | None = None,
        classes: ClassesMapping | None = None,
        captions: CaptionsMapping | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: object | None = None,
    ) -> None:
        super().__init__()
        self._steps_of: dict[int | None, int] = {}  # by thread, and of the last call
        unet = _as_component(unet)
        weights = _weights_of_schedule(scheduler) if noise_schedule is None else noise_schedule
        process = getattr(scheduler, "process", None)
        if forward_process is None and isinstance(process, ForwardProcess) and process.has_weights:
            forward_process = RegisteredModel.carrying(process)
        if isinstance(scheduler, VDMScheduler):
            check_context(scheduler.process.context_size, bare_network(unet))
            if (shape := _shape_of(unet)) is not None:
                scheduler.process.check_shape(shape)
        self.register_modules(unet=unet, scheduler=scheduler, noise_schedule=weights, forward_process=forward_process)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
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
    ) -> VDMPipeline:
        """A checkpoint of diffusers as a VDM: its samples bit for bit, and now its likelihood.

        **DDPM family** (any scheduler with betas). Network, process (its very table of betas), data scaling (``full``:
        levels from -1 to 1), decoder (``ddpm``, DDPM eq. 13) and the reverse steps' variance, fixed or learned, are
        taken over. Samples are DDPM's own steps with all that the config asks of them.
        ``transitions=num_train_timesteps - 1`` measures the very chain of Ho et al. (DDPM eq. 5). Where the sampler
        clips its estimates, the bound is that of the unclipped model; with a number of transitions the clipped one's
        is reported beside it.

        **Flow matching, EDM, VE** (`vdm_hub.schedulers.families` has what each network reads and predicts). Network,
        target and the ends of the noise are taken over; number of levels, data scaling and decoder must be given.
        The pipeline keeps the checkpoint's own scheduler, which samples as ever and carries the VDM's config; for the
        VDM's samplers set ``pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config)``.

        Args:
            source: A folder, a Hub id, or a pipeline in memory: a `DDPMPipeline`, a `DDIMPipeline`, a
                `ScoreSdeVePipeline` or another one of a ``unet`` and a ``scheduler``.
            num_levels: K, how many levels the images have that it was trained on; 256 for a DDPM, if not given.
            data_scaling: Where those levels lie: ``full`` (-1 to 1; DDPM's), ``unit`` (0 to 1) or ``bin_centers``.
            decoder: How levels follow from the first latent: ``ddpm`` (DDPM's) or ``factorised``.
            prediction_type: What the network predicts, if its config is wrong about it.
            variance_type: The reverse steps' variance, if the config is wrong about it: ``fixed_small``,
                ``fixed_large``, ``learned_range``, ...
            arguments: ``revision``, ``variant``, ``dtype``, ``token``, ``cache_dir``, ``local_files_only``, ...

        Raises:
            ConfigurationError: It is a model of another kind (latent, conditioned on text, ...), its family leaves
                something undefined that was not given, or its weights are not in safetensors.
            CheckpointError: A file is damaged, belongs to another network, or should not be where it is.
            OSError: There is no such repository, or it can't be reached.

        Example:
            >>> from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
            >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
            >>> size = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,)}
            >>> unet = UNet2DModel(**size, **blocks, layers_per_block=1, norm_num_groups=4)
            >>> pipe = VDMPipeline.from_diffusers(DDPMPipeline(unet, DDPMScheduler()), num_levels=17)
            >>> pipe.scheduler.config.decoder, pipe.process.num_levels
            ('ddpm', 17)
        """
        fields = {"num_levels": num_levels, "data_scaling": data_scaling, "decoder": decoder}
        fields |= {"prediction_type": prediction_type, "variance_type": variance_type}
        if isinstance(source, DiffusionPipeline):
            accepted = scheduler_of_pipeline(source, fields, arguments)
            return cls(source.unet, accepted)
        cls._check_loading(arguments)
        scheduler, files = scheduler_of_repository(source, fields, arguments)
        others = {key: value for key, value in arguments.items() if key not in HUB_ARGUMENTS}
        pipeline: VDMPipeline = cls._from_checked(files, others | {"scheduler": scheduler, "use_safetensors": True})
        return pipeline

    @classmethod
    def _from_checked(cls, files: ModelFiles, arguments: dict[str, Any]) -> Any:
        pipeline = super()._from_checked(files, arguments)
        described = process_config(pipeline.scheduler.config)
        for name in ("noise_schedule", "forward_process"):
            saved = files.read_json(INDEX).get(name) not in (None, [None, None])
            loaded = arguments.get(name) is not None or (saved and name not in arguments)
            if getattr(pipeline, name) is not None and not loaded:
                raise CheckpointError(
                    f"{files.name} has the {name} {shortened(described.get(name))}, which is learned, and no "
                    f"component {name} that holds its weights: it is incomplete. Save the pipeline again, or download "
                    f"it again, or give a {name}."
                )
        return pipeline

    def _check_text(self, classes: Any, captions: Any) -> None:
        """Refuse a text encoder that the network can't listen to, and one without a tokenizer."""
        if self.text_encoder is not None and self.tokenizer is None:
            raise ConfigurationError("a text_encoder is given, and no tokenizer: give both, or no text_encoder.")
        if captions is not None and classes is not None:
            raise ConfigurationError("both classes and captions are given: a model is conditioned on one of the two.")
        width = text_width_of(bare_network(self.unet))
        told = (captions, self.text_encoder, self.tokenizer)
        if width is None and any(part is not None for part in told):
            raise ConfigurationError(
                f"{type(bare_network(self.unet)).__name__} attends to no text, and captions or a text_encoder are "
                f"given: leave them out, or give a network with cross_attention_dim."
            )
        if self._text is not None and self._text.width != width:
            raise ConfigurationError(
                f"the text_encoder's vectors are {self._text.width} wide, and the network was built for {width} "
                f"(cross_attention_dim): give the encoder that it was trained with."
            )

    @property
    def _text(self) -> TextEncoder | None:
        """The text encoder with its tokenizer, where it has them."""
        if self.text_encoder is None or self.tokenizer is None:
            return None
        captions = self.config.get("captions")
        return TextEncoder(self.text_encoder, self.tokenizer, None if captions is None else captions["max_length"])

    @property
    def text_condition(self) -> TextCondition | None:
        """The captions that it is conditioned on, with its text encoder; ``None`` where it is not."""
        width, captions = text_width_of(bare_network(self.unet)), self.config.get("captions")
        if width is None:
            return None
        if captions is None:
            return TextCondition(width, text=self._text)
        return TextCondition.from_config(width, captions, self._text)

    @property
    def device(self) -> torch.device:
        """The device of its network: a text encoder may lie elsewhere."""
        device: torch.device = self.unet.device
        return device

    @property
    def process(self) -> ForwardProcess:
        """The forward process of the scheduler's config, on the pipeline's device."""
        scheduler = self._vdm_scheduler
        if self.forward_process is not None:
            carried: ForwardProcess = self.forward_process.module
            if carried.fields() != scheduler.process.fields():
                raise ConfigurationError(
                    f"the scheduler's process has the fields {shortened(scheduler.process.fields())}, and the "
                    f"pipeline's component forward_process {shortened(carried.fields())}: give the scheduler that was "
                    f"saved with it, or make a new pipeline of the network and this scheduler."
                )
            return carried
        if self.noise_schedule is None:
            return scheduler.process.to(self._execution_device)
        own, described = self.noise_schedule.module, getattr(scheduler.process, "schedule", None)
        published = described.bake() if isinstance(described, NoiseSchedule) else described
        if not isinstance(described, TabulatedSchedule) and type(own) not in (type(described), type(published)):
            raise ConfigurationError(
                f"the scheduler's noise_schedule is {shortened(scheduler.config.noise_schedule)}, and the pipeline's "
                f"component noise_schedule holds a {type(own).__name__}: give the scheduler that was saved with it, "
                f"or make a new pipeline of the network and this scheduler."
            )
        return scheduler.build_process(own)

    @property
    def _vdm_scheduler(self) -> VDMScheduler:
        if isinstance(self.scheduler, VDMScheduler):
            return self.scheduler
        scheduler: VDMScheduler = VDMScheduler.from_config(self.scheduler.config)
        return scheduler

    @property
    def shows_steps(self) -> bool:
        """Whether a call takes a callback of its steps: not where a loop of diffusers' own samples."""
        return own_loop(self.scheduler) is None

    @property
    def num_timesteps(self) -> int:
        """The number of steps of this thread's sampling, or of its last; callbacks compare their index with it."""
        return self._steps_of.get(threading.get_ident(), self._steps_of.get(None, len(self.scheduler.timesteps)))

    # ---- samples ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        latents: Tensor | None = None,
        class_labels: ClassLabels | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sampler: str | Sampler = ANCESTRAL,
        guidance_scale: float = 1.0,
        guider: str | BaseGuidance = GUIDER,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        **network_arguments: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images: z_1 from the prior, ``num_inference_steps`` reverse steps, then ``p(x|z_0)``.

        Args:
            batch_size: How many images; as many as ``class_labels`` or prompts, where this is not given.
            generator: One, or a list with one per image; images then do not depend on the batch they are in.
            num_inference_steps: Evaluations of the network.
            latents: z_1, (B, C, H, W), instead of a draw.
            class_labels: Class of each image, (B,), by number or name, or one for all: ``["sneaker", 3]``.
            output_type: ``pil``, ``np`` (B, H, W, C) or ``pt`` (B, C, H, W), the last two in [0, 1]; ``latent`` is
                what the last step left, (B, C, H, W), not decoded.
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: Called as ``callback(pipe, step, timestep, {"latents": ...})``; it may return changed
                latents.
            callback_on_step_end_tensor_inputs: Which tensors the callback gets; there is only ``latents``.
            sampler: ``ancestral``, the scheduler's own steps; or, by the score, ``reverse_sde``, ``probability_flow``,
                ``predictor_corrector``, ``annealed_langevin``, or one of `vdm_hub.diffusion.samplers`. Those that
                evaluate the network several times a step take so many steps fewer.
            guidance_scale: w of ``F = F_none + w (F_class - F_none)`` in the network's own target (Ho and Salimans,
                arXiv 2207.12598, eq. 6, with w + 1 for w). 1 is no guidance; else each step evaluates the network on
                twice as many images, and the images are no longer the model's: no likelihood is stated for them.
            guider: A guider of diffusers that combines these two, by its name or as an object, whose own scale then
                holds: ``ClassifierFreeZeroStarGuidance``, ``AdaptiveProjectedGuidance``, ...
            prompt: Caption of each image, or one for all, of a model that was trained with captions.
            negative_prompt: With guidance, what takes the place of no caption, for each prompt or one for all.
            num_images_per_prompt: Images of each prompt, one after the other.
            prompt_embeds: In place of ``prompt``, what `encode_prompt` gives, (B, L, D).
            negative_prompt_embeds: In place of ``negative_prompt``.
            prompt_attention_mask: With ``prompt_embeds``, where there is a token, (B, L); everywhere by default.
            negative_prompt_attention_mask: The same of ``negative_prompt_embeds``.
            network_arguments: Passed to the network by name.

        Example:
            >>> from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler
            >>> unet = UNetVDMModel(
            ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            ...     norm_num_groups=4,
            ... )
            >>> pipe = VDMPipeline(unet, VDMScheduler(num_levels=17))
            >>> pipe.set_progress_bar_config(disable=True)
            >>> pipe(batch_size=2, num_inference_steps=4, output_type="pt").images.shape
            torch.Size([2, 1, 8, 8])
        """
        self._check_call(batch_size, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        if (loop := own_loop(self.scheduler)) is not None:
            asked: dict[str, Any] = {"latents": latents, "class_labels": class_labels}
            asked |= {"callback_on_step_end": callback_on_step_end}
            asked |= {"prompt": prompt, "prompt_embeds": prompt_embeds} | network_arguments
            asked |= {"sampler": None if sampler == ANCESTRAL else sampler}
            asked |= {"output_type": output_type if output_type == "latent" else None}
            asked |= {"guidance_scale": None if guidance_scale == 1 else guidance_scale}
            given = {"batch_size": batch_size, "generator": generator, "num_inference_steps": num_inference_steps}
            return self._by_loop(loop, given, asked, output_type, return_dict)
        self._check_names(network_arguments, type(self).__call__)
        process, device = self.process, self._execution_device
        guiding = build_guider(guider, guidance_scale)
        self._check_told(class_labels, prompt, prompt_embeds)
        negative: Any = (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
        embeds = (prompt_embeds, prompt_attention_mask)
        told, untold = self._prompts(prompt, *embeds, num_images_per_prompt, *negative, guided=guiding is not None)
        if batch_size == 1 and latents is None and (told or class_labels is not None):
            batch_size = len(told["encoder_hidden_states"]) if told else _number_of(class_labels)
        shape = self._batch_shape(batch_size, latents, generator)
        if told:
            told, untold = (one_for_each(one, shape[0]) for one in (told, untold or told))
            told |= self._labels(class_labels, shape[0])
        else:
            told = self._told(shape[0], network_arguments, class_labels, None, None)
        _, bound = process.bind(None, process.draw_context(shape, generator, device))
        self._check_apart(network_arguments, told)
        network = self._network(process, network_arguments | told, guiding, untold)
        if latents is None:
            latents = bound.prior_sample(shape, generator, device)
        steps = _Steps(self, bound, network, num_inference_steps, sampler, generator)
        latents = latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        with evaluating(nn.ModuleList([self.unet, process])):
            images = latents = steps.taken(latents, callback_on_step_end)
            if output_type != "latent":
                _check_finite(latents, None if guiding is None else guidance_scale)
                images = images_from_levels(steps.decoded(latents), process.num_levels, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _by_loop(
        self, loop: type, given: dict[str, Any], asked: dict[str, Any], output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples by the loop of a pipeline of diffusers, whose scheduler knows no common one."""
        if refused := [f"{name}={shortened(value)}" for name, value in asked.items() if value is not None]:
            raise ConfigurationError(
                f"{type(self.scheduler).__name__} samples in the loop of diffusers' {loop.__name__}, which takes no "
                f"{', '.join(refused)}: leave it out, or set pipe.scheduler = "
                f"VDMScheduler.from_config(pipe.scheduler.config)."
            )
        if self.image_shape[0] != 3:
            raise ConfigurationError(
                f"the loop of diffusers' {loop.__name__} draws 3 channels, and this model's images have "
                f"{self.image_shape[0]}: set pipe.scheduler = VDMScheduler.from_config(pipe.scheduler.config)."
            )
        self._batch_shape(given["batch_size"], None, given["generator"])
        stock: Any = loop(unet=self.unet, scheduler=copy.deepcopy(self.scheduler)).to(self._execution_device)
        stock.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        images = stock(**given, output_type="np").images
        levels = torch.from_numpy(images).movedim(-1, 1).mul(self.num_levels - 1).round().long()
        made = images_from_levels(levels, self.num_levels, output_type)
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    @staticmethod
    def _check_call(batch_size: Any, output_type: str, callback: Any, asked: Any) -> None:
        """Refuse what a call can't do, before anything is computed."""
        if output_type not in _OUTPUT_TYPES:
            raise unknown_name("output_type", output_type, _OUTPUT_TYPES)
        if callback is not None and not callable(callback):
            raise ConfigurationError(f"callback_on_step_end is {shortened(callback)}: give a function.")
        if asked not in ((), [], ("latents",), ["latents"]):
            raise ConfigurationError(f"the callback asks for {shortened(asked)}; only ['latents'] can be given.")
        if isinstance(batch_size, str | list | tuple):
            raise ConfigurationError(f"batch_size, the first argument, is {shortened(batch_size)}: write prompt=...")

    def encode_prompt(
        self,
        prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        do_classifier_free_guidance: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The vectors of the tokens of prompts, and of what guidance puts in their place; all of one length L.

        Args:
            prompt: As of a call, as all the next.
            num_images_per_prompt: See there.
            negative_prompt: The empty text by default.
            prompt_embeds: See there.
            negative_prompt_embeds: See there.
            prompt_attention_mask: See there.
            negative_prompt_attention_mask: See there.
            do_classifier_free_guidance: Whether the last two of the results are wanted.

        Returns:
            ``prompt_embeds``, (B, L, D); ``prompt_attention_mask``, (B, L); ``negative_prompt_embeds``;
            ``negative_prompt_attention_mask``.

        Raises:
            ConfigurationError: The model takes no prompts, or a prompt is none.
        """
        condition = self.text_condition
        if condition is None:
            self._check_told(None, prompt, prompt_embeds)
            raise ConfigurationError("encode_prompt needs a model that is conditioned on captions.")
        each = whole_number("num_images_per_prompt", num_images_per_prompt)
        device = self._execution_device
        told = encoded(condition, prompt, prompt_embeds, prompt_attention_mask)
        told = {key: value.to(device).repeat_interleave(each, 0) for key, value in told.items()}
        if not do_classifier_free_guidance:
            return told["encoder_hidden_states"], told["encoder_attention_mask"], None, None
        name, instead = "negative_prompt", negative_of(negative_prompt, negative_prompt_embeds)
        untold = encoded(condition, instead, negative_prompt_embeds, negative_prompt_attention_mask, name=name)
        untold = {key: value.to(device) for key, value in untold.items()}
        count = len(told["encoder_hidden_states"]) // each
        untold = {key: value.repeat_interleave(each, 0) for key, value in one_for_each(untold, count, name).items()}
        told, untold = of_one_length(told, untold)
        return (*told.values(), *untold.values())  # type: ignore[return-value]

    def _prompts(
        self,
        prompt: Prompt | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        num_images_per_prompt: int,
        negative_prompt: Prompt | None,
        negative_prompt_embeds: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        *,
        guided: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the network is told of prompts, and instead of them; empty where none are given."""
        negative: Any = {"negative_prompt": negative_prompt, "negative_prompt_embeds": negative_prompt_embeds}
        is_negative = any(value is not None for value in negative.values())
        if is_negative and not guided:
            name = next(name for name, value in negative.items() if value is not None)
            raise ConfigurationError(
                f"{name} acts only with guidance: give a guidance_scale above 1, or leave it out."
            )
        if prompt is None and prompt_embeds is None:
            if num_images_per_prompt != 1 or is_negative:
                raise ConfigurationError("num_images_per_prompt and negative_prompt belong to a prompt: give one.")
            return {}, {}
        instead = [negative_prompt] if isinstance(negative_prompt, str | None) else negative_prompt
        condition, has_words = self.text_condition, not isinstance(instead, Sequence) or all(instead)
        is_empty = negative_prompt_embeds is None and not has_words
        if guided and is_empty and condition is not None:
            condition.check_null()
        told = self.encode_prompt(
            prompt,
            num_images_per_prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            guided,
        )
        names = ("encoder_hidden_states", "encoder_attention_mask")
        given = [value for value in told if value is not None]
        return dict(zip(names, given, strict=False)), dict(zip(names, given[2:], strict=False))

    def sample(
        self, batch_size: int, generator: Generator = None, num_inference_steps: int = 1000, **arguments: Any
    ) -> Tensor:
        """Samples in [0, 1], (B, C, H, W): `VDMPipeline.__call__` with tensors."""
        arguments |= {"num_inference_steps": num_inference_steps, "output_type": "pt"}
        source: Any = generator
        samples: Tensor = self(batch_size, source, return_dict=False, **arguments)[0]
        return samples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the network's images."""
        shape = _shape_of(self.unet)
        if shape is None:
            raise ConfigurationError("the network's config has no sample_size: give the size of the images there.")
        return shape

    @property
    def num_levels(self) -> int:
        """The number of levels of the scheduler's config, K."""
        return self.process.num_levels

    @property
    def _network_classes(self) -> int | None:
        rows = classes_of(self.unet)
        return None if rows is None else rows - keeps_null(self.unet)

    @property
    def _takes_labels(self) -> bool:
        return takes_classes(self.unet)

    @property
    def main_model(self) -> ModelMixin:
        """The network."""
        return self.unet

    @property
    def _named_arguments(self) -> list[str] | None:
        return named_arguments(bare_network(self.unet))

    def _scheduler_of_call(self, num_inference_steps: int, sampler: Sampler | None) -> Any:
        """A scheduler of this call's own on its grid: threads that share the pipeline share no step."""
        scheduler = copy.deepcopy(self.scheduler)
        most = None if isinstance(scheduler, VDMScheduler) else len(scheduler)
        steps = _steps(whole_number("num_inference_steps", num_inference_steps, most=most), sampler)
        if not isinstance(scheduler, VDMScheduler):
            config = scheduler.config
            if config.get("noise_schedule") is not None or family_of(config) is None:  # made of a VDMScheduler's
                check_sampler(type(scheduler), config.get("prediction_type", "epsilon"), {})
            check_grid(scheduler, steps)
        scheduler.set_timesteps(steps, device=self._execution_device)
        self._steps_of[threading.get_ident()] = self._steps_of[None] = len(scheduler.timesteps)
        return scheduler

    def _score_sampler(self, sampler: str | Sampler, bound: Any) -> Sampler | None:
        """The sampler, where it is another than the scheduler's own."""
        by_score = build_sampler(sampler)
        if by_score is not None and not (
            isinstance(bound, BoundGaussian) and isinstance(self.scheduler, VDMScheduler)
        ):
            raise ConfigurationError(
                f"sampler {type(by_score).__name__} needs the score of a Gaussian process and a VDMScheduler; this "
                f"pipeline has {type(bound).__name__} and {type(self.scheduler).__name__}: leave it out."
            )
        return by_score

    def _network(
        self,
        process: ForwardProcess,
        arguments: dict[str, Any],
        guider: BaseGuidance | None = None,
        untold: dict[str, Tensor] | None = None,
    ) -> GuidedNetwork:
        """The network in its own precision, guided where that is asked for; latents stay in float32."""
        unet = _InOwnPrecision(self.unet, process)
        if guider is None:
            return GuidedNetwork(unet, arguments)
        condition = self.condition
        if condition is None:
            raise ConfigurationError("guidance needs a model with a condition, and this one has none: leave it out.")
        if not untold:
            untold = self._null(arguments)
        instead = arguments | untold
        diffused = process.diffused
        has_more = isinstance(diffused, GaussianProcess) and (diffused.variance.learned or diffused.unread_half)
        return GuidedNetwork(unet, arguments, instead, guider, guided=self.latent_shape[0] if has_more else None)

    def _null(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The network's arguments for a batch that is told nothing, where no negative prompt says so."""
        if (classes := self.class_condition) is None:
            raise ConfigurationError("guidance needs a prompt, or prompt_embeds: give one for each image.")
        return classes.null(len(arguments[classes.entry]), self._execution_device)

    # ---- likelihood -------------------------------------------------------------------------------------------------

    def objective(self, transitions: int | None = None) -> VDMObjective:
        """The bound of this pipeline as a module."""
        process = self.process
        return VDMObjective(_InOwnPrecision(self.unet, process), process, transitions, self.condition)

    def clipped_objective(self, transitions: int | None) -> VDMObjective | None:
        """The bound with every estimate of the data clipped as the checkpoint's sampler does, if it does.

        A clipped predictor is another model, with a bound and a likelihood of its own, in continuous time as well.
        ``None`` where the sampler does not clip.
        """
        scheduler = self._vdm_scheduler
        if scheduler.clipping is None:
            return None
        process = scheduler.build_process().to(self._execution_device)
        assert isinstance(process, GaussianProcess)
        process.clipping = scheduler.clipping
        return VDMObjective(_InOwnPrecision(self.unet, process), process, transitions, self.condition)

    def description(self) -> dict[str, Any]:
        """The scheduler's config."""
        config = process_config(self.scheduler.config)
        return {name: value for name, value in config.items() if not name.startswith("_")}

    def notes(self, transitions: int | None) -> list[str]:
        """Notes on what the scheduler's config says and the bound's process does otherwise, and on guidance."""
        notes = notes_on_bound(self.scheduler.config, transitions)
        if (condition := self.condition) is not None and condition.dropout > 0:
            notes.append("this is the likelihood of the model without guidance; guided samples are of another one")
        return notes


class _Steps:
    """The reverse steps of one call: by its scheduler's own rule, or by the score."""

    def __init__(
        self,
        pipe: VDMPipeline,
        bound: Any,
        network: GuidedNetwork,
        num_inference_steps: int,
        sampler: str | Sampler,
        generator: Any,
    ) -> None:
        self._pipe, self._bound, self._network, self._generator = pipe, bound, network, generator
        self._by_score = pipe._score_sampler(sampler, bound)
        self._scheduler = pipe._scheduler_of_call(num_inference_steps, self._by_score)
        self._is_vdm = isinstance(self._scheduler, VDMScheduler)

    def taken(self, latents: Tensor, callback: StepCallback | None) -> Tensor:
        """The latents after all steps from z_1, in float32 or above."""
        timesteps = self._scheduler.timesteps
        latents = latents * getattr(self._scheduler, "init_noise_sigma", 1.0)  # flow matching's have none
        for i, timestep in enumerate(self._pipe.progress_bar(timesteps)):
            self._network.at_step(i, len(timesteps), timestep)
            latents = self._step(i, timestep, latents)
            if callback is not None:
                latents = (callback(self._pipe, i, timestep, {"latents": latents}) or {}).get("latents", latents)
        return latents

    def _step(self, i: int, timestep: Tensor, latents: Tensor) -> Tensor:
        scheduler, bound, network, generator = self._scheduler, self._bound, self._network, self._generator
        if self._by_score is not None:
            assert isinstance(bound, BoundGaussian)
            s, t = (time_tensor(scheduler.times[j], latents) for j in (i + 1, i))
            return self._by_score.step(partial(bound.score, network), bound.sde, latents, s, t, generator)
        if self._is_vdm:
            output = bound.predict(network, latents, time_tensor(scheduler.times[i], latents))
            own: Tensor = scheduler.step(output, timestep, latents, generator, process=bound).prev_sample
            return own
        output = network(model_input(scheduler, latents, timestep), timestep)
        if isinstance(bound, BoundGaussian) and bound.process.unread_half:
            output = output[:, : latents.shape[1]]
        extra = {"generator": generator} if _takes_generator(scheduler) else {}
        stock: Tensor = scheduler.step(output, timestep, latents, **extra).prev_sample
        return stock

    def decoded(self, latents: Tensor) -> Tensor:
        """The levels of what the last step left."""
        decodes = self._by_score is not None or (self._is_vdm and not self._scheduler.ends_at_data)
        if decodes:
            levels: Tensor = self._bound.decode(latents, self._network, self._generator)
            return levels
        return self._pipe.process.quantise(latents)


class _InOwnPrecision(nn.Module):
    """The network in its own precision; all around it stays in float32."""

    unet: ModelMixin

    def __init__(self, unet: ModelMixin, process: ForwardProcess) -> None:
        super().__init__()
        self.unet, self.call, self.process = unet, Call.of(unet), (process,)  # of which the network is no part

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **arguments: Any) -> tuple[Tensor]:
        given = sample
        if not isinstance(self.unet, UNetVDMModel):
            # It takes float32 at any precision: its Fourier features read bits that float16 does not have.
            given = sample.to(self.unet.dtype)
            floating = {name: v for name, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
            arguments |= {name: value.to(self.unet.dtype) for name, value in floating.items()}
        output = self.call(self.unet, given, timestep, **arguments).to(sample.dtype)
        return (checked_output(output, sample, self.unet, self.process[0]),)


def _shape_of(unet: ModelMixin) -> tuple[int, int, int] | None:
    """The shape (C, H, W) that a network takes, if its config says so."""
    config = config_of(unet)
    size = config.get("sample_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(height), int(width)


def _as_component(unet: ModelMixin) -> ModelMixin:
    """A network as a component of this package's: a plugin's is carried, as an index names no plugin's library."""
    found = registry.registration_of("networks", type(unet))
    is_plugins = found is not None and found.package != registry.BUILT_IN_PACKAGE
    return RegisteredModel.carrying(unet) if is_plugins else unet


def _weights_of_schedule(scheduler: SchedulerMixin) -> RegisteredModel | None:
    schedule = getattr(getattr(scheduler, "process", None), "schedule", None)
    if not isinstance(schedule, nn.Module) or not any(True for _ in schedule.parameters()):
        return None
    return RegisteredModel.carrying(cast(NoiseSchedule, schedule))


def _steps(num_inference_steps: int, sampler: Sampler | None) -> int:
    """The number of steps that take so many evaluations of the network in all."""
    if sampler is None:
        return num_inference_steps
    if num_inference_steps < sampler.evaluations:
        raise ConfigurationError(
            f"num_inference_steps is {num_inference_steps}, and one step of {type(sampler).__name__} takes "
            f"{sampler.evaluations} evaluations of the network: give at least so many."
        )
    return num_inference_steps // sampler.evaluations


def _number_of(class_labels: Any) -> int:
    """How many images are asked for by so many labels: one, where they are no list."""
    has_many = hasattr(class_labels, "__len__") and getattr(class_labels, "ndim", 1) > 0
    has_many = has_many and not isinstance(class_labels, str)
    return len(class_labels) or 1 if has_many else 1


def _check_finite(latents: Tensor, guidance_scale: float | None) -> None:
    if not bool(latents.isfinite().all()):
        broken = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        remedy = "look at the model's weights, or take smaller steps"
        if guidance_scale is not None:
            remedy = f"guidance_scale is {guidance_scale:g}, give a smaller one, or take smaller steps"
        raise NonFiniteLossError(
            f"the latents of {len(broken)} of {len(latents)} images (the first: {broken[0]}) are not finite after "
            f"the last step: {remedy}."
        )


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


VDMPipeline.__module__ = "vdm_hub"
