"""What a likelihood is measured by: the names of methods and forms, and a probability flow's settings.

Nothing here imports torch, so that a command line is answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.fields import whole_number

METHODS = ("bound", "ode", "importance_weighted")
FORMS = ("denoising_matching", "consistency", "joint")
"""Of the bound: see `vdm_hub.objectives.decompositions`."""
DEQUANTIZATIONS = ("uniform", "truncated_normal")
"""From levels to z_0: see `vdm_hub.likelihood.dequantization`."""
SOLVERS = {"dop853": "DOP853", "rk45": "RK45"}
"""Adaptive explicit Runge-Kutta methods of Dormand and Prince, of order 8(5, 3) and 5(4), and scipy's names."""
DTYPES = ("float64", "float32")
"""What the network may compute in."""
DIVERGENCES = ("rademacher", "gaussian", "exact")


@dataclass(frozen=True)
class ProbabilityFlow:
    """The protocol of a probability-flow likelihood; a report carries it whole.

    Attributes:
        dequantization: ``truncated_normal`` or ``uniform``: see `vdm_hub.likelihood.dequantization`.
        divergence: ``rademacher`` or ``gaussian`` probes (Hutchinson: ``E v' J v = tr J``, unbiased), or ``exact``,
            which costs one backward pass per dimension.
        probes: How many probes are averaged, each one more backward pass.
        tolerance: Of a step's error, absolute and relative: of z as the root mean square over dimensions, and of the
            log-density in nats per dimension, the two added in squares.
        max_steps: Steps that one datum may take.
        solver: ``rk45`` or ``dop853``, adaptive methods of Dormand and Prince, of order 5(4) and 8(5, 3), by scipy.
            The second is for smooth fields: with Fourier features of the input it takes more evaluations.
        dtype: What the network computes in: ``float64``, or ``float32``, for its own precision. In float32 rounding,
            amplified by the solver, is an error beside the tolerance's, and figures depend on the batch size by it.

    Raises:
        ConfigurationError: A name is unknown or a number out of range.

    >>> flow = ProbabilityFlow(divergence="exact")
    >>> flow.dequantization, flow.tolerance, flow.solver
    ('truncated_normal', 1e-05, 'rk45')
    """

    dequantization: str = "truncated_normal"
    divergence: str = "rademacher"
    probes: int = 1
    tolerance: float = 1e-5
    max_steps: int = 1000
    solver: str = "rk45"
    dtype: str = "float64"

    def __post_init__(self) -> None:
        if self.dequantization not in DEQUANTIZATIONS:
            raise unknown_name("dequantization", self.dequantization, DEQUANTIZATIONS)
        if self.divergence not in DIVERGENCES:
            raise unknown_name("divergence", self.divergence, DIVERGENCES)
        if self.solver not in SOLVERS:
            raise unknown_name("solver", self.solver, SOLVERS)
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        whole_number("probes", self.probes)
        whole_number("max_steps", self.max_steps)
        if not (isinstance(self.tolerance, Real) and 0 < self.tolerance < 1):
            raise ConfigurationError(f"tolerance is {self.tolerance!r}: give a value between 0 and 1, such as 1e-5.")
