"""The training loop. Read `train_model` from top to bottom."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub.data.conditions import Condition
from vdm_hub.data.examples import Examples, RunData
from vdm_hub.data.loading import load_data
from vdm_hub.errors import CheckpointError, ConfigurationError, warn
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.files import clear_leftovers, written_beside
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.variational_bound import Objective
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import allowed_changes
from vdm_hub.training.dry_run import describe_run
from vdm_hub.training.memory import memory_needs, refuse_what_cannot_fit
from vdm_hub.training.opening import describe_recipe, without_effect
from vdm_hub.training.parts.conditions import build_condition
from vdm_hub.training.parts.initial_models import InitialModel, open_initial_model
from vdm_hub.training.parts.processes import build_accelerator, is_sharded
from vdm_hub.training.parts.setup import build_objective, build_pipeline
from vdm_hub.training.parts.shards import full_tensors
from vdm_hub.training.parts.weights import averages, using_weights
from vdm_hub.training.publishing import check_publishing, publish_run
from vdm_hub.training.signals import StopSignals, TrainingStopped
from vdm_hub.training.state.checkpoint_state import pack_state, restore_state
from vdm_hub.training.state.checkpoints import find_checkpoint, save_checkpoint
from vdm_hub.training.state.outputs import (
    OutputFolder,
    Validation,
    own_method,
    publish_locally,
    results,
    save_samples,
)
from vdm_hub.training.state.resuming import ResumePoint, find_resume_point, not_saved
from vdm_hub.training.state.run_state import RunState
from vdm_hub.training.tracking import Trackers


def train_model(configuration: Configuration) -> LikelihoodReport | None:
    """Train, save, sample and measure a VDM as the configuration says.

    Returns:
        The bound on the test split, on the main process, where there is a test split.

    Raises:
        ConfigurationError: Another run is at work in this process, whose draws and processes the two would share.
        PublishError: The run is complete on disk, and only its publication failed.
        VDMHubError: Something is the user's to mend; nothing that was there before is lost.
        TrainingStopped: SIGTERM or SIGINT came; the checkpoint of the last step is written.
    """
    with _alone():
        return _train_alone(configuration)


_AT_WORK = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    """A block for one run at a time: torch's draws (weights, dropout) and accelerate's state are of a process."""
    if not _AT_WORK.acquire(blocking=False):
        raise ConfigurationError(
            "another run is at work in this process, in another thread: wait for its end, or start this one in a "
            "process of its own (vdm-hub train)."
        )
    try:
        yield
    finally:
        _AT_WORK.release()


def _train_alone(configuration: Configuration) -> LikelihoodReport | None:
    folder = OutputFolder(configuration)
    accelerator = build_accelerator(configuration, folder.path, folder.logs)
    if not accelerator.is_main_process:
        configuration, initial = _begin(configuration, accelerator, folder)
        return _train(configuration, accelerator, folder, initial)
    with StopSignals(before_first_step=True):
        configuration, initial = _begin(configuration, accelerator, folder)
        with folder.reserved(configuration):
            check_publishing(configuration)
            return _train(configuration, accelerator, folder, initial)


def _begin(
    configuration: Configuration, accelerator: Accelerator, folder: OutputFolder
) -> tuple[Configuration, InitialModel | None]:
    """The recipe, whole, and the model that the run begins from, if any; the main process downloads it."""
    with accelerator.main_process_first():
        initial = open_initial_model(configuration, folder.initial)
    return configuration if initial is None else initial.configuration, initial


def _train(
    configuration: Configuration, accelerator: Accelerator, folder: OutputFolder, initial: InitialModel | None
) -> LikelihoodReport | None:
    show = accelerator.is_main_process
    data, condition = load_run(configuration, accelerator, initial)
    needs = memory_needs(configuration, data.shape, accelerator, condition, data.tokenization, initial)
    if show:
        said = [describe_recipe(configuration), *([] if initial is None else [initial]), data.summary, needs]
        print(*said, sep="\n", flush=True)
    refuse_what_cannot_fit(needs, accelerator)
    run = TrainingRun(configuration, accelerator, data, folder, condition, initial)
    if show:
        print("".join(f"note: {words}.\n" for words in without_effect(configuration, run.total_steps)), end="")
    run.resume()
    if configuration.training.dry_run:
        run.try_dry()
        return None
    run.announce()  # the first that is written: whatever is refused before leaves everything as it was
    started, first_step = time.perf_counter(), run.step
    with StopSignals(show=show) as run.stop:
        with tqdm(total=run.total_steps, initial=run.step, desc="training", unit="step", disable=not show) as progress:
            for batches in run.batches():
                terms = run.optimise(batches)
                progress.update()
                run.record(terms, progress)
                if run.is_due("validation_steps"):
                    run.validate()
                if run.is_due("sample_steps"):
                    run.sample()
                if run.is_due("checkpointing_steps") or run.is_last() or run.is_asked_to_stop():
                    run.save()
                if run.is_asked_to_stop():
                    run.leave()
        run.stop.obey_at_once()
        if show:
            print(f"trained {run.step - first_step} steps in {time.perf_counter() - started:.1f} s")
        report = run.finish()
        run.close()
        if show:
            publish_run(configuration, folder)
    return report


def load_run(
    configuration: Configuration, accelerator: Accelerator, initial: InitialModel | None = None
) -> tuple[RunData, Condition | None]:
    """The data of a run, and what its network is told of each datum.

    Args:
        configuration: The recipe.
        accelerator: The processes.
        initial: The model that the run begins from; it knows its tokenizer and its classes.
    """
    data = load_data(configuration.data, None if initial is None else initial.tokenization)
    data = data if initial is None else initial.fit(data)
    return data, build_condition(configuration, data, accelerator, initial)


class TrainingRun(RunState):
    """A run with its output: log, pictures and checkpoints while it lasts, and its results."""

    def __init__(
        self,
        configuration: Configuration,
        accelerator: Accelerator,
        data: RunData,
        folder: OutputFolder,
        condition: Condition | None = None,
        initial: InitialModel | None = None,
    ) -> None:
        super().__init__(configuration, accelerator, data, folder, condition, initial)
        self.trackers = Trackers(accelerator, wanted=bool(self.training.trackers))
        self.stop, self._stop_is_agreed = StopSignals(), False
        self._start: ResumePoint | None = None
        self._clock = time.perf_counter()

    def announce(self) -> None:
        """Make the output folder this run's, and open the trackers."""
        if self.accelerator.is_main_process:
            if self._start is not None:
                self._start.set_aside()
            self.folder.claim(self.configuration, self.initial)
            if self.preparation is not None:
                tqdm.write(self.preparation)
        self.trackers.open(self.configuration.to_dict())
        self._clock = time.perf_counter()

    # ---- what is seen while it runs ---------------------------------------------------------------------------------

    def is_due(self, field: str) -> bool:
        """Whether something that happens every so many steps happens now."""
        every = getattr(self.training, field)
        return every > 0 and self.step % every == 0

    def record(self, terms: dict[str, Tensor], progress: Any) -> None:
        """Log the bound of this step, averaged over the processes."""
        if not self.is_due("logging_steps"):
            return
        asked = next(iter(terms.values())).new_tensor(float(self.stop.received is not None))
        stacked = self.accelerator.reduce(torch.stack([*terms.values(), asked]), reduction="mean")
        *means, stop = stacked.tolist()
        self._stop_is_agreed = stop > 0
        values = dict(zip(terms, means, strict=True))
        total = sum(values.values())
        per_second = (progress.format_dict["rate"] or 0.0) * self.global_batch_size
        kind = self.data.kind
        shown = {name: f"{value:.3f}" for name, value in ({kind.unit: total} | values).items()}
        progress.set_postfix(shown | {f"{kind.data}/s": f"{per_second:.0f}"})
        rate = {"learning_rate": self.lr_scheduler.get_last_lr()[0]}
        self.history.add("train", self.step, {"bits_per_dim": total} | values | rate)
        logged = {f"bits_per_{kind.value}": total} | values | {f"{kind.data}_per_second": per_second}
        self.trackers.log({f"train/{name}": value for name, value in logged.items()} | rate, self.step)

    def validate(self) -> None:
        """Measure the held-out bits/dim of the averaged weights; where they stop falling, the run may end early."""
        images = self.data.validation
        if images is None:
            return
        measured = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        with self._averaged() as model:
            if model is not None:
                measured += self._measure(model, images)
                if self.early_stopping.would_improve(float(measured)):
                    self.early_stopping.keep(model)
        if self.early_stopping.patience is not None:  # all processes stop at the same step
            self.early_stopping.look(float(broadcast(measured)), self.step)

    def _measure(self, model: Objective, images: Examples) -> float:
        """The held-out bits/dim, from two evaluations of each image."""
        report = evaluate(
            self._pipeline(model),
            images,
            own_method(self.configuration),
            replicates=2,
            batch_size=self.training.eval_batch_size,
            max_images=self.training.validation_images,
            progress=False,
        )
        units, by_byte = report.units, report.bits_per_byte
        figure = units.by_leading(report.bits_per_dim)
        tqdm.write(f"step {self.step}: held-out {figure:.4f} {units.leading} (se {report.leading_error:.4f})")
        measured = {"bits_per_dim": report.bits_per_dim, "standard_error": report.standard_error}
        of_texts = {} if by_byte is None else {"bits_per_byte": by_byte}
        self.history.add("validation", self.step, measured | of_texts)
        shown = {f"bits_per_{units.kind.value}": report.bits_per_dim} | of_texts | report.terms
        self.trackers.log({f"validation/{name}": value for name, value in shown.items()}, self.step)
        return report.bits_per_dim

    def _pipeline(self, model: Objective) -> LikelihoodPipeline:
        """The pipeline of the model as it is now."""
        return build_pipeline(model, **self.data.train.pipeline_arguments(self.configuration.data))

    def sample(self) -> None:
        """Draw samples of the averaged weights, a grid or texts, for the trackers and the run's folder."""
        if self.training.num_sample_images == 0:
            return
        suffix = self.folder.samples.suffix
        grid = self.folder.path / "samples" / f"step-{self.step:08d}{suffix}"
        try:
            with self._averaged() as model:
                if model is None:
                    return
                clear_leftovers(grid)
                with written_beside(grid) as beside:
                    save_samples(self._pipeline(model.eval()), self.configuration, beside)
            self.trackers.log_pictures({"samples": grid}, self.step)
        except OSError as error:
            warn(f"the samples of step {self.step} could not be written ({error}): training goes on.", stacklevel=2)

    # ---- signals ----------------------------------------------------------------------------------------------------

    def is_asked_to_stop(self) -> bool:
        """Whether a signal asks to stop here: for one process at once; several agree where the bound is logged."""
        several = self.accelerator.num_processes > 1
        return self._stop_is_agreed if several else self.stop.received is not None

    def leave(self) -> None:
        """End the run after the checkpoint of this step, and say how to go on.

        Raises:
            TrainingStopped: With the exit status.
        """
        received = self.stop.received or signal.SIGTERM  # another process got it
        if self.accelerator.is_main_process:
            path = find_checkpoint(self.folder.checkpoints, "latest")
            words = f"{received.name}: stopped after step {self.step} of {self.total_steps}; {path} is written. Go on"
            tqdm.write(f"{words} by the same command with --resume_from_checkpoint latest.", file=sys.stderr)
        self.close()
        raise TrainingStopped(received)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        self.losses.check_losses()
        self.losses.check_weights(self.step, self.model)
        if not (self.accelerator.is_main_process or is_sharded(self.accelerator)):
            return
        self.seconds, self._clock = self.seconds + time.perf_counter() - self._clock, time.perf_counter()
        tensors, state = pack_state(self)
        if not self.accelerator.is_main_process:
            return
        state["provenance"] = self.provenance.describe(self.step, self.seconds)
        folder = self.folder.checkpoints
        try:
            save_checkpoint(folder, self.step, tensors, state, self.training.checkpoints_total_limit)
        except (OSError, SafetensorError) as error:
            what = not_saved(folder, self.step, error)
            if self.is_last() or self.is_asked_to_stop():
                raise CheckpointError(f"{what}: mend that, and go on with --resume_from_checkpoint latest.") from error
            warn(f"{what}: training goes on, and the next one is tried in its turn.", stacklevel=2)

    def resume(self) -> None:
        """Go on from the checkpoint that the configuration names, if any.

        Raises:
            CheckpointError: It is damaged, not a checkpoint, or another model's.
        """
        self._start = find_resume_point(self.folder.checkpoints, self.training.resume_from_checkpoint)
        if self._start is not None:
            restore_state(self, self._start.path, self._start.checkpoint)
            if self.accelerator.is_main_process:
                changed = allowed_changes(self._start.checkpoint.state["recipe"], self.configuration.to_dict())
                tqdm.write("; ".join([f"resumed from {self._start.path}", *changed]))
        elif self.training.resume_from_checkpoint is not None and self.accelerator.is_main_process:
            tqdm.write(f"{self.folder.checkpoints} holds no checkpoint: the run begins at its first step")
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:  # nodes that do not share the folder
            raise CheckpointError(
                f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}) in "
                f"{self.folder.checkpoints}: give all of them the same folder."
            )

    # ---- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the trackers and the group of processes.

        What wraps the model goes first: where its reducer is the last to hold the group, the group is taken down with
        Python's lock held, and a thread of the group may wait for that lock for ever.
        """
        self.objective = self.model
        self.accelerator.free_memory()
        if self.accelerator.num_processes > 1:
            gc.collect()
        self.trackers.close()

    def finish(self) -> LikelihoodReport | None:
        """Save the pipeline of the averaged or the best weights, its pictures and its bound on the test split."""
        self.accelerator.wait_for_everyone()
        with self._published() as model:
            if model is None:
                return None
            return self._publish(model)

    def _publish(self, model: Objective) -> LikelihoodReport | None:
        """Save and measure the model as `finish` says, on the main process."""
        with results(self.folder):
            report, validation = publish_locally(model, self.configuration, self.folder, self.data), self._validation()
            record = {} if validation is None else {"validation": validation}
            self.folder.record(self.history, self.provenance.describe(self.step, self.seconds) | record)
        if report is not None:
            value = report.units.kind.value
            measured = {f"test/bits_per_{value}": report.bits_per_dim, "test/standard_error": report.standard_error}
            measured |= {} if report.bits_per_byte is None else {"test/bits_per_byte": report.bits_per_byte}
            self.trackers.log(measured, self.step)
        self.trackers.log_pictures(self.folder.pictures, self.step)
        print(self.folder.summary(self.configuration, self.data, report, validation))
        return report

    def _validation(self) -> Validation | None:
        """The last held-out figure of the weights that are published, or of weights before them."""
        step = self.early_stopping.best_step if self.early_stopping.weights else self.step
        last, images = self.history.last("validation", step), self.data.validation
        if last is None or images is None:
            return None
        sizes = [None if images.is_stream else images.count, self.training.validation_images]
        return last | {"images": min((size for size in sizes if size is not None), default=None)}

    def _published(self) -> AbstractContextManager[Objective | None]:
        if not self.early_stopping.weights:  # the main process's alone: the others need not know
            return self._averaged()
        best = f"{self.early_stopping.best:.4f} {self.data.kind.unit} held out"
        print(f"the weights of step {self.early_stopping.best_step} are published, the best that were seen ({best})")
        return self._averaged(self.early_stopping.weights)

    @contextmanager
    def _averaged(self, instead: Mapping[str, Tensor] | None = None) -> Iterator[Objective | None]:
        """The model with the moving average of its weights, or others, on the main process; ``None`` on the rest.

        Where parameters are sharded it is a model of its own, and all processes take part in putting it together.
        """
        is_main, model = self.accelerator.is_main_process, self.model
        weights = averages(self.model, self.ema) if is_main or is_sharded(self.accelerator) else {}
        if is_sharded(self.accelerator):
            own, weights = full_tensors(self.model.state_dict(), is_main), full_tensors(weights, is_main)
            if is_main:
                data, initial = self.data, self.initial
                model = build_objective(
                    self.configuration, data.shape, self.model.condition, data.tokenization, initial
                )
                model.to(self.accelerator.device)
                model.load_state_dict(own)
        if not is_main:
            yield None
            return
        with using_weights(model, instead or weights):
            yield model

    def try_dry(self) -> None:
        """Take a step for ``--dry_run``, and print what the run will need; nothing is written."""
        report = describe_run(self)
        if self.accelerator.is_main_process:
            print(f"{report}\ndry run: nothing was written to {self.folder.path}.")
        self.close()
