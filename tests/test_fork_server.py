"""A forked process finds what a new interpreter finds, and ends as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fork_server
from runs import ROOT, environment

PROBE = """
import gc, json, os, random, signal, sys, threading

def constants(*names):
    found = {}
    for name in names:
        __import__(name)
        values = list(vars(sys.modules[name]).items())
        shown = ((key, sorted(value) if isinstance(value, set | frozenset) else repr(value)) for key, value in values)
        named = {key: value for key, value in shown if key.isupper() and " at 0x" not in value}
        found |= {f"{name}.{key}": value for key, value in named.items() if key != "SESSION_ID"}
    return found

libraries = ("huggingface_hub.constants", "datasets.config", "diffusers.utils.constants", "transformers.utils.hub")
libraries += ("accelerate.commands.config.config_args", "tempfile", "fsspec.config", "matplotlib")
wanted = dict(os.environ)
found = {
    "argv": sys.argv, "path": sys.path, "command": [word for word in sys.orig_argv if word != "-q"],
    "environment": wanted, "folder": os.getcwd(), "session": os.getsid(0) == os.getpid(), "group": os.getpgrp(),
    "main": [__name__, globals().get("__file__"), __spec__ and __spec__.name, sys.modules["__main__"] is not None],
    "own main": vars(sys.modules["__main__"]) is globals(),
    "signals": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
    "masked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "gc": [gc.isenabled(), gc.get_threshold()], "threads": threading.active_count(),
    "ours": sorted(name for name in sys.modules if name.startswith(("vdm_hub", "pytest", "_pytest", "runs"))),
    "streams": [[s.encoding, s.errors, s.line_buffering, s.write_through, s.fileno()] for s in
                (sys.stdin, sys.stdout, sys.stderr)],
    "files": sorted(os.readlink(f"/proc/self/fd/{name}").partition(":")[0] for name in os.listdir("/proc/self/fd")
                    if int(name) < 3),
    "recursion": sys.getrecursionlimit(), "flags": str(sys.flags).replace("quiet=1", "quiet=0"),
    "executable": sys.executable, "umask": os.umask(0),
}
found |= constants(*libraries)
import matplotlib, numpy, torch
found["backend"], found["threads of torch"] = matplotlib.get_backend(), torch.get_num_threads()
found["deterministic"] = torch.are_deterministic_algorithms_enabled()
found["read"] = sys.stdin.read()
print(json.dumps(found))
"""


def ask(words: list[str], settings: dict[str, str], folder: Path, **options: Any) -> tuple[bool, dict[str, Any]]:
    """Whether it was forked, and what it found."""
    pipe = subprocess.PIPE
    command = [sys.executable, *words]
    with subprocess.Popen(
        command, env=settings, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options
    ) as process:
        answer, errors = process.communicate("words\n", timeout=100)
    assert process.returncode == 0, errors
    return getattr(process, "_server", None) is not None, json.loads(answer.splitlines()[-1])


TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true"}
ELSEWHERE = {"HF_HOME": "/tmp/another", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
OWN_MODULES = {"HF_ENDPOINT": "https://Hub.example/~me", "HF_MODULES_CACHE": "/tmp/modules"}
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "a module, in the same environment": (["-m", "probe"], TWO),
    "a script, with another Hub": (["probe.py"], ELSEWHERE),
    "another's modules, and an address that is kept otherwise than it is given": (["-P", "probe.py"], OWN_MODULES),
}


@pytest.mark.slow
@pytest.mark.parametrize(("program", "changes"), WAYS.values(), ids=WAYS)
def test_a_fork_finds_what_a_new_interpreter_finds(
    tmp_path: Path, program: list[str], changes: dict[str, str]
) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    settings = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}{os.pathsep}", **changes)
    session = {"start_new_session": program[0] == "-m"}
    forked, found = ask([*program, "a", "b"], settings, tmp_path, **session)
    fresh, expected = ask(["-q", *program, "a", "b"], settings, tmp_path, **session)
    assert (forked, fresh) == (hasattr(os, "pidfd_open"), False)
    if session["start_new_session"]:
        del found["group"], expected["group"]
    assert found == expected


# Functions' caches by their arguments may hold one: nobody calls them with it.
LEFT = """
import gc, json
from urllib.parse import SplitResult

