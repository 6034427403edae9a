"""The public face: the names of ``vdm_hub``, which docs, plugins, scripts and cards use alone, and what it costs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from dataclasses import is_dataclass

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from diffusers.optimization import SchedulerType

import fork_server
import vdm_hub
from runs import ROOT, environment
from vdm_hub import registry
from vdm_hub.commands import main
from vdm_hub.likelihood import dequantization, protocol
from vdm_hub.pipelines.registration import CLASSES
from vdm_hub.recipes import configuration

PUBLIC = sorted(vdm_hub.__all__)
RUNNABLE = {"vdm_hub.train", "vdm_hub.lm_eval"}  # what launchers of modules start
NAMED = re.compile(r"(?<![\w/])vdm_hub\.((?!py\b)\w+(?:\.\w+)*)")
HEAVY = ("torch", "numpy", "diffusers", "transformers", "accelerate", "datasets", "huggingface_hub")


def sources() -> Iterator[tuple[str, str]]:
    """Whatever Python stands in docs, plugins, scripts and the model card's template, by where it stands."""
    places = ("scripts", "plugins", "docs", "model_cards", "README.md", "vdm_hub/publishing")
    suffixes = {".py", ".md", ".jinja"}
    files = [path for place in places for path in ([ROOT / place, *(ROOT / place).rglob("*")])]
    for path in files:
        if path.suffix not in suffixes or (path.suffix == ".py" and "vdm_hub/publishing" in str(path)):
            continue
        text = path.read_text()
        yield str(path.relative_to(ROOT)), text


def imports(name: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """Modules of the package that a text imports from, and the names."""
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vdm_hub":
                yield str(node.module), [alias.name for alias in node.names]
            if isinstance(node, ast.Import):
                yield from ((alias.name, []) for alias in node.names if alias.name.partition(".")[0] == "vdm_hub")
    else:
        for module, names in re.findall(
            r"^[ >]*from (vdm_hub(?:\.\w+)*) import (\([^)]*\)|[^\n#]*)", text, re.MULTILINE
        ):
            yield module, [word for word in re.split(r"[(),\s]+", names) if word.isidentifier() and "{{" not in names]


def test_docs_plugins_scripts_and_cards_import_nothing_deeper() -> None:
    found = [(name, *imported) for name, text in sources() for imported in imports(name, text)]
    assert len(found) > 40
    deeper = [one for one in found if one[1] != "vdm_hub" and one[1] not in RUNNABLE]
    unknown = [one for one in found if one[1] == "vdm_hub" and not set(one[2]) <= {*PUBLIC, "__version__"}]
    assert not deeper and not unknown


def test_texts_name_nothing_deeper() -> None:
    """Public names, what is run by ``-m``, and the groups of entry points."""
    known = {
        *PUBLIC,
        "__all__",
        "train",
        "commands",
        "lm_eval",
        *registry.BUILT_INS,
        "lock",
    }  # .vdm_hub.lock: a file of a run
    named = [(place, one) for place, text in sources() if not place.endswith(".py") for one in NAMED.findall(text)]
    assert len(named) > 20
    assert not [one for one in named if one[1] not in known]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_has_words(name: str) -> None:
    value = getattr(vdm_hub, name)
    assert name in dir(vdm_hub)
    if isinstance(value, type) or inspect.isfunction(value):  # an alias of a type has none
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def explained() -> list[type]:
    """What ``vdm-hub explain`` has an answer for, of this package."""
    kinds = [registry.registrations(kind) for kind in registry.BUILT_INS]
    classes = [one.load() for kind in kinds for one in kind if one.package == registry.BUILT_IN_PACKAGE]
    return [*(getattr(vdm_hub, name) for name in CLASSES), *classes]


@pytest.mark.parametrize("cls", explained(), ids=lambda cls: cls.__name__)
def test_every_argument_that_a_recipe_may_give_is_explained(cls: type) -> None:
    said = inspect.getdoc(cls) or ""
    arguments = said.partition("Attributes:" if is_dataclass(cls) else "Args:")[2].partition("Example:")[0]
    unsaid = [name for name in inspect.signature(cls).parameters if not re.search(rf"\b{name}\b", arguments)]
    assert not unsaid


def test_explain_prints_every_meaning_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "LearnedMonotoneSchedul"]) == 2 and "did you mean" in capsys.readouterr().err
    assert main(["explain"]) == 0 and "learned_monotone" in capsys.readouterr().out
    assert main(["explain", "learned_monotone"]) == 0
    shown = capsys.readouterr().out
    assert "LearnedMonotoneSchedule(gamma_min=-13.3, gamma_max=5.0, hidden_features=1024)" in shown


def test_names_that_are_kept_apart_from_torch_are_those_of_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables by which words are answered at once: each is what the library, or the code that imports torch, has."""
    schedulers = {one.value for one in SchedulerType} - {"piecewise_constant"}
    assert set(configuration.LR_SCHEDULERS) == schedulers
    assert set(configuration.TRACKERS) == {"none", *LOGGER_TYPE_TO_CLASS}
    assert set(protocol.DEQUANTIZATIONS) == set(dequantization._KINDS)
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("ancestral", *vdm_hub.SAMPLERS))


def answered(script: str) -> str:
    command = [*fork_server.NEW, "-c", script]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WORDS: list[list[str]] = [["--help"], ["--version"], ["recipes"], ["recipes", "digits"], ["smple"], []]
WORDS += [["train", "digitz"], ["train", "digits", "--lr", "1"], ["train", "digits", "--help"]]
WORDS += [["evaluate", "x", "--such", "1"], ["evaluate", "--help"], ["classify", "--help"]]


def test_words_are_answered_before_anything_heavy_is_imported() -> None:
    """``vdm-hub --help``, a version, a recipe or an option that nobody knows."""
    script = f"""
import sys
from vdm_hub.commands import main
for words in {WORDS!r}:
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (words, heavy)
    assert status == (0 if words[:1] == ["recipes"] or words[-1:] in (["--help"], ["--version"]) else 2), words
"""
    assert "digits_hvae" in answered(script)


def test_the_package_is_imported_without_what_it_stands_on() -> None:
    answered(f"import sys, vdm_hub; assert not set({HEAVY!r}) & set(sys.modules)")


@pytest.mark.parametrize(
    "first", [pytest.param("import vdm_hub, diffusers", marks=pytest.mark.slow), "import diffusers, vdm_hub"]
)
def test_diffusers_finds_the_classes_whichever_is_imported_first(first: str) -> None:
    names = ["VDMPipeline", "UNetVDMModel", "VDMScheduler"]
    answered(
        f"{first}\nassert all(getattr(diffusers, name) is getattr(vdm_hub, name) for name in {names})\n"
        "from diffusers import DiffusionPipeline, pipelines\nassert pipelines.vdm_hub is vdm_hub\n"
        "assert DiffusionPipeline.from_pretrained.__func__.hands_over\ntry: diffusers.VDMNothing\n"
        "except AttributeError: pass\nelse: raise AssertionError('a name that nobody has is found')"
    )
