"""What a third party might bring, for law 7: a distribution of its own, which the core never names.

`PixelwiseSchedule` has a gamma per pixel, `ContextSchedule` an extra bound term and a latent per datum, which
`TellingSchedule` tells the network; `ResamplingProcess` has no gamma at all, `LogitsProcess` a network that gives K
logits for each level of data of any shape, `LearnedResampling` weights of its own; `PixelNetwork` is a network, `Mean`
a likelihood method and `Shout` a command of ``vdm-hub``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from vdm_hub import (
    BoundGamma,
    BoundProcess,
    Command,
    ConfigurationError,
    ForwardProcess,
    LikelihoodMethod,
    Measured,
    Measurement,
    ModelMixin,
    NoiseSchedule,
    Objective,
    check_fields,
    image_generator,
    option,
    registry,
)
from vdm_hub.diffusion.draws import Generator, normal_noise, uniform_noise
from vdm_hub.diffusion.forward_process import Network, Noise
from vdm_hub.diffusion.noise_schedules import Gamma


class PixelwiseSchedule(NoiseSchedule):
    """``gamma = gamma_min + (gamma_max - gamma_min) (t + tanh(bend) t (1 - t))``, one learned bend a pixel."""

    scalar = False

    def __init__(self, size: int, gamma_min: float = -7.87, gamma_max: float = 5.0) -> None:
        super().__init__()
        self._config = {"size": size, "gamma_min": gamma_min, "gamma_max": gamma_max}
        self.bend = nn.Parameter(torch.linspace(-1, 1, size * size).reshape(1, 1, size, size))

    def forward(self, t: Tensor) -> Tensor:
        return self.bent(t, self.bend)

    def bent(self, t: Tensor, bend: Tensor) -> Tensor:
        (batch,) = t.shape  # the contract: never ()
        t = t.reshape(batch, 1, 1, 1)
        first, last = self._config["gamma_min"], self._config["gamma_max"]
        return first + (last - first) * (t + torch.tanh(bend).to(t.dtype) * t * (1 - t))

    def to_config(self) -> dict[str, Any]:
        return dict(self._config)


class ContextSchedule(PixelwiseSchedule):
    """Every datum bends the schedule its own way, by a latent c: ``q(c|x) = N(w mean(x), 1)``, ``p(c) = N(0, 1)``."""

    def __init__(self, size: int, gamma_min: float = -7.87, gamma_max: float = 5.0) -> None:
        super().__init__(size, gamma_min, gamma_max)
        self.encoder = nn.Parameter(torch.tensor(0.5))

    def forward(self, t: Tensor) -> Tensor:
        raise AssertionError("a schedule with a context has no gamma until it is bound")

    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        return {"context": normal_noise((batch_size, 1, 1, 1), generator, device)}

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        context, extras = noise["context"], {}
        if x is not None:
            mean = self.encoder * x.mean((1, 2, 3), keepdim=True)
            context, extras = context + mean, {"context": 0.5 * mean.flatten() ** 2}
        return extras, lambda t: self.bent(t, context * self.bend)


class TellingSchedule(ContextSchedule):
    """The same, its latent told to the network."""

    context_size = 1

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        context = noise["context"] if x is None else noise["context"] + self.encoder * x.mean((1, 2, 3), keepdim=True)
        extras, gamma = super().bind(x, noise)
        return extras, BoundGamma(gamma, context.flatten(1))


class ResamplingProcess(ForwardProcess):
    """Each dimension keeps its level with probability ``keep(t)``, else it is any of the K levels (bits: K = 2)."""

    def __init__(self, num_levels: int = 2, num_train_timesteps: int = 1000, first_keep: float = 0.99) -> None:
        super().__init__()
        self.num_levels, self.num_train_timesteps, self.first_keep = num_levels, num_train_timesteps, first_keep

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> ResamplingProcess:
        _, arguments, _ = registry.parse_serialised("forward_processes", fields["forward_process"])
        return cls(fields["num_levels"], fields["num_train_timesteps"], **arguments)

    def to_config(self) -> dict[str, Any]:
        return {"first_keep": self.first_keep}

    def fields(self) -> dict[str, Any]:
        return {
            "forward_process": registry.serialise("forward_processes", self),
            "num_levels": self.num_levels,
            "num_train_timesteps": self.num_train_timesteps,
        }

    def encode(self, levels: Tensor) -> Tensor:
        return 2 * levels.float() / (self.num_levels - 1) - 1

    def quantise(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 * (self.num_levels - 1)).round().long().clamp(0, self.num_levels - 1)

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        names = ("keep", "level", "first_keep", "first_level")
        return {name: uniform_noise(shape, generator, device) for name in names}

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundResampling]:
        return {}, BoundResampling(self)

    def keep(self, t: Tensor) -> Tensor:
        return (self.first_keep * (1 - t)).float()


class BoundResampling(BoundProcess):
    """Distributions over the K levels are the last dimension of (B, *data, K)."""

    def __init__(self, process: ResamplingProcess) -> None:
        self.process, self.num_levels = process, process.num_levels

    def _keep(self, t: Tensor, like: Tensor) -> Tensor:
        return self.process.keep(t).to(like.device).reshape(-1, *(1,) * like.ndim)

    def _one_hot(self, x: Tensor) -> Tensor:
        return F.one_hot(self.process.quantise(x), self.num_levels).float()

    def _marginal(self, one_hot: Tensor, keep: Tensor) -> Tensor:
        return keep * one_hot + (1 - keep) / self.num_levels

    def _corrupt(self, x: Tensor, t: Tensor, keep: Tensor, level: Tensor) -> Tensor:
        other = self.process.encode((level * self.num_levels).floor())
        return torch.where(keep < self._keep(t, x).squeeze(-1), x, other)

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        return self._corrupt(x, t, noise["keep"], noise["level"])

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        """``log p(x|z_t)``, (B, *data, K): a softmax around the network's output."""
        timestep = (t.to(z_t.device) * (self.process.num_train_timesteps - 1)).float().expand(z_t.shape[0])
        levels = self.process.encode(torch.arange(self.num_levels, device=z_t.device))
        return torch.log_softmax(-((network(z_t, timestep).unsqueeze(-1) - levels) ** 2), -1)

    def _reverse(self, log_p_x: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``p(z_s|z_t) = sum_x p(x|z_t) q(z_s|z_t, x)``."""
        keep_s, keep_t, z_t = self._keep(s, z_t), self._keep(t, z_t), self._one_hot(z_t)
        weight = log_p_x.exp() / self._marginal(z_t, keep_t)
        spread = (1 - keep_s) / self.num_levels * weight.sum(-1, keepdim=True)
        return self._marginal(z_t, keep_t / keep_s) * (keep_s * weight + spread)

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        z_t = self.sample(x, t, noise)
        q = self._reverse(self._one_hot(x).clamp(min=1e-30).log(), z_t, s, t)
        p = self._reverse(self.predict(network, z_t, t), z_t, s, t)
        return (q * (q.clamp(min=1e-30).log() - p.clamp(min=1e-30).log())).flatten(1).sum(1)

    def prior_kl(self, x: Tensor) -> Tensor:
        q = self._marginal(self._one_hot(x), self._keep(torch.ones(x.shape[0]), x)).clamp(min=1e-30)
        return (q * (q.log() + math.log(self.num_levels))).flatten(1).sum(1)

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        t = torch.zeros(x.shape[0], device=x.device)
        log_p = self.predict(network, self._corrupt(x, t, noise["first_keep"], noise["first_level"]), t)
        return -(self._one_hot(x) * log_p).flatten(1).sum(1)

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        return self.process.encode((uniform_noise(shape, generator, device) * self.num_levels).floor())

    def _draw(self, probabilities: Tensor, generator: Generator) -> Tensor:
        shape = probabilities.shape[:-1]
        uniform = uniform_noise(shape, generator, probabilities.device).unsqueeze(-1)
        return (probabilities.cumsum(-1) < uniform).sum(-1).clamp(max=self.num_levels - 1)

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        levels = self.process.encode(torch.arange(self.num_levels, device=z_t.device))
        z_s = self.process.encode(self._draw(self._reverse(output, z_t, s, t), generator))
        return z_s, (output.exp() * levels).sum(-1)

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        t = torch.zeros(z_0.shape[0], device=z_0.device)
        return self._draw(self.predict(network, z_0, t).exp(), generator)


class HoldingProcess(ResamplingProcess):
    """The same, of which a part may be given."""

    def bind_given(self, x: Tensor, noise: Noise, given: Tensor) -> tuple[dict[str, Tensor], BoundHolding]:
        return {}, BoundHolding(self, x, given)


class BoundHolding(BoundResampling):
    """What is given is held: z_t and p are there what the data are."""

    def __init__(self, process: ResamplingProcess, x: Tensor, given: Tensor) -> None:
        super().__init__(process)
        self.x, self.given = x, given

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        return torch.where(self.given, x, super().sample(x, t, noise))

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        known = self._one_hot(self.x).clamp(min=1e-30).log()
        return torch.where(self.given.unsqueeze(-1), known, super().predict(network, z_t, t))

    def prior_kl(self, x: Tensor) -> Tensor:
        keep = self._keep(torch.ones(x.shape[0]), x)
        q = self._marginal(self._one_hot(x), keep).clamp(min=1e-30)
        each = (q * (q.log() + math.log(self.num_levels))).sum(-1)
        return torch.where(self.given, 0.0, each).flatten(1).sum(1)

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        return torch.where(self.given, self.x, super().prior_sample(shape, generator, device))

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        z_s, estimate = super().reverse_step(output, z_t, s, t, generator)
        return torch.where(self.given, self.x, z_s), torch.where(self.given, self.x, estimate)


class LogitsProcess(ResamplingProcess):
    """The same, its network's output the K logits of each level: (C K, H, W) for (C, H, W), (L K) for (L)."""

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0] * self.num_levels, *shape[1:])

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundLogits]:
        return {}, BoundLogits(self)


