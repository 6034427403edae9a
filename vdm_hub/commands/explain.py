"""Explanations of a recipe's parts, from the docstrings of their classes."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator

import diffusers

import vdm_hub
from vdm_hub import registry
from vdm_hub.errors import unknown_name
from vdm_hub.pipelines.registration import CLASSES
from vdm_hub.recipes.configuration import FIRST_STAGE_CLASSES, UNET_CLASSES

NETWORKS = tuple(dict.fromkeys((*UNET_CLASSES, *FIRST_STAGE_CLASSES, *CLASSES)))
"""The networks that a recipe may name, and all else that is saved with a model."""


def run(arguments: argparse.Namespace) -> None:
    """Explain one name, in each of its meanings, or list all names."""
    if arguments.name is None:
        for kind, names in _known().items():
            print(f"{kind.replace('_', ' ')}: {', '.join(names)}")
        print("\n`vdm-hub explain NAME` says what one is and what it takes.")
        return
    found = list(_classes(arguments.name))
    if not found:
        raise unknown_name("name", arguments.name, {name for names in _known().values() for name in names})
    print("\n\n".join(_explanation(what, cls) for what, cls in found))


def _known() -> dict[str, list[str]]:
    kinds = {kind: [one.name for one in registry.registrations(kind)] for kind in registry.BUILT_INS}
    return {"networks, schedulers and pipelines": list(NETWORKS)} | kinds


def _classes(name: str) -> Iterator[tuple[str, type]]:
    """All classes that a name means, with words for each."""
    if name in NETWORKS:
        yield name, getattr(vdm_hub if name in CLASSES else diffusers, name)
    for kind in registry.BUILT_INS:
        for one in registry.registrations(kind):
            if one.name == name and not (name in NETWORKS and kind == "networks"):  # which are those above
                yield f"{name}, {registry.KIND_WORDS[kind]} of {one.package}", one.load()


def _explanation(what: str, cls: type) -> str:
    """The text for one class: a heading, its signature with defaults, and its docstring."""
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in _parameters(cls)]
    call = inspect.Signature(parameters)
    return f"{what}\n{'=' * len(what)}\n{cls.__qualname__}{call}\n\n{inspect.getdoc(cls) or 'It has no docstring.'}"


def _parameters(cls: type) -> list[inspect.Parameter]:
    return list(inspect.signature(cls).parameters.values())
