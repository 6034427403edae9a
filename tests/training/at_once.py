"""Runs that are started at once, each a real process: ``python tests/training/at_once.py WORDS.json``.

Importing torch and diffusers takes seconds; so it is done once, and each run is a fork. For each it prints a JSON line
with its exit status and what it said on standard error. A run waits in its second step as long as there is a file
``wait`` in the current folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def train(words: list[str], log: Path) -> None:
    """The command line's own entry, in this process."""
    from vdm_hub import train as door
    from vdm_hub.training import loop

    class Waiting(loop.TrainingRun):
        def optimise(self, batches):  # type: ignore[no-untyped-def]
            if self.step == 1:
                log.with_suffix(".waits").touch()
                while Path("wait").exists():
                    time.sleep(0.01)
            return super().optimise(batches)

    loop.TrainingRun = Waiting  # type: ignore[misc]
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["train", *words]
    sys.exit(door.main())


def main() -> None:
    """Start them all, and wait for each."""
    import torch

    import vdm_hub.train  # noqa: F401 - what takes seconds, once for all

    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    children = {}
    logs = Path(sys.argv[1]).parent
    for number, words in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if (child := os.fork()) == 0:
            try:
                train(words, logs / f"{number}.log")
            except SystemExit as error:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(error.code or 0))
            finally:
                os._exit(70)
        children[child] = logs / f"{number}.log"
        (logs / f"{number}.pid").write_text(str(child))
    for child, log in children.items():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, "said": log.with_suffix(".err").read_text()}), flush=True)


if __name__ == "__main__":
    main()
