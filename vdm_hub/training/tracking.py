"""The trackers of a run. One that fails is dropped with a warning: no tracker is worth a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from vdm_hub.errors import ConfigurationError, in_one_line, warn
from vdm_hub.errors.secret_values import masked_values


class Trackers:
    """accelerate's trackers, each on its own: what one of them raises reaches neither the others nor the run.

    Args:
        accelerator: It knows which trackers the recipe names.
        wanted: Whether there are any.
    """

    def __init__(self, accelerator: Accelerator, *, wanted: bool) -> None:
        self.accelerator, self.wanted = accelerator, wanted

    def open(self, config: Mapping[str, Any]) -> None:
        """Start the trackers.

        Raises:
            ConfigurationError: One does not start: before the first step that is better mended than passed over.
        """
        if not self.wanted:
            return
        try:
            self.accelerator.init_trackers("vdm_hub", config=_flat(config))
        except Exception as error:  # each tracker has exceptions of its own
            raise ConfigurationError(
                f"report_to is {config['report_to']!r}, and such a tracker does not start ({in_one_line(error)}): "
                f"mend that, or take it out of report_to."
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def log_pictures(self, files: Mapping[str, Path], step: int) -> None:
        """Log picture files, and files of text, by name, those that exist, to the trackers that show such."""
        if not self.wanted:
            return
        texts = {name: _as_code(file.read_text("utf-8")) for name, file in files.items() if _is_text(file)}
        pictures = {name: file for name, file in files.items() if file.suffix == ".png"}
        if texts:
            self._each(lambda tracker: tracker.log(texts, step=step))
        self._each(lambda tracker: _show(tracker, _read(pictures), step))

    def close(self) -> None:
        """End the trackers, and the group of processes."""
        self._each(lambda tracker: tracker.finish())
        self.accelerator.trackers = []
        self.accelerator.end_training()

    def _each(self, do: Callable[[GeneralTracker], object]) -> None:
        for tracker in list(getattr(self.accelerator, "trackers", ())):
            try:
                do(tracker)
            except Exception as error:  # each tracker has exceptions of its own
                self.accelerator.trackers.remove(tracker)
                warn(
                    f"the tracker {tracker.name} failed ({in_one_line(error)}): the run goes on without it, and what "
                    f"is logged is in its checkpoints and in history.json all the same.",
                    stacklevel=3,
                )


def _is_text(file: Path) -> bool:
    return file.suffix == ".txt" and file.exists()


def _as_code(text: str) -> str:
    """Text as Markdown that shows it as it is: trackers read what they are given as that."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _read(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    return {name: np.asarray(Image.open(file).convert("RGB")) for name, file in files.items() if file.exists()}


def _show(tracker: GeneralTracker, pictures: Mapping[str, np.ndarray], step: int) -> None:
    if tracker.name == "trackio":  # accelerate knows no pictures of it
        trackio = importlib.import_module("trackio")
        tracker.log({name: trackio.Image(picture) for name, picture in pictures.items()}, step=step)
    elif hasattr(tracker, "log_images"):
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: picture[None] for name, picture in pictures.items()}, step=step, **layout)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every tracker can hold, without secrets."""
    shown = masked_values(values)
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in shown.items()}
