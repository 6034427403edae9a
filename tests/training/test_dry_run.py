"""``--dry_run`` builds everything, takes a step, says what a run needs, and writes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runs import SHIM, TORCHRUN, contents, python, recipe, start, train_here
from vdm_hub.errors import ConfigurationError


def test_it_says_what_the_run_needs_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(tmp_path / "run", dry_run=True, report_to="tensorboard", checkpointing_steps=1)
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    run = start(tmp_path / "other")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    assert f"UNetVDMModel, {parameters:,} parameters" in said
    assert "1,437, 1x8x8" in said and "16 images on 1 x cpu" in said and "for 6 steps" in said
    # weights, gradients, two moments and the average, each of 4 bytes; AdamW's step counts come on top
    assert float(re.findall(r"state +([\d.]+) MiB", said)[0]) == pytest.approx(5 * 4 * parameters / 2**20, abs=0.06)
    seconds, rate = re.findall(r"a step +([\d.]+) s, ([\d,.]+) images/s", said)[0]
    assert 16 / float(rate.replace(",", "")) == pytest.approx(float(seconds), abs=6e-4), "to a millisecond"


def test_a_finished_run_stays_as_it_was(tmp_path: Path) -> None:
    train_here(tmp_path / "run", checkpointing_steps=3)
    before = contents(tmp_path / "run")
    train_here(tmp_path / "run", dry_run=True, max_train_steps=9, resume_from_checkpoint="latest")
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_two_processes_say_it_once(tmp_path: Path) -> None:
    done = python(*TORCHRUN, SHIM, recipe(tmp_path, tmp_path / "run", dry_run=True), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("32 images on 2 x cpu") == 1
    assert not (tmp_path / "run").exists()


def test_what_would_fail_fails(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="halved"):
        train_here(tmp_path / "run", dry_run=True, unet={"block_out_channels": [8, 8, 8, 8, 8], "norm_num_groups": 4})
