"""Names in a config become classes here, and nowhere else.

Built-ins are a static table, so they work from an uninstalled checkout. Everything else is an entry point of an
installed distribution in the group ``vdm_hub.<kind>``. Listing imports nothing; the only code that a config can select
is the entry point whose kind, name and package match.

Serialised form: a built-in with default arguments is its name; with arguments it is ``{"name", "config"}``; a plugin
adds ``"package"`` and ``"version"``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from vdm_hub.errors import ConfigurationError, MissingPluginError, unknown_name

Serialised = str | dict[str, Any]

BUILT_IN_PACKAGE = "vdm-hub"

# A copy of this package under another name, as a repository may carry it, finds its own classes. It takes no plugins:
# theirs are derived from the classes of the package proper.
_PACKAGE = __name__.rpartition(".")[0]
_TAKES_PLUGINS = _PACKAGE == "vdm_hub"
_DIFFUSION = f"{_PACKAGE}.diffusion"
BUILT_INS: dict[str, dict[str, str]] = {
    "noise_schedules": {
        "linear": f"{_DIFFUSION}.noise_schedules:LinearSchedule",
        "cosine": f"{_DIFFUSION}.noise_schedules:CosineSchedule",
        "tabulated": f"{_DIFFUSION}.noise_schedules:TabulatedSchedule",
        "discrete_betas": f"{_DIFFUSION}.noise_schedules:DiscreteBetasSchedule",
        "learned_linear": f"{_DIFFUSION}.learned_schedules:LearnedLinearSchedule",
        "learned_monotone": f"{_DIFFUSION}.learned_schedules:LearnedMonotoneSchedule",
    },
    "parameterizations": {
        "epsilon": f"{_DIFFUSION}.parameterizations:Epsilon",
        "sample": f"{_DIFFUSION}.parameterizations:Sample",
        "score": f"{_DIFFUSION}.parameterizations:Score",
        "v_prediction": f"{_DIFFUSION}.parameterizations:Velocity",
    },
    "conditionings": {
        "affine": f"{_DIFFUSION}.conditioning:AffineConditioning",
        "table": f"{_DIFFUSION}.conditioning:TableConditioning",
    },
    "decoders": {
        "factorised": f"{_DIFFUSION}.decoders:FactorisedDecoder",
        "ddpm": f"{_DIFFUSION}.decoders:DDPMDecoder",
    },
    "forward_processes": {
        "gaussian": f"{_DIFFUSION}.gaussian_process:GaussianProcess",
    },
}

SERIALISED_FIELDS = {
    "noise_schedule": "noise_schedules",
    "prediction_type": "parameterizations",
    "conditioning": "conditionings",
    "decoder": "decoders",
    "forward_process": "forward_processes",
}
"""Fields of a config that hold a serialised form, and the kind of it."""

_KIND_WORDS = {kind: (kind[:-2] if kind.endswith("sses") else kind[:-1]).replace("_", " ") for kind in BUILT_INS}
_DISTRIBUTION_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Registration:
    """One name of one kind: where its class is, and who brings it. Holding one imports nothing."""

    kind: str
    name: str
    target: str
    package: str = BUILT_IN_PACKAGE
    version: str | None = None

    def load(self) -> type:
        """Import the class."""
        module, _, attribute = self.target.partition(":")
        try:
            loaded: type = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise MissingPluginError(
                f"the {_KIND_WORDS[self.kind]} {self.name!r} of the package {self.package!r} could not be imported "
                f"from {self.target}: {type(error).__name__}: {error}. Mend or reinstall that package."
            ) from error
        return loaded


def registrations(kind: str) -> list[Registration]:
    """All names of a kind, built-ins first; imports none of them.

    >>> [r.name for r in registrations("parameterizations")][:4]
    ['epsilon', 'sample', 'score', 'v_prediction']
    """
    if kind not in BUILT_INS:
        raise unknown_name("kind of plugin", kind, BUILT_INS)
    built_in = [Registration(kind, name, target) for name, target in BUILT_INS[kind].items()]
    found: dict[tuple[str, str], Registration] = {}
    for point in metadata.entry_points(group=f"vdm_hub.{kind}") if _TAKES_PLUGINS else ():
        package, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", None)
        found.setdefault((point.name, _normal(package)), Registration(kind, point.name, point.value, package, version))
    return built_in + list(found.values())


def lookup(kind: str, name: str, package: str | None = None) -> Registration:
    """The one registration that ``name`` means.

    Args:
        kind: A key of `BUILT_INS`.
        name: The name in the config.
        package: The distribution that the config says brings it; ``None`` where it does not say.

    Raises:
        MissingPluginError: The config names a package that is not installed, or does not bring this name.
        ConfigurationError: The name is unknown, or two packages bring it and ``package`` does not decide.
    """
    known = registrations(kind)
    if name in BUILT_INS[kind]:
        if package is not None and _normal(package) != BUILT_IN_PACKAGE:
            raise ConfigurationError(
                f"{name!r} is a built-in {_KIND_WORDS[kind]}, whose name the package {package!r} can't take: leave "
                f"the package out, or rename the plugin's entry point."
            )
        return next(r for r in known if r.name == name)
    matching = [r for r in known if r.name == name and r.package != BUILT_IN_PACKAGE]
    if package is not None:
        matching = [r for r in matching if _normal(r.package) == _normal(package)]
        if not matching:
            raise _missing(kind, name, package, known)
    if not matching:
        raise unknown_name(_KIND_WORDS[kind], name, {r.name for r in known})
    if len(matching) > 1:
        owners = " and ".join(repr(r.package) for r in matching)
        raise ConfigurationError(
            f"the {_KIND_WORDS[kind]} {name!r} is brought by {owners}: say which with "
            f'{{"name": "{name}", "package": "{matching[0].package}"}}, or uninstall one.'
        )
    return matching[0]


def parse(kind: str, serialised: Serialised) -> tuple[str, dict[str, Any], str | None]:
    """``(name, arguments, package)`` of a serialised form, checked."""
    word = _KIND_WORDS.get(kind, kind)
    if isinstance(serialised, str):
        text = serialised.strip()
        if not text.startswith("{"):
            return serialised, {}, None
        try:
            serialised = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"the {word} {text!r} is neither a name nor a JSON object: {error}.") from error
    if not isinstance(serialised, Mapping) or not isinstance(serialised.get("name"), str):
        raise ConfigurationError(
            f'a {word} is a name, or an object like {{"name": "...", "config": {{...}}}}; this is {serialised!r}.'
        )
    for key in serialised:
        if key not in ("name", "config", "package", "version"):
            raise unknown_name(f"field of a {word}", key, ("name", "config", "package", "version"))
    arguments, package = serialised.get("config") or {}, serialised.get("package")
    if not isinstance(arguments, Mapping):
        raise ConfigurationError(f"the 'config' of the {word} {serialised['name']!r} is {arguments!r}, not an object.")
    if package is not None and (not isinstance(package, str) or not _DISTRIBUTION_NAME.fullmatch(package)):
        raise ConfigurationError(f"the {word} {serialised['name']!r} names the package {package!r}: no valid name.")
    return serialised["name"], dict(arguments), package


def with_package(kind: str, serialised: Serialised) -> Serialised:
    """The form as a published config holds it: that of a plugin says which package brings it, and the version here.

    >>> with_package("noise_schedules", "linear")
    'linear'
    """
    name, arguments, package = parse(kind, serialised)
    found = lookup(kind, name, package)
    if found.package == BUILT_IN_PACKAGE:
        return serialised
    return {"name": name, "config": arguments, "package": found.package, "version": found.version}


def packages(fields: Mapping[str, Any]) -> dict[str, str]:
    """The plugin packages that the serialised forms of a config name, with their versions.

    >>> packages({"noise_schedule": {"name": "steep", "package": "vdm-hub-steep", "version": "1.2"}})
    {'vdm-hub-steep': '1.2'}
    """
    forms = [fields.get(field) for field in SERIALISED_FIELDS]
    return {
        str(form["package"]): str(form.get("version") or "0")
        for form in forms
        if isinstance(form, Mapping) and form.get("package")
    }


def resolve_class(kind: str, serialised: Serialised) -> tuple[type, dict[str, Any]]:
    """The class that a serialised form means, and the arguments it gives, unchecked."""
    name, arguments, package = parse(kind, serialised)
    return lookup(kind, name, package).load(), arguments


def resolve(kind: str, serialised: Serialised) -> tuple[type, dict[str, Any]]:
    """`resolve_class`, with the arguments checked against the constructor.

    >>> resolve("noise_schedules", "linear")
    (<class 'vdm_hub.diffusion.noise_schedules.LinearSchedule'>, {})
    """
    cls, arguments = resolve_class(kind, serialised)
    accepted = list(inspect.signature(cls).parameters)
    for key in arguments:
        if key not in accepted:
            raise unknown_name(f"argument of the {_KIND_WORDS[kind]} {parse(kind, serialised)[0]!r}", key, accepted)
    return cls, arguments


def build(kind: str, serialised: Serialised, **defaults: Any) -> Any:
    """An instance from its serialised form; ``defaults`` stand for arguments that the form leaves out.

    >>> build("noise_schedules", {"name": "linear", "config": {"gamma_max": 6.0}}).to_config()
    {'gamma_min': -13.3, 'gamma_max': 6.0}
    """
    cls, arguments = resolve(kind, serialised)
    accepted = inspect.signature(cls).parameters
    arguments = {key: value for key, value in defaults.items() if key in accepted} | arguments
    try:
        return cls(**arguments)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the {_KIND_WORDS[kind]} {serialised!r} can't be built: {error}. Its arguments are "
            f"{', '.join(accepted) or 'none'}."
        ) from error


def serialise(kind: str, instance: Any, complete: bool = False) -> Serialised:
    """The serialised form of an instance whose ``to_config()`` gives its arguments.

    ``complete`` writes those that equal their defaults too, where a name alone would mean something else.

    >>> from vdm_hub.diffusion.noise_schedules import LinearSchedule
    >>> serialise("noise_schedules", LinearSchedule()), serialise("noise_schedules", LinearSchedule(-8.0))
    ('linear', {'name': 'linear', 'config': {'gamma_min': -8.0}})
    """
    target = f"{type(instance).__module__}:{type(instance).__qualname__}"
    registration = next((r for r in registrations(kind) if r.target == target), None)
    if registration is None:
        known = ", ".join(sorted(r.name for r in registrations(kind)))
        raise ConfigurationError(
            f"{target} is not registered as a {_KIND_WORDS[kind]}, so no config can name it. Declare it as an entry "
            f"point in the group 'vdm_hub.{kind}' of an installed package. Registered: {known}."
        )
    config = instance.to_config()
    try:
        config = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"to_config() of the {_KIND_WORDS[kind]} {registration.name!r}: {error}.") from error
    parameters = inspect.signature(type(instance)).parameters
    arguments = {k: v for k, v in config.items() if complete or k not in parameters or parameters[k].default != v}
    if registration.package != BUILT_IN_PACKAGE:
        return {
            "name": registration.name,
            "config": arguments,
            "package": registration.package,
            "version": registration.version,
        }
    return {"name": registration.name, "config": arguments} if arguments else registration.name


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _missing(kind: str, name: str, package: str, known: list[Registration]) -> MissingPluginError:
    if not _TAKES_PLUGINS:
        return MissingPluginError(
            f"the {_KIND_WORDS[kind]} {name!r} needs the plugin package {package!r} (as the file claims; unverified), "
            f"and code that a repository carries takes no plugins. If you trust it: pip install {BUILT_IN_PACKAGE} "
            f"{package}, and load with vdm_hub, without trust_remote_code."
        )
    plugins = sorted({r.package for r in known if r.package != BUILT_IN_PACKAGE}) or ["none"]
    return MissingPluginError(
        f"the {_KIND_WORDS[kind]} {name!r} needs the plugin package {package!r} (as the file claims; unverified), "
        f"which is not installed or does not bring it. If you trust it: pip install {package}. Installed plugins: "
        f"{', '.join(plugins)}. {unknown_name(_KIND_WORDS[kind], name, {r.name for r in known})}"
    )
