"""Adaptive integration of many initial values by scipy, each with steps of its own, their fields evaluated together.

scipy steps one state at a time, and a network is worth calling only for many. So each datum has a thread in which
scipy's solver runs until it asks for its field; when all have asked, the calling thread answers them, one after the
other.
What a datum's solver sees is a function of its own state alone, so its result does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from vdm_hub.likelihood.protocol import SOLVERS
from vdm_hub.likelihood.scipy_modules import scipy_module

Array = np.ndarray[Any, np.dtype[np.float64]]
VectorField = Callable[[Array, Array], Array]
"""``(times (N,), states (N, S)) -> slopes (N, S)``, of every datum at a time of its own."""


class Trajectory(NamedTuple):
    """The end of a datum's integration.

    Attributes:
        state: There, (S,).
        steps: Accepted ones.
        evaluations: Of its field.
        failure: ``""`` at the interval's end; else ``"max_steps"`` or ``"not finite"``.
    """

    state: Array
    steps: int
    evaluations: int
    failure: str


class _NotFinite(Exception):
    """The error for a field that is NaN or infinite."""


class _Stopped(Exception):
    """The signal that the calling thread answers no more."""


def solver_library() -> Any:
    """The module of scipy's solvers.

    Raises:
        ConfigurationError: scipy is missing.
    """
    return scipy_module("integrate", "the probability-flow likelihood, by an ODE solver,")


@cache
def _in_even_steps(method: Any) -> Any:
    """The method with steps that follow the error's power of two alone.

    Where stability limits the steps of an explicit method, a step's length and the next one's error feed back on each
    other, and a difference in the last bits grows to the tolerance's size. So the error that chooses a step is rounded
    up: but for a chance that is about as small as those bits, all steps are the same. It takes 6 to 40 % more of them.
    """

    class EvenSteps(method):
        def _estimate_error_norm(self, *arguments: Any) -> float:
            norm = float(super()._estimate_error_norm(*arguments))
            return 2.0 ** np.ceil(np.log2(norm)) if norm > 0 else norm

    return EvenSteps


def integrate_ode(
    field: VectorField, start: Array, interval: tuple[float, float], tolerance: float, max_steps: int, solver: str
) -> list[Trajectory]:
    """Each datum's state at the interval's end.

    The field is rounded, to a hundredth of the tolerance or finer. A network's last bits differ between batches, and a
    rough field makes whole numbers of them; rounded, they are the same but for a rare value between two multiples.

    Args:
        field: Called in this thread, for all data at once; those that are done are evaluated where they ended.
        start: (N, S).
        interval: First and last time, of all.
        tolerance: Of a step's error, absolute and relative to the state: root mean square over S.
        max_steps: Steps of one datum, at most.
        solver: A name of `SOLVERS`.

    >>> paths = integrate_ode(lambda t, y: -y, np.array([[1.0], [2.0]]), (0.0, 1.0), 1e-9, 100, "dop853")
    >>> [round(float(path.state[0]), 6) for path in paths]
    [0.367879, 0.735759]
    """
    method = _in_even_steps(getattr(solver_library(), SOLVERS[solver]))
    unit = 2.0 ** math.floor(math.log2(tolerance / 100))
    asked: SimpleQueue[tuple[int, float, Array | None]] = SimpleQueue()
    answers: list[SimpleQueue[Array | None]] = [SimpleQueue() for _ in start]

    def run(i: int) -> Trajectory:
        def ask(time: float, state: Array) -> Array:
            asked.put((i, time, state))
            if (slope := answers[i].get()) is None:
                raise _Stopped
            if not np.isfinite(slope).all():
                raise _NotFinite
            return np.round(slope / unit) * unit

        try:
            return _integrate_one(method, ask, start[i], interval, tolerance, max_steps)
        finally:
            asked.put((i, 0.0, None))

    times, states = np.full(len(start), interval[0]), start.copy()
    active: set[int] = set()

    def hear() -> None:
        """Take the next question, or the news that a solver has none any more."""
        i, time, state = asked.get()
        if state is None:
            active.discard(i)
        else:
            times[i], states[i] = time, state
            active.add(i)

    with ThreadPoolExecutor(len(start)) as pool:
        running: list[Future[Trajectory]] = []
        try:
            for i in range(len(start)):
                running.append(pool.submit(run, i))
                hear()  # one thread runs at a time: many that want to would only wait for each other
            while active:
                slopes = field(times, states)
                for i in sorted(active):
                    answers[i].put(slopes[i])
                    hear()
        except BaseException:
            for answer in answers:
                answer.put(None)
            raise
        return [one.result() for one in running]


def _integrate_one(
    method: Any, field: Any, start: Array, interval: tuple[float, float], tolerance: float, max_steps: int
) -> Trajectory:
    steps = 0
    try:
        solver = method(field, interval[0], start, interval[1], rtol=tolerance, atol=tolerance)
        while solver.status == "running" and steps < max_steps:
            solver.step()
            steps += 1
    except _NotFinite:
        return Trajectory(start, steps, 0, "not finite")
    failure = {"finished": "", "running": "max_steps"}.get(solver.status, "not finite")
    return Trajectory(solver.y, steps, solver.nfev, failure)
