"""A model as a chain of latents, ``q(z_1|x) q(z_2|z_1) ...`` upwards and ``p(z_T) ... p(x|z_1)`` down.

A VDM with T transitions is one of T + 1 latents (`vdm_hub.as_hierarchical_vae`), a hierarchical VAE is one as it is,
and a latent VDM has its first stage's latent below those of its diffusion. A process of discrete values has T latents,
of K values each. A network that knows classes is told that of each datum, which both sides know. All compute in
float64.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from vdm_hub import (
    ConfigurationError,
    FactorisedDecoder,
    ForwardProcess,
    GaussianProcess,
    HVAEPipeline,
    LatentVDMPipeline,
    LikelihoodPipeline,
    MarkovianHVAE,
    VDMObjective,
    VDMPipeline,
    alpha,
    as_hierarchical_vae,
)
from vdm_hub_codec.decisions import Floats, Integers
from vdm_hub_codec.distributions import Choices, Distribution, Normal
from vdm_hub_codec.spacing import times_of

Gaussian = tuple[Tensor, Tensor]
"""A mean and a scale, the standard deviation, (B, *latent)."""

CLASS_LABELS = "class_labels"
"""The name under which a network is told the classes of its data."""

_BINS_PER_DEVIATION = 2
"""At least: of the narrower of a latent's two distributions."""


class ToldNetwork(nn.Module):
    """A network that is told the classes of a batch by whoever goes through the chain.

    Attributes:
        objective: Whose network it is.
        labels: The classes of the data at hand, int64, (B,).
    """

    def __init__(self, objective: VDMObjective) -> None:
        super().__init__()
        self.objective = objective
        self.labels = torch.zeros(0, dtype=torch.int64)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False, **context: Any) -> tuple[Tensor]:
        """The output, as the network's own."""
        told, network = {CLASS_LABELS: self.labels}, self.objective.network
        return (self.objective.call(network, sample, timestep, **told, **context),)


@dataclass
class Evaluations:
    """How often networks were asked of one datum."""

    count: int = 0


