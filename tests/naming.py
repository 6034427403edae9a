"""Messages are asserted by what they name: a value, a field, an option; not by their sentence."""

from __future__ import annotations

import re


def naming(*parts: object) -> str:
    """A pattern for ``match=``: each of these stands in the message, as a word, wherever and in whatever order."""
    return "(?s)" + "".join(f"(?=.*{_word(str(part))})" for part in parts)


def _word(part: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", part) else ""
    after = r"(?!\w)" if re.search(r"\w$", part) else ""
    return f"{before}{re.escape(part)}{after}"
