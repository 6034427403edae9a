"""What a run leaves behind: the pipeline, pictures and the measured bound."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from vdm_hub.errors import CheckpointError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.files import written_beside
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.variational_bound import VDMObjective
from vdm_hub.pipeline_vdm import VDMPipeline
from vdm_hub.plots import plot_schedule, save_grid
from vdm_hub.training.arguments import Configuration, parse
from vdm_hub.training.setup import build_pipeline

# Fields that a resumed run may have otherwise: they change no step that was taken, nor the data of those to come.
_MAY_CHANGE = {
    *("recipe", "output_dir", "resume_from_checkpoint", "max_train_steps", "num_train_epochs", "num_workers"),
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "logging_steps"),
    *("eval_batch_size", "validation_steps", "validation_images", "validation_split", "test_split"),
    *("evaluation_replicates", "sample_steps", "num_sample_images", "num_inference_steps"),
}


class OutputFolder:
    """The folder of one run; it never mixes two."""

    def __init__(self, configuration: Configuration) -> None:
        assert configuration.training.output_dir is not None
        self.path = Path(configuration.training.output_dir)
        self.checkpoints, self.pipeline = self.path / "checkpoints", self.path / "pipeline"
        self.recipe, self.evaluation = self.path / "recipe.yaml", self.path / "evaluation.json"
        self.samples, self.schedule = self.path / "samples.png", self.path / "schedule.png"
        self.logs = self.path / "logs"

    def claim(self, configuration: Configuration) -> None:
        """Make the folder this run's; refuse one that holds another run, or anything else.

        Raises:
            CheckpointError: It is not empty and the run does not resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"output_dir {self.path} is a file: choose a folder.")
        resuming = configuration.training.resume_from_checkpoint is not None
        if self.path.exists() and any(self.path.iterdir()) and not resuming:
            what = "already holds a run" if self.recipe.exists() else "is not empty"
            raise CheckpointError(
                f"output_dir {self.path} {what}. Choose another --output_dir, go on with that run by "
                f"--resume_from_checkpoint latest, or remove the folder yourself: nothing is overwritten."
            )
        if resuming and self.recipe.exists():
            self._check_same_run(configuration)
        with written_beside(self.recipe) as beside:
            beside.write_text(configuration.to_yaml())

    def _check_same_run(self, configuration: Configuration) -> None:
        """Refuse to go on with another recipe than the folder's; what only shows or stores may change."""
        before, now = parse([str(self.recipe)]).to_dict(), configuration.to_dict()
        changed = [key for key in now if key not in _MAY_CHANGE and before.get(key) != now[key]]
        if changed:
            differences = "; ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
            raise CheckpointError(
                f"{self.path} holds a run of another recipe: {differences}. Resume with the recipe it was made by "
                f"({self.recipe}), or choose another --output_dir."
            )


@contextmanager
def averaged_weights(objective: VDMObjective, ema: EMAModel | None) -> Iterator[None]:
    """The objective with the moving average of its weights, within the block."""
    if ema is None:
        yield
        return
    ema.store(objective.parameters())
    ema.copy_to(objective.parameters())
    try:
        yield
    finally:
        ema.restore(objective.parameters())


def sample_images(pipeline: VDMPipeline, configuration: Configuration, count: int) -> Any:
    """Samples in [0, 1], (B, C, H, W), from the run's seed."""
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    generator = torch.Generator().manual_seed(configuration.training.seed)
    steps = configuration.training.num_inference_steps
    return pipeline(count, generator=generator, num_inference_steps=steps, output_type="pt", return_dict=False)[0]


def publish_locally(
    objective: VDMObjective, configuration: Configuration, folder: OutputFolder, test: Any
) -> LikelihoodReport | None:
    """Save the pipeline, then its pictures and its bound on the test split, each whole or not at all."""
    pipeline = build_pipeline(objective.eval())
    with written_beside(folder.pipeline) as beside:
        pipeline.save_pretrained(beside, safe_serialization=True)
    training = configuration.training
    report = None
    if test is not None and training.evaluation_replicates > 0:
        report = evaluate(
            pipeline,
            test,
            transitions=configuration.diffusion.transitions,
            replicates=training.evaluation_replicates,
            batch_size=training.eval_batch_size,
            seed=training.seed,
        )
        with written_beside(folder.evaluation) as beside:
            beside.write_text(json.dumps(report.to_dict(), indent=1))
        with written_beside(folder.schedule) as beside:
            plot_schedule(pipeline.process, report, beside)
    if training.num_sample_images > 0:
        images = sample_images(pipeline, configuration, training.num_sample_images)
        with written_beside(folder.samples) as beside:
            save_grid(images, beside)
    return report
