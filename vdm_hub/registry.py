"""Names in a config become classes here, and nowhere else.

Built-ins are a static table, so they work from an uninstalled checkout. Everything else is an entry point of an
installed distribution in the group ``vdm_hub.<kind>``. Listing imports nothing; the only code that a config can select
is the entry point whose kind, name and package match. The environment variable ``VDM_HUB_PLUGINS`` limits it further:
the distributions, separated by commas, that may be loaded; none where it is empty.

Serialised form: a built-in with default arguments is its name; with arguments it is ``{"name", "config"}``; a plugin
adds ``"package"`` and ``"version"``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

from vdm_hub.errors import (
    ConfigurationError,
    MissingPluginError,
    VDMHubError,
    in_one_line,
    shortened,
    unknown_name,
    warn,
)

Serialised = str | dict[str, Any]

BUILT_IN_PACKAGE = "vdm-hub"
ALLOWED_VARIABLE = "VDM_HUB_PLUGINS"
"""The environment variable that limits which distributions may be loaded."""

PACKAGE = __name__.rpartition(".")[0]
"""The name of this package: a copy that a repository carries has another, and finds its own classes by that."""
# Such a copy takes no plugins: theirs are derived from the classes of the package proper.
_TAKES_PLUGINS = PACKAGE == "vdm_hub"
_DIFFUSION = f"{PACKAGE}.diffusion"
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
        "flow_prediction": f"{_DIFFUSION}.parameterizations:FlowPrediction",
        "edm": f"{_DIFFUSION}.parameterizations:EDMPrediction",
        "ve_score": f"{_DIFFUSION}.parameterizations:VEScore",
    },
    "conditionings": {
        "affine": f"{_DIFFUSION}.conditioning:AffineConditioning",
        "table": f"{_DIFFUSION}.conditioning:TableConditioning",
        "flow_time": f"{_DIFFUSION}.conditioning:FlowTime",
        "edm_noise": f"{_DIFFUSION}.conditioning:EDMNoise",
        "ve_noise": f"{_DIFFUSION}.conditioning:VENoise",
    },
    "decoders": {
        "factorised": f"{_DIFFUSION}.decoders:FactorisedDecoder",
        "ddpm": f"{_DIFFUSION}.decoders:DDPMDecoder",
    },
    "forward_processes": {
        "gaussian": f"{_DIFFUSION}.gaussian_process:GaussianProcess",
    },
    "networks": {
        "UNetVDMModel": f"{PACKAGE}.models.unet_vdm:UNetVDMModel",
    },
    "likelihood_methods": {
        "bound": f"{PACKAGE}.likelihood.methods:VariationalBound",
        "ode": f"{PACKAGE}.likelihood.methods:ProbabilityFlow",
        "importance_weighted": f"{PACKAGE}.likelihood.methods:ImportanceWeighted",
    },
    "commands": {},
}

RESERVED = {
    "commands": ("train", "recipes", "explain", "evaluate", "classify", "sample", "publish", "space", "plugins")
}
"""Names that are taken, though no class is registered under them: the commands of ``vdm-hub`` itself."""

_BASES = {
    "noise_schedules": f"{_DIFFUSION}.noise_schedules:NoiseSchedule",
    "parameterizations": f"{_DIFFUSION}.parameterizations:Parameterization",
    "conditionings": f"{_DIFFUSION}.conditioning:Conditioning",
    "decoders": f"{_DIFFUSION}.decoders:Decoder",
    "forward_processes": f"{_DIFFUSION}.forward_process:ForwardProcess",
    "networks": "diffusers.models.modeling_utils:ModelMixin",
    "likelihood_methods": f"{PACKAGE}.likelihood.methods:LikelihoodMethod",
    "commands": f"{PACKAGE}.commands.command:Command",
}

SERIALISED_FIELDS = {
    "noise_schedule": "noise_schedules",
    "prediction_type": "parameterizations",
    "conditioning": "conditionings",
    "decoder": "decoders",
    "forward_process": "forward_processes",
}
"""The fields of a config that hold a serialised form, and the kind of each."""

CARRIED_PROCESS = "_vdm"
"""The field of a stock scheduler's config that holds a `VDMScheduler`'s, where the two have fields in common.

