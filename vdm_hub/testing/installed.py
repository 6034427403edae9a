"""The kit, applied to what is installed: an instance of each registered class, under the laws of its kind."""

from __future__ import annotations

import inspect
from typing import Any

from vdm_hub import registry
from vdm_hub.errors import ConfigurationError
from vdm_hub.registry import Registration
from vdm_hub.testing.checks import LAWS

_BUILT_IN_EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("noise_schedules", "tabulated"): {"gammas": [-13.3, -9.0, -7.5, -3.0, -2.5, 1.0, 5.0]},
    ("noise_schedules", "discrete_betas"): {"betas": [1e-4 + 0.0199 * i / 999 for i in range(1000)]},
    ("conditionings", "table"): {"gammas": [-13.3, -9.0, -7.5, -3.0, -2.5, 1.0, 5.0]},
    ("networks", "UNetVDMModel"): {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4},
    ("likelihood_methods", "importance_weighted"): {"transitions": 3, "draws": 2},
}
_OF_THE_DATA = {"sample_size": 8, "in_channels": 1, "out_channels": 1}


def problem(registration: Registration) -> str | None:
    """Why nothing can be loaded by a name, in a few words; ``None`` where it can. Imports nothing.

    >>> problem(registry.lookup("noise_schedules", "linear")) is None
    True
    """
    kind, name = registration.kind, registration.name
    if registration.package == registry.BUILT_IN_PACKAGE:
        return None
    if name in registry.BUILT_INS[kind] or name in registry.RESERVED.get(kind, ()):
        return "unusable: the name of a built-in"
    if not registration.is_allowed:
        return f"not allowed by {registry.ALLOWED_VARIABLE}"
    try:
        registry.lookup(kind, name, registration.package)
    except ConfigurationError:
        return "unusable: no valid name"
    return None


def rivals(registration: Registration) -> list[str]:
    """Other packages that bring the same name, so that a config must say which. Imports nothing.

    >>> rivals(registry.lookup("noise_schedules", "linear"))
    []
    """
    if registration.package == registry.BUILT_IN_PACKAGE:
        return []
    same = [one for one in registry.registrations(registration.kind) if one.name == registration.name]
    return sorted(one.package for one in same if one.is_allowed and one != registration)


def example_config(registration: Registration) -> dict[str, Any]:
    """The arguments of an instance to check: what the class itself says by ``example_config``, else its defaults.

    A class whose constructor has required arguments gives them by a classmethod ``example_config``, such that the
    instance takes data of shape (B, 1, 8, 8). A network is built for such data where it gives none.
    """
    given = getattr(registration.load(), "example_config", None)
    if given is not None:
        return dict(given())
    config = dict(_BUILT_IN_EXAMPLES.get((registration.kind, registration.name), {}))
    if registration.kind == "networks":
        takes = inspect.signature(registration.load()).parameters
        config |= {name: value for name, value in _OF_THE_DATA.items() if name in takes}
    return config


def example(registration: Registration) -> Any:
    """An instance to check.

    >>> from vdm_hub.registry import lookup
    >>> example(lookup("noise_schedules", "linear")).to_config()
    {'gamma_min': -13.3, 'gamma_max': 5.0}
    """
    cls, config = registration.load(), example_config(registration)
    if registration.kind != "forward_processes":
        return cls(**config)
    form: dict[str, Any] = {"name": registration.name, "config": config, "package": registration.package}
    fields = {
        "forward_process": form,
        "num_levels": getattr(cls, "example_num_levels", 256),
        "num_train_timesteps": 1000,
    }
    return cls.from_fields(fields)  # type: ignore[attr-defined]


def check_registered(registration: Registration) -> None:
    """Import what is registered under a name, build an instance, and put it under the laws of its kind.

    Raises:
        VDMHubError: It can't be imported, is of the wrong class, or its package is not allowed.
        LawViolation: It breaks a law.
        Exception: Whatever its constructor raises.

    >>> from vdm_hub.registry import lookup
    >>> check_registered(lookup("parameterizations", "epsilon"))
    """
    LAWS[registration.kind].check(example(registration))
