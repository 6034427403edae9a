"""Code for readers without vdm_hub: a pipeline's folder that carries the part of this package which it needs.

``pipeline.py`` holds the sources of that part and imports them under a name of their own, made of the version and a
hash; ``model_index.json`` names that package and that file, in diffusers' own form for custom pipelines. So the reader
types no more than

    DiffusionPipeline.from_pretrained(repo_or_folder, revision="remote-code", trust_remote_code=True)

and several versions, and the installed package, live side by side in one process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from vdm_hub import registry
from vdm_hub.errors import CheckpointError, ConfigurationError
from vdm_hub.files import written_beside
from vdm_hub.hub.install_hint import HINT_KEY
from vdm_hub.hub.json_files import read_json
from vdm_hub.hub.places import INDEX
from vdm_hub.hub.repositories import CONFIGS
from vdm_hub.hub.text_files import TEXT_COMPONENTS
from vdm_hub.pipelines.vdm import VDMPipeline
from vdm_hub.publishing import remote_code_reader
from vdm_hub.publishing.carried_code import (
    PACKAGE,
    PINNED_NAME,
    PUBLIC_CLASSES,
    component_file,
    pinned_name,
    pipeline_file,
)
from vdm_hub.version import __version__

_PIPELINE = "pipeline.py"


def add_remote_code(folder: Path) -> str:
    """Add the code to a folder that `VDMPipeline.save_pretrained` wrote, and name it in the index.

    The index changes last: until then the folder loads as before. A folder that carries code already is given today's.

    Args:
        folder: The pipeline.

    Returns:
        The name under which the code is imported, such as ``vdm_hub_0_1_0_3f2a9c81``.

    Raises:
        CheckpointError: The folder holds no pipeline of this package.
        ConfigurationError: It needs a plugin, whose code can't be carried.
    """
    index, name = _read_index(folder), pinned_name()
    _refuse_plugins(folder, index)
    files = _files(folder, index)
    for path, text in files.items():
        _write(path, text)
    for component, (library, cls) in _components(index).items():
        if library == PACKAGE:
            index[component] = [name, cls]
    index.pop(HINT_KEY, None)  # this revision does load without the package
    index["_class_name"] = [Path(_PIPELINE).stem, VDMPipeline.__name__]
    _write(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    for path in set(folder.glob("*/*.py")) - files.keys():
        if PINNED_NAME.fullmatch(path.stem):
            path.unlink()
    return name


def check_remote_code(folder: Path) -> None:
    """Load the folder in a new process without vdm_hub, and compare what it computes with what is computed here.

    Only the very code that this version writes is run.

    Raises:
        CheckpointError: The folder carries other code, does not load, or gives other samples or another bound.
    """
    index = _read_index(folder)
    files = {path: text.encode() for path, text in _files(folder, index).items()}
    for path in sorted(files.keys() | set(folder.rglob("*.py"))):
        if not path.is_file() or path.read_bytes() != files.get(path):
            raise CheckpointError(
                f"{path} is not what vdm_hub {__version__} writes there: remove the folder's Python files, and add "
                f"the code again."
            )
    here = remote_code_reader.measure(_load_with_the_package(folder, index))
    there = _measure_without_the_package(folder)
    different = [name for name in here | there if not _same(here.get(name), there.get(name))]
    if different:
        raise CheckpointError(
            f"{folder} gives something else in a process without vdm_hub than in this one: {', '.join(different)} "
            f"differ. Do not publish it; this is a bug of vdm_hub {__version__}, or files changed meanwhile."
        )


# ---- the folder -----------------------------------------------------------------------------------------------------


def _files(folder: Path, index: Mapping[str, Any]) -> dict[Path, str]:
    """The Python files that the folder is to hold, by name."""
    carried = [component for component, (library, _) in _components(index).items() if library == PACKAGE]
    stubs = {folder / component / f"{pinned_name()}.py": component_file() for component in carried}
    return {folder / _PIPELINE: pipeline_file()} | stubs


def _read_index(folder: Path) -> dict[str, Any]:
    """The index as `save_pretrained` wrote it, also where the folder carries code."""
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: name a folder that VDMPipeline.save_pretrained wrote.")
    index = read_json(path)
    if isinstance(index.get("_class_name"), list):
        index["_class_name"] = index["_class_name"][-1]
    if index.get("_class_name") != VDMPipeline.__name__:
        raise CheckpointError(
            f"{path} names the class {index.get('_class_name')!r}: only a {VDMPipeline.__name__} can be published "
            f"with the code of vdm_hub."
        )
    for component, (library, cls) in _components(index).items():
        library = PACKAGE if PINNED_NAME.fullmatch(library) else library
        if not _is_known(component, library, cls):
            raise CheckpointError(
                f"{INDEX} has {library}.{cls} as its {component}: only classes of diffusers and vdm_hub, and text "
                f"encoders of transformers, can be published with the code of vdm_hub."
            )
        index[component] = [library, cls]
    return index


def _is_known(component: str, library: str, cls: str) -> bool:
    if library == PACKAGE:
        return cls in PUBLIC_CLASSES
    of_text = component in TEXT_COMPONENTS  # which the reader has transformers for, as for any pipeline with text
    return library == ("transformers" if of_text else "diffusers") and hasattr(importlib.import_module(library), cls)


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    found = {}
    for key, value in index.items():
        if key.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if not key.isidentifier() or len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise CheckpointError(f"{INDEX} has the component {key!r}: {value!r}, which is no class of a library.")
        found[key] = (value[0], value[1])
    return found


def _refuse_plugins(folder: Path, index: Mapping[str, Any]) -> None:
    carried = [component for component, (library, _) in _components(index).items() if library == PACKAGE]
    for path in (folder / component / name for component in carried for name in CONFIGS):
        config = read_json(path) if path.is_file() else {}
        for field, kind in registry.SERIALISED_FIELDS.items():
            name, _, package = registry.parse_serialised(
                kind, config.get(field) or next(iter(registry.BUILT_INS[kind]))
            )
            if name not in registry.BUILT_INS[kind]:
                raise ConfigurationError(
                    f"the {field} {name!r} of {path} comes from the plugin {package or 'that brings it'!r}, whose "
                    f"code can't be carried: publish without the carried code, for readers who install vdm_hub and "
                    f"that plugin."
                )


def _write(path: Path, text: str) -> None:
    with written_beside(path) as beside:
        beside.write_bytes(text.encode())


# ---- the two sides of the check -------------------------------------------------------------------------------------


def _load_with_the_package(folder: Path, index: Mapping[str, Any]) -> VDMPipeline:
    parts = {}
    for component, (library, name) in _components(index).items():
        cls = getattr(importlib.import_module(library), name)
        arguments = {"use_safetensors": True} if issubclass(cls, ModelMixin) else {}
        parts[component] = cls.from_pretrained(folder / component, **arguments)
    return VDMPipeline(**parts)


def _measure_without_the_package(folder: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "measured.safetensors"
        environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_DISABLE_REMOTE_CODE"}
        environment |= {"HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1"}
        # -P, as the script's own folder holds modules of this package.
        command = [sys.executable, "-P", str(remote_code_reader.__file__), str(folder.resolve()), str(output)]
        command.append(str(torch.get_num_threads()))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise CheckpointError(f"{folder} can't be used in a process without vdm_hub: {reason}")
        return {name: tensor.clone() for name, tensor in load_file(output).items()}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)
