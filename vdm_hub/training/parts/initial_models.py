"""The trained model that a run begins from: loaded, kept beside the run, and made into what is trained."""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from vdm_hub.data.conditions import ClassCondition, Condition
from vdm_hub.data.examples import RunData
from vdm_hub.data.loading import as_classes
from vdm_hub.data.tokenization import Tokenization, open_tokenizer
from vdm_hub.diffusion.latent_process import LatentProcess
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.evaluation.provenance import public_name, vocabulary_fingerprint, weights_fingerprint
from vdm_hub.files import written_beside
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.places import PIPELINE
from vdm_hub.hub.records import InitialRecord
from vdm_hub.hub.repositories import ModelFiles, open_files
from vdm_hub.hub.schemas import check_record
from vdm_hub.models.registered_model import bare_network
from vdm_hub.models.token_networks import check_token_model, token_embeddings
from vdm_hub.objectives.hierarchical import HVAEObjective
from vdm_hub.objectives.tokens import TokenObjective
from vdm_hub.objectives.variational_bound import Objective, VDMObjective
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.by_name import open_pipeline, place_of_pipeline
from vdm_hub.pipelines.hvae import HVAEPipeline
from vdm_hub.pipelines.tokens import TokenPipeline
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.schedulers.configs import is_beta_table
from vdm_hub.schedulers.diffusers_checkpoints import pipeline_class
from vdm_hub.schedulers.families import family_of
from vdm_hub.schedulers.vdm import VDMScheduler
from vdm_hub.training.parts.taking_over import PROCESS, differs, take_over, vdm_scheduler

