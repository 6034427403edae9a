"""README and docs/: their code runs, in a folder as it is after ``make quickstart``, and what they name is there."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from markdown_it import MarkdownIt
from PIL import Image

import vdm_hub
from hub.publications import tiny_network
from hub.server import LoopbackHub
from runs import ROOT, environment, finished_run
from vdm_hub.commands import _parser
from vdm_hub.errors import MissingPluginError
from vdm_hub.lm_eval.harness_model import HarnessModel
from vdm_hub.recipes.arguments import parse_recipe

README = ROOT / "README.md"
PLUGINS = sorted(folder.name for folder in (ROOT / "plugins").iterdir() if (folder / "pyproject.toml").exists())
OF_PLUGINS = {  # commands, and whose they are
    command: ROOT / "plugins" / name
    for name in PLUGINS
    for command in tomllib.loads((ROOT / "plugins" / name / "pyproject.toml").read_text())["project"]
    .get("entry-points", {})
    .get("vdm_hub.commands", {})
}
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS_PLUGINS = re.compile(r"^from vdm_hub_\w+ import", re.MULTILINE)  # `plugins/test_installed.py` runs those
PYTHON = [page for page in PAGES if "```python\n" in page.read_text() and not NEEDS_PLUGINS.search(page.read_text())]
QUICK_PAGES = ("README", "5_continuous_time")  # the first, and the ladder's last; the others are long together
# What a test adds to a training command, so that it takes seconds: fewer and smaller, nothing else.
SHORT = "--max_train_steps 2 --train_batch_size 4 --num_inference_steps 2 --num_sample_images 1 --report_to none"
SHORT += " --evaluation_replicates 1"
SMALL_UNET = '--unet \'{"block_out_channels": [32], "layers_per_block": 1}\''
QUICK = re.compile(r"vdm-hub (evaluate|sample|plugins) ")
TRAINING = re.compile(r"vdm_hub\.train |vdm-hub train ")


def stem(page: Path) -> str:
    """The name of a page in the list of tests."""
    return page.stem


def marked(page: Path) -> Any:
    """A page as a parameter, marked where it takes long."""
    return pytest.param(page, marks=() if page.stem in QUICK_PAGES else pytest.mark.slow)


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """``(language, title, content)``: a title says why a block is not run here, such as ``title="Takes an hour"``."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            language, _, title = token.info.partition(" ")
            yield language, title, token.content


def lines(titled: bool, pages: Sequence[Path] = PAGES) -> list[str]:
    """The commands of pages, each once."""
    texts = [text for page in pages for kind, title, text in blocks(page) if kind == "bash" and bool(title) is titled]
    found = (line.partition("  #")[0].strip() for text in texts for line in text.replace("\\\n", " ").splitlines())
    return sorted({line for line in found if line})


def run(home: Path, command: str | list[str], variables: Mapping[str, str] | None = None) -> str:
    """Run a line as a user would, with this environment's programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = dict(variables or environment()) | {"PATH": path}
    words = shlex.split(command) if isinstance(command, str) else command
    if words[0] == "vdm-hub":  # as the module that this program is, which is forked; `test_wheel.py` runs the program
        words = [sys.executable, "-m", "vdm_hub.commands", *words[1:]]
    done = subprocess.run(words, cwd=home, env=given, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def shortened(line: str) -> str:
    """A training command that takes seconds, into a folder of its own."""
    has_unet = any(word in line for word in ("--unet", "digits_vae", "--init_from"))
    words = re.sub(r"--output_dir \S+", "", line)
    return f"{words} {SHORT} {'' if has_unet else SMALL_UNET} --output_dir runs/{abs(hash(line))}"


OF_README = "vdm-hub train template --train_data_dir my_images --resolution 32"
OF_OTHERS = ["accelerate launch -m vdm_hub.train digits_vae", "vdm-hub train digits_classes"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, folders of images and checkpoint that README speaks of, and the pages' own files."""
    home = tmp_path_factory.mktemp("pages")
    source = np.random.default_rng(0)
    for i in range(40):
        image = Image.fromarray(source.integers(0, 256, (40, 36, 3), dtype=np.uint8))
        for folder in (home / "my_images", home / "my_classes" / ("cat", "dog")[i % 2]):
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    for text in (text for page in PAGES for kind, _, text in blocks(page) if kind == "yaml"):
        (home / text.removeprefix("# ").partition("\n")[0]).write_text(text)
    (home / "scripts").symlink_to(ROOT / "scripts")
    shutil.copytree(finished_run()[0], home / "runs" / "digits")
    run(home, f"{OF_README} {SHORT} {SMALL_UNET}")
    stock = DDPMPipeline(tiny_network(stock=True), DDPMScheduler())  # type: ignore[arg-type]
    stock.save_pretrained(home / "my-ddpm")
    return home


@pytest.fixture(scope="module")
def whole_home(home: Path) -> Path:
    """The runs that the other pages speak of, too."""
    for line in OF_OTHERS:
        run(home, f"{line} {SHORT} {'' if 'digits_vae' in line else SMALL_UNET}")
    return home


