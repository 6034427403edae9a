r"""The log-likelihood of the probability-flow ODE (SDE section 4.3 and eq. 13; Chen et al., arXiv 1806.07366, eq. 8).

The flow from z_0 to z_1 has the marginals of the diffusion. Written in gamma it knows nothing of the schedule but its
endpoints, and no derivative of it is needed:

    dz/dgamma = f(z, gamma) = 1/2 sigma (eps_hat(z, gamma) - sigma z),
    log p_0(z_0) = log N(z_1; 0, I) + int_{gamma_0}^{gamma_1} div f dgamma.

In gamma the right-hand side is of order one per dimension from end to end, while in t a steep schedule hides all of
its work in a few percent of the interval; the adaptive solver would have to find it there, at the price of rejected
steps.

State and log-density are integrated together, in float64, each datum with steps of its own, so that a datum's value
does not depend on what else is in its batch. The network runs in its own precision and in ``eval`` mode.

Sources: SDE is Song et al., arXiv 2011.13456; the stochastic divergence is FFJORD's, Grathwohl et al., arXiv
1810.01367.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import normal_noise, uniform_noise
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.gaussian import alpha, broadcast, sigma, sum_dimensions
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.errors import ConfigurationError, NonFiniteLossError, unknown_name
from vdm_hub.likelihood.dequantization import DEQUANTIZATIONS, dequantization
from vdm_hub.likelihood.per_image import CountedNetwork, Measured, Measurement, Terms, image_generator
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.variational_bound import Batch, VDMObjective

SOLVERS = {"tsit5": "Tsit5", "dopri5": "Dopri5"}
"""Adaptive methods, by their names and torchode's."""
DIVERGENCES = ("rademacher", "gaussian", "exact")
_DEQUANTIZATION_DRAWS, _PROBE_DRAWS = 0, 1


@dataclass(frozen=True)
class ProbabilityFlow:
    """The protocol of a probability-flow likelihood; a report carries it whole.

    Attributes:
        dequantization: ``truncated_normal`` or ``uniform``: see `vdm_hub.likelihood.dequantization`.
        divergence: ``rademacher`` or ``gaussian`` probes (Hutchinson: ``E v' J v = tr J``, unbiased), or ``exact``,
            which costs one backward pass per dimension.
        probes: How many probes are averaged, each one more backward pass.
        tolerance: Of a step's error, absolute and relative: of z as the root mean square over dimensions, and of the
            log-density in nats per dimension, whichever is larger. Below 1e-6 a float32 network's rounding is in the
            way.
        max_steps: Steps that one datum may take.
        solver: ``tsit5`` (Tsitouras) or ``dopri5`` (Dormand and Prince), both adaptive and of order 5(4).

    Raises:
        ConfigurationError: A name is unknown or a number out of range.

    >>> flow = ProbabilityFlow(divergence="exact")
    >>> flow.dequantization, flow.tolerance, flow.solver
    ('truncated_normal', 1e-05, 'tsit5')
    """

    dequantization: str = "truncated_normal"
    divergence: str = "rademacher"
    probes: int = 1
    tolerance: float = 1e-5
    max_steps: int = 1000
    solver: str = "tsit5"

    def __post_init__(self) -> None:
        if self.dequantization not in DEQUANTIZATIONS:
            raise unknown_name("dequantization", self.dequantization, DEQUANTIZATIONS)
        if self.divergence not in DIVERGENCES:
            raise unknown_name("divergence", self.divergence, DIVERGENCES)
        if self.solver not in SOLVERS:
            raise unknown_name("solver", self.solver, SOLVERS)
        if self.probes < 1 or self.max_steps < 1:
            raise ConfigurationError(f"probes is {self.probes} and max_steps {self.max_steps}: give at least 1 each.")
        if not 0 < self.tolerance < 1:
            raise ConfigurationError(f"tolerance is {self.tolerance}: give a value between 0 and 1, such as 1e-5.")


@dataclass(frozen=True)
class FlowDensity:
    """``log p_0(z_0)`` in its two parts, each per datum, (B,), float64, in nats.

    Attributes:
        base_density: ``log N(z_1; 0, I)`` where the flow ends.
        volume_change: ``int div f dgamma`` along the way.
        steps: Steps of the solver, accepted and rejected ones, (B,).
    """

    base_density: Tensor
    volume_change: Tensor
    steps: Tensor

    @property
    def log_density(self) -> Tensor:
        """``log p_0(z_0)``, (B,), nats."""
        return self.base_density + self.volume_change


def scalar_gaussian(process: ForwardProcess) -> GaussianProcess:
    """The process, where one gamma a time describes it.

    Raises:
        ConfigurationError: It is another process, or its gamma differs between pixels or data.
    """
    if isinstance(process, GaussianProcess) and process.schedule.scalar:
        return process
    name = type(getattr(process, "schedule", process)).__name__
    raise ConfigurationError(
        f"{name} is not a Gaussian process with one gamma per time, which this likelihood needs: ask for the "
        f"variational bound instead (method='bound')."
    )


def predict_noise(process: GaussianProcess, network: Callable[..., Tensor], z: Tensor, gamma: Tensor) -> Tensor:
    """``eps_hat(z, gamma)`` whatever the network's target is: z of shape (B, *data), gamma of shape (B,)."""
    return predict_both(process, network, z, gamma)[0]


def predict_both(
    process: GaussianProcess, network: Callable[..., Tensor], z: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """`predict_noise`, and what the network says of the reverse step's variance, where that is learned."""
    parameterization = process.parameterization
    level = broadcast(gamma, z)
    output = network(parameterization.input_scale(level) * z, process.conditioning(gamma))
    mean, variance = process.split(output, z)
    mean = parameterization.output_scale(level) * mean
    if process.clipping is None:
        return parameterization.eps_hat(mean, z, level), variance
    x_hat = process.clipping(parameterization.x_hat(mean, z, level))
    return (z - alpha(level) * x_hat) / sigma(level), variance


def flow_density(
    process: GaussianProcess,
    network: Callable[[Tensor, Tensor], Tensor],
    z_0: Tensor,
    probes: Tensor | None,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    solver: str = "tsit5",
    indices: Sequence[int] | None = None,
) -> FlowDensity:
    """``log p_0(z_0)`` of the flow that the network defines, in nats, up to the solver's tolerance.

    Args:
        process: A Gaussian process with a scalar schedule.
        network: ``(sample (B, *data), timestep (B,)) -> output (B, *data)``, differentiable, in the process's target.
        z_0: Latents at gamma_0, (B, *data), on the process's device.
        probes: (P, B, *data), with ``E v v' = I``; ``None`` for the exact divergence.
        tolerance: See `ProbabilityFlow`.
        max_steps: See `ProbabilityFlow`.
        solver: See `ProbabilityFlow`.
        indices: The images' numbers, (B,), for messages.

    Raises:
        NonFiniteLossError: The flow of a datum is not finite; the message names the image.
        ConfigurationError: A datum needs more than ``max_steps`` steps.

    >>> from vdm_hub.diffusion.noise_schedules import LinearSchedule
    >>> process = GaussianProcess.from_fields({}, LinearSchedule(-8.0, 8.0))
    >>> standard_normal = lambda z, timestep: sigma(process.conditioning.inverse(timestep))[:, None] * z
    >>> density = flow_density(process, standard_normal, torch.zeros(1, 2), probes=None)
    >>> round(float(density.log_density), 5)  # log N(0; 0, I) in two dimensions
    -1.83788
    """
    shape, dimensions = z_0.shape, z_0[0].numel()

    def field(gamma: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            z = state[:, :-1].detach().reshape(shape).requires_grad_()
            level = broadcast(sigma(gamma), z)
            velocity = 0.5 * level * (predict_noise(process, network, z, gamma) - level * z)
            divergence = _divergence(velocity, z, probes)
        return torch.cat([velocity.detach().flatten(1), divergence[:, None] / dimensions], dim=1)

    start = torch.cat([z_0.double().flatten(1), z_0.new_zeros(shape[0], 1, dtype=torch.float64)], dim=1)
    interval = _endpoints(process, z_0.device)
    end, steps = _solve(field, start, interval, tolerance, max_steps, solver, indices or range(shape[0]))
    z_1 = end[:, :-1]
    base = -0.5 * (z_1**2 + math.log(2 * math.pi)).sum(1)
    return FlowDensity(base, end[:, -1] * dimensions, steps)


def _divergence(velocity: Tensor, z: Tensor, probes: Tensor | None) -> Tensor:
    """``tr dv/dz`` per datum, (B,): the mean of ``v' J v`` over probes, exact where these are the whole basis."""
    directions = _scaled_basis(z) if probes is None else iter(probes)
    products = []
    for direction in directions:
        (gradient,) = torch.autograd.grad(velocity, z, direction, retain_graph=True)
        products.append(sum_dimensions(gradient * direction))
    return torch.stack(products).mean(0)


def _scaled_basis(z: Tensor) -> Iterator[Tensor]:
    """``sqrt(D) e_i`` for every dimension i: probes whose mean of ``v v'`` is the identity, and no estimate of it."""
    dimensions = z[0].numel()
    for i in range(dimensions):
        direction = torch.zeros_like(z)
        direction.view(z.shape[0], -1)[:, i] = math.sqrt(dimensions)
        yield direction


def _endpoints(process: GaussianProcess, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        first, last = process.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)).double()
    return first, last


def _solve(
    field: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    interval: tuple[Tensor, Tensor],
    tolerance: float,
    max_steps: int,
    method: str,
    indices: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The state at the interval's end and the steps taken, per datum."""
    torchode = _solver_library()
    first, last = (time.expand(start.shape[0]).contiguous() for time in interval)
    term = torchode.ODETerm(field, with_stats=False)
    controller = torchode.IntegralController(tolerance, tolerance, term=term, norm=_error_norm).to(start.device)
    solver = torchode.AutoDiffAdjoint(getattr(torchode, SOLVERS[method])(term=term), controller, max_steps=max_steps)
    with torch.no_grad():
        solution = solver.solve(torchode.InitialValueProblem(y0=start, t_start=first, t_end=last))
    failed = (solution.status != torchode.status_codes.SUCCESS).nonzero().flatten().tolist()
    if not failed:
        return solution.ys[:, -1], solution.stats["n_steps"]
    if int(solution.status[failed[0]]) == torchode.status_codes.REACHED_MAX_STEPS:
        raise ConfigurationError(
            f"the probability-flow ODE of image {indices[failed[0]]} needs more than {max_steps} steps at a tolerance "
            f"of {tolerance:g}: raise max_steps or the tolerance."
        )
    raise NonFiniteLossError(
        f"the probability-flow ODE of image {indices[failed[0]]} became NaN or infinite. The model's weights or its "
        f"schedule's endpoints are at fault: evaluate an earlier checkpoint, or look at that image."
    )


def _solver_library() -> Any:
    """torchode, the one library whose adaptive steps are per datum; torchdiffeq's and scipy's are the batch's.

    It is an extra, as it pins an old typeguard that not every environment can hold.
    """
    try:
        return importlib.import_module("torchode")  # by its name: the carried code is to need no more than diffusers
    except ImportError as error:
        raise ConfigurationError(
            "the probability-flow likelihood needs the ODE solvers of torchode, which are not installed: "
            "run `pip install torchode`."
        ) from error


def _error_norm(error: Tensor) -> Tensor:
    """The larger of z's root mean square and the log-density's own: averaged with z's, it would count for nothing."""
    return torch.maximum(error[:, :-1].square().mean(1).sqrt(), error[:, -1].abs())


# ---- images -------------------------------------------------------------------------------------------------------


class FlowMeasurement(Measurement):
    """The method ``ode``, the probability-flow likelihood: ``E_q[log p_0(z_0)] + H(q)``, estimated.

    The number is that of another model than the bound's: the ODE's, with the same network. Of this model it is
    three things at once. ``log p_0(z_0)`` is exact up to the tolerance, where the divergence is; a probe's noise is
    unbiased at each point of the path. Its expectation over the dequantisation is a lower bound of ``log P(x)``, the
    mass that the model's density has in the level's bin, as any dequantised density is. And one draw of it bounds
    nothing. So ``is_bound`` is false: up to the solver's error, only the expectation is a bound.

    Terms in nats, whose sum estimates ``-log P(x)`` from above in expectation: ``base_density``, ``-log N(z_1; 0,
    I)``; ``volume_change``, minus the integrated divergence; ``dequantization``, minus the entropy of q(z_0|x).

    Args:
        objective: The model; its process Gaussian with a scalar schedule. It is evaluated outside autocast.
        flow: The protocol.
        seed: Of all draws.

    Raises:
        ConfigurationError: The process has no scalar gamma, or the solvers' library is missing.
    """

    method, is_bound, transitions = "ode", False, None
    objective: VDMObjective

    def __init__(self, objective: VDMObjective, flow: ProbabilityFlow | None = None, seed: int = 0) -> None:
        super().__init__(objective, seed)
        self.flow = flow or ProbabilityFlow()
        scalar_gaussian(objective.process)
        _solver_library()

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """One dequantised draw of each image, and its ODE."""
        network = CountedNetwork(self.objective.network, batch)
        draw = draw_flow(self.objective, batch, self.flow, (self.seed, replicate), 0, network)
        counts = {"evaluations": network.per_image(len(draw.log_q)), "steps": draw.steps}
        return Measured(draw.terms | {"dequantization": -draw.entropy}, counts)

    def protocol(self) -> dict[str, Any]:
        """The fields of `ProbabilityFlow`."""
        return {"probability_flow": asdict(self.flow)}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The protocol with the solver's steps and evaluations."""
        return {"probability_flow": asdict(self.flow) | steps_taken(diagnostics)}

    def notes(self, report: LikelihoodReport) -> list[str]:
        """What kind of number it is."""
        return ["the ODE is another model than the bound's; its expectation over the dequantisation bounds -log2 p(x)"]


def steps_taken(diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mean and most steps over all solves, and network evaluations per solve."""
    steps, evaluations = diagnostics["steps"], diagnostics["evaluations"]
    return {
        "steps_mean": float(steps.mean()),
        "steps_max": int(steps.max()),
        "evaluations_per_solve": float(evaluations.sum()) / steps.numel(),
    }


@dataclass(frozen=True)
class FlowDraw:
    """One draw per image: ``-log p_0(z_0)`` in terms, ``log q(z_0|x)``, the entropy of q, and the steps, each (B,)."""

    terms: Terms
    log_q: Tensor
    entropy: Tensor
    steps: Tensor


def draw_flow(
    objective: VDMObjective,
    batch: Batch,
    flow: ProbabilityFlow,
    key: tuple[int, int],
    draw: int,
    network: CountedNetwork,
) -> FlowDraw:
    """Dequantise each image of a batch once and solve its ODE.

    The dequantisation is a function of (seed, replicate, image, draw), the probes of (seed, replicate, image): all
    draws of a replicate share them, so that in importance weights their noise is common to a large part.

    Args:
        objective: The model.
        batch: The images, with ``indices``.
        flow: The protocol.
        key: (seed, replicate).
        draw: Which of an image's draws.
        network: The model's network on this batch.
    """
    process, indices = scalar_gaussian(objective.process), batch["indices"].tolist()
    x = process.encode(batch["levels"])
    generators = [image_generator(*key, i, draw, _DEQUANTIZATION_DRAWS) for i in indices]
    uniform = uniform_noise(tuple(x.shape), generators, x.device, torch.float64)
    gamma_0, _ = _endpoints(process, x.device)
    dequantized = dequantization(flow.dequantization).draw(x, gamma_0, process.scaling.spacing, uniform)
    probes = _probes(flow, tuple(x.shape), [image_generator(*key, i, 0, _PROBE_DRAWS) for i in indices], x)
    with torch.autocast(x.device.type, enabled=False):
        density = flow_density(
            process, network, dequantized.z_0, probes, flow.tolerance, flow.max_steps, flow.solver, indices
        )
    terms = {"base_density": -density.base_density, "volume_change": -density.volume_change}
    return FlowDraw(terms, dequantized.log_q, dequantized.entropy, density.steps.double())


def _probes(
    flow: ProbabilityFlow, shape: tuple[int, ...], generators: list[torch.Generator], like: Tensor
) -> Tensor | None:
    if flow.divergence == "exact":
        return None
    if flow.divergence == "gaussian":
        draws = [normal_noise(shape, generators, like.device, torch.float64) for _ in range(flow.probes)]
        return torch.stack(draws)
    uniforms = [uniform_noise(shape, generators, like.device, torch.float64) for _ in range(flow.probes)]
    return torch.where(torch.stack(uniforms) < 0.5, -1.0, 1.0).double()
