r"""The log-likelihood of the probability-flow ODE (SDE section 4.3 and eq. 13; Chen et al., arXiv 1806.07366, eq. 8).

The flow from z_0 to z_1 has the marginals of the diffusion. Written in gamma it knows nothing of the schedule but its
endpoints, and no derivative of it is needed:

    dz/dgamma = f(z, gamma) = 1/2 sigma (eps_hat(z, gamma) - sigma z),
    log p_0(z_0) = log N(z_1; 0, I) + int_{gamma_0}^{gamma_1} div f dgamma.

In gamma the right-hand side is of order one per dimension from end to end, while in t a steep schedule hides all of
its work in a few percent of the interval; the adaptive solver would have to find it there, at the price of rejected
steps.

Where each pixel has a gamma of its own, the noise is diagonal and the flow is in t, with a factor ``gamma'(t)``.

State and log-density are integrated together, in float64, each datum with steps of its own, so that a datum's value
does not depend on what else is in its batch. The network runs in float64 too, in ``eval`` mode: an adaptive solver
amplifies rounding, and where float32 rounds depends on the batch.

Sources: SDE is Song et al., arXiv 2011.13456; the stochastic divergence is FFJORD's, Grathwohl et al., arXiv
1810.01367.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdm_hub.diffusion.draws import image_generator, normal_noise, uniform_noise
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.gaussian import broadcast, sigma, sum_dimensions
from vdm_hub.diffusion.gaussian_process import BoundGaussian, GaussianProcess, gaussian_of
from vdm_hub.diffusion.latent_process import LatentProcess
from vdm_hub.diffusion.noise_schedules import gamma_and_derivative
from vdm_hub.errors import ConfigurationError, NonFiniteLossError
from vdm_hub.likelihood.dequantization import dequantization, draw_of_latents
from vdm_hub.likelihood.lockstep import Array, Trajectory, integrate_ode, solver_library
from vdm_hub.likelihood.measurement import Measured, Measurement
from vdm_hub.likelihood.protocol import FlowSettings
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.models.calls import CountedNetwork
from vdm_hub.objectives.variational_bound import Batch, Terms, VDMObjective, check_nothing_given

COARSER, COARSEST = 10, 0.5
"""The factor on the tolerance of the second solution, by which a figure's numerical error is estimated, and the most
that this tolerance may be: above, the second is finer by that factor instead."""
_DEQUANTIZATION_DRAWS, _PROBE_DRAWS, _CONTEXT_DRAWS = 0, 1, 2


@dataclass(frozen=True)
class FlowDensity:
    """``log p_0(z_0)`` in its two parts, each per datum, (B,), float64, in nats.

    Attributes:
        base_density: ``log N(z_1; 0, I)`` where the flow ends.
        volume_change: ``int div f dgamma`` along the way.
        steps: Of the solver, (B,), float64.
        evaluations: Of the network, likewise.
    """

    base_density: Tensor
    volume_change: Tensor
    steps: Tensor
    evaluations: Tensor

    @property
    def log_density(self) -> Tensor:
        """``log p_0(z_0)``, (B,), nats."""
        return self.base_density + self.volume_change


def flow_density(
    bound: BoundGaussian,
    network: Callable[[Tensor, Tensor], Tensor],
    z_0: Tensor,
    probes: Tensor | None,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
    solver: str = "rk45",
    indices: Sequence[int] | None = None,
) -> FlowDensity:
    """``log p_0(z_0)`` of the flow that the network defines, in nats, up to the solver's tolerance.

    Args:
        bound: A Gaussian process, bound to these data.
        network: ``(sample (B, *data), timestep (B,)) -> output (B, *data)``, differentiable, in the process's target.
        z_0: Latents at time 0, (B, *data), on the process's device.
        probes: (P, B, *data), with ``E v v' = I``; ``None`` for the exact divergence.
        tolerance: See `ProbabilityFlow`.
        max_steps: See `ProbabilityFlow`.
        solver: See `ProbabilityFlow`.
        indices: The images' numbers, (B,), for messages.

    Raises:
        NonFiniteLossError: The flow of a datum is not finite; the message names the image.
        ConfigurationError: A datum needs more than ``max_steps`` steps.

    >>> from vdm_hub import GaussianProcess, LinearSchedule
    >>> process = GaussianProcess.from_fields({}, LinearSchedule(-8.0, 8.0))
    >>> standard_normal = lambda z, timestep: sigma(process.conditioning.inverse(timestep))[:, None] * z
    >>> density = flow_density(process.bind(None, {})[1], standard_normal, torch.zeros(1, 2), probes=None)
    >>> round(float(density.log_density), 5)  # log N(0; 0, I) in two dimensions
    -1.83788
    """
    shape, dimensions, device = z_0.shape, z_0[0].numel(), z_0.device
    interval, path = _path(bound)

    def field(times: Array, states: Array) -> Array:
        state = torch.from_numpy(states).to(device)
        with torch.enable_grad():
            z = state[:, :-1].reshape(shape).requires_grad_()
            gamma, rate = (broadcast(value, z) for value in path(torch.from_numpy(times).to(device)))
            eps_hat, _ = bound.predict_noise(network, z, gamma)
            velocity = 0.5 * rate * sigma(gamma) * (eps_hat - sigma(gamma) * z)
            divergence = _divergence(velocity, z, probes)
        slope = torch.cat([velocity.detach().flatten(1), divergence[:, None] / math.sqrt(dimensions)], dim=1)
        return slope.cpu().numpy()

    # Over sqrt(D): in the norm of a step's error, a mean over the state, the log-density counts as much as all of z.
    start = torch.cat([z_0.double().flatten(1), z_0.new_zeros(shape[0], 1, dtype=torch.float64)], dim=1)
    paths = integrate_ode(field, start.cpu().numpy(), interval, tolerance, max_steps, solver)
    _check_paths(paths, indices or range(shape[0]), tolerance, max_steps)
    end = torch.from_numpy(np.stack([one.state for one in paths]))
    base = -0.5 * (end[:, :-1] ** 2 + math.log(2 * math.pi)).sum(1)
    counts = (torch.tensor([one[i] for one in paths], dtype=torch.float64) for i in (1, 2))
    return FlowDensity(base, end[:, -1] * math.sqrt(dimensions), *counts)


def _path(bound: BoundGaussian) -> tuple[tuple[float, float], Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The interval to integrate over, and gamma and its rate there: in gamma itself, or where it has many, in t."""
    schedule = bound.process.scalar_gamma
    if schedule is None:
        return (0.0, 1.0), partial(gamma_and_derivative, bound.gamma)
    return schedule.endpoints(), lambda gamma: (gamma, torch.ones_like(gamma))


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


