r"""The number of replicates for a target: evaluations are added in stages, each planned from the error so far.

The error of a mean of R independent replicates falls as ``R^{-1/2}``, so a target asks for ``R (error/target)^2``. The
error itself is uncertain, by a share of about ``(2 (R-1))^{-1/2}``, so no stage more than doubles what there is.
"""

from __future__ import annotations

import math

from vdm_hub.errors import ConfigurationError

FEWEST_REPLICATES = 8
"""The fewest replicates that give a standard error to stop by."""


def next_replicates(done: int, standard_error: float, target: float, maximum: int) -> int:
    """The number of replicates that are to follow: none once the target is met, or the maximum spent.

    Args:
        done: Replicates so far.
        standard_error: Of the mean, from them; NaN or infinite where they are too few.
        target: The standard error that is wanted, in the same units.
        maximum: Of replicates in all.

    Raises:
        ConfigurationError: The target is not positive.

    >>> [next_replicates(8, error, target=0.005, maximum=64) for error in (0.010, 0.006, 0.005)]
    [8, 4, 0]
    """
    if not target > 0:
        raise ConfigurationError(f"the target standard error is {target}: give a positive number of bits/dim.")
    left = max(maximum - done, 0)
    if done < FEWEST_REPLICATES:
        return min(FEWEST_REPLICATES - done, left)
    ratio = standard_error / target
    needed = math.ceil(min(2 * done, done * (ratio * ratio)))  # twice as many where the error is NaN or infinite, too
    return min(max(needed - done, 0), left)
