"""Commands that Ctrl-C ends, each a real process: ``python tests/commands/interrupted.py WORDS.json``.

Importing takes seconds; so it is done once, and each command is a fork. It gets SIGINT as soon as it has shown that it
is at work, and for each a JSON line says how it ended: status, output, and the seconds from the signal to its end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path


def begin(words: list[str], log: Path) -> int:
    """The command line's own entry, in a process of its own."""
    if child := os.fork():
        return child
    for number, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    door, *arguments = words
    try:
        if door == "train":
            from vdm_hub.train import main as train

            sys.argv = ["train", *arguments]
            status = train()
        else:
            from vdm_hub.commands import main as command

            status = command(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def main() -> None:
    """One after the other; a command is at work when its file ``until`` is there, or when it shows its progress."""
    import torch

    import vdm_hub.commands.evaluate
    import vdm_hub.commands.publish
    import vdm_hub.commands.sample
    import vdm_hub.train
    import vdm_hub.training.loop  # noqa: F401 - what takes seconds, once for all

    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    folder = Path(tempfile.mkdtemp())
    for number, (words, until) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        log = folder / f"{number}.log"
        child, deadline = begin(words, log), time.monotonic() + 100
        errors = log.with_suffix(".err")
        while not (Path(until).exists() if until else errors.exists() and "%" in errors.read_text()):
            if time.monotonic() > deadline or os.waitpid(child, os.WNOHANG) != (0, 0):
                sys.exit(f"{words} never came to {until or 'a progress bar'}: {errors.read_text()}")
            time.sleep(0.005)
        os.kill(child, signal.SIGINT)
        sent = time.monotonic()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = {"status": status, "seconds": time.monotonic() - sent, "said": errors.read_text()}
        print(json.dumps(told | {"printed": log.with_suffix(".out").read_text()}), flush=True)


if __name__ == "__main__":
    main()
