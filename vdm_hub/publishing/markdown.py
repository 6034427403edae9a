"""Markdown around text of anyone's, which is shown as it is: escaped by default, whatever the template forgets.

A page is a Jinja template. Each ``{{ value }}`` in it is escaped as running text; what is to be Markdown is said to be
by `markdown` or `block`, or by one of the filters ``code``, ``python`` and ``words``.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterable
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from vdm_hub.errors import in_words, shown_character


def visible(value: Any) -> str:
    r"""A value's text on one line, of at most 1,000 characters, in which nothing is hidden.

    >>> visible("a\nb\u202ec")
    'a b\\u202ec'
    """
    return in_words(str(value))


def plain(value: Any) -> Markup:
    r"""Running text that Markdown and browsers show as it is: no markup, no HTML, and no address becomes a link.

    >>> print(plain("<script>alert(1)</script> | [x](y)"), plain("CIFAR-10, split train (32x32)"))
    &lt;script&gt;alert(1)&lt;/script&gt; \| \[x\](y) CIFAR-10, split train (32x32)
    """
    escaped = html.escape(visible(value), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|#~!$^])", r"\\\1", escaped)
    escaped = re.sub(
        r"^([-+=:](?=[\s=:-]|$)|\d+(?=[.)](?:\s|$)))", _entities, escaped
    )  # a list, a heading or a table at a line's beginning
    return Markup(re.sub(r":(?=//)|(?<=www)\.|@", _entities, escaped, flags=re.IGNORECASE))


def block(text: str, most: int = 4000) -> Markup:
    r"""A text of several lines as a fenced block, whatever fences it holds; characters that would hide are escaped.

    Args:
        text: The text.
        most: The characters that are shown of it; a last line says that there are more.

    >>> print(block("two\n```\nlines\x1b"))
    ````text
    two
    ```
    lines\x1b
    ````
    """
    kept = text[:most].expandtabs(4).split("\n")
    lines = ["".join(map(shown_character, line)) for line in kept]
    lines += ["[...]"] if len(text) > most else []
    fence = _fence(text, 3)
    return Markup("\n".join([f"{fence}text", *lines, fence]))


def _fence(text: str, least: int) -> str:
    """More backticks than any run of them in a text."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def code(value: Any) -> Markup:
    """A value as a code span, whatever backticks it holds.

    >>> print(code("a`b"), code("`"))
    ``a`b`` `` ` ``
    """
    text = visible(value)
    fence = _fence(text, 1)
    space = " " if not text or text[0] in "` " or text[-1] in "` " else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def python(value: str) -> Markup:
    """A string as Python code writes it, on one line.

    >>> print(python("v2"))
    "v2"
    """
    return Markup(json.dumps(value, ensure_ascii=not value.isprintable()))


def words(values: Iterable[Any]) -> Markup:
    r"""The words of a shell's command line, each quoted where it needs to be.

    >>> print(words(["vdm-hub", "evaluate", "a b", "$(x)"]))
    vdm-hub evaluate 'a b' '$(x)'
    """
    return Markup(" ".join(shlex.quote(visible(value)) for value in values))


def markdown(form: str, *values: Any) -> Markup:
    r"""Markdown of ours around values, which are escaped unless they are Markdown themselves.

    >>> print(markdown("**{}** of {}", "a*b", code("c")))
    **a\*b** of `c`
    """
    return Markup(form.format(*map(_shown, values)))


def render(template: str, **values: Any) -> str:
    """The page that a template gives, which may extend one of this folder's."""
    # Not autoescape: that knows HTML alone. What `finalize` returns goes onto the page as it is.
    environment = Environment(finalize=_shown, undefined=StrictUndefined, loader=FunctionLoader(template_text))
    environment.filters.update(code=code, python=python, words=words)
    return environment.from_string(template).render(**values)


def template_text(name: str) -> str:
    """The text of a template of this folder."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _shown(value: Any) -> Markup:
    return value if isinstance(value, Markup) else plain(value)


def _entities(match: re.Match[str]) -> str:
    return "".join(f"&#{ord(character)};" for character in match[0])