It is a private one, which diffusers keeps and does not warn of.
"""

KIND_WORDS = {kind: (kind[:-2] if kind.endswith("sses") else kind[:-1]).replace("_", " ") for kind in BUILT_INS}
_NAME = re.compile(r"\w([\w.+-]*\w)?", re.ASCII)
_DISTRIBUTION_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")


class OlderPluginWarning(UserWarning):
    """The warning for a config that was saved with a newer version of a plugin than the installed one."""


@dataclass(frozen=True)
class Registration:
    """One name of one kind: where its class is, and who brings it. Holding one imports nothing."""

    kind: str
    name: str
    target: str
    package: str = BUILT_IN_PACKAGE
    version: str | None = None

    def load(self) -> type:
        """Import the class.

        Raises:
            MissingPluginError: Its module fails at import; that error is shown, and is the cause.
            ConfigurationError: ``VDM_HUB_PLUGINS`` does not allow its package, or it is no class of its kind.
        """
        if not self.is_allowed:
            raise _not_allowed(self.kind, self.name, [self])
        whose = f"the {KIND_WORDS[self.kind]} {self.name!r} of the package {self.package!r}"
        try:
            loaded = metadata.EntryPoint(self.name, self.target, f"vdm_hub.{self.kind}").load()
        except (Exception, SystemExit) as error:
            raise MissingPluginError(
                f"{whose} could not be imported from {self.target}: {type(error).__name__}: {in_one_line(error)}. "
                f"Mend or reinstall that package."
            ) from error
        module, _, name = _BASES[self.kind].partition(":")
        if not isinstance(loaded, type) or not issubclass(loaded, base_class(self.kind)):
            what = f"the class {loaded.__qualname__}" if isinstance(loaded, type) else f"a {type(loaded).__name__}"
            raise ConfigurationError(
                f"{whose} is {what} at {self.target}, which is not derived from {module}.{name}: derive it from that "
                f"class, or mend the entry point."
            )
        return loaded

    @property
    def is_allowed(self) -> bool:
        """Whether ``VDM_HUB_PLUGINS`` lets it be loaded; built-ins always may."""
        if self.package == BUILT_IN_PACKAGE:
            return True
        allowed = allowed_packages()
        return allowed is None or canonicalize_name(self.package) in allowed


def base_class(kind: str) -> type:
    """The class that all of a kind are derived from, imported.

    >>> base_class("decoders").__name__
    'Decoder'
    """
    module, _, name = _BASES[kind].partition(":")
    base: type = getattr(importlib.import_module(module), name)
    return base


def allowed_packages() -> set[str] | None:
    """The normalised names that ``VDM_HUB_PLUGINS`` holds; ``None`` where it is not set, and all are allowed.

    Raises:
        ConfigurationError: It holds what is no name of a distribution.
    """
    value = os.environ.get(ALLOWED_VARIABLE)
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if not _DISTRIBUTION_NAME.fullmatch(name):
            raise ConfigurationError(
                f"{ALLOWED_VARIABLE} holds {name!r}, no name of a distribution: give names separated by commas, "
                f"nothing to load no plugin, or unset it to load any that is installed."
            )
    return {canonicalize_name(name) for name in names}


def registrations(kind: str) -> list[Registration]:
    """All registrations of a kind, built-ins first; imports none of them.

    >>> [r.name for r in registrations("parameterizations")][:4]
    ['epsilon', 'sample', 'score', 'v_prediction']
    """
    if kind not in BUILT_INS:
        raise unknown_name("kind of plugin", kind, BUILT_INS)
    built_in = [Registration(kind, name, target) for name, target in BUILT_INS[kind].items()]
    return built_in + list(_installed(kind, _searched()) if _TAKES_PLUGINS else ())


def _searched() -> tuple[object, ...]:
    """Where packages are looked for, and when each place last changed: as importlib decides whether to look anew."""
    return (*map(id, sys.meta_path), *((place, _changed(Path(place))) for place in sys.path))


def _changed(place: Path) -> tuple[Path, int] | None:
    with suppress(OSError, ValueError):
        return place.absolute(), place.stat().st_mtime_ns
    return None


@functools.lru_cache(maxsize=2 * len(BUILT_INS))
def _installed(kind: str, searched: tuple[object, ...]) -> tuple[Registration, ...]:
    """What installed distributions bring of a kind; a run asks fifty times, and each look takes milliseconds."""
    found: dict[tuple[str, str], Registration] = {}
    for point in metadata.entry_points(group=f"vdm_hub.{kind}"):
        about = point.dist.metadata if point.dist else None
        # Damaged metadata may lack both.
        package, version = (about["Name"] or "unknown", about["Version"]) if about else ("unknown", None)
        found.setdefault(
            (point.name, canonicalize_name(package)), Registration(kind, point.name, point.value, package, version)
        )
    return tuple(found.values())


def lookup(kind: str, name: str, package: str | None = None) -> Registration:
    """The one registration that ``name`` means.

    Args:
        kind: A key of `BUILT_INS`.
        name: The name in the config.
        package: The distribution that the config says brings it; ``None`` where it does not say.

    Raises:
        MissingPluginError: The config names a package that is not installed, or does not bring this name.
        ConfigurationError: The name is unknown or no name, two packages bring it and ``package`` does not decide, or
            ``VDM_HUB_PLUGINS`` does not allow the one that does.
    """
    known = registrations(kind)
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is no valid name of a {KIND_WORDS[kind]}: names hold letters, digits, '_', '-', '.' and '+'. "
            f"Known: {', '.join(sorted(r.name for r in known))}."
        )
    if name in BUILT_INS[kind]:
        if package is not None and canonicalize_name(package) != BUILT_IN_PACKAGE:
            raise ConfigurationError(
                f"{name!r} is a built-in {KIND_WORDS[kind]}, whose name the package {package!r} can't take: leave "
                f"the package out, or rename the plugin's entry point."
            )
        return next(r for r in known if r.name == name)
    matching = [r for r in known if r.name == name and r.package != BUILT_IN_PACKAGE]
    if package is not None:
        matching = [r for r in matching if canonicalize_name(r.package) == canonicalize_name(package)]
        if not matching:
            raise _missing(kind, name, package, known)
    if not matching:
        raise unknown_name(KIND_WORDS[kind], name, {r.name for r in known})
    allowed = [r for r in matching if r.is_allowed]
    if not allowed:
        raise _not_allowed(kind, name, matching)
    if len(allowed) > 1:
        matching = allowed
        owners = " and ".join(repr(r.package) for r in matching)
        in_recipe = " (in a recipe's unet, _package beside _class_name)" if kind == "networks" else ""
        raise ConfigurationError(
            f"the {KIND_WORDS[kind]} {name!r} is brought by {owners}: say which with "
            f'{{"name": "{name}", "package": "{matching[0].package}"}}{in_recipe}, or uninstall one.'
        )
    return allowed[0]


def parse_serialised(kind: str, serialised: Serialised) -> tuple[str, dict[str, Any], str | None]:
    """The name, the arguments and the package of a serialised form, checked."""
    return _parts(kind, serialised)[:3]


def with_package(kind: str, serialised: Serialised) -> Serialised:
    """The form as a published config holds it: that of a plugin says which package brings it, and the version here.

    >>> with_package("noise_schedules", "linear")
    'linear'
    """
    found, arguments = _find(kind, serialised)
    if found.package == BUILT_IN_PACKAGE:
        return serialised
    return {"name": found.name, "config": arguments, "package": found.package, "version": found.version}


def packages(fields: Mapping[str, Any]) -> dict[str, str]:
    """The plugin packages that the serialised forms of a config, or the fields of a recipe, name, with their versions.

    >>> packages({"noise_schedule": {"name": "steep", "package": "vdm-hub-steep", "version": "1.2"}})
    {'vdm-hub-steep': '1.2'}
    """
    forms = [_mapping_of(fields.get(field)) for field in (*SERIALISED_FIELDS, "network", "unet")]
    forms += [_mapping_of(form.get("forward_process")) for form in forms]  # all fields of a process
    named = [(form.get("package") or form.get("_package"), form.get("version") or "0") for form in forms]
    return {str(package): str(version) for package, version in named if package}


def _mapping_of(form: Any) -> Mapping[str, Any]:
    """A form as a mapping, also from a recipe's text; empty where it is a name alone."""
    if isinstance(form, str) and form.startswith("{"):
        form = json.loads(form)
    return form if isinstance(form, Mapping) else {}


