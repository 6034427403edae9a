"""The names of forms, dequantisations and solvers, and the settings of probability flows and classifications.

Nothing here imports torch, so that a command line is answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import check_fields, option

FORMS = ("denoising_matching", "consistency", "joint")
"""The forms of the bound: see `vdm_hub.decompositions`."""
DEQUANTIZATIONS = ("uniform", "truncated_normal")
"""The ways from levels to z_0: see `vdm_hub.likelihood.dequantization`."""
SOLVERS = {"dop853": "DOP853", "rk45": "RK45"}
"""The adaptive explicit Runge-Kutta methods of Dormand and Prince, of order 8(5, 3) and 5(4), and scipy's names."""
DTYPES = ("float64", "float32")
"""The types that the network may compute in."""
DIVERGENCES = ("rademacher", "gaussian", "exact")
"""The ways to find ``div f``: by random probes (Hutchinson's estimator), or a dimension at a time."""


@dataclass(frozen=True)
class FlowSettings:
    """The settings of an ODE of the probability flow; their meaning is described at `vdm_hub.ProbabilityFlow`."""

    dequantization: str = option(
        "truncated_normal",
        "the ODE: from levels to z_0, by uniform or truncated_normal noise",
        choices=DEQUANTIZATIONS,
    )
    divergence: str = option(
        "rademacher",
        "the ODE: by rademacher or gaussian probes (Hutchinson's estimator), or exact, one backward pass a dimension",
        choices=DIVERGENCES,
    )
    probes: int = option(1, "the ODE: probes averaged, each one more backward pass", at_least=1, at_most=10**6)
    tolerance: float = option(1e-5, "the ODE: of a step's error, absolute and relative", above=0, below=1)
    max_steps: int = option(1000, "the ODE: the most steps of one datum", at_least=1, at_most=10**6)
    solver: str = option("rk45", "the ODE: an adaptive method, rk45 or dop853", choices=tuple(SOLVERS))
    dtype: str = option("float64", "the ODE: the network's arithmetic, float64 or float32", choices=DTYPES)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ClassificationEffort:
    """The network evaluations that a classification may take.

    Attributes:
        budget: The most evaluations of each image, over all candidates; 20 a candidate where not given.
        confidence: The probability, by the draws' own errors, at which an image is done: that the candidate found best
            is the one that endless draws would find. ``None`` drops no candidate: all have the whole budget.
        first_draws: Of each candidate, before any is dropped.
        pilot_evaluations: About how many, in no result, teach where times are best drawn and how much a difference
            scatters; 0 for none.

    Raises:
        ConfigurationError: A number is out of range.

    >>> ClassificationEffort(budget=100).confidence
    0.65
    """

    budget: int | None = option(
        None, "the most evaluations of each image, over all candidates; 20 a candidate", at_least=2, at_most=10**9
    )
    confidence: float | None = option(
        0.65, "an image is done where its best candidate is the best with this probability", above=0.5, below=1
    )
    first_draws: int = option(2, "draws before a candidate may be dropped", at_least=1, at_most=10**6)
    pilot_evaluations: int = option(
        2048,
        "about how many evaluations, in no result, say where times are drawn; 0 for none",
        at_least=0,
        at_most=10**9,
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def budget_for(self, candidates: int) -> int:
        """The most evaluations of each image for so many candidates.

        Raises:
            ConfigurationError: They are fewer than the first draws.
        """
        budget = self.budget or 20 * candidates
        if budget < (least := candidates * self.first_draws):
            raise ConfigurationError(
                f"budget is {budget}, and {self.first_draws} first draws of each of {candidates} candidates take "
                f"{least}: give at least so many, or fewer candidates or first draws."
            )
        return budget
