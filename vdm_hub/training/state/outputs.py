"""The outputs of a run: the pipeline, pictures and the measured bound."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from vdm_hub.data.held_out import SPLIT
from vdm_hub.data.kinds import IMAGES, TOKENS
from vdm_hub.data.loading import RunData, check_outputs_apart
from vdm_hub.errors import CheckpointError, ConfigurationError, in_one_line
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.files import clear_leftovers, entries, expanded, is_locked, leftovers, locked, written_beside
from vdm_hub.likelihood.methods import VariationalBound
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.variational_bound import Objective
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.pipelines.tokens import TokenPipeline, joined_texts
from vdm_hub.plots import plot_schedule, plot_training_curve, rows_of_choices, save_grid, shows_schedule
from vdm_hub.recipes.arguments import Configuration, parse_recipe
from vdm_hub.recipes.configuration import differences
from vdm_hub.training.parts.initial_models import InitialModel
from vdm_hub.training.parts.setup import build_pipeline
from vdm_hub.training.state.checkpoints import checkpoints, foreign_entries, tidy
from vdm_hub.training.state.history import History
from vdm_hub.training.state.provenance import describe_split

Validation: TypeAlias = dict[str, Any]
"""The last measurement of held-out images in training: ``step``, ``bits_per_dim``, ``standard_error``, ``images``."""


class OutputFolder:
    """The folder of one run; it never mixes two."""

    def __init__(self, configuration: Configuration) -> None:
        assert configuration.training.output_dir is not None
        self.path, self.kind = expanded(configuration.training.output_dir), configuration.data.kind
        self.checkpoints, self.pipeline = self.path / "checkpoints", self.path / "pipeline"
        self.recipe, self.evaluation = self.path / "recipe.yaml", self.path / "evaluation.json"
        self.samples, self.schedule = self.path / configuration.data.kind.samples, self.path / "schedule.png"
        self.history, self.curve = self.path / "history.json", self.path / "training_curve.png"
        self.provenance, self.initial = self.path / "run.json", self.path / "initial"
        self.logs, self.lock = self.path / "logs", self.path / ".vdm_hub.lock"
        self.pictures = {"samples": self.samples, "schedule": self.schedule, "training_curve": self.curve}
        results = (self.recipe, self.pipeline, self.evaluation, self.history, self.provenance)
        self._written = (*results, *self.pictures.values(), self.initial)

    @contextmanager
    def reserved(self, configuration: Configuration) -> Iterator[None]:
        """Keep the folder for this run alone within the block, whatever else is started; a dry run only looks.

        Where the run ends without having written anything, nothing is left of it.

        Raises:
            CheckpointError: Another run is at work in it, or it is not this run's to write to.
        """
        self._refuse_second()
        self.check(configuration)
        if configuration.training.dry_run:
            yield
            return
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(locked(self.lock))
                except BlockingIOError as error:
                    raise self._second() from error
                self.check(configuration)  # another run may have come and gone since
                yield
        finally:
            with suppress(OSError):  # of those that are not empty
                for path in made:
                    path.rmdir()

    def _refuse_second(self) -> None:
        if is_locked(self.lock):
            raise self._second()

    def _second(self) -> CheckpointError:
        return CheckpointError(
            f"another run is at work in output_dir {self.path} at this moment: choose another --output_dir, or wait "
            f"for its end."
        )

    def check(self, configuration: Configuration) -> None:
        """Refuse a folder that holds another run, or anything else, or that is among the data; nothing is written.

        Raises:
            CheckpointError: It is not empty, and not this run's own to go on with.
            DataError: It lies in the folder of the images.
        """
        check_outputs_apart(configuration.data, {"output_dir": self.path})
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise CheckpointError(f"output_dir {self.path} is a file, or no folder: choose another.")
        self._check_writable()
        if not self.path.exists() or not self._names():
            return
        if not self._goes_on(configuration):
            what = "already holds a run" if self.recipe.exists() else "is not empty"
            remedy = "go on with that run by --resume_from_checkpoint latest, " if self.recipe.exists() else ""
            raise CheckpointError(
                f"output_dir {self.path} {what}. Choose another --output_dir, {remedy}or remove the folder yourself: "
                f"nothing is overwritten."
            )
        if in_the_way := foreign_entries(self.checkpoints):
            raise CheckpointError(
                f"{in_the_way[0]} has the name of a checkpoint, and is none of this run's: move it away."
            )

    def _goes_on(self, configuration: Configuration) -> bool:
        """Whether this run is the one in the folder, and goes on with it."""
        wanted = configuration.training.resume_from_checkpoint
        if wanted is None or not self.recipe.exists():
            return False
        if wanted == "latest":
            return bool(checkpoints(self.checkpoints)) or self._stopped_early(configuration)
        return expanded(wanted).resolve().parent == self.checkpoints.resolve()

    def _stopped_early(self, configuration: Configuration) -> bool:
        """Whether the folder holds this very recipe and no result: a run that ended before its first checkpoint."""
        if self._names() - {self.recipe.name, self.checkpoints.name, self.logs.name, self.initial.name, "samples"}:
            return False
        try:
            before = parse_recipe([str(self.recipe)]).to_dict()
        except ConfigurationError:
            return False
        return not differences(before, configuration.to_dict())

    def _names(self) -> set[str]:
        """The names in the folder, without what a run that was killed left half-written."""
        half_written = {path.name for written in self._written for path in leftovers(written)}
        return {path.name for path in entries(self.path)} - half_written - {self.lock.name}

    def _check_writable(self) -> None:
        parent = self.path.absolute()
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"output_dir is {self.path}, and you may not write in {parent}: choose another --output_dir, or "
                f"change its permissions."
            )

    def claim(self, configuration: Configuration, initial: InitialModel | None = None) -> None:
        """Make the folder this run's, by its recipe and the model that it begins from; clear a killed one's away."""
        for written in self._written:
            clear_leftovers(written)
        tidy(self.checkpoints, configuration.training.checkpoints_total_limit)
        with written_beside(self.recipe) as beside:
            beside.write_text(configuration.to_yaml())
        if initial is not None and not self.initial.exists():
            initial.keep(self.initial)

    def record(self, history: History, provenance: dict[str, Any]) -> None:
        """Write the course of the run, its picture, and how the run came about."""
        with written_beside(self.history) as beside:
            beside.write_text(json.dumps(history.to_dict(), allow_nan=False))
        with written_beside(self.curve) as beside:
            plot_training_curve(history.to_dict(), beside, self.kind.unit)
        with written_beside(self.provenance) as beside:
            beside.write_text(json.dumps(provenance, indent=1, allow_nan=False))

    def summary(
        self,
        configuration: Configuration,
        data: RunData,
        report: LikelihoodReport | None,
        validation: Validation | None,
    ) -> str:
        """The summary of a run: its figure on the test images, or the last in training, and its place."""
        name, lines = configuration.data.dataset_name or configuration.data.train_data_dir, []
        if report is not None:
            what = (
                f"test {data.kind.data} held out" if data.held_out_test else f"{configuration.data.test_split} split"
            )
            lines = [f"\n{what} of {name}:\n{report}"]
        elif validation is not None:
            lines = [
                f"\nno test {data.kind.data}; {validation['images']} {data.kind.data} held out of {name}, at step "
                f"{validation['step']}:\n{validation['bits_per_dim']:.4f} {data.kind.unit}   standard error "
                f"{validation['standard_error']:.4f}"
            ]
        places = {"pipeline": self.pipeline, "samples": self.samples, "schedule": self.schedule}
        return "\n".join(lines + [f"{name:<13}{place}" for name, place in places.items() if place.exists()])


@contextmanager
def results(folder: OutputFolder) -> Iterator[None]:
    """A block in which the results of a trained run are made and written.

    Raises:
        CheckpointError: They could not be, by the file system's fault.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the run is trained and its last checkpoint whole, but not all of its results could be written to "
            f"{folder.path} ({in_one_line(error)}): mend that, and run it again with "
            f"--resume_from_checkpoint latest."
        ) from error


