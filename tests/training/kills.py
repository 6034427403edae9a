"""A prepared process that starts real runs, each a process (or two) of its own, and kills them without warning.

Importing torch and diffusers takes seconds; so it is done once, and each attempt is a fork: a real process, really
killed. Run as ``python tests/training/kills.py FOLDER PROCESSES SEED PLAN RECIPE [--field value ...]``; it prints one
JSON line for each attempt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

Moment = Callable[[Path, int, set[str]], bool]
"""Whether the run in this folder has come to where a kill is wanted, by way of a number from 1 to 8, and of the names
of what it is writing: not what the kill before left."""


def at_any_time(run: Path, number: int, writing: set[str]) -> bool:
    """Also before the first step: while data are read, the model is built, the recipe written."""
    return True


def after_steps(run: Path, number: int, writing: set[str]) -> bool:
    """So many steps from where the run went on: between two checkpoints, or on one."""
    steps = marker(run)
    return steps.exists() and steps.stat().st_size >= number


def while_a_checkpoint_is_written(run: Path, number: int, writing: set[str]) -> bool:
    """From the moment that the folder beside its place is there."""
    return any(name.startswith(".step-") for name in writing)


def while_results_are_written(run: Path, number: int, writing: set[str]) -> bool:
    """From the first half-written file of `publish_locally` on."""
    return any(name.startswith(".pipeline-") for name in writing)


def half_written(run: Path) -> set[str]:
    """What has no final name yet."""
    return {path.name for path in (*run.glob(".*"), *(run / "checkpoints").glob(".*"))}


MOMENTS: dict[str, tuple[Moment, float]] = {  # with the spread of the random delay after it, in seconds
    "any": (at_any_time, 0.4),
    "step": (after_steps, 0.02),
    "checkpoint": (while_a_checkpoint_is_written, 0.01),
    "results": (while_results_are_written, 0.8),
}


def marker(run: Path) -> Path:
    """A file with a byte for each step of this attempt."""
    return run.with_suffix(".steps")


def train(arguments: list[str], run: Path) -> None:
    """The command line's own entry, in this process, with the marker kept."""
    from vdm_hub import train as door
    from vdm_hub.training import loop

    class Marked(loop.TrainingRun):
        def optimise(self, batches):  # type: ignore[no-untyped-def]
            terms = super().optimise(batches)
            with marker(run).open("ab") as steps:
                steps.write(b".")
            return terms

    loop.TrainingRun = Marked  # type: ignore[misc]
    sys.argv = ["train", *arguments]
    sys.exit(door.main())


def fork(processes: int, arguments: list[str], run: Path) -> list[int]:
    """Start a run of one or several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            for descriptor in (1, 2):
                os.dup2(os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
            os.environ["ACCELERATE_USE_CPU"] = "true"
            if processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
            try:
                train(arguments, run)
            except SystemExit as error:
                sys.stdout.flush()
                os._exit(int(error.code or 0))
            finally:
                os._exit(70)
        children.append(child)
    return children


def attempt(children: list[int], run: Path, moment: str | None, number: int, delay: float) -> str:
    """Wait for the moment, then kill; or, without one, for the end."""
    reached, stale = (None if moment is None else MOMENTS[moment][0]), half_written(run)
    alive, killed = set(children), False
    while alive:
        if reached is not None and reached(run, number, half_written(run) - stale):
            time.sleep(delay)
            for child in alive:
                os.kill(child, signal.SIGKILL)
            reached = None
        for child in list(alive):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                alive.discard(child)
                code = os.waitstatus_to_exitcode(status)
                if code not in (0, -signal.SIGKILL):
                    return f"exit status {code}"
                killed |= code != 0
        time.sleep(0.0005)
    return "killed" if killed else "finished"


def main() -> None:
    """Kill at each moment of the plan, such as ``any:2,step:8``; then let the run end."""
    import torch

    import vdm_hub.train  # noqa: F401 - what takes seconds, once for all attempts

    torch.set_num_threads(1)
    folder, processes, seed, plan, *arguments = sys.argv[1:]
    run, draws = Path(folder), random.Random(int(seed))
    moments = [name for part in plan.split(",") for name in [part.split(":")[0]] * int(part.split(":")[1])]
    left: list[str | None] = [*moments, None]
    while left:
        moment = left[0]
        marker(run).unlink(missing_ok=True)
        number, delay = draws.randint(1, 8), draws.uniform(0, MOMENTS[moment][1]) if moment else 0.0
        children = fork(int(processes), [*arguments, "--resume_from_checkpoint", "latest"], run)
        outcome = attempt(children, run, moment, number, delay)
        latest = sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1:]
        told = {"moment": moment, "delay": delay, "outcome": outcome, "latest": latest}
        told["half_written"] = sorted(half_written(run))
        print(json.dumps(told), flush=True)
        if outcome.startswith("exit"):
            sys.exit(run.with_suffix(".log").read_text())
        if moment is None or outcome == "killed":
            left.pop(0)
        else:  # it was quicker than the kill: all that is left of it are results, which are made each time
            left[0] = "results"


if __name__ == "__main__":
    main()
