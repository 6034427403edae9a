"""Ctrl-C while libraries are imported, which takes seconds, is one line as well."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from typing import Any


def interruptible_import(module: str) -> Any:
    """Import a module; Ctrl-C ends the process at once, as an exception within a library's import may be swallowed."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main():
        return importlib.import_module(module)
    signal.signal(signal.SIGINT, _leave)
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def restore_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, unless whoever started the process had it ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN and _is_main():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _leave(*_: object) -> None:
    os.write(2, b"\ninterrupted: nothing had begun.\n" if os.environ.get("RANK", "0") == "0" else b"")
    os._exit(128 + signal.SIGINT)
