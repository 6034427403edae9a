"""``--dry_run`` builds everything, takes a step, says what a run needs, and writes nothing."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runs import LEARNED, SHIM, TORCHRUN, contents, python, recipe, start, train_here
from vdm_hub.errors import ConfigurationError
from vdm_hub.training import dry_run


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


def test_each_row_is_a_figure_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a learned schedule, without averages, two steps on; its step takes a hundred seconds here."""
    run = start(tmp_path / "run", noise_schedule=LEARNED, use_ema=False)
    steps, optimise = [], run.optimise
    monkeypatch.setattr(run, "optimise", lambda batches: (steps.append(run.step), optimise(batches))[1])
    run.step = 2
    measured = dry_run._seconds(run, next(run.batches()))
    assert len(steps) == 5 and 0 < measured < 100
    run.step = 2
    monkeypatch.setattr(dry_run, "_seconds", lambda run, batches: 1000.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = {line[:16].strip(): line[16:] for line in dry_run.describe_run(run).splitlines()}
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(steps) == 6, "a step was taken"
    network, whole = (sum(p.numel() for p in part.parameters()) for part in (run.model.body, run.model))
    assert rows["beside it"].startswith(f"{whole - network:,} learned") and whole > network
    assert dry_run._bytes(run) == pytest.approx(4 * 4 * whole, rel=0.02), "AdamW's step counts come on top"
    assert float(rows["state"].split()[0]) == pytest.approx(dry_run._bytes(run) / 2**20, abs=0.051)
    peak = float(rows["peak memory"].split()[0].replace(",", ""))
    assert before / 1024 - 1 <= peak <= after / 1024 + 1 and "of the process" in rows["peak memory"]
    assert rows["training"].startswith("1:06:40 for 4 steps") and rows["a step"].startswith("1000.000 s, 0.0 images/s")
    run.step = 6
    assert dry_run.describe_run(run).startswith("nothing is left to do") and "6 steps" in dry_run.describe_run(run)


def test_a_schedule_that_learns_nothing_is_said_and_other_values_have_no_bytes(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    before = dry_run.describe_run(run)
    assert re.search("beside it +nothing is learned", before)
    assert dry_run._bytes(run) == pytest.approx(5 * 4 * sum(p.numel() for p in run.model.parameters()), rel=0.02)
    next(iter(run.optimizer.state.values()))["of an optimiser's own"] = "no tensor"
    run.step = 0
    assert re.findall("state .*MiB", dry_run.describe_run(run)) == re.findall("state .*MiB", before)


def test_what_only_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has no number; a GPU its own clock and memory; and macOS counts in bytes."""
    stream: Any = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace(is_stream=True, count=7)))
    assert dry_run._number_of_images(stream) == "a stream"
    clock = {"now": 0.0, "queued": 50.0}  # of a step before

    def queue(batches: Any) -> None:
        clock["queued"] += 3

    def synchronise(device: Any) -> None:
        clock.update(now=clock["now"] + clock["queued"], queued=0)

    gpu = torch.device("cuda")
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(device=gpu), optimise=queue)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronise)
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock["now"])
    assert dry_run._seconds(run, []) == 3
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    assert dry_run._peak(gpu) == 12345
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kilobytes = dry_run._peak(torch.device("cpu")) / 1024
    assert before <= kilobytes <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(dry_run.sys, "platform", "darwin")
    assert dry_run._peak(torch.device("cpu")) == pytest.approx(kilobytes, rel=0.01)
