"""The version, on its own, so that it can be read without importing anything; and how versions compare."""

import re

__version__ = "0.1.0"

# The package is on no index, so nothing promises that pip finds it by its name.
HOW_TO_INSTALL = "`pip install .` in a clone of its source, or `pip install` of its wheel"

# PEP 440: the release, then a phase before it (dev, a, b, rc) or after it (post).
_VERSION = re.compile(
    r"v?(\d{1,9}(?:\.\d{1,9})*)[._-]?(a|b|rc|dev|post|)[._-]?(\d{0,9})(?:[._+-].*)?", re.ASCII | re.IGNORECASE
)
_PHASES = ("dev", "a", "b", "rc", "", "post")


def is_older(version: str, than: str) -> bool:
    """Whether one version comes before another by PEP 440, epochs and local parts aside.

    What is no such version is neither older nor newer. The registry stands on the standard library, hence no
    `packaging` here.

    >>> is_older("1.9", "1.10"), is_older("1.0rc1", "1.0"), is_older("1.0.post1", "1.0"), is_older("1.0", "newest")
    (True, True, False, False)
    """
    found = [_VERSION.fullmatch(text) for text in (version, than)]
    if None in found:
        return False
    first, second = (
        (_release(match[1]), _PHASES.index(match[2].lower()), int(match[3] or 0)) for match in found if match
    )
    return first < second


def _release(text: str) -> list[int]:
    parts = [int(part) for part in text.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts
