"""The names of forms, dequantisations and solvers, and how a probability flow is solved.

Nothing here imports torch, so that a command line is answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass

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
