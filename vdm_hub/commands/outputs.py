"""Checks of the places where commands write files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.loading import check_outputs_apart
from vdm_hub.errors import ConfigurationError
from vdm_hub.files import check_writable, destination, expanded
from vdm_hub.hub.places import RECIPE, pipeline_folder, run_folder
from vdm_hub.recipes.arguments import read_recipe


def check_output(path: Path, option: str, suffix: str, *, overwrite: bool) -> None:
    """Refuse, before there is anything to write, a place where no file of this kind can be written.

    Args:
        path: The place.
        option: The option that named it.
        suffix: What the file's name must end in, in any case, such as ``.png``.
        overwrite: Whether a plain file that is there may be replaced.

    Raises:
        OutputError: There is a device, a pipe or a socket, or nothing can be written there.
        ConfigurationError: There is a folder, or a file that may not be replaced; or the name is another kind's.
    """
    target = destination(path)
    if target.is_dir() or path.suffix.casefold() != suffix:
        what = "a folder" if target.is_dir() else "of another kind"
        raise ConfigurationError(f"--{option} {path} is {what}: name a file that ends in {suffix}.")
    if target.exists() and not overwrite:
        raise ConfigurationError(f"{path} exists: name another --{option}, or replace it with --overwrite.")
    check_writable(path)


def check_apart_from_training(pipeline: str | Path, outputs: Mapping[str, Path]) -> None:
    """Refuse to write into the folder of images that a run was trained on.

    Args:
        pipeline: The run's folder, or its pipeline's; of any other nothing is known.
        outputs: The places, by the options that named them.

    Raises:
        DataError: One of them would be among the images of another run.
    """
    run = run_folder(pipeline_folder(expanded(pipeline)))
    if run is None:
        return
    recipe = read_recipe(run / RECIPE)
    name, folder = recipe.get("dataset_name"), recipe.get("train_data_dir")
    if os.path.exists(os.path.expanduser(str(folder or name))):  # noqa: PTH110, PTH111 - of any string
        check_outputs_apart(DataArguments(dataset_name=name, train_data_dir=folder), outputs)
