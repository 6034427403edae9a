"""What every pipeline of the ladder offers: a likelihood, samples, and what measuring and publishing ask of it."""

from __future__ import annotations

import copy
import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_hub.data.conditions import CLASS_LABELS, ClassCondition, ClassLabels, Condition
from vdm_hub.data.kinds import IMAGES, DataKind, kind_of
from vdm_hub.data.levels import levels_from_images
from vdm_hub.data.preprocessing import HeldOut, Preprocessing
from vdm_hub.diffusion.draws import Generator
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.errors import ConfigurationError, DataError, explained, shortened, unknown_name
from vdm_hub.fields import whole_number
from vdm_hub.hub.checks import already_checked, check_pipeline
from vdm_hub.hub.repositories import HUB_ARGUMENTS, ModelFiles, open_files
from vdm_hub.hub.schemas import check_arguments
from vdm_hub.hub.weights import check_finite_weights
from vdm_hub.likelihood.classification import BoundClassifier
from vdm_hub.likelihood.classification_report import ClassificationReport, numbered
from vdm_hub.likelihood.measurement import collect
from vdm_hub.likelihood.methods import METHODS, Method, build_measurement, method_of
from vdm_hub.likelihood.profiles import PixelProfile, pixel_profile
from vdm_hub.likelihood.protocol import ClassificationEffort
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.models.conditions import check_classes
from vdm_hub.models.loading import REMEDY, refuse_pickles
from vdm_hub.models.text_conditions import TextCondition
from vdm_hub.objectives.variational_bound import Objective, VDMObjective
from vdm_hub.pipelines.prompts import Prompt, encoded, one_for_each
from vdm_hub.pipelines.published_card import KeepsPublishedCard

_LOADING = (
    *("torch_dtype", "dtype", "variant", "use_safetensors", "device_map", "max_memory", "low_cpu_mem_usage"),
    *("offload_folder", "offload_state_dict", "disable_mmap", "quantization_config", "proxies", "trust_remote_code"),
    *("custom_pipeline", "custom_revision", "load_connected_pipeline", "use_onnx", "use_flashpack"),
    *("provider", "sess_options", "provider_options"),
)
"""The arguments of `DiffusionPipeline.from_pretrained` besides components; it ignores all others."""
_OF_SOME = ("text_encoder", "tokenizer")


