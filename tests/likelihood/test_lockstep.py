"""Many initial values integrated at once: exact ends, and an end at all whatever happens to a field."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest

from vdm_hub.likelihood.lockstep import _in_even_steps, integrate_ode, solver_library
from vdm_hub.likelihood.protocol import SOLVERS

FIRST, LAST, UNIT = 0.25, 1.75, 2.0**-30
START = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])


def decay(times: Any, states: Any) -> Any:
    return -states


def ended(field: Any, *, tolerance: float = 100 * UNIT, max_steps: int = 100, solver: str = "rk45") -> Any:
    """What `integrate_ode` gave or raised; a thread that waits for something that never comes fails the test."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(integrate_ode(field, START, (FIRST, LAST), tolerance, max_steps, solver))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert found, "it does not end"
    return found[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_datum_ends_where_its_equation_does(solver: str) -> None:
    calls: list[int] = []

    def field(times: Any, states: Any) -> Any:
        calls.append(len(states))
        return np.cos(times)[:, None] * states

    paths = ended(field, solver=solver)
    for path, start in zip(paths, START, strict=True):
        np.testing.assert_allclose(path.state, start * math.exp(math.sin(LAST) - math.sin(FIRST)), rtol=0, atol=1e-6)
        assert path.failure == "" and 1 < path.steps < path.evaluations
    assert set(calls) == {3} and len(calls) == max(path.evaluations for path in paths), "all are asked for together"


def test_too_few_steps_and_what_is_not_finite_are_told_of_the_datum_alone() -> None:
    few = ended(decay, max_steps=2)
    assert [(path.steps, path.failure) for path in few] == [(2, "max_steps")] * 3
    enough = ended(decay)[0]
    assert ended(decay, max_steps=enough.steps)[0].failure == ""

    def broken(times: Any, states: Any) -> Any:
        return np.where((states > 2.2) & (times[:, None] > 0.3), np.nan, -states)

    found = ended(broken)
    assert [path.failure for path in found] == ["", "not finite", ""] and found[1].evaluations == 0


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_a_datum_is_stepped_as_scipy_steps_it_alone(tolerance: float) -> None:
    """States that are small beside an absolute tolerance, and large; the slopes are rounded in the same way."""
    unit = 2.0 ** math.floor(math.log2(tolerance / 100))
    for scale in (1e-3, 1.0, 1e3):
        start = np.array([[scale, -scale]])
        (path,) = integrate_ode(lambda t, y: np.cos(9 * t)[:, None] * y, start, (FIRST, LAST), tolerance, 999, "rk45")
        alone = _in_even_steps(solver_library().RK45)(
            lambda t, y: np.round(np.cos(9 * t) * y / unit) * unit,
            FIRST,
            start[0],
            LAST,
            rtol=tolerance,
            atol=tolerance,
        )
        steps = 0
        while alone.status == "running":
            alone.step()
            steps += 1
        assert (path.steps, path.evaluations, path.failure) == (steps, alone.nfev, "")
        assert np.array_equal(path.state, alone.y)


def test_slopes_are_whole_numbers_of_a_power_of_two_a_hundredth_of_the_tolerance_or_finer() -> None:
    for tolerance, unit in ((100 * UNIT, UNIT), (199 * UNIT, UNIT), (99 * UNIT, UNIT / 2)):
        found = ended(lambda times, states, unit=unit: np.full_like(states, 7.4 * unit), tolerance=tolerance)
        for path, start in zip(found, START, strict=True):
            np.testing.assert_allclose(path.state - start, (LAST - FIRST) * 7 * unit, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS.values())
def test_the_error_that_chooses_a_step_is_the_solver_s_own_up_to_the_next_power_of_two(solver: str) -> None:
    plain = getattr(solver_library(), solver)
    arguments = (lambda t, y: np.sin(9 * y), 0.0, START[0], 1.0)
    ours, theirs = _in_even_steps(plain)(*arguments), plain(*arguments)
    ours.step()
    theirs.step()
    for slopes in (theirs.K, 0 * theirs.K):
        with np.errstate(all="raise"):
            error = [one._estimate_error_norm(slopes, 0.1, np.array([1e-3, 2e-3])) for one in (ours, theirs)]
        assert error[0] == (2.0 ** math.ceil(math.log2(error[1])) if slopes.any() else 0)


def test_an_error_of_the_field_is_raised() -> None:
    def fails(times: Any, states: Any) -> Any:
        if times.max() > 0.3:
            raise ZeroDivisionError
        return -states

    assert isinstance(ended(fails), ZeroDivisionError)
    assert [path.failure for path in ended(decay)] == [""] * 3