def resolve_class(kind: str, serialised: Serialised) -> tuple[type, dict[str, Any]]:
    """The class that a serialised form means, and the arguments it gives, unchecked.

    Warns:
        OlderPluginWarning: The installed plugin is older than the one that the form was saved with.
    """
    found, arguments = _find(kind, serialised)
    return found.load(), arguments


def resolve(kind: str, serialised: Serialised) -> tuple[type, dict[str, Any]]:
    """The result of `resolve_class`, its arguments checked against the constructor.

    >>> resolve("noise_schedules", "linear")
    (<class 'vdm_hub.diffusion.noise_schedules.LinearSchedule'>, {})
    """
    cls, arguments = resolve_class(kind, serialised)
    parameters = inspect.signature(cls).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for key in arguments:
        if key not in accepted and not takes_any:
            raise unknown_name(
                f"argument of the {KIND_WORDS[kind]} {parse_serialised(kind, serialised)[0]!r}", key, accepted
            )
    return cls, arguments


def build(kind: str, serialised: Serialised, **defaults: Any) -> Any:
    """An instance from its serialised form; ``defaults`` stand for arguments that the form leaves out.

    >>> build("noise_schedules", {"name": "linear", "config": {"gamma_max": 6.0}}).to_config()
    {'gamma_min': -13.3, 'gamma_max': 6.0}
    """
    cls, arguments = resolve(kind, serialised)
    accepted = inspect.signature(cls).parameters
    arguments = {key: value for key, value in defaults.items() if key in accepted} | arguments
    with building(kind, serialised, accepted):
        return cls(**arguments)