def holds(part):
    if type(part) in (tuple, frozenset):
        return any(map(holds, part))
    return type(part) is str and "no-such" + "-hub" in part

gc.unfreeze()
left = {}
for holder in gc.get_objects():
    lines = type(holder) is list and len(holder) > 300  # of a source file, for the place of a warning
    if not lines and not isinstance(holder, SplitResult | tuple) and "lru_cache" not in str(type(holder)):
        for part in filter(holds, holder.values() if type(holder) is dict else gc.get_referents(holder)):
            left[str(holder)[:100]] = str(part)[:100]
print(json.dumps({"left": left}))
"""


@pytest.mark.slow
def test_no_stand_in_is_left_in_a_fork(tmp_path: Path) -> None:
    forked, found = ask(["-c", LEFT], environment(**ELSEWHERE | OWN_MODULES), tmp_path)
    assert (forked, found["left"]) == (hasattr(os, "pidfd_open"), {})


@pytest.mark.parametrize(
    ("changes", "shadow"),
    [
        ({"OMP_NUM_THREADS": "2"}, None),
        ({"PYTHONUNBUFFERED": "yes"}, None),
        ({"MPLBACKEND": "svg"}, None),
        ({"HOME": "/tmp"}, None),
        ({}, "torch.py"),
    ],
)
def test_what_was_imported_otherwise_is_imported_anew(
    tmp_path: Path, changes: dict[str, str], shadow: str | None
) -> None:
    if shadow:
        (tmp_path / shadow).touch()
    words = ["-c", "import json, sys; print(json.dumps({'modules': len(sys.modules)}))"]
    forked, found = ask(words, environment(**changes), tmp_path)
    assert not forked
    assert found["modules"] < 200


ENDS = {
    "a number": "sys.exit(3)",
    "nothing": "sys.exit()",
    "words": "sys.exit('no')",
    "at once": "os._exit(7)",
    "an error": "1 / 0",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "asked to end": "os.kill(os.getpid(), signal.SIGTERM)",
    "hung up": "os.kill(os.getpid(), signal.SIGHUP)",
    "a closed output": "os.close(1)",
    "threads, and what is left for the end": "threading.Timer(0.1, print, ['late']).start(); "
    "atexit.register(print, 'last')",
    "a child": "sys.exit(subprocess.run([sys.executable, '-c', 'raise SystemExit(5)']).returncode)",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_fork_ends_as_a_new_interpreter_ends(end: str) -> None:
    code = "import atexit, os, signal, subprocess, sys, threading, time\n"
    code += f"print(sys.argv, sys.path, __name__, __spec__, end='')\n{end}"
    ends = [
        subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment())
        for options in ([], ["-q"])
    ]
    (found, expected) = ((done.returncode, done.stdout, done.stderr) for done in ends)
    assert found == expected


def test_forks_draw_numbers_of_their_own_and_are_waited_for() -> None:
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(()).item())"
    draws = [subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True) for _ in range(2)]
    assert not set(draws[0].split()) & set(draws[1].split())
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], env=environment())
    assert sleeping.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeping.wait(0.1)
    os.kill(sleeping.pid, signal.SIGSTOP)
    assert sleeping.poll() is None
    sleeping.kill()
    assert sleeping.wait(10) == -signal.SIGKILL == sleeping.poll()
    assert not Path(f"/proc/{sleeping.pid}").exists()


def test_what_this_process_ignores_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code = "import os, signal; os.kill(os.getpid(), signal.SIGHUP)"
        assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_libraries_of_the_servers_import_nothing_of_vdm_hub() -> None:
    code = f"import sys, {', '.join(' '.join(fork_server.LAYERS).split())}; print('vdm_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True) == "False\n"
