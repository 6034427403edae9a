"""The start of a resumed run, and the words for a checkpoint that could not be written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vdm_hub.errors import CheckpointError, in_one_line, warn
from vdm_hub.training.state.checkpoints import (
    Checkpoint,
    checkpoints,
    find_checkpoint,
    holds_nothing_else,
    load_checkpoint,
)


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint to go on from, and the damaged ones after it that were passed over."""

    path: Path
    checkpoint: Checkpoint
    damaged: tuple[Path, ...] = ()

    def set_aside(self) -> None:
        """Rename a damaged checkpoint, so that it is none any more, and say so. Nothing is deleted.

        Raises:
            CheckpointError: It holds files that no run wrote; nothing is changed.
        """
        for path in self.damaged:
            if not holds_nothing_else(path):
                raise CheckpointError(f"the checkpoint {path} is damaged, and holds other files, too: move it away.")
        for path in self.damaged:
            aside = path.rename(_free(path.with_name(f"damaged-{path.name}")))
            warn(
                f"the checkpoint {path} is damaged, and was renamed to {aside.name}: the run goes on from the one "
                f"before it, {self.path}.",
                stacklevel=3,
            )


def find_resume_point(folder: Path, wanted: str | None) -> ResumePoint | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; ``latest`` is the last one that is whole.

    Nothing on the disk is changed.

    Returns:
        ``None`` where nothing was asked for, or ``latest`` finds no checkpoint.

    Raises:
        CheckpointError: The one that was named is damaged, or not the last of its run; or all are damaged.
    """
    if wanted is None:
        return None
    if wanted != "latest":
        path = find_checkpoint(folder, wanted)
        assert path is not None
        checkpoint = load_checkpoint(path)
        _refuse_overwriting(folder, path, int(checkpoint.state["step"]))
        return ResumePoint(path, checkpoint)
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        try:
            return ResumePoint(path, load_checkpoint(path), tuple(damaged))
        except CheckpointError:
            damaged.append(path)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({names}): restore one from a copy, or start the run again in a "
            f"new output_dir."
        )
    return None


def not_saved(folder: Path, step: int, error: Exception) -> str:
    """Words for a checkpoint that could not be written, and for the last one that there is."""
    whole = find_checkpoint(folder, "latest") or "none yet"
    return (
        f"the checkpoint of step {step} could not be written to {folder} ({in_one_line(error)}); nothing "
        f"that was there is lost, and the last whole one is {whole}"
    )


def _refuse_overwriting(folder: Path, path: Path, step: int) -> None:
    later = [other for other in checkpoints(folder) if other.name > f"step-{step:08d}"]
    if later:
        raise CheckpointError(
            f"{path} is not the last checkpoint of its run: going on from it would overwrite {later[0].name} and "
            f"what follows. Move the later ones away, or resume from 'latest'."
        )


def _free(path: Path) -> Path:
    count = 1
    while os.path.lexists(path):
        count += 1
        path = path.with_name(f"{path.name.partition('.')[0]}.{count}")
    return path
