"""Make a Gradio app of a model, as a Space of the Hub, a folder, or served on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.commands.options import OVERRIDES
from vdm_hub.commands.outputs import check_apart_from_training
from vdm_hub.errors import ConfigurationError, OutputError, warn
from vdm_hub.fields import whole_number
from vdm_hub.files import check_writable, destination, expanded, written_beside
from vdm_hub.hub.places import pipeline_folder, run_folder
from vdm_hub.publishing.repository import check_ready
from vdm_hub.spaces.pushing import push_space
from vdm_hub.spaces.requirements import check_requirements, on_no_index, requirements
from vdm_hub.spaces.writing import GRADIO, TOLD, Space, write_space


def run(arguments: argparse.Namespace) -> None:
    """Write the Space, push it, and serve it, as far as asked for."""
    _check_options(arguments)
    if arguments.output is not None:
        _check_place(arguments.output, overwrite=arguments.overwrite)
        check_apart_from_training(arguments.model, {"output": arguments.output})
    space = _space(arguments)
    is_sent = arguments.output is not None or arguments.push is not None
    if is_sent and (missing := on_no_index(space.requirements)):
        warn(
            f"{', '.join(missing)}: on no index of packages, so that a Space can't install it by its name: give "
            f"--requirement 'NAME @ git+https://...' for each, or write that into requirements.txt."
        )
    if arguments.output is not None:
        with written_beside(arguments.output, keeps_all=True) as beside:
            files = write_space(space, beside)
        print(f"written to {arguments.output}: {', '.join(files)}")
    if arguments.push is not None:
        with tempfile.TemporaryDirectory() as temporary:
            write_space(space, Path(temporary) / "space")
            address = push_space(Path(temporary) / "space", arguments.push, arguments.private or None)
        carried = ", with the model itself" if space.is_local else ""
        print(f"pushed{carried}: {address}")
    if arguments.serve:
        _serve(space, arguments.output, arguments.port)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    if arguments.output is None and arguments.push is None and not arguments.serve:
        raise ConfigurationError("nothing says where to: give --output FOLDER, --push OWNER/NAME, or --serve.")
    acts_with = {"overwrite": "output", "private": "push", "port": "serve"}
    for option, other in acts_with.items():
        if getattr(arguments, option) not in (None, False) and getattr(arguments, other) in (None, False):
            raise ConfigurationError(f"--{option} acts only with --{other}: add it, or leave --{option} out.")
    if arguments.port is not None:
        whole_number("--port", arguments.port, 1, 65535)
    if arguments.push is not None:
        check_ready(arguments.push)
    if arguments.serve and importlib.util.find_spec("gradio") is None:
        raise ConfigurationError(
            f"--serve needs gradio, which is not installed: `pip install gradio=={GRADIO}`, or install vdm_hub with "
            f"its extra, `pip install '.[space]'`."
        )
    check_requirements(arguments.requirement)


def _check_place(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace what no former Space is."""
    place = destination(output)
    check_writable(output)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / TOLD).is_file():
        raise OutputError(f"{output} exists already, and is no Space: name another folder, or remove it.")
    if not overwrite:
        raise ConfigurationError(f"{output} exists: name another --output, or replace it with --overwrite.")


def _space(arguments: argparse.Namespace) -> Space:
    place, named = expanded(arguments.model), {name: getattr(arguments, name) for name in OVERRIDES}
    loading: dict[str, Any] = {"revision": arguments.revision, "num_levels": arguments.num_levels}
    loading["overrides"] = {name: value for name, value in named.items() if value is not None} or None
    loading = {name: value for name, value in loading.items() if value is not None}
    if place.is_dir() and arguments.revision is not None:
        raise ConfigurationError(f"--revision is {arguments.revision!r}, and {place} is a folder: leave it out.")
    pipeline = load_pipeline(arguments.model, **loading)
    if not getattr(getattr(pipeline, "first_stage", None), "is_fitted", True):
        warn(
            f"the autoencoder of {arguments.model} was trained without a likelihood, so that the app shows samples "
            f"and no bits: for those, fit its scale first (pipe.fit_first_stage(images)), save the pipeline, and give "
            f"that."
        )
    model: str | Path = pipeline_folder(place) if place.is_dir() else arguments.model
    name = (run_folder(model) or model).resolve().name if isinstance(model, Path) else model.rpartition("/")[2]
    return Space(pipeline, model, arguments.title or name, requirements(pipeline, arguments.requirement), loading)


def _serve(space: Space, written: Path | None, port: int | None) -> None:
    """Run the app in this process until it is stopped."""
    if port is not None:
        os.environ["GRADIO_SERVER_PORT"] = str(port)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if written is None else destination(written)
        if written is None:
            write_space(space, folder, carries=False)
        runpy.run_path(str(folder / "app.py"), run_name="__main__")
