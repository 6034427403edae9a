"""A sampling as it goes on: a generator of what a pipeline's callback is given, and of the result."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vdm_hub.fields import whole_number

Watched = tuple[int | None, Any]
"""A step, from 0, and what the callback was given at it; or ``None`` and what the call gave."""


class _NobodyLooksError(Exception):
    """The error that ends a sampling whose generator was closed."""


def watch(call: Callable[[Callable[..., None]], Any], every: int = 1) -> Iterator[Watched]:
    """The states of a sampling one after the other, then its result; another thread samples meanwhile.

    A generator that is closed, or left in a loop, ends the sampling at its next step.

    Args:
        call: A call of a pipeline, which is given what to pass as ``callback_on_step_end``.
        every: Of how many steps one is shown.

    Yields:
        ``(step, {"latents": ..., ...})`` of a step, and at the end ``(None, result)``.

    Raises:
        Exception: What the call raised.

    Example:
        >>> from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler, watch
        >>> unet = UNetVDMModel(8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
        >>> pipe = VDMPipeline(unet, VDMScheduler(num_levels=17))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> seen = watch(lambda show: pipe.sample(2, num_inference_steps=5, callback_on_step_end=show), every=2)
        >>> [(step, "images" if step is None else tuple(state["latents"].shape)) for step, state in seen]
        [(0, (2, 1, 8, 8)), (2, (2, 1, 8, 8)), (4, (2, 1, 8, 8)), (None, 'images')]
    """
    every = whole_number("every", every)
    found: queue.Queue[tuple[str, int | None, Any]] = queue.Queue()
    left = threading.Event()

    def show(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> None:
        if left.is_set():
            raise _NobodyLooksError
        if step % every == 0:
            found.put(("step", step, dict(state)))

    def run() -> None:
        try:
            found.put(("result", None, call(show)))
        except BaseException as error:
            found.put(("error", None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            what, step, value = found.get()
            if what == "error":
                raise value
            yield step, value
            if what == "result":
                return
    finally:
        left.set()
