"""SIGTERM and SIGINT: the step under way, a checkpoint, a word on how to go on, and the exit status of the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fork_server
from runs import ROOT, TORCHRUN, contents, environment, recipe, train_here
from vdm_hub.errors import PublishError
from vdm_hub.training.signals import _SIGNALS, StopSignals, TrainingStopped
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

LONG: dict[str, Any] = {"max_train_steps": 100_000, "checkpointing_steps": 5, "checkpoints_total_limit": 2}
DOOR = ("-m", "vdm_hub.train")


def begin(run: Path, *words: str, new: bool = False, **fields: Any) -> subprocess.Popen[str]:
    """A run in a process of its own, after its first checkpoint."""
    start = fork_server.NEW if new else [sys.executable]
    command = [*start, *words, recipe(run.parent / "recipe", run, **fields)]
    here = environment(ACCELERATE_USE_CPU="true")
    process = subprocess.Popen(
        command, env=here, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not list((run / "checkpoints").glob("step-*")):
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate()[1])
        time.sleep(0.005)
    return process


def steps(run: Path) -> list[int]:
    return [load_checkpoint(path).state["step"] for path in checkpoints(run / "checkpoints")]


def finish_and_compare(tmp_path: Path, stopped_at: int, fields: dict[str, Any]) -> None:
    """The run that was stopped, taken three steps further, is the undisturbed one."""
    short = fields | {"max_train_steps": stopped_at + 3, "lr_scheduler": "constant"}
    train_here(tmp_path / "run", **short, resume_from_checkpoint="latest")
    train_here(tmp_path / "calm", **short)
    pipelines = [contents(tmp_path / name / "pipeline") for name in ("run", "calm")]
    assert pipelines[0] == pipelines[1]
    assert (tmp_path / "run" / "history.json").read_text() == (tmp_path / "calm" / "history.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_checkpoint_of_the_last_step_and_its_own_exit_status(
    number: signal.Signals, tmp_path: Path
) -> None:
    fields = LONG | {"lr_scheduler": "constant", "logging_steps": 3, "checkpointing_steps": 4}
    process = begin(tmp_path / "run", *DOOR, **fields)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    last = steps(tmp_path / "run")[-1]
    assert f"{number.name} received" in said
    assert f"{number.name}: stopped after step {last} of 100000" in said
    assert "--resume_from_checkpoint latest" in said
    assert f"step-{last:08d} is written" in said
    assert not (tmp_path / "run" / "pipeline").exists()
    finish_and_compare(tmp_path, last, fields)


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """The step under way would take a minute: it waits for a batch that does not come."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = begin(tmp_path / "run", str(script), **LONG)
    (tmp_path / "run" / "wait").touch()
    while not (tmp_path / "run" / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.01)
    before = contents(tmp_path / "run" / "checkpoints")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "SIGINT received" not in (line := process.stderr.readline()):
        assert line, "it ended at the first"
    assert "Ctrl-C again ends it at once" in line
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert contents(tmp_path / "run" / "checkpoints") == before


SLOW = """
import sys, time
from vdm_hub import train
from vdm_hub.training import loop


class Slow(loop.TrainingRun):
    def optimise(self, batches):
        folder = self.folder.path
        if (folder / "wait").exists():
            (folder / "waiting").touch()
            for _ in range(6000):
                time.sleep(0.01)
        return super().optimise(batches)


loop.TrainingRun = Slow
sys.exit(train.main())
"""