def save_samples(pipeline: Any, configuration: Configuration, path: Path) -> None:
    """Draw samples from the run's seed, and save them in the file that shows those of its kind of data."""
    _SAVED_BY[configuration.data.kind.name](pipeline, configuration, path)


def _save_texts(pipeline: TokenPipeline, configuration: Configuration, path: Path) -> None:
    """Draw texts, as many as fill a few screens at most, and save them, one after the other."""
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    training = configuration.training
    count, generator = min(training.num_sample_images, _MOST_TEXTS), torch.Generator().manual_seed(training.seed)
    drawn: Any = pipeline(count, num_inference_steps=training.num_inference_steps, generator=generator)
    path.write_text(joined_texts(drawn.texts), "utf-8")


def _save_grid(pipeline: LikelihoodPipeline, configuration: Configuration, path: Path) -> None:
    """Draw images, and save them as one picture; what the network is told has rows of its own."""
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    training = configuration.training
    generator = torch.Generator().manual_seed(training.seed)
    condition = pipeline.condition
    choices = None if condition is None else len(condition.choices)
    rows, columns = rows_of_choices(choices, training.num_sample_images)
    told = {} if condition is None else {condition.argument: [condition.choices[row] for row in rows] or ""}
    count = len(rows) or training.num_sample_images
    if pipeline.text_condition is not None and rows:
        tqdm.write("a row of samples each of: " + "; ".join(map(str, told["prompt"][::columns])))
    save_grid(pipeline.sample(count, generator, training.num_inference_steps, **told), path, columns)


