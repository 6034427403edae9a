"""Ctrl-C, and the signals of batch systems: finish the step under way, write a checkpoint, leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from vdm_hub.errors import PublishError

_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    *(signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
    signal.SIGXCPU,  # the time of a job on the CPU is nearly over
)


class TrainingStopped(SystemExit):
    """The exception for a run that a signal ended in order; its status is 128 + the signal's number, as in shells.

    >>> TrainingStopped(signal.SIGTERM).code
    143
    """

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(128 + received)
        self.signal = received


class StopSignals:
    """A block in which signals are noted, not obeyed: `received` says which one came first.

    A second SIGINT ends the process at once, by the system's own hand. Under nohup, which ignores SIGHUP, that stays
    ignored. Outside the main thread, where Python handles no signals, the block changes nothing.

    Args:
        show: Say on standard error that the signal was received; for one of several processes.
        before_first_step: They end the process in order instead, as Ctrl-C, which is left to Python, does anyway.

    >>> with StopSignals(show=False) as stop:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     stop.received
    <Signals.SIGTERM: 15>
    """

    def __init__(self, *, show: bool = True, before_first_step: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._show, self._at_once = show, before_first_step
        self._left_alone = {signal.SIGINT} if before_first_step else set()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the signals over from whoever handled them."""
        if threading.current_thread() is threading.main_thread():
            heard = (
                set(_SIGNALS)
                - self._left_alone
                - ({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set())
            )
            self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Give the signals back; an error after a signal that was obeyed is what native code made of the exception.

        Raises:
            TrainingStopped: In place of such an error; a publication's own words, on what is there, stay.
        """
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._at_once and self.received and isinstance(error, Exception) and not isinstance(error, PublishError):
            raise TrainingStopped(self.received) from error

    def obey_at_once(self) -> None:
        """From here on a signal, also one that came before, raises: for what is written whole or not at all.

        Raises:
            TrainingStopped: A signal was received already.
        """
        self._at_once = True
        if self.received is not None:
            raise TrainingStopped(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if self._at_once:
            if self._show and self._left_alone:
                os.write(2, f"\n{self.received.name} received before the first step: the run ends.\n".encode())
            raise TrainingStopped(self.received)
        if self._show:  # not by print, which a signal may have interrupted
            words = f"\n{self.received.name} received: one more step and a checkpoint, then the run ends"
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            os.write(2, f"{words}{again}.\n".encode())
