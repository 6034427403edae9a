"""Adaptive integration of many initial values by scipy, each with steps of its own, their fields evaluated together.

scipy steps one state at a time, and a network is worth calling only for many. So each datum has a coroutine (a
greenlet, as scipy's solvers know of no other kind) in which the solver runs until it asks for its field; when all have
asked, all are answered.
What a datum's solver sees is a function of its own state alone, so its result does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from vdm_hub.likelihood.needed_modules import needed_module
from vdm_hub.likelihood.protocol import SOLVERS

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


_NEEDED_FOR = "the probability-flow likelihood, by an ODE solver,"


def solver_library() -> Any:
    """The module of scipy's solvers.

    Raises:
        ConfigurationError: It is missing, or greenlet is.
    """
    needed_module("greenlet", _NEEDED_FOR)
    return needed_module("scipy.integrate", _NEEDED_FOR)


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
        field: Called for all data at once; those that are done are evaluated where they ended.
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
    greenlets = needed_module("greenlet", _NEEDED_FOR)
    caller = greenlets.getcurrent()

    def ask(time: float, state: Array) -> Array:
        slope = caller.switch((time, state))
        if not np.isfinite(slope).all():
            raise _NotFinite
        return np.round(slope / unit) * unit

    solvers = [greenlets.greenlet(_integrate_one) for _ in start]
    # A solver's word is a time and a state, a question; the last is its trajectory.
    heard = [solvers[i].switch(method, ask, start[i], interval, tolerance, max_steps) for i in range(len(start))]
    times, states = np.full(len(start), interval[0]), start.copy()
    while active := [i for i, solver in enumerate(solvers) if not solver.dead]:
        for i in active:
            times[i], states[i] = heard[i]
        slopes = field(times, states)
        for i in active:
            heard[i] = solvers[i].switch(slopes[i])
    return heard


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