@dataclass(frozen=True)
class Chain:
    """Latents ``z_1`` to ``z_T`` above data ``z_0`` of K levels.

    Attributes:
        num_levels: K.
        shapes: Of the data, and of each latent, ``z_1`` first.
        up: ``q(z_t|z_{t-1})`` at ``z_{t-1}``, for t = 1..T.
        down: ``p(z_{t-1}|z_t)`` at ``z_t``, for t = 1..T.
        exponents: Of two: each latent's width of a bin; ``None`` where latents are values.
        told: The network that must be told classes; ``None`` where it knows none.
        given: The t whose ``p(z_t|z_{t+1})`` asks no network; ``None`` where all do.
        evaluations: Of networks, so far: one for each datum and ``p(z_t|z_{t+1})``, by all chains made of this one.
    """

    num_levels: int
    shapes: Sequence[tuple[int, ...]]
    up: Sequence[Callable[[Tensor], Any]]
    down: Sequence[Callable[[Tensor], Any]]
    exponents: tuple[int, ...] | None = None
    told: ToldNetwork | None = None
    given: int | None = None
    evaluations: Evaluations = field(default_factory=Evaluations)

    @property
    def depth(self) -> int:
        """T, the number of latents."""
        return len(self.up)

    def q(self, t: int, below: Tensor, size: int) -> Distribution:
        """``q(z_t|z_{t-1})``, so many data at a time."""
        return self._distribution(self.up[t - 1], below, size, t)

    def p(self, t: int, above: Tensor, size: int, labels: Integers | None = None) -> Distribution:
        """``p(z_t|z_{t+1})``, so many data at a time, of classes (B,) where the network is told them."""
        self._count(t, len(above))
        return self._distribution(self.down[t], above, size, t, labels)

    def _count(self, t: int, data: int) -> None:
        self.evaluations.count += 0 if t == self.given else data

    def prior(self, count: int) -> Distribution:
        """``p(z_T)``: N(0, 1), or all values alike."""
        size = math.prod(self.shapes[-1])
        if self.exponents is None:
            return Choices(np.full((count, size, self.num_levels), 1 / self.num_levels))
        return Normal(np.zeros((count, size)), np.ones((count, size)), 2.0 ** self.exponents[-1])

    def width(self, t: int) -> float:
        """The width of a bin of z_t; one of the data, and of latents that are values."""
        return 1.0 if t == 0 or self.exponents is None else 2.0 ** self.exponents[t - 1]

    def value(self, numbers: Integers, t: int) -> Tensor:
        """What networks are given for numbers, (B, n): the levels, or the centres of bins."""
        width = 1 if t == 0 or self.exponents is None else self.width(t)
        return torch.from_numpy(numbers * width).reshape(-1, *self.shapes[t])

    def _distribution(
        self, call: Callable[[Tensor], Any], given: Tensor, size: int, t: int, labels: Integers | None = None
    ) -> Distribution:
        classes = torch.zeros(len(given), dtype=torch.int64) if labels is None else torch.from_numpy(labels)
        parts = [self._call(call, *both) for both in zip(given.split(size), classes.split(size), strict=True)]
        if t == 0 or self.exponents is None:
            return Choices(np.concatenate([part.double().exp().flatten(1, -2).cpu().numpy() for part in parts]))
        return Normal(*gaussian_of(parts), self.width(t))

    def _call(self, call: Callable[[Tensor], Any], given: Tensor, classes: Tensor) -> Any:
        if self.told is not None:
            self.told.labels = classes
        with torch.no_grad():
            return call(given)

    def with_bins_for(self, levels: Integers) -> Self:
        """The chain with bins that suit some of the data, and the narrower of the two distributions of each latent."""
        if self.exponents is None:
            return self
        below = torch.from_numpy(levels[:8])
        classes, scales = torch.zeros(len(below), dtype=torch.int64), list[float]()
        generator = np.random.default_rng(0)
        for t in range(1, self.depth + 1):
            mean, scale = gaussian_of([self._call(self.up[t - 1], below, classes)])
            drawn = mean + scale * generator.standard_normal(mean.shape)
            z = torch.from_numpy(drawn).reshape(-1, *self.shapes[t])
            if t > 1:
                self._count(t - 1, len(z))
                own = gaussian_of([self._call(self.down[t - 1], z, classes)])[1]
                scales[-1] = min(scales[-1], float(np.quantile(own, 0.05)))
            scales.append(float(np.quantile(scale, 0.05)))
            below = z
        exponents = tuple(math.floor(math.log2(scale / _BINS_PER_DEVIATION)) for scale in scales)
        return replace(self, exponents=exponents)

    @classmethod
    def of(cls, pipeline: LikelihoodPipeline, transitions: int | None = None, spacing: bytes | None = None) -> Chain:
        """The chain of a pipeline, on copies of its modules in float64.

        Args:
            pipeline: Of a VDM, of a latent one, of a process of discrete values, or of a hierarchical VAE.
            transitions: T of what has transitions.
            spacing: How dense they are in time, of a VDM; equal where not given.

        Raises:
            ConfigurationError: It has no such chain.
        """
        if isinstance(pipeline, HVAEPipeline):
            if transitions is not None:
                raise ConfigurationError(
                    f"transitions is {transitions}, and a hierarchical VAE has latents of its own: leave it out."
                )
            return _of_hierarchy(copy.deepcopy(pipeline.main_model).double().eval())
        check_process(pipeline.process)
        if transitions is None:
            raise ConfigurationError("a file is made by a number of transitions: give one, such as 100.")
        if isinstance(pipeline, LatentVDMPipeline):
            return _of_latents(pipeline, transitions)
        if isinstance(pipeline, VDMPipeline):
            return cls.of_objective(pipeline.objective(transitions), pipeline.image_shape, spacing)
        raise ConfigurationError(f"{type(pipeline).__name__} has no chain of latents that files are made with.")

    @classmethod
    def of_objective(cls, objective: VDMObjective, shape: tuple[int, ...], spacing: bytes | None = None) -> Chain:
        """That of a bound with a number of transitions.

        Raises:
            ConfigurationError: The process is neither Gaussian, as `vdm_hub.as_hierarchical_vae` takes it, nor one of
                discrete values that says its probabilities.
        """
        check_process(objective.process)
        objective, told = _told(objective)
        if objective.process.has_discrete_latents:
            return replace(_of_values(objective, shape), told=told)
        times = None if spacing is None else times_of(spacing, objective.transitions or 1)
        return replace(_of_hierarchy(as_hierarchical_vae(objective, shape, times)), told=told, given=0)


