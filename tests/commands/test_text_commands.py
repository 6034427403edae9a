"""The commands on a model of texts: each option of `vdm-hub sample` is read or refused."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_tokens
from naming import naming
from vdm_hub.commands import main, options
from vdm_hub.commands.options import OVERRIDES

READ = {
    *(
        "help",
        "pipeline",
        "revision",
        "num_images",
        "output",
        "overwrite",
        "num_inference_steps",
        "batch_size",
        "seed",
    ),
    *("prompt", "length", "temperature", "remasking"),
}
OTHER = {"sampler": "reverse_sde", "guider": "nope", "guidance_scale": "2.5"}


def sample_options() -> list[str]:
    parser = argparse.ArgumentParser()
    options.sample(parser)
    return [action.dest for action in parser._actions]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tiny_tokens.install(tmp_path_factory.mktemp("plugin") / "site-packages"))
        folder = tmp_path_factory.mktemp("texts")
        tiny_tokens.pipeline().save_pretrained(folder)
        yield folder


@pytest.mark.parametrize("name", [name for name in sample_options() if name not in READ])
def test_an_option_of_images_is_refused_of_texts(
    name: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = OTHER.get(name, "3")
    output = tmp_path / "texts.txt"
    words = ["sample", str(pipeline), "--num_images", "1", "--num_inference_steps", "2", "--output", str(output)]
    assert main([*words, f"--{name}", given]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    of_checkpoints = name in OVERRIDES or name == "num_levels"  # which are refused of any pipeline of ours
    named = naming(name) if of_checkpoints else naming(f"--{name}", given, "texts")
    assert re.search(named, said) and not output.exists()
    assert main(words) == 0 and output.read_text()


def test_each_prompt_is_filled_equally_often_and_another_number_is_said(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "samples.txt"
    words = ["sample", str(pipeline), "--num_images", "4", "--num_inference_steps", "2", "--output", str(output)]
    assert main([*words, "--prompt", "ab", "ba", "aa"]) == 0
    assert capsys.readouterr().out.startswith("3 samples of 4")
