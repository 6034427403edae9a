"""A Space of a model of texts: its requirements name this package, and its app samples and measures texts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from spaces.browser import browsed, message, needs_browser, served
from tiny_tokens import LENGTH, network, tokenizer
from vdm_hub import TokenPipeline, VDMScheduler


def pipeline(name: str = "absorbing") -> TokenPipeline:
    words, process = tokenizer(), {"name": name, "package": "vdm-hub-tokens", "config": {"schedule": "polynomial"}}
    windows = {"length": LENGTH, "context": 0, "text_column": "text"}
    scheduler = VDMScheduler(num_levels=len(words) - 1, forward_process=process)
    torch.manual_seed(0)
    made = TokenPipeline(network(len(words)), words, scheduler, windows=windows)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_requirements_name_the_package_that_the_model_needs(tmp_path: Path) -> None:
    made, output = pipeline(), tmp_path / "space"
    made.save_pretrained(tmp_path / "pipeline")
    command = [sys.executable, "-m", "vdm_hub.commands", "space", str(tmp_path / "pipeline"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "vdm-hub-tokens" in done.stderr
    lines = [Requirement(line) for line in (output / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    saved_with = made.scheduler.config.forward_process["version"]
    assert {line.name: str(line.specifier) for line in lines}["vdm-hub-tokens"] == f">={saved_with}"
    assert "measure" in (output / "app.py").read_text() and "texts" in (output / "README.md").read_text()
    assert (output / "model" / "tokenizer" / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served")
    pipeline().save_pretrained(folder / "pipeline")
    with served(folder / "pipeline", folder / "log.txt") as address, browsed(address) as found:
        yield found
    assert "Traceback" not in (folder / "log.txt").read_text()


@needs_browser
def test_texts_are_sampled_and_holes_filled_as_they_open(page: Any) -> None:
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("2 texts.").wait_for()
    made = pipeline()
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = made(2, LENGTH, num_inference_steps=min(64, LENGTH), generator=seeds).texts
    shown = page.locator("#texts textarea").input_value()
    assert shown == "\n\n--------\n\n".join(expected)


@needs_browser
def test_a_text_gets_its_bits_and_an_empty_one_the_message(page: Any) -> None:
    page.get_by_role("tab", name="Bits of a text").click()
    page.get_by_role("button", name="Measure").click()
    assert "text" in message(page)
    page.get_by_label("text", exact=True).fill("abc def")
    page.get_by_label("a second one").fill("gab")
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("takes fewer bits").wait_for()
    report = pipeline().log_likelihood("abc def", replicates=8)
    figure = f"at most {report.bits_per_dim:.3f} ± {report.standard_error:.3f}"
    assert page.get_by_role("cell", name=figure).first.is_visible()
