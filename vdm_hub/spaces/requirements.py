"""The requirements of a Space: this package, torch, and the plugin packages that the model needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.publishing.wording import plugin_packages
from vdm_hub.registry import BUILT_IN_PACKAGE
from vdm_hub.version import __version__

FILE = "requirements.txt"


def check_requirements(given: Sequence[str]) -> dict[str, str]:
    """Requirements that a user gave, by the name of their package.

    Raises:
        ConfigurationError: One is none, as pip has them.

    >>> check_requirements(["vdm-hub @ git+https://example.org/vdm_hub@0a1b2c3"])
    {'vdm-hub': 'vdm-hub @ git+https://example.org/vdm_hub@0a1b2c3'}
    """
    found = {}
    for line in given:
        try:
            found[str(canonicalize_name(Requirement(line).name))] = line
        except InvalidRequirement as error:
            raise ConfigurationError(
                f"--requirement {shortened(line)} is none that pip knows ({str(error).splitlines()[0]}): give one "
                f"such as 'vdm-hub @ git+https://host/repository@COMMIT'."
            ) from error
    return found


def requirements(pipeline: LikelihoodPipeline, given: Sequence[str] = ()) -> dict[str, str]:
    """What a Space of a pipeline has to install, a line for each package.

    A package that pip installed from a repository is named by that address and its commit; any other by its version:
    that of a plugin is the one that the model was saved with.

    Args:
        pipeline: The model.
        given: Lines that take the place of those of the same package, or are added.

    Raises:
        ConfigurationError: One of them is no requirement.
    """
    plugins = {str(canonicalize_name(name)): version for name, version in plugin_packages(pipeline).items()}
    own = {
        BUILT_IN_PACKAGE: f"{BUILT_IN_PACKAGE}=={__version__}",
        "torch": f"torch=={torch.__version__.split('+')[0]}",
    }
    own |= {name: f"{name}>={version}" for name, version in plugins.items()}
    own |= {name: address for name in own if (address := _address(name)) is not None}
    return own | check_requirements(given)


def on_no_index(lines: dict[str, str]) -> list[str]:
    """The packages of this project among requirements that are named without an address: no index has them.

    >>> on_no_index({"vdm-hub": "vdm-hub==0.1.0", "torch": "torch==2.13.0"})
    ['vdm-hub']
    """
    ours = [name for name in lines if name == BUILT_IN_PACKAGE or name.startswith(f"{BUILT_IN_PACKAGE}-")]
    return [name for name in ours if Requirement(lines[name]).url is None]


def as_text(lines: dict[str, str]) -> str:
    """The file of some requirements."""
    missing = on_no_index(lines)
    note = f"# {', '.join(missing)}: on no index of packages. Write here where pip finds it: NAME @ git+https://...\n"
    return (note if missing else "") + "\n".join(lines.values()) + "\n"


def _address(name: str) -> str | None:
    """Where pip installed a package from, where that was a commit of a repository (PEP 610)."""
    try:
        told = json.loads(distribution(name).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    if not (vcs := told.get("vcs_info")):
        return None
    within = f"#subdirectory={told['subdirectory']}" if told.get("subdirectory") else ""
    return f"{name} @ {vcs['vcs']}+{told['url']}@{vcs['commit_id']}{within}"
