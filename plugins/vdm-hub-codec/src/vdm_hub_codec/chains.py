"""A model as a chain of latents, ``q(z_1|x) q(z_2|z_1) ...`` upwards and ``p(z_T) ... p(x|z_1)`` down.

A VDM with T transitions is one of T + 1 latents (`vdm_hub.as_hierarchical_vae`), a hierarchical VAE is one as it is,
and a latent VDM has its first stage's latent below those of its diffusion. All compute in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_hub import (
    ConfigurationError,
    HVAEPipeline,
    LatentVDMPipeline,
    LikelihoodPipeline,
    MarkovianHVAE,
    VDMObjective,
    VDMPipeline,
    alpha,
    as_hierarchical_vae,
)
from vdm_hub_codec.decisions import Floats

Gaussian = tuple[Tensor, Tensor]
"""A mean and a scale, the standard deviation, (B, *latent)."""


@dataclass(frozen=True)
class Chain:
    """Latents ``z_1`` to ``z_T`` above data of K levels.

    Attributes:
        num_levels: K.
        shape: Of a datum.
        shapes: Of each latent, ``z_1`` first.
        up: ``q(z_t|z_{t-1})`` at ``z_{t-1}``, ``q(z_1|x)`` at the levels.
        down: ``p(z_t|z_{t+1})`` at ``z_{t+1}``, for t = 1..T-1; ``p(z_T)`` is N(0, 1).
        levels: ``log p(x|z_1)``, (B, *shape, K).
    """

    num_levels: int
    shape: tuple[int, ...]
    shapes: Sequence[tuple[int, ...]]
    up: Sequence[Callable[[Tensor], Gaussian]]
    down: Sequence[Callable[[Tensor], Gaussian]]
    levels: Callable[[Tensor], Tensor]

    @property
    def depth(self) -> int:
        """T, the number of latents."""
        return len(self.up)

    @classmethod
    def of(cls, pipeline: LikelihoodPipeline, transitions: int | None = None) -> Chain:
        """The chain of a pipeline, on copies of its modules in float64.

        Args:
            pipeline: Of a VDM, of a latent one, or of a hierarchical VAE.
            transitions: T of a VDM.

        Raises:
            ConfigurationError: It has no such chain.
        """
        if pipeline.condition is not None:
            raise ConfigurationError(
                "the model is conditional, and a file holds no labels or captions to tell it: give one that is told "
                "nothing."
            )
        if isinstance(pipeline, HVAEPipeline):
            if transitions is not None:
                raise ConfigurationError(
                    f"transitions is {transitions}, and a hierarchical VAE has latents of its own: leave it out."
                )
            return _of_hierarchy(copy.deepcopy(pipeline.main_model).double().eval())
        if transitions is None:
            raise ConfigurationError("a file is made by a number of transitions: give one, such as 100.")
        if isinstance(pipeline, LatentVDMPipeline):
            return _of_latents(pipeline, transitions)
        if isinstance(pipeline, VDMPipeline):
            objective = copy.deepcopy(pipeline.objective(transitions)).double().eval()
            return cls.of_objective(objective, pipeline.image_shape)
        raise ConfigurationError(f"{type(pipeline).__name__} has no chain of latents that files are made with.")

    @classmethod
    def of_objective(cls, objective: VDMObjective, image_shape: tuple[int, int, int]) -> Chain:
        """That of a VDM's bound with a number of transitions, in float64.

        Raises:
            ConfigurationError: It has no such form: see `vdm_hub.as_hierarchical_vae`.
        """
        return _of_hierarchy(as_hierarchical_vae(objective, image_shape))


def _of_hierarchy(model: MarkovianHVAE) -> Chain:
    return Chain(
        model.num_levels,
        model.image_shape,
        model.latent_shapes,
        [lambda x: model.encode(1, model.scale(x, torch.float64)), *_each(model.encode, 2, model.depth + 1)],
        _each(model.decode, 1, model.depth),
        model.decode_levels,
    )


def _of_latents(pipeline: LatentVDMPipeline, transitions: int) -> Chain:
    """The first stage's latent, and above it those of its diffusion."""
    objective = copy.deepcopy(pipeline.objective(transitions)).double().eval()
    process: Any = objective.process
    stage = process.first_stage
    if not hasattr(stage, "decode_levels"):
        raise ConfigurationError(
            f"the first stage is a {type(stage).__name__}, which says no probabilities of a pixel's levels by "
            f"decode_levels: give a MarkovianHVAE or an AutoencoderKLFirstStage."
        )
    latent = process.latent_shape((1, *pipeline.image_shape))[1:]
    above = as_hierarchical_vae(VDMObjective(objective.network, process.gaussian, transitions), latent)
    with torch.no_grad():
        gamma_0 = process.gaussian.schedule(torch.zeros((), dtype=torch.float64)).double()
    return Chain(
        pipeline.num_levels,
        pipeline.image_shape,
        [latent, *above.latent_shapes],
        [
            lambda levels: process.posterior(process.encode(levels).double()),
            *_each(above.encode, 1, above.depth + 1),
        ],
        [
            lambda z: (z / alpha(gamma_0), torch.exp(0.5 * gamma_0).expand_as(z)),
            *_each(above.decode, 1, above.depth),
        ],
        lambda y: stage.decode_levels(process.unscaled(y)),
    )


def _each(call: Callable[[int, Tensor], Gaussian], first: int, beyond: int) -> list[Callable[[Tensor], Gaussian]]:
    return [lambda z, t=t: call(t, z) for t in range(first, beyond)]  # type: ignore[misc]


def in_parts(call: Callable[[Tensor], Gaussian], batch: Tensor, size: int) -> tuple[Floats, Floats]:
    """A Gaussian of a batch, so many data at a time, flat, (B, n)."""
    with torch.no_grad():
        parts = [call(part) for part in batch.split(size)]
    means, scales = (torch.cat([part[i].expand_as(part[0]).double() for part in parts]).flatten(1) for i in (0, 1))
    return means.cpu().numpy(), scales.cpu().numpy()


def probabilities_in_parts(call: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Floats:
    """The probabilities of all levels, (B, n, K)."""
    with torch.no_grad():
        parts = [call(part).double().exp().flatten(1, -2) for part in batch.split(size)]
    found: Floats = np.concatenate([part.cpu().numpy() for part in parts])
    return found
