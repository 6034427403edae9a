"""Captions made from the names of classes by a template."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from vdm_hub.errors import ConfigurationError, shortened


def captions_of_classes(template: str, names: Sequence[str]) -> tuple[str, ...]:
    """The caption of each class.

    Raises:
        ConfigurationError: As `check_template`.

    >>> captions_of_classes("a photo of a {label}", ["shirt", "bag"])
    ('a photo of a shirt', 'a photo of a bag')
    """
    check_template(template)
    return tuple(template.replace("{label}", name) for name in names)


def check_template(template: str) -> None:
    """Refuse a template that says nothing of a class, or asks for more than its name.

    Raises:
        ConfigurationError: It has no ``{label}``, or another field.
    """
    try:
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError:
        fields = set()
    if fields != {"label"} or "{" in template.replace("{label}", ""):
        raise ConfigurationError(
            f"caption_template is {shortened(template)}: write {{label}} where the name of the class is to stand, "
            f"and no other braces, such as 'a photo of a {{label}}'."
        )