def _check_paths(paths: Sequence[Trajectory], indices: Sequence[int], tolerance: float, max_steps: int) -> None:
    for index, path in zip(indices, paths, strict=True):
        if path.failure == "max_steps":
            raise ConfigurationError(
                f"the probability-flow ODE of image {index} needs more than {max_steps} steps at a tolerance of "
                f"{tolerance:g}: raise max_steps or the tolerance."
            )
        if path.failure:
            raise NonFiniteLossError(
                f"the probability-flow ODE of image {index} became NaN or infinite. The model's weights or its "
                f"schedule's endpoints are at fault: evaluate an earlier checkpoint, or look at that image."
            )


# ---- images -------------------------------------------------------------------------------------------------------


class FlowMeasurement(Measurement):
    """The method ``ode``, the probability-flow likelihood: ``E_q[log p_0(z_0)] + H(q)``, estimated.

    The number is that of another model than the bound's: the ODE's, with the same network. Of this model it is
    three things at once. ``log p_0(z_0)`` is exact up to the tolerance, where the divergence is; a probe's noise is
    unbiased at each point of the path. Its expectation over the dequantisation is a lower bound of ``log P(x)``, the
    mass that the model's density has in the level's bin, as any dequantised density is. And one draw of it bounds
    nothing. So ``is_bound`` is false: up to the solver's error, only the expectation is a bound.

    Terms in nats, whose sum estimates ``-log P(x)`` from above in expectation: ``base_density``, ``-log N(z_1; 0,
    I)``; ``volume_change``, minus the integrated divergence; ``dequantization``, minus the entropy of q(z_0|x); and
    what the schedule adds, where it draws a latent of its own from q.

    Of a latent VDM it is the flow of the latents: ``z_0 = alpha_0 y`` of a draw from the encoder's ``q(y|x)``, whose
    entropy, as ``latent``, is in the place of the dequantisation's, and ``reconstruction`` is ``-log p(x|y)``.

    The figure's own numerical error is estimated: in replicate 0 each ODE is solved once more, at `COARSER` times the
    tolerance (where that were above `COARSEST`, at a tenth of it), and
    ``details["probability_flow"]["numerical_error"]`` is the mean over images of the change in bits/dim, each taken
    as positive.

    Args:
        objective: The model; its process Gaussian. It is evaluated outside autocast.
        flow: The protocol.
        seed: Of all draws.

    Raises:
        ConfigurationError: The process is another, or the solvers' library is missing.
    """

    method, is_bound, transitions = "ode", False, None
    objective: VDMObjective

    def __init__(self, objective: VDMObjective, flow: FlowSettings | None = None, seed: int = 0) -> None:
        super().__init__(objective, seed)
        self.flow = flow or FlowSettings()
        flowing(objective.process)
        solver_library()
        self._copies: tuple[ForwardProcess, nn.Module] | None = None

    @property
    def model(self) -> tuple[ForwardProcess, nn.Module]:
        """The objective's process and network, or copies in float64, of the weights at the first call."""
        process, network = self.objective.process, self.objective.network
        if self.flow.dtype == "float32":
            return process, network
        if self._copies is None:
            copies = copy.deepcopy((process, network))
            for part in copies:
                part.double().eval().requires_grad_(False)
            self._copies = copies
        return self._copies

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of one dequantised draw of each image, by its ODE."""
        return self._checked(batch, replicate, lambda flow: self._measure(batch, replicate, flow))

    def _measure(self, batch: Batch, replicate: int, flow: FlowSettings) -> Measured:
        draw = draw_flow(*self.model, batch, flow, (self.seed, replicate), 0)
        counts = {"evaluations": draw.evaluations, "steps": draw.steps}
        return Measured(draw.terms | {draw.drawn: -draw.entropy}, counts)

    def _checked(self, batch: Batch, replicate: int, solve: Callable[[FlowSettings], Measured]) -> Measured:
        """The result at the protocol's tolerance, and its distance from that at another, in replicate 0."""
        found = solve(self.flow)
        counts = dict(found.diagnostics)
        change = counts["second_evaluations"] = torch.zeros_like(counts["evaluations"])
        if replicate == 0:
            coarser = COARSER * self.flow.tolerance
            second = coarser if coarser <= COARSEST else self.flow.tolerance / COARSER
            again = solve(replace(self.flow, tolerance=second))
            total, other = (torch.stack(list(one.terms.values())).sum(0) for one in (found, again))
            change = (total - other).abs() / (batch["levels"][0].numel() * math.log(2))
            counts["second_evaluations"] = again.diagnostics["evaluations"]
            counts["evaluations"] = counts["evaluations"] + again.diagnostics["evaluations"]
        return Measured(found.terms, counts | {"numerical_change": change})

    def protocol(self) -> dict[str, Any]:
        """The fields of `ProbabilityFlow`."""
        of_latents = isinstance(self.objective.process, LatentProcess)
        return {"probability_flow": asdict(self.flow) | ({"dequantization": "none: q(y|x)"} if of_latents else {})}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The protocol with the solver's steps and evaluations, and the figure's numerical error in bits/dim."""
        error = float(diagnostics["numerical_change"][0].mean())
        protocol = self.protocol()["probability_flow"]
        return {"probability_flow": protocol | steps_taken(diagnostics) | {"numerical_error": error}}

    def notes(self, report: LikelihoodReport) -> list[str]:
        """A note on the kind of number."""
        of_latents = isinstance(self.objective.process, LatentProcess)
        over = "the encoder's draws" if of_latents else "the dequantisation"
        return [f"the ODE is another model than the bound's; its expectation over {over} bounds -log2 p(x)"]


def steps_taken(diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
    """The mean and the most steps over all solves at the protocol's tolerance, and the network evaluations of one."""
    steps, evaluations = diagnostics["steps"], diagnostics["evaluations"].sum()
    evaluations = evaluations - diagnostics.get("second_evaluations", torch.zeros(())).sum()
    return {
        "steps_mean": float(steps.mean()),
        "steps_max": int(steps.max()),
        "evaluations_per_solve": float(evaluations) / steps.numel(),
    }


