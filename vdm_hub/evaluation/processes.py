"""The processes of an evaluation: each measures its share of the images, and all come to the same report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from vdm_hub.errors import ConfigurationError, VDMHubError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that evaluate together; by default it is alone.

    Attributes:
        rank: Its number.
        count: How many there are.

    >>> Processes().gather("a"), Processes().broadcast("b"), Processes().is_main
    (['a'], 'b', True)
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """The processes that ``accelerate launch`` or ``torchrun`` started.

        Raises:
            ConfigurationError: The launcher started more processes than accelerate knows of.
        """
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched == 1:
            return cls()
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if launched != state.num_processes:
            raise ConfigurationError(
                f"{launched} processes were launched, but accelerate runs {state.num_processes}, each on its own: "
                f"they would measure the same images {launched} times. On CPUs set ACCELERATE_USE_CPU=true; else run "
                f"`accelerate config`."
            )
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes reports."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of each process, in their order, on all of them."""
        if self.count == 1:
            return [value]
        gathered: list[T] = gather_object([value])
        return gathered

    def broadcast(self, value: T) -> T:
        """The main process's value, on all of them."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        broadcast_object_list(values)
        return values[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every process; what stops one of them stops all, instead of leaving the others waiting.

        Raises:
            VDMHubError: As ``work`` raised here, or on another process.
        """
        result, failed = None, None
        try:
            result = work()
        except (VDMHubError, OSError) as error:
            failed = error
        messages = self.gather(None if failed is None else str(failed))
        if failed is not None:
            raise failed
        for rank, message in enumerate(messages):
            if message is not None:
                raise ConfigurationError(f"process {rank} of {self.count} stopped: {message}")
        return result  # type: ignore[return-value]

    @contextmanager
    def main_speaks(self) -> Iterator[None]:
        """A block in which errors of other processes end these without a word: the main process says the same."""
        try:
            yield
        except (VDMHubError, OSError):
            if self.is_main:
                raise
            raise SystemExit(2) from None
