"""Stages: replicates are added until a target error is met or the budget ends, and the result says which."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linear_gaussian import Batches, images, objective
from measured import measured
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.estimator import BoundEstimator
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.stages import FEWEST_REPLICATES, next_replicates

LEVELS = images(130)


@given(st.integers(0, 200), st.floats(1e-9, 1e3) | st.just(math.nan), st.floats(1e-9, 1e3), st.integers(0, 200))
def test_a_stage_stays_in_the_budget_and_ends_where_it_should(
    done: int, error: float, target: float, maximum: int
) -> None:
    more = next_replicates(done, error, target, maximum)
    assert 0 <= more <= max(maximum - done, 0)
    if done >= FEWEST_REPLICATES and error <= target:
        assert more == 0
    elif done < maximum:
        assert more > 0
    if done >= FEWEST_REPLICATES:
        assert more <= done


@pytest.mark.parametrize(
    ("done", "error", "maximum", "more"),
    [
        *[(0, math.nan, 64, 8), (3, 0.1, 64, 5), (3, 9.0, 5, 2), (7, 0.5, 64, 1)],
        *[(8, 1.0, 64, 0), (8, 1.2, 64, 4), (8, 1.0001, 64, 1), (8, 3.0, 64, 8), (8, 3.0, 9, 1)],
        *[(20, math.nan, 64, 20), (20, math.inf, 64, 20), (20, 1e200, 64, 20), (40, 3.0, 64, 24)],
        *[(70, 3.0, 64, 0), (70, 0.5, 64, 0)],
    ],
)
def test_a_stage_has_as_many_replicates_as_the_error_asks_for(
    done: int, error: float, maximum: int, more: int
) -> None:
    """``done (error/target)^2`` in all, from 8 to twice as many, and no more than the maximum."""
    assert next_replicates(done, error, 1.0, maximum) == more
    assert next_replicates(done, 0.01 * error, 0.01, maximum) == more


@given(st.floats(1.0001, 10), st.integers(8, 10_000))
def test_stages_of_a_known_variance_come_to_an_end(ratio: float, done: int) -> None:
    """With an error that falls as it should, the target is met after the doublings that it takes, and one more."""
    error = ratio
    for _ in range(2 * math.ceil(math.log2(10)) + 2):
        more = next_replicates(done, error, 1.0, 10**9)
        if more == 0:
            break
        error *= math.sqrt(done / (done + more))
        done += more
    assert error <= 1.0 + 1e-9


def estimate(**stages: Any) -> LikelihoodReport:
    return measured(BoundEstimator(objective(), len(LEVELS)), Batches(LEVELS), **stages)


def test_a_target_in_reach_is_reached_and_one_out_of_reach_is_said_not_to_be() -> None:
    first = estimate()
    target = first.standard_error / 1.3
    report = estimate(target=target)
    assert report.reached and report.standard_error <= target < first.standard_error and report.replicates > 8

    report = estimate(target=1e-6, max_replicates=11)
    assert not report.reached and report.details["target"]["ended_by"] == "max_replicates"
    assert report.replicates == 11


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_a_target_that_is_no_error_is_refused(target: float) -> None:
    with pytest.raises(ConfigurationError, match="target standard error"):
        next_replicates(8, 0.1, target, 64)
