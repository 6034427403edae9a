"""Whatever strings records, recipe and names hold, a card has the structure of one that holds plain words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hub.publications import EVALUATION, RECIPE, RUN, tiny_pipeline
from vdm_hub import VDMPipeline
from vdm_hub.publishing.card import Edition, render_card
from vdm_hub.publishing.contents import Contents
from vdm_hub.publishing.markdown import code, markdown, plain, python, render, words

STRINGS = (
    "dataset_name", "dataset_config_name", "train_split", "package", "version", "device", "mixed_precision", "command",
    "fingerprint", "measured name", "config", "split", "term", "method", "license", "twin error", "no twin",
)  # fmt: skip
FRAGMENTS = [
    "\n", "\n\n", "\r", "\u2028", "\u0085", "\t", "    ", "# ", "\n# x\n", "---", "\n---\n", "===", "\n===\n",
    "```", "\n```\n", "`", "~~~", "~", "*", "**", "_", "![x](http://y.org/z.png)", "[x](http://y.org)",
    "[x]: http://y.org", "[^1]", "]", "(", ")", "<b>", "</b>", "<!-- ", "-->", "<http://y.org>", "<script>",
    "&lt;", "&#35;", "&", "|", "\n| a | b |\n| - | - |\n", "- ", "+ ", "1. ", "1) ", "> ", ":", "://",
    "http://y.org", "www.y.org", "a@y.org", "$$x$$", "\\", "\\\\", "\\\n", "{{ 1234 * 5678 }}", "{% raw %}", "{#",
    "\u202e", "\u2066", "\u200b", "\ufeff", "\x00", "\x1b[31m", "\ud800", "'", '"', "$(x)", ";", "!", "word",
    "Ünïcode", " ",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=8).map("".join)


@cache
def pipeline() -> VDMPipeline:
    return tiny_pipeline()


def card(texts: dict[str, str], twin: bool = False) -> str:
    recipe = RECIPE | {name: texts[name] for name in ("dataset_name", "dataset_config_name", "train_split")}
    run = RUN | {name: texts[name] for name in ("device", "mixed_precision", "command")}
    run |= {"versions": {texts["package"]: texts["version"]}}
    run |= {"dataset": {"images": 7, "fingerprint": texts["fingerprint"] or "x"}}
    told = {"name": texts["measured name"], "config": texts["config"], "split": texts["split"]}
    evaluation = EVALUATION | {"dataset": told, "terms": {texts["term"]: 1.75}, "method": texts["method"]}
    source = Contents(Path(), recipe, evaluation, {}, run)
    edition = Edition("me/tiny", license=texts["license"] or "x", no_twin=texts["no twin"] or "x")
    if twin:
        edition = Edition("me/tiny", license=texts["license"] or "x", twin="0f" * 20, twin_error=texts["twin error"])
    return render_card(source, pipeline(), edition)


def structure(page: str) -> list[str]:
    """The types of all tokens but those of running text."""
    return list(kinds(MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(body(page))))


def kinds(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type not in ("text", "text_special"):
            yield f"{token.type} {token.attrGet('href') or token.attrGet('src') or ''}"
        yield from kinds(token.children or [])


def running_text(page: str) -> str:
    """What a reader's program may look through for addresses: text outside of code, without what is escaped."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).disable("text_join").parse(body(page))
    inline = [child for token in tokens for child in token.children or []]
    return " ".join(child.content for child in inline if child.type == "text")


def body(page: str) -> str:
    return page.split("\n---\n", 1)[1]


@cache
def words_card(twin: bool, command: bool = True) -> str:
    return card(dict.fromkeys(STRINGS, "word") | ({} if command else {"measured name": "a\x00b"}), twin)


@cache
def structure_of_words(twin: bool, command: bool = True) -> list[str]:
    return structure(words_card(twin, command))


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(STRINGS, TEXTS)), st.booleans())
@example(dict.fromkeys(STRINGS, "\n\n# Free\n\n![x](http://y.org/z.png) [here](http://y.org)\n\n```\n"), False)
@example(dict.fromkeys(STRINGS, "<img src=x onerror=alert(1)>"), True)
@example(dict.fromkeys(STRINGS, "---\nlicense: mit\n---"), True)
def test_no_string_changes_the_structure_of_a_card(texts: dict[str, str], twin: bool) -> None:
    page = card(texts, twin)
    # A measurement is repeated by a command only where every part of it can be written on a command line.
    assert structure(page) in (structure_of_words(twin), structure_of_words(twin, command=False))
    assert not re.search(r"://|www\.|\S@\S", running_text(page)), "no address becomes a link by itself"
    hidden = [character for character in page if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert set(hidden) <= {"\n"}
    assert str(1234 * 5678) not in page, "a template in a name is not evaluated"
    metadata = yaml.safe_load(page.split("\n---\n")[0])
    assert set(metadata) == set(yaml.safe_load(words_card(twin).split("\n---\n")[0])) - ({"datasets"} - set(metadata))
    assert metadata["library_name"] == "diffusers" and metadata["model-index"][0]["name"] == "tiny"
    assert sum(len(result["metrics"]) for result in metadata["model-index"][0]["results"]) == 2


def test_what_a_template_forgets_to_escape_is_escaped() -> None:
    hostile = "\n# x\n[a](b) <i> ` $(x)"
    page = render(
        "a {{ x }} b {{ x | code }} {{ y }}\n\n```python\n{{ x | python }}\n{{ [x] | words }}\n```",
        x=hostile,
        y=markdown("*{}*", hostile),
    )
    assert [token.type for token in MarkdownIt().parse(page)] == [
        "paragraph_open",
        "inline",
        "paragraph_close",
        "fence",
    ]
    inline = MarkdownIt().parse(page)[1].children or []
    assert {token.type for token in inline} - {"text", "text_special"} == {"code_inline", "em_open", "em_close"}


def test_a_forgotten_name_is_an_error_not_a_gap() -> None:
    with pytest.raises(Exception, match="absent"):
        render("{{ absent }}")


def test_text_of_every_day_is_left_as_it_is() -> None:
    for text in (
        "CIFAR-10, split train (32x32)",
        "0.1.0",
        "2.13.0+cpu",
        "NVIDIA H100 80GB HBM3",
        "-3.5",
        "a: b",
        "Ünïcode",
    ):
        assert plain(text) == text
    assert (
        code("sha256:60e6") == "`sha256:60e6`"
        and python("v2") == '"v2"'
        and words(["a", "--b", "c d"]) == "a --b 'c d'"
    )


def test_a_value_of_any_length_stays_a_line() -> None:
    text = "word " * 100_000
    assert len(plain(text)) < 1100 and len(code(text)) < 1100
