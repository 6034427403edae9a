r"""Importance-weighted bounds: ``log p(x) >= E log 1/K sum_k w_k >= E log w_1`` (Burda et al., arXiv 1509.00519).

The weights ``w = p(x, z) / q(z|x)`` must be exact for their draw: the log-mean-exp rises with K because the weights'
mean is p(x), and noise added to their logarithm raises that mean. So there are two kinds, and no third over estimates
of the bound at random times:

- **chains**: K whole chains of T transitions, ``log w = log p(x, z_0..z_T) - log q(z_0..z_T|x)``, K T evaluations.
- **flows**: K dequantised draws, ``log w = log p_0(z_0) - log q(z_0|x)``, each an ODE. A stochastic divergence is
  noise in the logarithm: its probes are shared by all draws of an image, which takes out what they have in common;
  only the exact divergence leaves no bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import image_generator, normal_noise
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.diffusion.gaussian import sum_dimensions
from vdm_hub.diffusion.gaussian_process import GaussianProcess, gaussian_of
from vdm_hub.diffusion.latent_process import LatentProcess
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import whole_number
from vdm_hub.likelihood.measurement import Measured, Measurement
from vdm_hub.likelihood.probability_flow import FlowMeasurement, draw_flow, flowing
from vdm_hub.likelihood.protocol import FlowSettings
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.models.calls import CountedNetwork
from vdm_hub.objectives.variational_bound import Batch, Terms, VDMObjective, check_nothing_given


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """``log 1/K sum_k w_k`` over the first dimension: (K, B) -> (B,), the ``- log K`` included.

    >>> float(log_mean_exp(torch.tensor([[3.0], [3.0]])))
    3.0
    """
    return log_weights.logsumexp(0) - math.log(log_weights.shape[0])


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2`` over the first dimension, between 1 and K: (K, B) -> (B,).

    >>> float(effective_sample_size(torch.zeros(4, 1)))
    4.0
    """
    return torch.exp(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))


class ChainsMeasurement(Measurement):
    """The method ``importance_weighted`` over K whole chains per image, of the T-transition model.

    Its expectation is an upper bound of ``-log p(x)``, falls with K to ``-log p(x)`` itself, and is the finite-T bound
    of `VDMObjective` at K = 1. Terms: ``reconstruction``, ``prior`` and ``diffusion`` as there, averaged over chains,
    and ``importance_weighting``, at most zero: what K chains gain over their mean.

    Args:
        objective: The model, with a finite number of transitions; its process Gaussian.
        chains: K. Chain k of an image is a function of (seed, replicate, image, k), so fewer are a part of more.
        seed: Of all draws.

    Raises:
        ConfigurationError: The objective is in continuous time, or its process has no exact weights.
    """

    method = "importance_weighted"
    objective: VDMObjective

    def __init__(self, objective: VDMObjective, chains: int = 16, seed: int = 0) -> None:
        super().__init__(objective, seed)
        if objective.transitions is None:
            raise ConfigurationError(
                "importance weights need whole chains, and continuous time has none; weights from random times would "
                "be biased upwards. Give a number of transitions."
            )
        whole_number("chains", chains)
        check_exact_weights(objective.process)
        self.chains = chains

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of K chains of each image."""
        network = CountedNetwork(self.objective.network, batch)
        draws = [chain_terms(self.objective, batch, (self.seed, replicate), k, network) for k in range(self.chains)]
        terms, size = weighted(draws)
        counts = {"evaluations": network.per_image(len(size)), "effective_sample_size": size}
        return Measured(terms, counts)

    def protocol(self) -> dict[str, Any]:
        """The number of draws K, and what is drawn."""
        return {"importance_weights": {"over": "chains", "draws": self.chains}}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The protocol with the effective sample sizes."""
        return {"importance_weights": self.protocol()["importance_weights"] | effective_sizes(diagnostics)}


class WeightedFlowMeasurement(FlowMeasurement):
    """The method ``importance_weighted`` over K dequantised draws per image, of the probability-flow model.

    Its expectation falls with K to ``-log P(x)``, where P is the mass that the ODE's density has in each level's bin;
    at K = 1 it is that of `FlowMeasurement`, and ``is_bound`` is false as there. Terms: as there, averaged over draws,
    with ``dequantization`` the draws' own ``log q(z_0|x)`` in place of minus the entropy, and
    ``importance_weighting``, at most zero.

    Args:
        objective: The model; its process Gaussian.
        flow: The protocol of each ODE. ``divergence="exact"`` is the only one without bias here.
        draws: K. Draw k of an image is a function of (seed, replicate, image, k).
        seed: Of all draws.
    """

    method = "importance_weighted"

    def __init__(
        self, objective: VDMObjective, flow: FlowSettings | None = None, draws: int = 16, seed: int = 0
    ) -> None:
        whole_number("draws", draws)
        super().__init__(objective, flow, seed)
        check_exact_weights(flowing(objective.process))
        self.draws = draws

    def _measure(self, batch: Batch, replicate: int, flow: FlowSettings) -> Measured:
        """The terms of K dequantised draws of each image, by their ODEs."""
        arguments = *self.model, batch, flow, (self.seed, replicate)
        solved = [draw_flow(*arguments, k) for k in range(self.draws)]
        terms, size = weighted([draw.terms | {draw.drawn: draw.log_q} for draw in solved])
        steps = torch.stack([draw.steps for draw in solved], dim=1)
        evaluations = torch.stack([draw.evaluations for draw in solved]).sum(0)
        return Measured(terms, {"evaluations": evaluations, "effective_sample_size": size, "steps": steps})

    def protocol(self) -> dict[str, Any]:
        """The number of draws K, and the protocol of each ODE."""
        over = "q(y|x)" if isinstance(self.objective.process, LatentProcess) else "dequantization"
        return super().protocol() | {"importance_weights": {"over": over, "draws": self.draws}}

    def details(self, diagnostics: Mapping[str, Tensor]) -> dict[str, Any]:
        """The protocol with the effective sample sizes and the solver's steps."""
        weights = self.protocol()["importance_weights"] | effective_sizes(diagnostics)
        return super().details(diagnostics) | {"importance_weights": weights}

    def notes(self, report: LikelihoodReport) -> list[str]:
        """A note on the kind of number."""
        if self.flow.divergence == "exact":
            return super().notes(report)
        return [
            *super().notes(report),
            "the stochastic divergence biases importance weights; divergence='exact' does not",
        ]


