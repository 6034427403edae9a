"""Where a pipeline lies, by the name that a person gives: a folder, a run's folder, or a Hub id."""

from __future__ import annotations

from pathlib import Path

INDEX = "model_index.json"
PIPELINE = "pipeline"
"""The folder of a run that holds its pipeline."""
RECIPE = "recipe.yaml"
"""The file of a run that says what it was asked to do, as the run itself wrote it."""


def pipeline_folder(folder: Path) -> Path:
    """The pipeline's folder, which a run's folder stands for too; the folder itself where there is no pipeline.

    >>> pipeline_folder(Path("no/run"))
    PosixPath('no/run')
    """
    within = folder / PIPELINE
    return within if (within / INDEX).is_file() and not (folder / INDEX).is_file() else folder


def run_folder(pipeline: Path) -> Path | None:
    """The folder of the run that made a pipeline and has its recipe; ``None`` for a pipeline alone.

    >>> run_folder(Path("no/run/pipeline"))
    """
    place = pipeline.resolve()
    return place.parent if place.name == PIPELINE and (place.parent / RECIPE).is_file() else None
