"""Messages are asserted by what they name: a value, a field, an option; not by their sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest


def naming(*parts: object) -> str:
    """A pattern for ``match=``: each of these stands in the message, as a word, wherever and in whatever order."""
    return "(?s)" + "".join(f"(?=.*{_word(str(part))})" for part in parts)


def paragraph(error: Any, call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message with which a call is refused: one paragraph, of no more than anyone reads."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) <= 1000
    return message


def _word(part: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", part) else ""
    after = r"(?!\w)" if re.search(r"\w$", part) else ""
    return f"{before}{re.escape(part)}{after}"
