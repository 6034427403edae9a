r"""Samplers from the score alone, beside ancestral sampling: the reverse SDE, its flow, and Langevin dynamics.

Each takes latents from time t to an earlier s by a function ``score(z, t) = grad log q(z_t)``, which any target gives.
What is left at time 0 is z_0, which the decoder turns into levels, as after ancestral sampling.

Sources: SDE is Song et al., arXiv 2011.13456; NCSN is Song and Ermon, arXiv 1907.05600.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.continuous_time import DiffusionSDE
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.errors import ConfigurationError, unknown_name

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
"""``(z (B, *data), t ()) -> grad log q(z_t)``, like z; one evaluation of the network."""


class Sampler(ABC):
    """A method that takes one step back in time.

    Attributes:
        evaluations: Of the score, in each step.
    """

    evaluations: int = 1

    @abstractmethod
    def step(
        self, score: ScoreFunction, sde: DiffusionSDE, z: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> Tensor:
        """``z_s`` from ``z_t``.

        Args:
            score: Of the marginals.
            sde: Of the process.
            z: ``z_t``, (B, *data).
            s: The earlier time, ().
            t: The later one, ().
            generator: Of the noise; one, or a list with one per datum.
        """


class ReverseSDE(Sampler):
    """Euler-Maruyama on the reverse SDE: ``z_s = z_t - (f z - g^2 score) dt + g sqrt(dt) eps`` (SDE eq. 6)."""

    def step(
        self, score: ScoreFunction, sde: DiffusionSDE, z: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> Tensor:
        dt = t - s
        mean = z - sde.reverse_drift(z, t, score(z, t)).to(z.dtype) * dt
        return mean + ((sde.diffusion_squared(z, t) * dt).sqrt() * _noise(z, generator)).to(z.dtype)


class ProbabilityFlowODE(Sampler):
    """Heun's method, of second order, on the probability-flow ODE (SDE eq. 13); no noise after the prior's."""

    evaluations = 2

    def step(
        self, score: ScoreFunction, sde: DiffusionSDE, z: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> Tensor:
        dt = t - s
        slope = sde.flow_drift(z, t, score(z, t))
        guess = (z - slope * dt).to(z.dtype)
        return (z - 0.5 * dt * (slope + sde.flow_drift(guess, s, score(guess, s)))).to(z.dtype)


class PredictorCorrector(Sampler):
    """A step of a predictor, the reverse SDE, then steps of Langevin dynamics at the level reached (SDE alg. 3 and 5).

    A corrector's step is ``z + e score + sqrt(2 e) n`` with ``e = 2 ratio^2 sigma^2``: what SDE's ``2 (ratio |n| /
    |score|)^2`` is for the score ``-n/sigma`` of noise alone. Taken of the draw, it would depend on z, which is a
    bias: a large one in few dimensions, where a score near a mode is small.

    Args:
        corrector_steps: Of Langevin dynamics, after each predictor's step.
        ratio: Of noise to score, their signal-to-noise ratio r.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(self, corrector_steps: int = 1, ratio: float = 0.16) -> None:
        if type(corrector_steps) is not int or corrector_steps < 1 or not 0 < ratio < 1:  # beyond, steps diverge
            raise ConfigurationError(
                f"corrector_steps is {corrector_steps} and ratio {ratio}: give at least 1 step, and a ratio between 0 "
                f"and 1."
            )
        self.corrector_steps, self.ratio, self.evaluations = corrector_steps, ratio, 1 + corrector_steps
        self.predictor = ReverseSDE()

    def step(
        self, score: ScoreFunction, sde: DiffusionSDE, z: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> Tensor:
        z = self.predictor.step(score, sde, z, s, t, generator)
        for _ in range(self.corrector_steps):
            size = (2 * self.ratio**2 * torch.sigmoid(sde.gamma_at(s, z))).to(z.dtype)
            z = z + size * score(z, s) + (2 * size).sqrt() * _noise(z, generator)
        return z


class AnnealedLangevin(Sampler):
    """Langevin dynamics at one noise level after the other, no step between them (NCSN alg. 1).

    ``z/alpha``, data plus noise, is carried on to the next level, and moves there by steps of ``step_size`` of the
    noise's variance: ``z + 1/2 e score + sqrt(e) n``, ``e = step_size sigma_s^2``.

    Args:
        steps_per_level: L.
        step_size: NCSN's epsilon over its last level's variance.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(self, steps_per_level: int = 4, step_size: float = 0.2) -> None:
        # With larger steps those on a Gaussian diverge.
        if type(steps_per_level) is not int or steps_per_level < 1 or not 0 < step_size < 4:
            raise ConfigurationError(
                f"steps_per_level is {steps_per_level} and step_size {step_size}: give at least 1 step, and a size "
                f"between 0 and 4."
            )
        self.steps_per_level, self.step_size, self.evaluations = steps_per_level, step_size, steps_per_level

    def step(
        self, score: ScoreFunction, sde: DiffusionSDE, z: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> Tensor:
        gamma_s, gamma_t = sde.gamma_at(s, z), sde.gamma_at(t, z)
        z = (z * (gaussian.alpha(gamma_s) / gaussian.alpha(gamma_t))).to(z.dtype)
        size = (self.step_size * torch.sigmoid(gamma_s)).to(z.dtype)
        for _ in range(self.steps_per_level):
            z = z + 0.5 * size * score(z, s) + size.sqrt() * _noise(z, generator)
        return z


SAMPLERS: dict[str, type[Sampler]] = {
    "reverse_sde": ReverseSDE,
    "probability_flow": ProbabilityFlowODE,
    "predictor_corrector": PredictorCorrector,
    "annealed_langevin": AnnealedLangevin,
}
"""The samplers beside ``ancestral``, by name."""
ANCESTRAL = "ancestral"


def build_sampler(sampler: str | Sampler) -> Sampler | None:
    """A sampler by its name, or itself; ``None`` for ``ancestral``, the process's own reverse step.

    >>> build_sampler("ancestral") is None, build_sampler("probability_flow").evaluations
    (True, 2)
    """
    if isinstance(sampler, Sampler) or sampler == ANCESTRAL:
        return None if isinstance(sampler, str) else sampler
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, (ANCESTRAL, *SAMPLERS))
    return SAMPLERS[sampler]()


def _noise(z: Tensor, generator: Generator) -> Tensor:
    return normal_noise(tuple(z.shape), generator, z.device, torch.promote_types(z.dtype, torch.float32))