@pytest.mark.parametrize("page", map(marked, PYTHON), ids=stem)
def test_the_python_of_a_page_runs_and_draws_what_it_shows(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    home: Path = request.getfixturevalue("home" if page.stem in QUICK_PAGES else "whole_home")
    for one in home.iterdir():
        (tmp_path / one.name).symlink_to(one)
    run(tmp_path, [sys.executable, str(ROOT / "scripts" / "run_page.py"), str(page), "--folder", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    shown = set(re.findall(r"images/([\w.]+)\)", page.read_text()))
    assert drawn == shown if page.parent.name == "ladder" else drawn <= shown


def commands() -> list[Any]:
    """What is not quick: of README, and what the other pages have beside it, as long ones."""
    own = lines(titled=False, pages=[README])
    every = [line for line in lines(titled=False) if not QUICK.match(line)]
    return [pytest.param(line, marks=() if line in own else pytest.mark.slow) for line in every]


@pytest.mark.parametrize("line", commands())
def test_a_command_runs(request: pytest.FixtureRequest, line: str) -> None:
    """As it stands; training is cut short, and ``make`` is asked for its plan (CI runs the targets)."""
    home: Path = request.getfixturevalue("home" if line in lines(False, [README]) else "whole_home")
    if line.startswith("vdm-hub publish"):
        with LoopbackHub() as hub:
            run(home, line, hub.environment(home / "cache"))
            assert ("me/vdm-digits" in hub.repositories) == ("--dry_run" not in line)
    elif line.startswith("make"):
        assert run(ROOT, f"{line} --dry-run PYTHON={sys.executable}")
    elif line not in [OF_README, *OF_OTHERS]:  # the home has run these
        run(home, shortened(line) if TRAINING.search(line) else line)


@pytest.mark.parametrize(("pages", "count"), [([README], 5), pytest.param(PAGES, 12, marks=pytest.mark.slow)])
def test_the_quick_commands_run(request: pytest.FixtureRequest, pages: list[Path], count: int) -> None:
    """All in one process, as importing the libraries takes longer than what they do."""
    commands = [shlex.split(line)[1:] for line in lines(False, pages) if QUICK.match(line)]
    assert len(commands) >= count
    home: Path = request.getfixturevalue("home" if pages == [README] else "whole_home")
    script = f"from vdm_hub.commands import main\nfor words in {commands!r}: assert main(words) == 0, words"
    run(home, [sys.executable, "-c", script])


@pytest.mark.parametrize("line", lines(titled=True))
def test_a_command_that_takes_too_long_is_one_that_its_program_takes(line: str) -> None:
    program, *words = shlex.split(line.partition(" -m ")[2] if line.startswith("accelerate") else line)
    program, *words = [program, *words] if program != "python" else words if words[0] != "-m" else words[1:]
    if program == "vdm_hub.train" or [program, *words[:1]] == ["vdm-hub", "train"]:
        try:
            parse_recipe(words if program == "vdm_hub.train" else words[1:])
        except MissingPluginError as error:  # the core's tests run without plugins, and a page says what it needs
            assert any(f"Needs {package}" in page.read_text() for package in PLUGINS for page in PAGES)
            assert any(package in str(error) for package in PLUGINS)
    elif program == "vdm_hub.lm_eval":
        given = {one.partition("=")[0] for one in words[words.index("--model_args") + 1].split(",")}
        assert given <= inspect.signature(HarnessModel).parameters.keys()
    elif program in ("vdm-hub", "vdm_hub.commands") and words[0] in OF_PLUGINS:
        source = "".join(path.read_text() for path in (OF_PLUGINS[words[0]] / "src").rglob("*.py"))
        assert all(f'"{word}"' in source for word in words if word.startswith("-"))
    elif program in ("vdm-hub", "vdm_hub.commands"):
        _parser().parse_args(words)
    else:
        source = (ROOT / program).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))


def test_there_are_blocks_of_every_kind_and_each_is_what_it_says() -> None:
    found = [(language, text) for page in PAGES for language, _, text in blocks(page)]
    assert {language for language, _ in found} == {"bash", "json", "mermaid", "python", "yaml"}
    for language, text in found:
        if language in ("json", "yaml"):
            assert json.loads(text) if language == "json" else yaml.safe_load(text)
    assert len(lines(titled=False)) > 20 and lines(titled=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_or_names_is_there(page: Path) -> None:
    text = page.read_text()
    links = {page.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)}
    named = {ROOT / path for path in re.findall(r"\b(?:scripts|tests|docs|plugins|vdm_hub)/[\w./-]+\.\w+", text)}
    assert not [str(path) for path in links | named if not path.exists()]


def test_readme_is_short_and_its_figures_are_those_of_the_results() -> None:
    text, results = README.read_text(), (ROOT / "docs" / "results.md").read_text().replace("**", "")
    assert len(text.splitlines()) <= 150
    rows = [row.split("|")[4:6] for row in text.splitlines() if row.startswith(("| V", "| hier", "| latent"))]
    assert len(rows) == 6
    for bits, seconds in rows:
        measured, _, error = bits.strip().partition(" ± ")
        row = next(row for row in results.splitlines() if measured in row and seconds.strip() in row)
        assert error in row


def test_the_maps_are_those_of_the_package() -> None:
    run(ROOT, [sys.executable, "scripts/house.py", "--check"])


def test_the_ladder_has_a_chapter_for_every_rung() -> None:
    chapters = sorted(page.stem for page in PAGES if page.parent.name == "ladder")
    assert len(chapters) >= 5 and [one.partition("_")[0] for one in chapters] == ["1", "2", "3", "4", "5"]


def test_every_public_name_stands_on_one_page_of_the_reference_and_every_page_in_the_site() -> None:
    reference = "".join(page.read_text() for page in PAGES if page.parent.name == "api")
    assert sorted(re.findall(r"\bvdm_hub\.(\w+)", reference)) == sorted(vdm_hub.__all__)
    pages = re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) == len(set(pages)) and {str(page.relative_to(ROOT)) for page in PAGES} <= set(pages)