@dataclass(frozen=True)
class FlowDraw:
    """One draw per image, each (B,): ``-log p_0(z_0)`` in terms, ``log q(z_0|x)``, the entropy of q, and counts.

    Of latents ``-log p(x|y)`` is among the terms, and q that of the encoder; ``drawn`` names the term of q.
    """

    terms: Terms
    log_q: Tensor
    entropy: Tensor
    steps: Tensor
    evaluations: Tensor
    drawn: str = "dequantization"


def flowing(process: ForwardProcess) -> GaussianProcess:
    """The Gaussian process whose flow a likelihood is of: of the data themselves, or of their latents.

    Raises:
        ConfigurationError: It is another.
    """
    return process.gaussian if isinstance(process, LatentProcess) else gaussian_of(process)


def draw_flow(
    process: ForwardProcess, network: nn.Module, batch: Batch, flow: FlowSettings, key: tuple[int, int], draw: int
) -> FlowDraw:
    """Dequantise each image of a batch once, or draw its latents, and solve its ODE.

    The dequantisation is a function of (seed, replicate, image, draw), the probes of (seed, replicate, image): all
    draws of a replicate share them, so that in importance weights their noise is common to a large part.

    Args:
        process: Of the model.
        network: Its network.
        batch: The images, with ``indices``.
        flow: The protocol.
        key: (seed, replicate).
        draw: Which of an image's draws.
    """
    check_nothing_given(process, batch)
    gaussian, indices = flowing(process), batch["indices"].tolist()

    def generators(draw: int, kind: int) -> list[torch.Generator]:
        return [image_generator(*key, i, draw, kind) for i in indices]

    with torch.autocast(batch["levels"].device.type, enabled=False):
        x, scale = _points(process, batch["levels"])
        shape, device = tuple(x.shape), x.device
        context = gaussian.draw_context(shape, generators(draw, _CONTEXT_DRAWS), device)
        probes = _probes(flow, shape, generators(0, _PROBE_DRAWS), x)
        noise = generators(draw, _DEQUANTIZATION_DRAWS)
        extras, bound = gaussian.bind(x, context)
        gamma_0 = broadcast(bound.gamma(x.new_zeros(len(x))), x)
        if scale is None:
            uniform = uniform_noise(shape, noise, device, torch.float64)
            start = dequantization(flow.dequantization).draw(x, gamma_0, gaussian.scaling.spacing, uniform)
        else:
            eps = normal_noise(shape, noise, device, torch.float64)
            start = draw_of_latents(x, scale, gamma_0, eps)
            extras = {"reconstruction": _not_decoded(process, batch["levels"], x + scale * eps)} | extras
        counted = CountedNetwork(network, batch)
        density = flow_density(bound, counted, start.z_0, probes, flow.tolerance, flow.max_steps, flow.solver, indices)
    terms = {"base_density": -density.base_density, "volume_change": -density.volume_change} | extras
    drawn = "dequantization" if scale is None else "latent"
    return FlowDraw(terms, start.log_q, start.entropy, density.steps, density.evaluations, drawn)


