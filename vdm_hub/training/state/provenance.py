"""The provenance of a run, by which it can be repeated; nothing of the machine but its kind of device."""

from __future__ import annotations

import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vdm_hub import registry
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.examples import RunData
from vdm_hub.data.kinds import IMAGES, TOKENS
from vdm_hub.evaluation.provenance import describe_images, describe_windows, library_versions
from vdm_hub.hub.records import InitialRecord
from vdm_hub.objectives.variational_bound import Objective
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import DiffusionArguments
from vdm_hub.training.parts.networks import count_parameters

_PACKAGE = Path(__file__).resolve().parents[2]


class Provenance:
    """The content of ``run.json``, also in each checkpoint: command, versions, code, size, time and data of a run.

    Args:
        configuration: The recipe.
        accelerator: The processes, their device and precision.
        objective: All that is trained.
        data: The training images among them.
        origin: The record of the trained model that the run began from.
    """

    def __init__(
        self,
        configuration: Configuration,
        accelerator: Accelerator,
        objective: Objective,
        data: RunData,
        origin: InitialRecord | None = None,
    ) -> None:
        self._origin = {} if origin is None else {"init_from": dict(origin)}
        self._configuration, self._accelerator, self._data = configuration, accelerator, data
        self._condition = {} if objective.condition is None else objective.condition.record
        self._parameters = {name: count_parameters(part) for name, part in objective.parts.items()}

    def describe(self, steps: int, seconds: float) -> dict[str, Any]:
        """The record of the run as it is now.

        Args:
            steps: Optimiser steps that were taken, in all parts of the run together.
            seconds: The time that they took.
        """
        training, accelerator = self._configuration.training, self._accelerator
        batch = training.train_batch_size * training.gradient_accumulation_steps * accelerator.num_processes
        changing = {"steps": steps, "training_seconds": round(seconds, 3)}
        return {
            **self._fixed,
            **changing,
            "processes": accelerator.num_processes,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "global_batch_size": batch,
            "device": _device(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "parameters": self._parameters,
        }

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """The entries that stay: the code that runs is that of the start, whatever is committed meanwhile."""
        data, train = self._configuration.data, self._data.train
        return {
            "command": _command(self._configuration, self._accelerator),
            "versions": library_versions(),
            "plugins": plugin_versions(self._configuration.diffusion),
            "git": code_state(),
            "working_directory_git": git_state(),
            "dataset": describe_split(train, data, data.train_split),
            "augmentation": train.augmentation(data),
            **self._condition,
            **self._origin,
        }


def describe_split(images: Any, arguments: DataArguments, split: str | None) -> dict[str, Any]:
    """The public description of one of a run's splits, by the kind of its data."""
    return _DESCRIBED_BY[images.kind.name](images, arguments, split)


def _describe_images(images: Any, arguments: DataArguments, split: str | None) -> dict[str, Any]:
    described = describe_images(
        images,
        arguments.source,
        split,
        config=arguments.dataset_config_name,
        resolution=arguments.resolution,
        color=arguments.color,
        image_column=arguments.image_column,
    )
    told = {name: getattr(arguments, name) for name in ("label_column", "caption_column", "caption_template")}
    return described | {name: value for name, value in told.items() if value is not None}


def _describe_windows(windows: Any, arguments: DataArguments, split: str | None) -> dict[str, Any]:
    return describe_windows(
        windows,
        arguments.source,
        split,
        config=arguments.dataset_config_name,
        text_column=arguments.text_column,
    )


_DESCRIBED_BY = {IMAGES.name: _describe_images, TOKENS.name: _describe_windows}


def plugin_versions(diffusion: DiffusionArguments) -> dict[str, str | None]:
    """The packages, and their versions, of the plugins that a recipe names.

    >>> plugin_versions(DiffusionArguments())
    {}
    """
    found = []
    for field, kind in registry.SERIALISED_FIELDS.items():
        if (serialised := getattr(diffusion, field)) is not None:
            name, _, package = registry.parse_serialised(kind, serialised)
            found.append(registry.lookup(kind, name, package))
    return {one.package: one.version for one in found if one.package != registry.BUILT_IN_PACKAGE}


def code_state(package: Path = _PACKAGE) -> dict[str, Any] | None:
    """The `git_state` of this package's own code; ``None`` where it runs from no clone, but as it was installed."""
    # It may also lie in somebody else's repository, as an environment within a project does.
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    return git_state(package) if tracked else None


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of the repository that a folder lies in, and whether tracked files differ from it.

    ``None`` where there is no git, no repository or no commit.

    Args:
        folder: The folder; the current directory where not given.
    """
    folder = folder or Path.cwd()
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _command(configuration: Configuration, accelerator: Accelerator) -> str:
    """The command that repeats the run with the recipe beside it, and a precision that the launcher chose."""
    chosen = configuration.training.mixed_precision is None and accelerator.mixed_precision != "no"
    flag = f" --mixed_precision {accelerator.mixed_precision}" if chosen else ""
    return f"accelerate launch --num_processes {accelerator.num_processes}{flag} -m vdm_hub.train recipe.yaml"


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