@contextmanager
def building(kind: str, serialised: Serialised, accepted: Iterable[str]) -> Iterator[None]:
    """Say of an error within what could not be built: a plugin's constructor may raise anything."""
    try:
        yield
    except VDMHubError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the {KIND_WORDS[kind]} {shortened(serialised)} can't be built: {in_one_line(error)}. Its arguments "
            f"are {', '.join(accepted) or 'none'}."
        ) from error


def serialise(kind: str, instance: Any, complete: bool = False) -> Serialised:
    """The serialised form of an instance whose ``to_config()`` gives its arguments.

    ``complete`` writes those that equal their defaults too, where a name alone would mean something else.

    >>> from vdm_hub.diffusion.noise_schedules import LinearSchedule
    >>> serialise("noise_schedules", LinearSchedule()), serialise("noise_schedules", LinearSchedule(-8.0))
    ('linear', {'name': 'linear', 'config': {'gamma_min': -8.0}})
    """
    target = f"{type(instance).__module__}:{type(instance).__qualname__}"
    registration = registration_of(kind, type(instance))
    if registration is None:
        known = ", ".join(sorted(r.name for r in registrations(kind)))
        raise ConfigurationError(
            f"{target} is not registered as a {KIND_WORDS[kind]}, so no config can name it. Declare it as an entry "
            f"point in the group 'vdm_hub.{kind}' of an installed package. Registered: {known}."
        )
    config = _json_object(f"{KIND_WORDS[kind]} {registration.name!r}", _config_of(instance))
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


def _config_of(instance: Any) -> Any:
    """The constructor's arguments: as ``to_config`` gives them, or as diffusers keeps a model's."""
    if hasattr(instance, "to_config"):
        return instance.to_config()
    return {name: value for name, value in instance.config.items() if not name.startswith("_")}


def registration_of(kind: str, cls: type) -> Registration | None:
    """The registration whose class this is; ``None`` where there is none. Imports nothing."""
    # A plugin's entry point under the name of a built-in leads to the built-in.
    known = [r for r in registrations(kind) if r.package == BUILT_IN_PACKAGE or r.name not in BUILT_INS[kind]]
    target = f"{cls.__module__}:{cls.__qualname__}"
    named = [r for r in known if r.target.partition("[")[0].strip() == target]
    # An entry point may name what its module has imported from another; that module is loaded if the class is.
    return next(iter(named + [r for r in known if _is_already(r, cls)]), None)


def _is_already(registration: Registration, cls: type) -> bool:
    module, _, path = registration.target.partition("[")[0].strip().partition(":")
    found: Any = sys.modules.get(module)
    for attribute in path.split("."):
        found = getattr(found, attribute, None)
    return found is cls