@torch.no_grad()
def _points(process: ForwardProcess, levels: Tensor) -> tuple[Tensor, Tensor | None]:
    """The data in float64, without a deviation; of a latent process the mean and the deviation of ``q(y|x)``."""
    if not isinstance(process, LatentProcess):
        return flowing(process).encode(levels, torch.float64), None
    mean, scale = process.posterior(process.encode(levels))
    return mean.double(), scale.double()


@torch.no_grad()
def _not_decoded(process: ForwardProcess, levels: Tensor, y: Tensor) -> Tensor:
    """``-log p(x|y)``, nats, (B,)."""
    assert isinstance(process, LatentProcess)
    return -process.coder.log_likelihood(levels, process.unscaled(y)).double()


def _probes(
    flow: FlowSettings, shape: tuple[int, ...], generators: list[torch.Generator], like: Tensor
) -> Tensor | None:
    if flow.divergence == "exact":
        return None
    if flow.divergence == "gaussian":
        draws = [normal_noise(shape, generators, like.device, torch.float64) for _ in range(flow.probes)]
        return torch.stack(draws)
    uniforms = [uniform_noise(shape, generators, like.device, torch.float64) for _ in range(flow.probes)]
    return torch.where(torch.stack(uniforms) < 0.5, -1.0, 1.0).double()
