"""Ctrl-C is one line and status 130, in every command, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest import CaptureFixture as Said

from runs import ROOT, TORCHRUN, contents, environment, recipe
from tiny import tiny_pipeline
from vdm_hub.commands import report_errors
from vdm_hub.errors import PublishError

SCRIPT = str(Path(__file__).with_name("interrupted.py"))


def test_ctrl_c_is_one_line_and_status_130_in_every_command(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    tiny_pipeline().save_pretrained(pipeline)
    out = tmp_path / "out"
    out.mkdir()
    digits = ["--dataset_name", "digits", "--num_levels", "17"]
    made = recipe(tmp_path, out / "run", evaluation_replicates=100_000, max_train_steps=1)
    commands = [
        (["sample", str(pipeline), "--num_inference_steps", "100000", "--output", str(out / "grid.png")], None),
        (["evaluate", str(pipeline), *digits, "--replicates", "10000", "--plot", str(out / "bits.png")], None),
        (["evaluate", str(pipeline), *digits, "--replicates", "9999", "--method", "ode", "--tolerance", "1e-9"], None),
        (["publish", str(pipeline), "me/it", "--dry_run", "--output_dir", str(out / "card")], None),
        (
            ["train", made],
            str(out / "run" / ".vdm_hub.lock"),
        ),  # before its first step, from which on it leaves a checkpoint
    ]
    (tmp_path / "words.json").write_text(json.dumps(commands))
    command = [sys.executable, SCRIPT, str(tmp_path / "words.json")]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for (words, _), end in zip(commands, ends, strict=True):
        assert end["status"] == 130, (words, end)
        assert "Traceback" not in end["said"], end["said"]
        assert end["said"].count("interrupted") == 1
        assert end["said"].splitlines()[-1].startswith("interrupted")
        assert end["seconds"] < 20
    assert contents(out) == {}


@pytest.mark.parametrize("module", ["vdm_hub.commands", "vdm_hub.train"])
def test_ctrl_c_while_libraries_are_imported_is_one_line_too(module: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *(["plugins"] if module.endswith("commands") else ["digits"])],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip().startswith("interrupted") and len(said.strip().splitlines()) == 1, said


MADE_OF_IT = [OSError("a file can't be read"), RuntimeError("a tensor can't be made"), PublishError("look at the Hub")]


@pytest.mark.parametrize("error", MADE_OF_IT, ids=lambda error: type(error).__name__)
def test_ctrl_c_of_which_a_library_makes_an_error_is_none_of_the_users(error: Exception, capsys: Said) -> None:
    """Such as safetensors, whose native code calls Python and says of whatever that raises that the file is wrong."""

    def load() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        assert report_errors(load) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err.strip()
    assert said.startswith("interrupted: ") and len(said.splitlines()) == 1
    assert (str(error) in said) == isinstance(error, PublishError)


@pytest.mark.slow
def test_two_processes_say_it_once(tmp_path: Path) -> None:
    """The launcher has words of its own; its workers have one line."""
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    words = ["evaluate", str(tmp_path / "pipeline"), "--dataset_name", "digits", "--num_levels", "17"]
    words += ["--replicates", "10000", "--batch_size", "32", "--journal", str(tmp_path / "journal")]
    process = subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN, "-m", "vdm_hub.commands", *words],
        env=environment(ACCELERATE_USE_CPU="true"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    deadline = time.monotonic() + 100
    while not list((tmp_path / "journal").rglob("replicate-*")):
        assert process.poll() is None and time.monotonic() < deadline, "it measured nothing"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("interrupted: ") == 1, said
    ours = [line for line in said.splitlines() if "vdm_hub/" in line]
    assert not ours, said