class LikelihoodPipeline(KeepsPublishedCard, DiffusionPipeline):
    """A generative model of K-level images that knows their likelihood, on whichever rung of the ladder."""

    _left_out_where_none: tuple[str, ...] = ("preprocessing", "held_out", "classes", "captions")
    """The entries of a pipeline's index that stand there only where they are known."""
    _may_be_left: tuple[str, ...] = ()
    """The components that a reader who does not need them may load it without, by ``None``."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images become its levels, a copy; ``None`` where nothing is known of that."""
        return copy.deepcopy(self.config.get("preprocessing"))

    @property
    def held_out(self) -> HeldOut | None:
        """How its test images were held out of the training split, a copy; ``None`` where none were."""
        return copy.deepcopy(self.config.get("held_out"))

    def _register_images(
        self,
        preprocessing: Mapping[str, Any] | None,
        held_out: Mapping[str, Any] | None,
        classes: Mapping[str, Any] | None = None,
        captions: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep what is known of the images in the config, as mappings: a list there is a component's class."""
        images = {"preprocessing": preprocessing, "held_out": held_out, "classes": classes, "captions": captions}
        check_arguments(type(self), images)
        if preprocessing is not None:
            self._check_preprocessing(preprocessing)
        if classes is not None:
            check_classes(self.main_model, **ClassCondition.from_config(classes).sizes)
        self.register_to_config(**{name: copy.deepcopy(known) for name, known in images.items() if known is not None})

    def _check_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        """Refuse images that are not the model's, before any is read."""
        channels, height, width = self.image_shape
        side = preprocessing["resolution"] or height
        needed = {"grey": 1, "rgb": 3}.get(preprocessing["color"], channels)
        read = {"num_levels": preprocessing["num_levels"], "shape": (needed, side, side if side != height else width)}
        own = {"num_levels": self.num_levels, "shape": self.image_shape}
        if read != own:
            raise ConfigurationError(
                f"preprocessing is {shortened(dict(preprocessing), 200)}: that makes images of shape {read['shape']} "
                f"(channels, height, width) and {read['num_levels']} levels, and the model's are of {own['shape']} "
                f"and {own['num_levels']} levels: give the preprocessing that it was trained with."
            )

    @property
    def kind(self) -> DataKind:
        """What it is a model of."""
        return IMAGES

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of its images."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of what a sample starts from, without the batch; the images', unless a rung says otherwise."""
        return self.image_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its data, (C, H, W)."""
        return self.image_shape

    def may_be_of(self, dataset: Mapping[str, Any]) -> bool:
        """Whether the record of a dataset, as `vdm_hub.evaluation.provenance` makes it, is of data that it knows."""
        own = (self.kind, self.num_levels, list(self.shape))
        return (kind_of(dataset), dataset["levels"], dataset["shape"]) == own

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """The number of levels of its images, K."""

    def check_data(self, levels: Tensor, given_levels: int) -> None:
        """Refuse images whose shape or levels are not the model's.

        Args:
            levels: Of the images, (N, C, H, W).
            given_levels: As how many levels they were read.

        Raises:
            DataError: They are not.
        """
        (channels, height, width), num_levels = self.image_shape, self.num_levels
        if tuple(levels.shape[1:]) != (channels, height, width):
            raise DataError(
                f"the images are {'x'.join(map(str, levels.shape[1:]))}, the model's {channels}x{height}x{width}: "
                f"evaluate a dataset of that size and number of channels, or ask for resizing with --resolution "
                f"{height}."
            )
        if int(levels.max()) >= num_levels:
            raise DataError(f"the images hold level {int(levels.max())}; the model knows 0 to {num_levels - 1}.")
        if given_levels != num_levels:
            raise DataError(
                f"the images were read as {given_levels} levels, and the model knows {num_levels}: read them with "
                f"num_levels={num_levels}, where they have so many."
            )

    @property
    def process(self) -> ForwardProcess | None:
        """The forward process that corrupts the images; ``None`` where nothing does, as in a hierarchical VAE."""
        return None

    @property
    def default_method(self) -> Method:
        """The likelihood method where none is named: ``bound``, unless its process has a better one."""
        method: Method = "bound" if self.process is None else self.process.likelihood_method
        return method

    @property
    def condition(self) -> Condition | None:
        """What it is conditioned on, classes or captions; ``None`` for an unconditional model."""
        return self.text_condition or self.class_condition

    @property
    def known_condition(self) -> Condition:
        """What it is conditioned on.

        Raises:
            ConfigurationError: It is on nothing.
        """
        if (condition := self.condition) is None:
            raise ConfigurationError(
                "the model is neither class-conditional nor told captions, and what an image is, is found by what the "
                "network says when told each: give a model that was trained with labels or captions."
            )
        return condition

    @property
    def text_condition(self) -> TextCondition | None:
        """The captions that it is conditioned on, with its text encoder; ``None`` where it is not."""
        return None

    @property
    def class_condition(self) -> ClassCondition | None:
        """The classes that it is conditioned on, by number and by name; ``None`` where it is not."""
        if (classes := self.config.get("classes")) is not None:
            return ClassCondition.from_config(classes)
        known = self._network_classes
        return None if known is None else ClassCondition(known)

    @property
    def num_classes(self) -> int | None:
        """How many classes it is conditioned on; ``None`` where it is not."""
        return None if self.class_condition is None else self.class_condition.count

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes that it is conditioned on, in their order, where it knows any."""
        return None if self.class_condition is None else self.class_condition.names

    @property
    def _network_classes(self) -> int | None:
        """How many classes its network knows, the null class among them unless it keeps one of its own accord."""
        return None

    @property
    def _takes_labels(self) -> bool:
        """Whether labels may be given: networks of a user's own may read them though their config says nothing."""
        return self.num_classes is not None

    def to_json_string(self) -> str:
        """The index as JSON; components that not every model has are left out where there are none."""
        index = json.loads(super().to_json_string())
        kept = {key: value for key, value in index.items() if value != [None, None] or key not in _OF_SOME}
        for value in kept.values():  # diffusers' own loader does not find its deprecated schedulers where it says
            if isinstance(value, list) and value[:1] == ["deprecated"]:
                value[0] = "diffusers"
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"

    @property
    @abstractmethod
    def main_model(self) -> ModelMixin:
        """The component that the model is named by."""

    @property
    def _named_arguments(self) -> list[str] | None:
        """The arguments that its network takes by name from a user; ``None`` for any."""
        return []

    @property
    def device_of_latents(self) -> torch.device:
        """The device on which it computes."""
        device: torch.device = self._execution_device
        return device

    @abstractmethod
    def objective(self, transitions: int | None = None) -> Objective:
        """The bound of this pipeline as a module.

        Args:
            transitions: T, or ``None`` for continuous time.

        Raises:
            ConfigurationError: The model has no such transitions.
        """

    def clipped_objective(self, transitions: int | None) -> Objective | None:
        """The bound of the model that its sampler makes of it by clipping, where it does."""
        return None

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """The config of all that decides a likelihood besides the weights, as plain JSON."""

    def notes(self, transitions: int | None) -> list[str]:
        """Notes for a reader of its bound, one sentence each."""
        return []

    def examine(self, levels: Tensor) -> tuple[dict[str, Any], list[str]]:
        """Details for the report, and notes, on a model and these images, beside its bound."""
        return {}, []

    @abstractmethod
    def sample(
        self, batch_size: int, generator: Generator = None, num_inference_steps: int = 1000, **arguments: Any
    ) -> Tensor:
        """Samples in [0, 1], (B, C, H, W).

        Args:
            batch_size: How many.
            generator: One, or a list with one per image.
            num_inference_steps: Evaluations of the network, where the model may take more or fewer.
            arguments: Of the pipeline's own ``__call__``.
        """

    def _batch_shape(self, batch_size: int, latents: Tensor | None, generator: Any) -> tuple[int, ...]:
        """The shape of what samples start from, given or drawn: ``latents`` decide how many, where 1 is asked for."""
        batch_size = whole_number("batch_size", batch_size)
        if latents is not None and not (isinstance(latents, Tensor) and latents.is_floating_point()):
            what = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise ConfigurationError(f"latents are {what}: give a tensor of floating-point numbers.")
        shape = (batch_size, *self.latent_shape) if latents is None else tuple(latents.shape)
        if shape[1:] != self.latent_shape:
            raise ConfigurationError(f"latents have shape {shape}; the model needs (B, *{self.latent_shape}).")
        if latents is not None and not (len(latents) and bool(latents.isfinite().all())):
            fault = "have a value that is not finite" if len(latents) else "are none"
            raise ConfigurationError(f"latents of shape {shape} {fault}: give finite ones, or leave them out.")
        if batch_size not in (1, shape[0]):
            raise ConfigurationError(f"batch_size is {batch_size}, and {shape[0]} latents were given: leave it out.")
        each = [generator] if generator is None or isinstance(generator, torch.Generator) else generator
        if not isinstance(each, Sequence) or not all(one is None or isinstance(one, torch.Generator) for one in each):
            raise ConfigurationError(
                f"generator is {shortened(generator)}: give a torch.Generator, or a list with one for each image."
            )
        if each is generator and (len(each) != shape[0] or None in each):
            raise ConfigurationError(f"{len(each)} generators for {shape[0]} images: give one each, or just one.")
        return shape

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load from a folder or a Hub id, with all arguments of `DiffusionPipeline.from_pretrained`.

        Files and configs are checked before any weight is read, and weights before they are used: only safetensors are
        read, of exactly the network that the config describes, and everything is of one commit and as it is listed.

        Raises:
            MissingPluginError: The pipeline needs a plugin that is not installed; the message says which.
            ConfigurationError: A config names what nobody knows, or the name is neither a folder nor a Hub id.
            CheckpointError: A file is damaged, or not what was saved, or should not be where it is.
            HubError: There is no such repository, or it can't be reached.
        """
        refuse_pickles(kwargs)
        trusts_code = bool(kwargs.get("trust_remote_code"))
        if not trusts_code:  # its own class may take others
            cls._check_loading(kwargs)
        files = open_files(
            pretrained_model_name_or_path, **{key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        )
        check_pipeline(files, cls, kwargs, kwargs.get("variant"), trusts_code)
        if trusts_code:  # the repository's own code chooses what it reads
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs | dict(files.pinned))
        return cls._from_checked(files, kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline of another's components, which both then share: see `DiffusionPipeline.from_pipe`.

        Args:
            pipeline: Any pipeline that has them.
            kwargs: Components and arguments of this class that take the place of the other's. Without ``dtype``, the
                weights keep their type.

        Raises:
            ConfigurationError: The other lacks a component, or has one that this class would leave out; an argument
                is none of this class's, or takes a component away.

        Example:
            >>> from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler
            >>> unet = UNetVDMModel(8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
            >>> pipe = VDMPipeline(unet, VDMScheduler(num_levels=17))
            >>> VDMPipeline.from_pipe(pipe, scheduler=VDMScheduler(num_levels=256)).unet is pipe.unet
            True
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ConfigurationError(f"from_pipe got {shortened(pipeline)}: give a pipeline.")
        takes, options = cls._get_signature_keys(cls)
        required = {name for name in takes if name not in cls._optional_components}
        parts = {name: part for name, part in pipeline.components.items() if part is not None}
        known = {*takes, *options, "dtype", "torch_dtype"}
        for name, value in kwargs.items():
            if name not in known:
                raise unknown_name(f"argument of {cls.__name__}.from_pipe", name, known)
            if value is None and name in required:
                raise ConfigurationError(f"{name} is None: leave it out, and the other pipeline's is taken.")
        missing = sorted(required - parts.keys() - kwargs.keys())
        left_out = sorted(parts.keys() - set(takes))
        if missing or left_out:
            wrong = (
                f"has no {', '.join(missing)}" if missing else f"has {', '.join(left_out)}, which would be left out"
            )
            raise ConfigurationError(
                f"a {type(pipeline).__name__} {wrong}; a {cls.__name__} is made of {', '.join(sorted(required))}. "
                f"Give a pipeline of these, or what is missing by name."
            )
        # Given by name: diffusers asks for the very class of an annotation, and here any model called alike will do.
        if kwargs.get("dtype") is None and "torch_dtype" in kwargs:  # its former name
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        dtype = next((part.dtype for part in parts.values() if isinstance(part, ModelMixin)), None)
        return super().from_pipe(pipeline, **{"dtype": dtype} | parts | kwargs)

    @classmethod
    def _check_loading(cls, arguments: Mapping[str, Any]) -> None:
        """Refuse an argument that would be ignored, and one that would drop what was saved."""
        own = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        known = [*own, *HUB_ARGUMENTS, *_LOADING]
        for name, value in arguments.items():
            if name not in known:
                raise unknown_name(f"argument of {cls.__name__}.from_pretrained", name, known)
            replaced = name in cls._optional_components and arguments.get("scheduler") is not None
            if name in own and value is None and not replaced and name not in cls._may_be_left:
                raise ConfigurationError(
                    f"{name} is None: leave it out, and what was saved is loaded; or give one of your own."
                )

    @classmethod
    def _from_checked(cls, files: ModelFiles, arguments: dict[str, Any]) -> Any:
        """The pipeline of files that were checked; ``arguments`` are what the reader gave besides."""
        with explained(f"{files.name} can't be loaded", REMEDY), already_checked(files.folder):
            pipeline = super().from_pretrained(files.folder, **arguments)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name not in arguments:
                check_finite_weights(f"{files.name}/{name}", part)
        pipeline.register_to_config(_name_or_path=files.name)
        return pipeline

    @torch.no_grad()
    def log_likelihood(
        self,
        images: Any,
        method: Method | None = None,
        replicates: int = 8,
        seed: int = 0,
        class_labels: ClassLabels | None = None,
        *,
        prompt: Prompt | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        batch_size: int = 256,
        **network_arguments: Tensor,
    ) -> LikelihoodReport:
        """The log-likelihood of some images, per image and on average; the report says whether it is a bound.

        Args:
            images: PIL images, arrays (B, H, W, C) or tensors (B, C, H, W) as the pipeline returns them (in [0, 1], on
                the K levels), or integer tensors of levels.
            method: What it is measured by: `VariationalBound`, `ProbabilityFlow` or `ImportanceWeighted`, with their
                options, or another that is registered; or a method's name, ``bound``, ``ode`` or
                ``importance_weighted``, for its defaults. By default `default_method`.
            replicates: Independent estimates per image, behind the standard error.
            seed: Of all draws: an image's noise is a function of it, the replicate and the image's index; its time
                also of how many images there are, over which times are stratified.
            class_labels: Class of each image, (B,), by number or name, or one for all.
            prompt: Caption of each image, or one for all.
            prompt_embeds: In place of ``prompt``, what the text encoder makes of it, (B, L, D).
            prompt_attention_mask: With ``prompt_embeds``, where there is a token, (B, L); everywhere by default.
            batch_size: Images at once, at most.
            network_arguments: Passed to the network by name, each (B, ...).

        Raises:
            DataError: A pixel is none of the K levels, or the images' shape is not the network's.
            ConfigurationError: The method is unknown, or the model has no such likelihood.
            NonFiniteLossError: A term of an image is NaN or infinite; the message names both.

        Example:
            >>> import torch
            >>> from vdm_hub import UNetVDMModel, VariationalBound, VDMPipeline, VDMScheduler
            >>> unet = UNetVDMModel(
            ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            ...     norm_num_groups=4,
            ... )
            >>> pipe = VDMPipeline(unet, VDMScheduler(num_levels=17))
            >>> report = pipe.log_likelihood(torch.zeros(3, 1, 8, 8))
            >>> report.log_likelihood.shape, report.per_image.shape, report.is_bound  # nats, bits/dim
            (torch.Size([3]), torch.Size([3]), True)
            >>> pipe.log_likelihood(torch.zeros(3, 1, 8, 8), VariationalBound(transitions=10)).transitions
            10
        """
        batch_size, replicates = whole_number("batch_size", batch_size), whole_number("replicates", replicates)
        method, levels = method_of(self.default_method if method is None else method), self._levels(images)
        self._check_arguments(network_arguments, levels.shape[0])
        told = self._told(
            levels.shape[0], network_arguments, class_labels, prompt, prompt_embeds, prompt_attention_mask
        )
        self._check_apart(network_arguments, told)
        whole = {"levels": levels, "indices": torch.arange(levels.shape[0]), **network_arguments, **told}

        def batches() -> Iterator[dict[str, Tensor]]:
            parts = torch.arange(levels.shape[0]).split(batch_size)
            return ({name: value[part.to(value.device)] for name, value in whole.items()} for part in parts)

        def measured(objective: Objective) -> LikelihoodReport:
            count = levels.shape[0]
            return collect(build_measurement(objective, count, method, seed), batches, count, replicates)

        report, clipped = measured(self.objective(method.transitions)), self.clipped_objective(method.transitions)
        if clipped is not None:
            report = report.with_clipped(lambda: measured(clipped))
        details, notes = self.examine(whole["levels"])
        report.details |= details
        return report.with_notes([*self.notes(method.transitions), *notes])

    def pixel_profile(
        self,
        images: Any,
        class_labels: ClassLabels | None = None,
        *,
        prompt: Prompt | None = None,
        evaluations: int = 64,
        seed: int = 0,
        batch_size: int = 256,
    ) -> PixelProfile:
        """Where the bits of each image lie: over its pixels, and over t; see `vdm_hub.plot_pixel_profile`.

        The figure to report is that of `log_likelihood`, which takes fewer evaluations for the same error, and says
        its error.

        Args:
            images: As `log_likelihood` takes them, as the next two.
            class_labels: Class of each image, or one for all.
            prompt: Caption of each image, or one for all.
            evaluations: Of the network, for each image, at stratified times.
            seed: Of all draws.
            batch_size: Evaluations in one call of the network; it changes no figure.

        Raises:
            DataError: A pixel is none of the K levels, or the images' shape is not the network's.
            ConfigurationError: The bits lie on no pixel, as those of a latent diffusion or of a hierarchical VAE.

        Example:
            >>> import torch
            >>> from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler
            >>> unet = UNetVDMModel(8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
            >>> pipe = VDMPipeline(unet, VDMScheduler(num_levels=17))
            >>> profile = pipe.pixel_profile(torch.zeros(1, 1, 8, 8), evaluations=8)
            >>> {name: tuple(bits.shape) for name, bits in profile.terms.items()}
            {'reconstruction': (1, 1, 8, 8), 'prior': (1, 1, 8, 8), 'diffusion': (1, 1, 8, 8)}
        """
        objective, levels = self.objective(), self._levels(images)
        if not isinstance(objective, VDMObjective):
            raise ConfigurationError(
                f"the bits of a {type(self).__name__} are those of its latents, and lie on no pixel: ask for its "
                f"terms as a whole (log_likelihood)."
            )
        batch = {"levels": levels, **self._told(len(levels), {}, class_labels, prompt, None)}
        return pixel_profile(objective, batch, evaluations, seed, batch_size)

    def classify(
        self,
        images: Any,
        candidates: Sequence[int | str] | None = None,
        *,
        prior: Sequence[float] | Tensor | None = None,
        labels: Sequence[int | str] | Tensor | None = None,
        effort: ClassificationEffort | None = None,
        transitions: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> ClassificationReport:
        """The class of each image by the bound: ``p(c|x)`` in proportion to ``p(c) exp(-B_c(x))``.

        All classes of an image see the same times and noise, and those that are out of the question are dropped after
        a few draws (Li et al., arXiv 2303.16203; Clark & Jaini, arXiv 2303.15233).

        Args:
            images: As `log_likelihood` takes them.
            candidates: The classes to choose from, by number or name, all of the network's by default; or captions,
                where it was trained with captions: ``["a photo of a shirt", "a photo of a bag"]``.
            prior: ``p(c)`` of the candidates; uniform by default.
            labels: What each image is, by the number of its candidate from 0 or by its name, where the report is to
                say how often it was found.
            effort: How many evaluations of the network: see `ClassificationEffort`.
            transitions: T; continuous time by default.
            seed: Of all draws: an image's are a function of it and the image's index.
            batch_size: Pairs of an image and a class in one call of the network; changes no figure.

        Raises:
            ConfigurationError: The network is told nothing of an image, a candidate is none that it knows or there
                are fewer than two, or the prior is none.
            DataError: A pixel is none of the K levels, or the images' shape is not the network's.

        Example:
            >>> import torch
            >>> from vdm_hub import ClassificationEffort, UNetVDMModel, VDMPipeline, VDMScheduler
            >>> unet = UNetVDMModel(
            ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            ...     norm_num_groups=4, num_class_embeds=3,
            ... )
            >>> pipe = VDMPipeline(unet, VDMScheduler(num_levels=17))
            >>> report = pipe.classify(torch.zeros(2, 1, 8, 8), effort=ClassificationEffort(budget=30))
            >>> report.names, report.posterior.shape
            (('0', '1', '2'), torch.Size([2, 3]))
        """
        chosen, levels = self.known_condition.choose(candidates), self._levels(images)
        batch = {"levels": levels, "indices": torch.arange(len(levels))}
        objective, chances = self.objective(transitions), chosen.prior(prior)
        known = None if labels is None else numbered(labels, chosen.names, len(levels))
        report = BoundClassifier(objective, chosen.told, chances, effort, seed, batch_size).report(batch, chosen.names)
        return report if known is None else report.scored(known)

    def _levels(self, images: Any) -> Tensor:
        """The levels of images, which must have the model's shape, on its device."""
        levels = levels_from_images(images, self.num_levels).to(self.device_of_latents)
        if tuple(levels.shape[1:]) != self.image_shape:
            raise DataError(
                f"the images are {tuple(levels.shape[1:])} (channels, height, width); the model's are "
                f"{self.image_shape}: resize or convert them first."
            )
        return levels

    def bits_per_dim(self, images: Any, method: Method | None = None, **kwargs: Any) -> LikelihoodReport:
        """`log_likelihood`, by the name under which the field reports it: ``print(pipe.bits_per_dim(images))``."""
        return self.log_likelihood(images, method, **kwargs)

    def _check_arguments(self, given: Mapping[str, Any], batch_size: int) -> None:
        """Refuse arguments that no one takes, and those for a network that are not one for each image."""
        method = next(
            (cls for cls in METHODS if given.keys() & cls.options().keys() - {*(self._named_arguments or ())}), None
        )
        if method is not None:
            name = min(given.keys() & method.options().keys())
            raise ConfigurationError(f"{name} is an option of a method: give method={method.__name__}({name}=...).")
        self._check_names(given, LikelihoodPipeline.log_likelihood)
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (batch_size,):
                what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shortened(value)
                raise ConfigurationError(
                    f"{name}, for the network, is {what}: give a tensor of one entry for each of {batch_size} images."
                )

    def _check_names(self, given: Iterable[str], function: Callable[..., Any]) -> None:
        """Refuse names that neither a function of this pipeline nor its network takes."""
        taken = self._named_arguments
        parameters = list(inspect.signature(function).parameters.values())[1:]
        known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        for name in given:
            if name in ("guidance_scale", "guider", "negative_prompt", "negative_prompt_embeds"):
                raise ConfigurationError(
                    f"{name} is of samples: a likelihood is always that of the model without guidance. Leave it out."
                )
            if taken is not None and name not in taken:
                raise unknown_name(f"argument of {type(self).__name__} or its network", name, {*known, *taken})

    def _told(
        self,
        batch_size: int,
        given: Mapping[str, Any],
        class_labels: ClassLabels | None,
        prompt: Prompt | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The network's arguments for what it is conditioned on, of each image."""
        self._check_told(class_labels, prompt, prompt_embeds)
        labels, text = self._labels(class_labels, batch_size), self.text_condition
        if text is None or (prompt is None and prompt_embeds is None and "encoder_hidden_states" in given):
            return labels
        told = encoded(text, prompt, prompt_embeds, prompt_attention_mask)
        return labels | {
            key: value.to(self.device_of_latents) for key, value in one_for_each(told, batch_size).items()
        }

    @staticmethod
    def _check_apart(given: Iterable[str], told: Iterable[str]) -> None:
        """Refuse an argument of the network that the condition gives, too."""
        if both := sorted({*given} & {*told}):
            raise ConfigurationError(f"{both[0]} is given, and the condition says it too: leave one of the two out.")

    def _check_told(self, class_labels: Any, prompt: Any, prompt_embeds: Any = None) -> None:
        """Refuse a class for a model that knows captions, and the other way round."""
        told = {"class_labels": class_labels, "prompt": prompt, "prompt_embeds": prompt_embeds}
        told = {name: value for name, value in told.items() if value is not None}
        condition, text = self.condition, self.text_condition is not None
        takes_class = self.class_condition is not None or not text  # without both, labels have words of their own
        wrong = [name for name in told if not (takes_class if name == "class_labels" else text)]
        if not wrong:
            return
        knows = "nothing" if condition is None else f"a {condition.noun}"
        remedy = "leave it out" if condition is None else f"give {condition.argument} instead"
        raise ConfigurationError(
            f"{wrong[0]} is {shortened(told[wrong[0]])}, and the model is told {knows} of an image: {remedy}."
        )

    def _labels(self, class_labels: ClassLabels | None, batch_size: int) -> dict[str, Tensor]:
        """The network's argument for the classes, one of each image."""
        condition = self.class_condition
        if class_labels is None:
            if condition is not None:
                raise ConfigurationError(
                    f"class_labels is None, and the network knows {condition.count} classes: give them."
                )
            return {}
        if not self._takes_labels:
            raise ConfigurationError("class_labels were given, and the network knows no classes: leave them out.")
        if condition is None:  # a network of a user's own, whose labels may be anything
            with explained("class_labels are no numbers", "give one whole number for each image", ConfigurationError):
                labels = torch.as_tensor(class_labels)
        else:
            labels = condition.numbers(class_labels)
            labels = labels.expand(batch_size) if labels.ndim == 0 else labels
        if labels.shape[:1] != (batch_size,) or (condition is not None and labels.ndim != 1):
            raise ConfigurationError(f"{tuple(labels.shape)} class labels for {batch_size} images: give one each.")
        return {CLASS_LABELS: labels.to(self.device_of_latents)}