def _parts(kind: str, serialised: Serialised) -> tuple[str, dict[str, Any], str | None, str | None]:
    """The name, arguments, package and version of a serialised form, checked."""
    word = KIND_WORDS.get(kind, kind)
    if isinstance(serialised, str):
        text = serialised.strip()
        if not text.startswith("{"):
            return serialised, {}, None, None
        try:
            serialised = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"the {word} {shortened(text)} is neither a name nor a JSON object: {in_one_line(error)[:200]}."
            ) from error
    if not isinstance(serialised, Mapping) or not isinstance(serialised.get("name"), str):
        raise ConfigurationError(
            f'a {word} is a name, or an object like {{"name": "...", "config": {{...}}}}; this is '
            f"{shortened(serialised)}."
        )
    for key in serialised:
        if key not in ("name", "config", "package", "version"):
            raise unknown_name(f"field of a {word}", key, ("name", "config", "package", "version"))
    whose = f"the {word} {serialised['name']!r}"
    arguments, package = serialised.get("config"), serialised.get("package")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ConfigurationError(
            f"the 'config' of {whose} is {shortened(arguments)}: give an object of arguments, or leave it out."
        )
    if package is not None and (not isinstance(package, str) or not _DISTRIBUTION_NAME.fullmatch(package)):
        raise ConfigurationError(
            f"{whose} names the package {shortened(package)}: no valid name. Give that of the distribution on PyPI, "
            f"letters, digits, '-', '_' and '.', or leave it out."
        )
    version = serialised.get("version")
    if version is not None and not isinstance(version, str):
        raise ConfigurationError(
            f'{whose} has the version {shortened(version)}: give a string such as "1.0", or leave it out.'
        )
    return serialised["name"], dict(arguments or {}), package, version


def _find(kind: str, serialised: Serialised) -> tuple[Registration, dict[str, Any]]:
    """The registration and the arguments of a serialised form, with a warning where the installed one is older."""
    name, arguments, package, saved = _parts(kind, serialised)
    found = lookup(kind, name, package)
    if saved and found.version and is_older(found.version, saved):
        warn(
            f"the {KIND_WORDS[kind]} {name!r} was saved with {found.package} {saved}, and {found.version} is "
            f"installed, which may give other results: upgrade {found.package}.",
            OlderPluginWarning,
            stacklevel=3,
        )
    return found, arguments


def _json_object(whose: str, config: Any) -> dict[str, Any]:
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ConfigurationError(
            f"to_config() of the {whose} gives {shortened(config)}: it must give a dict of the constructor's "
            f"arguments by name."
        )
    try:
        read: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"to_config() of the {whose} is not JSON: {error}. Give numbers, strings, lists and dicts, such as "
            f"tensor.tolist()."
        ) from error
    return read


def is_older(version: str, than: str) -> bool:
    """Whether one version comes before another; what is no version (PEP 440) is neither older nor newer.

    >>> is_older("1.9", "1.10"), is_older("1.0rc1", "1.0"), is_older("1.0.post1", "1.0"), is_older("1.0", "newest")
    (True, True, False, False)
    """
    try:
        return Version(version) < Version(than)
    except ValueError:  # InvalidVersion is one, and so is a number of more digits than Python reads
        return False


def _not_allowed(kind: str, name: str, found: list[Registration]) -> ConfigurationError:
    owners = " and ".join(sorted(repr(r.package) for r in found))
    return ConfigurationError(
        f"the {KIND_WORDS[kind]} {name!r} is brought by {owners}, which {ALLOWED_VARIABLE}="
        f"{os.environ.get(ALLOWED_VARIABLE, '')!r} does not allow: add it there, separated by a comma, or unset it."
    )


def _missing(kind: str, name: str, package: str, known: list[Registration]) -> MissingPluginError:
    if not _TAKES_PLUGINS:
        return MissingPluginError(
            f"the {KIND_WORDS[kind]} {name!r} needs the plugin package {package!r} (as the file claims; unverified), "
            f"and code that a repository carries takes no plugins. If you trust it, install vdm_hub "
            f"and that package, from where its author offers it (such as by `pip install {package}`), and load "
            f"with vdm_hub, without trust_remote_code."
        )
    plugins = sorted({r.package for r in known if r.package != BUILT_IN_PACKAGE}) or ["none"]
    return MissingPluginError(
        f"the {KIND_WORDS[kind]} {name!r} needs the plugin package {package!r} (as the file claims; unverified), "
        f"which {_state_of(package)}. If you trust it, install it from where its author offers it, such as by "
        f"`pip install {package}`. Installed plugins: "
        f"{', '.join(plugins)}. {unknown_name(KIND_WORDS[kind], name, {r.name for r in known})}"
    )


def _state_of(package: str) -> str:
    try:
        return f"is installed in version {metadata.version(package)}, which does not bring it (an upgrade may)"
    except metadata.PackageNotFoundError:
        return "is not installed"