def check_process(process: ForwardProcess | None) -> None:
    """Refuse a process that has no finite chain of latents, of which each says its probabilities under the one above.

    Raises:
        ConfigurationError: It is one.
    """
    gaussian: Any = getattr(process, "gaussian", process) if hasattr(process, "first_stage") else process
    if process is None or process.has_discrete_latents:
        return
    if not isinstance(gaussian, GaussianProcess) or gaussian.scalar_gamma is None:
        schedule = getattr(gaussian, "schedule", None)
        of = "" if schedule is None else f" with the schedule {type(schedule).__name__}"
        raise ConfigurationError(
            f"the model's process is {type(process).__name__}{of}, and a file is made by T latents, of a Gaussian "
            f"process with one gamma a time (none of each pixel, and no latent beside), or of values that say their "
            f"probabilities: give a model of such a process."
        )
    if gaussian is process and not isinstance(gaussian.decoder, FactorisedDecoder):
        raise ConfigurationError(
            f"the model's decoder is {type(gaussian.decoder).__name__}, which asks the network about the data, and a "
            f"file is made by the decoder 'factorised', which does not: train a model with it, or read a checkpoint "
            f"of diffusers with it, VDMPipeline.from_diffusers(checkpoint, decoder='factorised'), save that with "
            f"save_pretrained, and give the folder."
        )


def _told(objective: VDMObjective) -> tuple[VDMObjective, ToldNetwork | None]:
    """A copy in float64; where its network knows classes, with one that is told them outside of the batch.

    Raises:
        ConfigurationError: It is told captions.
    """
    objective = copy.deepcopy(objective).double().eval()
    if (condition := objective.condition) is None:
        return objective, None
    if condition.entry != CLASS_LABELS:
        raise ConfigurationError(
            f"the model is told the {condition.noun} of an image, and a file keeps none to tell it when it is read: "
            f"give a model that is told classes, or nothing."
        )
    network = ToldNetwork(objective)
    return VDMObjective(network, objective.process, objective.transitions).double().eval(), network


def gaussian_of(parts: Sequence[Gaussian]) -> tuple[Floats, Floats]:
    """The mean and scale of all parts of a batch, (B, n)."""
    means, scales = (torch.cat([part[i].expand_as(part[0]).double() for part in parts]).flatten(1) for i in (0, 1))
    return means.cpu().numpy(), scales.cpu().numpy()


def _of_hierarchy(model: MarkovianHVAE) -> Chain:
    return Chain(
        model.num_levels,
        [model.image_shape, *model.latent_shapes],
        [lambda x: model.encode(1, model.scale(x, torch.float64)), *_each(model.encode, 2, model.depth + 1)],
        [model.decode_levels, *_each(model.decode, 1, model.depth)],
        (0,) * model.depth,
    )


def _of_latents(pipeline: LatentVDMPipeline, transitions: int) -> Chain:
    """The first stage's latent, and above it those of its diffusion."""
    objective, told = _told(pipeline.objective(transitions))
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
        [pipeline.image_shape, latent, *above.latent_shapes],
        [
            lambda levels: process.posterior(process.encode(levels).double()),
            *_each(above.encode, 1, above.depth + 1),
        ],
        [
            lambda y: stage.decode_levels(process.unscaled(y)),
            lambda z: (z / alpha(gamma_0), torch.exp(0.5 * gamma_0).expand_as(z)),
            *_each(above.decode, 1, above.depth),
        ],
        (0,) * (1 + above.depth),
        told,
        given=1,
    )


def _of_values(objective: VDMObjective, shape: tuple[int, ...]) -> Chain:
    """Latents of K values at the times 1/T, .., 1; the last is any of them, each alike."""
    process, transitions = objective.process, objective.transitions or 1
    times = torch.arange(transitions + 1, dtype=torch.float64) / transitions
    network, bound = objective.network_on({"levels": torch.zeros(0)}), process.bind(None, {})[1]

    def up(levels: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return bound.transition_probabilities(process.encode(levels).double(), s, t).log()

    def down(levels: Tensor, s: Tensor, t: Tensor) -> Tensor:
        z_t = process.encode(levels).double()
        output = bound.predict(network, z_t, t.expand(len(z_t)))
        return bound.reverse_probabilities(output, z_t, s, t).log()

    steps = list(itertools.pairwise(times))
    return Chain(
        process.num_levels,
        [shape] * (transitions + 1),
        [lambda z, s=s, t=t: up(z, s, t) for s, t in steps],  # type: ignore[misc]
        [lambda z, s=s, t=t: down(z, s, t) for s, t in steps],  # type: ignore[misc]
    )


def _each(call: Callable[[int, Tensor], Gaussian], first: int, beyond: int) -> list[Callable[[Tensor], Gaussian]]:
    return [lambda z, t=t: call(t, z) for t in range(first, beyond)]  # type: ignore[misc]