class BoundLogits(BoundResampling):
    """A softmax of the network's own logits."""

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        timestep = (t.to(z_t.device) * (self.process.num_train_timesteps - 1)).float().expand(z_t.shape[0])
        logits = network(z_t, timestep).unflatten(1, (z_t.shape[1], self.num_levels))
        return torch.log_softmax(logits.movedim(2, -1), -1)


class LearnedResampling(ResamplingProcess):
    """The same, what it keeps at t = 0 a weight of its own."""

    has_weights = True

    def __init__(self, num_levels: int = 2, num_train_timesteps: int = 1000, first_keep: float = 0.95) -> None:
        super().__init__(num_levels, num_train_timesteps, first_keep)
        self.logit = nn.Parameter(torch.logit(torch.tensor(first_keep)))

    def keep(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.logit).to(t.device) * (1 - t).float()


class PixelNetwork(ModelMixin, ConfigMixin):
    """A network of a third party: each pixel by itself, told the timestep and, where it has one, a context."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        width: int = 8,
        context_size: int | None = None,
    ) -> None:
        super().__init__()
        self.into = nn.Conv2d(in_channels, width, 1)
        self.told = nn.Linear(1 + (context_size or 0), width)
        self.conv_out = nn.Conv2d(width, out_channels, 1)

    def forward(
        self, sample: Tensor, timestep: Tensor, return_dict: bool = True, context: Tensor | None = None
    ) -> tuple[Tensor]:
        told = torch.sin(timestep.to(sample.dtype).reshape(-1, 1).expand(len(sample), 1) / 300)
        if context is not None:
            told = torch.cat([told, context.to(sample.dtype)], 1)
        return (self.conv_out(torch.tanh(self.into(sample) + self.told(told)[:, :, None, None])),)


class Shout(Command):
    """Say a word loudly."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("word")

    def run(self, arguments: argparse.Namespace) -> int:
        if arguments.word == "nothing":
            raise ConfigurationError("word is 'nothing': give another.")
        print(arguments.word.upper())
        return 0


@dataclass(frozen=True)
class Mean(LikelihoodMethod):
    """A likelihood method of a third party: the bound at so many independent times."""

    name = "mean_bound"

    times: int = option(3, "independent times", at_least=1)

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        return MeanOfTimes(objective, seed, self.times)


class MeanOfTimes(Measurement):
    """At times of each image's own."""

    method = "mean_bound"

    def __init__(self, objective: Objective, seed: int, times: int) -> None:
        super().__init__(objective, seed)
        self.times = times

    def measure(self, batch: Any, replicate: int) -> Measured:
        sums: dict[str, Tensor] = {}
        for k in range(self.times):
            generators = [image_generator(self.seed, replicate, k, int(i)) for i in batch["indices"]]
            times = torch.cat([torch.rand(1, generator=generator) for generator in generators])
            terms = self.objective(batch, times, self.objective.draw_noise(batch, generators)).terms
            sums = {name: sums.get(name, 0) + term.double() / self.times for name, term in terms.items()}
        return Measured(sums, {"evaluations": torch.full((len(generators),), float(self.times))})

    def protocol(self) -> dict[str, Any]:
        return {}
