"""Ctrl-C is one line, at whatever moment it comes: while libraries are imported, or within what they raise."""

from __future__ import annotations

import importlib
import os
import signal
import threading
from typing import Any, NoReturn

_CAME = threading.Event()


def interruptible_import(module: str) -> Any:
    """Import a module; Ctrl-C ends the process at once, as an exception within a library's import may be swallowed."""
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.default_int_handler, _interrupt) or not _is_main():
        return importlib.import_module(module)
    signal.signal(signal.SIGINT, _leave)
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def restore_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, unless whoever started the process had it ignored."""
    _CAME.clear()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN and _is_main():
        signal.signal(signal.SIGINT, _interrupt)


def interrupt_came() -> bool:
    """Whether Ctrl-C came since `restore_interrupts`: then an error is what a library made of it."""
    return _CAME.is_set()


def _interrupt(*_: object) -> NoReturn:
    _CAME.set()
    raise KeyboardInterrupt


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _leave(*_: object) -> None:
    os.write(2, b"\ninterrupted: nothing had begun.\n" if os.environ.get("RANK", "0") == "0" else b"")
    os._exit(128 + signal.SIGINT)
