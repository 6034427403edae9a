"""The command ``vdm-hub``: argument parsing and printing, nothing else."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

from vdm_hub.command_line import Parser
from vdm_hub.commands import evaluate, plugins, publish, sample
from vdm_hub.errors import Interrupted, VDMHubError, in_one_line, in_words
from vdm_hub.secret_values import mask

# At exit, a last look for garbage among all that was imported takes two seconds and finds nothing that matters.
atexit.register(gc.freeze)

COMMANDS = {"evaluate": evaluate, "plugins": plugins, "publish": publish, "sample": sample}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vdm-hub COMMAND ...``; an error that is the user's to mend is one paragraph and exit status 2."""
    parser = Parser(prog="vdm-hub", description="Variational diffusion models.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        help_text = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=help_text, description=help_text))
    arguments = parser.parse_args(argv)
    return report_errors(lambda: COMMANDS[arguments.command].run(arguments))


def report_errors(run: Callable[[], object]) -> int:
    """Call ``run``; a `VDMHubError`, or what a file system refuses, is a message on standard error and status 2.

    Ctrl-C is a line and status 130. Otherwise the status is what ``run`` returns, where that is a number, or 0.
    Warnings are shown as errors are, whatever library they are of.
    """
    warnings.formatwarning = _line_of_warning
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = run()
    except (VDMHubError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        said = str(stop) if isinstance(stop, Interrupted) else "nothing half-written is left."
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one waits for nothing
        if os.environ.get("RANK", "0") == "0":
            print(f"\ninterrupted: {said}", file=sys.stderr)
        return 128 + signal.SIGINT
    return status if isinstance(status, int) else 0


def _line_of_warning(message: Warning | str, *where: object, **line: object) -> str:
    """A warning as it is printed: without the place in the code, and as errors are."""
    return f"warning: {in_words(mask(str(message)))}\n"