def chain_terms(
    objective: VDMObjective, batch: Batch, key: tuple[int, int], chain: int, network: CountedNetwork
) -> Terms:
    r"""``-log w`` of one chain per image in three named terms, (B,), nats, float64.

    The chain is drawn from the end, ``q(z_1|x) prod q(z_s|z_t, x)``, the same joint as the forward one (Luo eq. 47).
    The expectation of ``log q(z_s|z_t, x) - log p(z_s|z_t)`` over z_s is the transition KL of the denoising-matching
    form (VDM eq. 13).

    Args:
        objective: The model, with a finite number of transitions.
        batch: The images, with ``indices``.
        key: (seed, replicate).
        chain: k, which of the K chains.
        network: The model's network on this batch.
    """
    check_nothing_given(objective.process, batch)
    process, transitions = objective.process, objective.transitions
    assert transitions is not None
    levels = batch["levels"]
    # Of data, not what float32 kept of them: 17 levels do not lie on its grid.
    exactly = {"dtype": torch.float64} if isinstance(process, GaussianProcess) else {}
    x = process.encode(levels, **exactly).double()
    extras, bound = process.bind(x, {})
    generators = [image_generator(*key, int(i), chain) for i in batch["indices"]]

    def normal() -> Tensor:
        return normal_noise(tuple(x.shape), generators, x.device, torch.float64)

    with torch.autocast(x.device.type, enabled=False):
        times = torch.arange(transitions + 1, dtype=torch.float64, device=x.device) / transitions
        steps = [time.expand(len(x)) for time in times]
        z, prior = _last_latent(bound.marginal_kernel(x, steps[-1]), normal())
        diffusion = torch.zeros_like(prior)
        for t, s in pairwise(reversed(steps)):
            q = bound.posterior_kernel(x, z, s, t)
            _, p = bound.reverse_kernel(bound.predict(network, z, t), z, s, t)
            z = q.sample(normal())
            diffusion += q.log_prob(z) - p.log_prob(z)
        first = bound.marginal_kernel(x, steps[0])
        eps = (z - first.mean) / first.scale
        reconstruction = bound.reconstruction(levels, x, {"reconstruction": eps}, network)
    return {"reconstruction": reconstruction, "prior": prior, "diffusion": diffusion} | extras


def _last_latent(q: ReverseKernel, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The last latent, ``z_1`` from q(z_1|x), and ``log q(z_1|x) - log N(z_1; 0, I)``."""
    z = q.sample(eps)
    return z, sum_dimensions(0.5 * (z**2 - eps**2) - q.scale.log())


def weighted(draws: list[Terms]) -> tuple[Terms, Tensor]:
    """The terms averaged over draws, the weights' gain, and their effective sample sizes, (B,)."""
    means = {name: torch.stack([terms[name] for terms in draws]).mean(0) for name in draws[0]}
    log_weights = -torch.stack([torch.stack(list(terms.values())).sum(0) for terms in draws])
    gain = {"importance_weighting": log_weights.mean(0) - log_mean_exp(log_weights)}
    return means | gain, effective_sample_size(log_weights)


def effective_sizes(diagnostics: Mapping[str, Tensor]) -> dict[str, float]:
    """The report's figures of the weights' effective sample sizes."""
    size = diagnostics["effective_sample_size"]
    return {"effective_sample_size_mean": float(size.mean()), "effective_sample_size_min": float(size.min())}


def check_exact_weights(process: ForwardProcess) -> None:
    """Refuse a process whose kernels are not Gaussian, or which draws a latent of its own.

    Raises:
        ConfigurationError: Its bound has a KL of that latent, which is no weight of one draw.
    """
    if not process.has_gaussian_kernels:
        gaussian_of(process)  # which says so
    device = next((tensor.device for tensor in (*process.parameters(), *process.buffers())), torch.device("cpu"))
    if process.draw_context((1, *process.example_shape), torch.Generator().manual_seed(0), device):
        who = type(getattr(process, "schedule", process)).__name__
        raise ConfigurationError(
            f"{who} draws a latent of its own, whose term of the bound is a mean, and importance weights must be "
            f"those of one draw: ask for method 'bound', or 'ode'."
        )