_RECORD, _SCHEDULER, _WIDTH = "origin.json", "scheduler/scheduler_config.json", 119
_OF_SAMPLERS = (
    *("final_sigmas_type", "variance_type", "clip_sample", "clip_sample_range", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset"),
)
"""What a config with a table of betas says beside the process, for those who sample from it."""


@dataclass(frozen=True)
class InitialModel:
    """A trained model that a run begins from.

    Attributes:
        pipeline: The model as it was published; nothing of it is trained.
        record: Which one it is, as ``run.json`` has it.
        configuration: The recipe with all that the model answers.
        said: A line for each difference between the two.
        kept: Whether it is the copy that a run kept, which was compared with the recipe when that began.
    """

    pipeline: LikelihoodPipeline
    record: InitialRecord
    configuration: Configuration
    said: list[str]
    kept: bool

    @property
    def name(self) -> str:
        """Its name, as messages have it."""
        return self.record["name"]

    def __str__(self) -> str:
        """Paragraphs for what is taken from where."""
        own, model = self.record, self.configuration.model.model
        at = f", commit {own['commit'][:12]}" if own["commit"] else ""
        network = type(bare_network(self.pipeline.main_model)).__name__
        lines = [f"begins from {own['name']} ({own['pipeline']}{at}, weights {own['weights'][:19]}...)"]
        process = "" if model == "hvae" else "; the process: " + ", ".join(self._process())
        condition = self.pipeline.condition
        told = "" if condition is None else f"; what it is told: a {condition.noun} of each image"
        known = self.pipeline.preprocessing
        images = "" if known is None else f"; how images become levels: {shortened(dict(known), 200)}"
        if isinstance(self.pipeline, TokenPipeline):
            told = f"; its tokenizer, of {self.pipeline.tokenization.num_ids:,} tokens"
        lines.append(f"taken over: the {network} and its weights{process}{images}{told}")
        lines.append("of the recipe: the data, the bound's transitions, the optimisation and the moving average")
        paragraphs = [textwrap.fill(one, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for one in lines]
        return "\n".join([*paragraphs, *(f"note: {words}." for words in self.said)])

    def _process(self) -> list[str]:
        diffusion = self.configuration.diffusion
        return [f"{field} {shortened(getattr(diffusion, field), 60)}" for field in ("forward_process", *PROCESS)]

    # ---- data -------------------------------------------------------------------------------------------------------

    @property
    def tokenization(self) -> Tokenization | None:
        """Its tokenizer, of a model of texts.

        Raises:
            ConfigurationError: Another one is asked for.
        """
        if not isinstance(self.pipeline, TokenPipeline):
            return None
        own, asked = self.pipeline.tokenization, self.configuration.data.tokenizer
        learned = asked in ("character", "bpe")  # from texts, and now from others
        if asked is not None and not learned and not self.kept:
            other = open_tokenizer(asked)
            if vocabulary_fingerprint(other) != vocabulary_fingerprint(own):
                raise ConfigurationError(
                    f"tokenizer is {asked!r}, of {other.num_ids:,} tokens, and {self.name} has its own, of "
                    f"{own.num_ids:,}: the rows of its network are those. Give its own, such as its folder."
                )
        return own

    def fit(self, data: RunData) -> RunData:
        """The data as the model takes them: labels by the numbers of its classes, and a note on what it may have seen.

        Raises:
            ConfigurationError: They are of another shape, or other images are held out than were for the model.
            DataError: An image is of a class that it does not know.
        """
        pipeline = self.pipeline
        if isinstance(pipeline, TokenPipeline):
            return data
        if tuple(data.shape) != tuple(pipeline.image_shape):
            found, own = ("x".join(map(str, shape)) for shape in (data.shape, pipeline.image_shape))
            raise ConfigurationError(
                f"the images are {found} (channels, height, width), and {self.name} is a model of images {own}: give "
                f"--resolution {pipeline.image_shape[-1]} or --color, or images of that shape."
            )
        if isinstance(condition := pipeline.condition, ClassCondition):
            data = as_classes(data, replace(condition, column=str(self.configuration.data.label_column)))
        return self._held_out(data)

    def _held_out(self, data: RunData) -> RunData:
        """The data, with a note where the model may have been trained on those that are held out of them."""
        now, before = data.held_out_test, self.pipeline.held_out
        if now is None:
            return data
        if before is not None and (before["split"], before["images"]) == (now["split"], now["images"]):
            if (before["size"], before["label_column"]) != (now["size"], now["label_column"]):
                raise ConfigurationError(
                    f"test_size is {self.configuration.data.test_size}, which holds out {now['size']} of "
                    f"{now['images']} images, and {self.name} held out {before['size']}: it was trained on some of "
                    f"those. Leave test_size out."
                )
            return data
        note = f"the test images are held out of this run, and {self.name}, which it began from, may have seen them"
        return replace(data, notes=(*data.notes, note))

    # ---- what is trained --------------------------------------------------------------------------------------------

    def objective(self, shape: tuple[int, ...], condition: Condition | None) -> Objective:
        """The module of all that is trained, with copies of the model's weights.

        Args:
            shape: Of the data.
            condition: What the network is told of each datum.

        Raises:
            ConfigurationError: The process that is asked for can't be built.
        """
        pipe, transitions = self._copy(), self.configuration.diffusion.transitions
        if isinstance(pipe, HVAEPipeline):
            return HVAEObjective(pipe.hvae)
        pipe.scheduler = scheduler = self._scheduler()
        if isinstance(pipe, TokenPipeline):
            check_token_model(pipe.network, shape[0])
            embeddings: Any = token_embeddings(pipe.network)
            embeddings.padding_idx = None  # no token is padding, so that each learns
            scored = shape[0] - self.configuration.data.window_context
            return TokenObjective(pipe.token_network(), pipe.process, transitions, scored=scored)
        if self._differs("noise_schedule"):
            pipe.noise_schedule = None  # the weights of another one
        process = pipe.process
        if isinstance(process, LatentProcess):
            process.normalises = False  # the network knows latents of that shift and scale
            process.frozen = self.configuration.model.freeze_first_stage
            process.first_stage.requires_grad_(not process.frozen)
        objective = VDMObjective(bare_network(pipe.unet), process, transitions, condition)
        if is_beta_table(scheduler.config.noise_schedule):
            objective.sampling = {name: scheduler.config[name] for name in _OF_SAMPLERS}
        return objective

    def _copy(self) -> Any:
        """A copy of the pipeline, but for the text encoder, which is never trained."""
        encoder = getattr(self.pipeline, "text_encoder", None)
        return copy.deepcopy(self.pipeline, {} if encoder is None else {id(encoder): encoder})

    def _scheduler(self) -> VDMScheduler:
        """The scheduler of the process at the start: the model's own, but for what is asked for."""
        # Scaling and decoder would be derived anew from another schedule, where a config of diffusers left them open.
        asked: dict[str, Any] = {
            name: getattr(self.configuration.diffusion, name)
            for name in PROCESS
            if name in ("data_scaling", "decoder") or self._differs(name)
        }
        of_texts = isinstance(self.pipeline, TokenPipeline)
        asked["num_levels"] = self.pipeline.num_levels if of_texts else self.configuration.data.num_levels
        scheduler: VDMScheduler = VDMScheduler.from_config(vdm_scheduler(self.pipeline).config, **asked)
        return scheduler

    def _differs(self, field: str) -> bool:
        own = vdm_scheduler(self.pipeline).config[field]
        return differs(field, getattr(self.configuration.diffusion, field), own)

    # ---- beside the run ---------------------------------------------------------------------------------------------

    def keep(self, folder: Path) -> None:
        """Write the model to a folder of the run, which then needs it nowhere else."""
        with written_beside(folder) as beside:
            self.pipeline.save_pretrained(beside / PIPELINE, safe_serialization=True)
            (beside / _RECORD).write_text(json.dumps(self.record, indent=1))


def open_initial_model(configuration: Configuration, kept: Path) -> InitialModel | None:
    """The model that a run begins from; of a run that goes on, as it was kept; ``None`` where there is none.

    Args:
        configuration: The recipe.
        kept: The folder of the run that holds it.

    Raises:
        ConfigurationError: It is another kind of model than the recipe's, or its weights do not fit what is asked for.
        CheckpointError: A file of it is damaged.
        HubError: There is no such repository, or it can't be reached.
    """
    name, revision = configuration.model.init_from, configuration.model.init_revision
    if name is None:
        return None
    goes_on = configuration.training.resume_from_checkpoint is not None and (kept / _RECORD).is_file()
    if goes_on:
        record: Any = read_json(kept / _RECORD)
        check_record(InitialRecord, record, str(kept / _RECORD))
        pipeline = open_pipeline(str(kept / PIPELINE))
    else:
        place = place_of_pipeline(name)
        if revision is not None and Path(place).is_dir():
            raise ConfigurationError(
                f"init_revision is {revision!r}, and {name} is a folder, which has none: leave it out."
            )
        files = open_files(place, revision=revision)
        commit = getattr(files.pinned.get("revision"), "resolved", None)
        at = None if commit is None else str(commit)
        saved = pipeline_class(place, at)
        pipeline = open_pipeline(place, configuration.data.num_levels, at, _left_open(files, configuration.asked))
        record = {
            "name": public_name(name),
            "commit": at,
            "pipeline": saved,
            "weights": weights_fingerprint(pipeline),
        }
    if not getattr(getattr(pipeline, "first_stage", None), "is_fitted", True):
        raise ConfigurationError(
            f"init_from is {name!r}, whose autoencoder was trained without a likelihood, so that it has no bound to "
            f"train on: fit its scale first (pipe = LatentVDMPipeline.from_diffusers(...); "
            f"pipe.fit_first_stage(images); pipe.save_pretrained(folder)), and begin from that folder."
        )
    _name_parts(pipeline, record["name"])
    taken, said = take_over(configuration, pipeline, record["name"])
    if record["commit"] is not None:  # the recipe repeats the run, wherever the branch is then
        taken = replace(taken, model=replace(taken.model, init_revision=record["commit"]))
    return InitialModel(pipeline, record, taken, said, goes_on)


def _name_parts(pipeline: LikelihoodPipeline, name: str) -> None:
    """Let the configs of the parts, which are published again, name the model, and no place on this machine."""
    for part in pipeline.components.values():
        config: Any = getattr(part, "config", None)
        if isinstance(part, ConfigMixin):
            if "_name_or_path" in part.config:
                part.register_to_config(_name_or_path=name)
        elif hasattr(config, "_name_or_path"):
            config._name_or_path = name
        elif hasattr(part, "name_or_path"):
            part.name_or_path = name


def _left_open(files: ModelFiles, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe asks for of that which a family of diffusers leaves open, where the model is of such a one."""
    if _SCHEDULER not in files or family_of(files.read_json(_SCHEDULER)) is None:
        return {}
    return {name: asked[name] for name in ("data_scaling", "decoder") if asked.get(name) is not None}
