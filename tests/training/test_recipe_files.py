"""Recipes are YAML 1.2 without references: what a scalar is, what is refused, and at what cost."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from naming import paragraph
from vdm_hub.errors import ConfigurationError
from vdm_hub.recipes import plain_yaml
from vdm_hub.recipes.arguments import parse_recipe

BASE = "dataset_name: digits\nmax_train_steps: 5\n"


def recipe(folder: Path, content: str | bytes) -> list[str]:
    path = folder / "mine.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [str(path)]


refused = partial(paragraph, ConfigurationError, parse_recipe)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", 10), ("0o10", 8), ("0x1F", 31), ("0xff", 255), ("+3", 3), ("-7", -7), ("00", 0), ("0b11", "0b11")),
        *(("1:30", "1:30"), ("190:20:30", "190:20:30"), ("1_000", "1_000"), ("0o9", "0o9"), ("1,000", "1,000")),
        *(("1e-4", 1e-4), ("1E3", 1000.0), ("1.", 1.0), (".5", 0.5), ("1e", "1e"), ("1.5e+3", 1500.0)),
        *((".inf", math.inf), ("-.Inf", -math.inf), ("inf", "inf"), ("nan", "nan"), ("NaN", "NaN")),
        *(("true", True), ("False", False), ("TRUE", True), ("tRUE", "tRUE"), ("yes", "yes"), ("No", "No")),
        *(("on", "on"), ("off", "off"), ("y", "y"), ("~", None), ("null", None), ("NULL", None), ("nUll", "nUll")),
        *(("2026-11-28", "2026-11-28"), ("=", "="), ("'010'", "010"), ('"true"', "true"), ("\u0661", "\u0661")),
    ],
)
def test_a_scalar_is_what_the_core_schema_of_yaml_1_2_says(text: str, value: Any) -> None:
    found = plain_yaml.load(f"key: {text}", "here")["key"]
    assert (found, type(found)) == (value, type(value))
    if text[0] not in "'\"":
        plain = plain_yaml.scalar(text)
        assert (plain, type(plain)) == (value, type(value)), "a word of a command line is the same"


@pytest.mark.parametrize(
    ("line", "value"),
    [("seed: 010", 10), ("seed: 0o10", 8), ("seed: 0x1F", 31), ("seed: 1e3", 1000), ("seed: '7'", 7)],
)
@pytest.mark.parametrize("door", ["recipe", "command line"])
def test_an_integer_is_read_alike_at_both_doors(door: str, line: str, value: int, tmp_path: Path) -> None:
    word = line.partition(": ")[2].strip("'")
    argv = recipe(tmp_path, BASE + line) if door == "recipe" else [*recipe(tmp_path, BASE), "--seed", word]
    assert parse_recipe(argv).training.seed == value


@pytest.mark.parametrize("word", ["1_000", "1:30", "1,000", "0b11", "\u0661\u0662", " 5 5", "1e400", "0x", "--5"])
@pytest.mark.parametrize("door", ["recipe", "command line"])
def test_what_is_no_number_in_yaml_is_none_at_either_door(door: str, word: str, tmp_path: Path) -> None:
    if door == "recipe":
        said = refused(recipe(tmp_path, f"{BASE}seed: {word}\n"))
    else:
        said = refused([*recipe(tmp_path, BASE), f"--seed={word}"])
    assert "seed" in said


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (BOMB, "anchor"),
        (BASE + "unet: &x {dropout: 0.1}\n", "anchor"),
        (BASE + "unet: *x\n", "alias"),
        ("<<: {seed: 1}\n" + BASE, "merge"),
        (BASE + "unet:\n  <<: {dropout: 0.1}\n", "merge"),
        (BASE + "seed: !!int 5\n", "tag"),
        (BASE + "seed: !mine 5\n", "tag"),
        (BASE + "x: !!python/object/apply:os.system ['true']\n", "tag"),
        (BASE + "unet: !!set {a, b}\n", "tag"),
        (BASE + "seed: 1\nseed: 1\n", "twice"),
        (BASE + "unet: {dropout: 0.1, dropout: 0.2}\n", "twice"),
        (BASE + "unet: {1: 2}\n", "text"),
        (BASE + "unet: {[1]: 2}\n", "text"),
        (BASE + "true: 1\n", "text"),
        (BASE + "unet: " + "[" * 5000, "levels"),
        (BASE + "unet: " + "{a: " * 5000, "levels"),
        (BASE + "- " * 5000, ""),
        ("- " * 5000, "levels"),
        (BASE + "seed: " + "9" * 5000, "long"),
        (BASE + "---\n" + BASE, "single document"),
        (BASE + "\x00", "character"),
        (BASE.encode("utf-16"), "UTF-8"),
        (BASE.encode("utf-16-le"), "character"),
        (BASE.encode("utf-32"), "UTF-8"),
        ((BASE + "output_dir: caf\xe9\n").encode("latin-1"), "UTF-8"),
        (b"\xff" * 100, "UTF-8"),
        (b"a" * 10_000_000, "bytes"),
        (b"", "mapping"),
        (b"null", "mapping"),
        (BASE + "unet: {dropout: .inf}\n", "unet"),
        (BASE + "unet: {dropout: .nan}\n", "unet"),
        (BASE + "recipe: ../../mine\n", "recipe"),
        (BASE + "recipe: [1]\n", "recipe"),
        (BASE + 'recipe: "a\\e[31m"\n', "recipe"),
    ],
)
def test_what_a_recipe_has_no_place_for_is_refused_at_once(content: str | bytes, word: str, tmp_path: Path) -> None:
    began = time.monotonic()
    assert word in refused(recipe(tmp_path, content))
    assert time.monotonic() - began < 5


def test_utf_8_with_a_mark_is_read(tmp_path: Path) -> None:
    text = BASE + "output_dir: caf\u00e9\n"
    for content in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode()):
        assert parse_recipe(recipe(tmp_path, content)).training.output_dir == "caf\u00e9"


def test_the_longest_recipe_is_read_in_seconds_and_a_pipe_is_none(tmp_path: Path) -> None:
    gammas = [round(-7 + 12 * number / 9000, 6) for number in range(9000)]
    text = f"{BASE}noise_schedule: {{name: tabulated, config: {{gammas: {gammas}}}}}\n"
    assert len(text) < plain_yaml.MAX_BYTES
    began = time.monotonic()
    parse_recipe(recipe(tmp_path, text))
    assert time.monotonic() - began < 20
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "pipe.yaml" in refused([str(tmp_path / "pipe.yaml")])


def test_home_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe(tmp_path, BASE)
    assert parse_recipe(["~/mine.yaml"]).recipe == "mine"
    assert "nobody-of-this-name" in refused(["~nobody-of-this-name/mine.yaml"])


TRICKY = [
    "1e3",
    "010",
    "0o10",
    "1:30",
    "1_000",
    "yes",
    "null",
    "~",
    "",
    "true",
    ".inf",
    "<<",
    "=",
    "- a",
    "a: b",
    "# x",
]
TRICKY += ["2026-11-28", " x ", "a\nb", "\u00e9", "\u2028", "'", '"', "0x1F", "+1", "1."]


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text("ab1e.:_-~ #\n'\"")
        | st.sampled_from(TRICKY),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_is_read_again(value: Any) -> None:
    text = plain_yaml.dump({"value": value, "again": [value, value]})
    assert plain_yaml.load(text, "here") == {"value": value, "again": [value, value]}


@pytest.mark.parametrize("value", TRICKY)
def test_other_readers_of_yaml_take_text_for_text(value: str) -> None:
    assert yaml.safe_load(plain_yaml.dump({"value": value})) == {"value": value}