def test_a_signal_after_the_last_step_ends_at_once_and_the_results_come_later(tmp_path: Path) -> None:
    """The evaluation of many passes is not waited for."""
    fields = {"max_train_steps": 4, "evaluation_replicates": 100_000}
    process = begin(tmp_path / "run", *DOOR, **fields)
    while not (tmp_path / "run" / "pipeline").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert steps(tmp_path / "run") == [4]
    assert not (tmp_path / "run" / "evaluation.json").exists()
    more = {"max_train_steps": 4, "evaluation_replicates": 1, "resume_from_checkpoint": "latest"}
    assert train_here(tmp_path / "run", **more) is not None
    assert (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize("to", [pytest.param("one worker", marks=pytest.mark.slow), "the launcher"])
def test_two_processes_stop_at_the_same_step(to: str, tmp_path: Path) -> None:
    fields = LONG | {"train_batch_size": 8, "logging_steps": 3, "lr_scheduler": "constant"}
    process = begin(tmp_path / "run", "-m", *TORCHRUN, *DOOR, new=to == "one worker", **fields)
    if to == "the launcher":
        process.send_signal(signal.SIGTERM)
    else:
        workers = [int(pid) for pid in _children(process.pid)]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert said.count("stopped after step") == 1, said
    last = steps(tmp_path / "run")[-1]
    assert last % 3 == 0, "they agree where the bound is logged"
    assert f"stopped after step {last} of" in said
    assert "Connection closed" not in said


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("before_first_step", [True, False])
def test_an_error_that_native_code_makes_of_a_signal_is_the_signal_still(*, before_first_step: bool) -> None:
    with (
        pytest.raises(TrainingStopped) as stopped,
        StopSignals(show=False, before_first_step=before_first_step) as stop,
    ):
        stop.obey_at_once()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except TrainingStopped as raised:
            raise ValueError("an error of a file") from raised  # as safetensors does where its writing calls Python
    assert stopped.value.code == 143
    with pytest.raises(PublishError), StopSignals(show=False) as stop:
        stop.obey_at_once()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except TrainingStopped as raised:
            raise PublishError("half of it is there") from raised
    with pytest.raises(ValueError, match="its own"), StopSignals(show=False):  # no signal: an error is an error
        raise ValueError("its own")


def test_handlers_are_given_back_and_left_alone_outside_the_main_thread() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals(show=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        with pytest.raises(TrainingStopped) as stopped:
            stop.obey_at_once()
        assert stopped.value.code == 143

    def elsewhere() -> None:
        with StopSignals():
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before

    with ThreadPoolExecutor(1) as other:
        other.submit(elsewhere).result()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("before_first_step", [True, False])
@pytest.mark.parametrize("hangup", [signal.SIG_IGN, signal.SIG_DFL])
def test_which_signals_are_heard(hangup: Any, *, before_first_step: bool) -> None:
    """Ctrl-C before the first step is Python's own; what nohup ignores stays ignored."""
    outside = signal.signal(signal.SIGHUP, hangup)
    try:
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        with StopSignals(show=False, before_first_step=before_first_step):
            heard = {number for number in _SIGNALS if signal.getsignal(number) != before[number]}
        assert {number: signal.getsignal(number) for number in _SIGNALS} == before
    finally:
        signal.signal(signal.SIGHUP, outside)
    left_alone = ({signal.SIGINT} if before_first_step else set()) | (
        {signal.SIGHUP} if hangup is signal.SIG_IGN else set()
    )
    assert heard == set(_SIGNALS) - left_alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_counts_and_is_said_once(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """And a second Ctrl-C is the system's."""
    for more in ({}, {"show": False}):
        with StopSignals(**more) as stop:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.received is number
            assert (signal.getsignal(signal.SIGINT) is signal.SIG_DFL) == (number is signal.SIGINT)
        said = capfd.readouterr().err
        assert said.count("received") == said.count(f"{number.name} received") == (0 if more else 1)
        assert ("Ctrl-C again" in said) == (number is signal.SIGINT and not more)


@pytest.mark.parametrize("show", [True, False])
@pytest.mark.parametrize("before_first_step", [True, False])
def test_what_is_obeyed_at_once_is_said_before_the_first_step(
    capfd: pytest.CaptureFixture[str], *, show: bool, before_first_step: bool
) -> None:
    with pytest.raises(TrainingStopped), StopSignals(show=show, before_first_step=before_first_step) as stop:
        stop.obey_at_once()
        os.kill(os.getpid(), signal.SIGTERM)
    said = capfd.readouterr().err
    assert ("SIGTERM received before the first step" in said) == (show and before_first_step) == bool(said)


BATCH = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@pytest.mark.slow
def test_the_signals_of_batch_systems_leave_a_checkpoint_and_their_own_exit_status(tmp_path: Path) -> None:
    """Four runs of one process, which has imported what they need; then one under nohup, which hears no SIGHUP."""
    made = [recipe(tmp_path / f"{number}", tmp_path / f"run{number}", **LONG) for number in range(len(BATCH) + 1)]
    script = tmp_path / "one_by_one.py"
    script.write_text(ONE_BY_ONE)
    numbers = ["0", *(str(int(number)) for number in BATCH)]
    command = [sys.executable, str(script), *(word for pair in zip(numbers, made, strict=True) for word in pair)]
    here = environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, env=here, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.splitlines() if line.isdigit()] == [
        128 + signal.SIGTERM,  # under nohup, and so not by the SIGHUP that came first
        *(128 + number for number in BATCH),
    ], done.stderr
    assert "Traceback" not in done.stderr
    for run, number in zip(range(len(made)), (signal.SIGTERM, *BATCH), strict=True):
        last = steps(tmp_path / f"run{run}")[-1]
        assert f"{number.name}: stopped after step {last} of 100000" in done.stderr
        assert not [path for path in (tmp_path / f"run{run}").iterdir() if path.name.startswith(".")]


ONE_BY_ONE = """
import os, signal, sys, threading, time
from pathlib import Path
from vdm_hub import train

pairs = list(zip(sys.argv[1::2], sys.argv[2::2]))
for run, (number, made) in enumerate(pairs):
    folder = Path(made).parents[1] / f"run{run}" / "checkpoints"
    if (child := os.fork()) == 0:
        # Whatever the shell that started the tests ignores.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if number == "0" else signal.SIG_DFL)
        sys.argv = ["train", made]
        try:
            sys.exit(train.main())
        except SystemExit as error:
            sys.stderr.flush()
            os._exit(int(error.code or 0))
    while not folder.is_dir() or not list(folder.glob("step-*")):
        time.sleep(0.01)
    for each in [int(number)] if number != "0" else [signal.SIGHUP, signal.SIGTERM]:
        os.kill(child, each)
        time.sleep(0.5)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_the_first_step_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-u", *DOOR, recipe(tmp_path / "recipe", tmp_path / "run", **LONG)]
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored by the run, too
    try:
        run = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    with run as process:
        assert process.stdout and process.stderr
        assert any(line.startswith("parameters") for line in process.stdout), "it said what it is"
        process.send_signal(number)
        said = process.stderr.read()
    # The step may have been quicker than the signal.
    assert process.returncode == 128 + number and number.name in said, said
    if "before the first step" in said:
        assert contents(tmp_path / "run") == {}
    else:
        assert steps(tmp_path / "run")