_SAVED_BY: dict[str, Callable[[Any, Configuration, Path], None]] = {IMAGES.name: _save_grid, TOKENS.name: _save_texts}
_MOST_TEXTS = 16


def publish_locally(
    objective: Objective, configuration: Configuration, folder: OutputFolder, data: RunData
) -> LikelihoodReport | None:
    """Save the pipeline, then its pictures and its bound on the test images, each whole or not at all."""
    dataset = _describe_test(configuration, data)
    held_out: Any = data.held_out_test
    if held_out is not None and dataset is not None:
        held_out = held_out | {"fingerprint": dataset["fingerprint"]}
    described = data.train.pipeline_arguments(configuration.data)
    pipeline = build_pipeline(objective.eval(), **described, held_out=held_out)
    with written_beside(folder.pipeline, keeps_all=True) as beside:
        pipeline.save_pretrained(beside, safe_serialization=True)
    training = configuration.training
    report = None
    if data.test is not None and training.evaluation_replicates > 0:
        report = evaluate(
            pipeline,
            data.test,
            own_method(configuration),
            replicates=training.evaluation_replicates,
            batch_size=training.eval_batch_size,
            seed=training.seed,
            dataset=dataset,
        ).with_notes(data.notes)
        with written_beside(folder.evaluation) as beside:
            beside.write_text(json.dumps(report.to_dict(), indent=1))
    if pipeline.process is None or not shows_schedule(pipeline.process, report):
        folder.schedule.unlink(missing_ok=True)  # of an earlier end of this run
    else:
        with written_beside(folder.schedule) as beside:
            plot_schedule(pipeline.process, report, beside)
    if training.num_sample_images > 0:
        with written_beside(folder.samples) as beside:
            save_samples(pipeline, configuration, beside)
    return report


def _describe_test(configuration: Configuration, data: RunData) -> dict[str, Any] | None:
    """The description of the test images, where there are any."""
    if data.test is None:
        return None
    split = configuration.data.test_split if data.held_out_test is None else SPLIT
    return describe_split(data.test, configuration.data, split)


def own_method(configuration: Configuration) -> VariationalBound | None:
    """What a run measures itself by: the bound of its transitions, or its process's own method in continuous time."""
    count = configuration.diffusion.transitions
    return None if count is None else VariationalBound(count)
