"""`BinomialProcess`: what binomial diffusion says to the bound, the sampler and the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub import (
    BoundProcess,
    ConfigurationError,
    ForwardProcess,
    Generator,
    Network,
    Noise,
    broadcast,
    registry,
    sum_dimensions,
    uniform_noise,
)
from vdm_hub_binomial import kernels


class BinomialProcess(ForwardProcess):
    r"""Bits that are replaced by coin tosses, at the remaining signal ``a(t) = 1 - t^exponent``.

    With T transitions and ``exponent`` 1 it is SD15's chain of T steps, ``beta_t = 1/(T - t + 1)`` (SD15 Table 1): the
    signal after t of them is ``(T - t)/T``. z_0 is the data, z_1 all coin tosses: so the reconstruction and the prior
    term are zero, and the first transition, from z_{1/T} to the data, is SD15's decoder. In continuous time the bound
    does not depend on the exponent, but its estimator's variance does: with 1 it diverges logarithmically at t = 0,
    with 2 it is finite.

    The network reads the bits as -1 and 1 and ``(1 - a)(num_train_timesteps - 1)`` as the timestep, and its output is
    the log-odds of each bit of the data given all other bits.

    Args:
        exponent: At least 1; how late the signal is lost.
        num_train_timesteps: The range of the timesteps.

    >>> process = BinomialProcess()
    >>> process.encode(torch.tensor([0, 1])), process.signal(torch.tensor([0.0, 0.2, 1.0]))
    (tensor([-1.,  1.]), tensor([1.0000, 0.8000, 0.0000]))
    """

    num_levels = 2
    has_discrete_latents = True
    example_num_levels = 2
    """For `vdm-hub plugins --check`."""

    def __init__(self, exponent: float = 1.0, num_train_timesteps: int = 1000) -> None:
        super().__init__()
        if not isinstance(exponent, int | float) or not 1 <= exponent < float("inf"):
            raise ConfigurationError(f"the binomial process got exponent={exponent!r}: give a number of at least 1.")
        self.exponent, self.num_train_timesteps = float(exponent), num_train_timesteps

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> BinomialProcess:
        """See `ForwardProcess.from_fields`; it reads ``num_levels``, ``num_train_timesteps`` and its own config."""
        if fields.get("num_levels", 256) != cls.num_levels:
            raise ConfigurationError(
                f"the binomial process corrupts bits, and num_levels is {fields.get('num_levels', 256)}: give images "
                f"of two levels with num_levels 2; python -m vdm_hub_binomial.binarise makes them of others."
            )
        _, arguments = registry.resolve("forward_processes", fields["forward_process"])
        return cls(**arguments | {"num_train_timesteps": fields.get("num_train_timesteps", 1000)})

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments that the scheduler's config does not hold itself."""
        return {"exponent": self.exponent}

    def fields(self) -> dict[str, Any]:
        """See `ForwardProcess.fields`."""
        return {
            "forward_process": registry.serialise("forward_processes", self),
            "num_levels": self.num_levels,
            "num_train_timesteps": self.num_train_timesteps,
        }

    def lost(self, t: Tensor) -> Tensor:
        """``1 - a(t)``, the probability that a bit was replaced, elementwise."""
        return t**self.exponent

    def signal(self, t: Tensor) -> Tensor:
        """``a(t)``, elementwise."""
        return 1 - self.lost(t)

    def lost_rate(self, t: Tensor) -> Tensor:
        """The derivative of `lost` in t."""
        return self.exponent * t ** (self.exponent - 1)

    def encode(self, levels: Tensor) -> Tensor:
        """0 and 1 -> -1 and 1."""
        return 2 * levels.float() - 1

    def quantise(self, x: Tensor) -> Tensor:
        """The sign, as 0 or 1."""
        return (x > 0).long()

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        """One uniform a bit."""
        return {"marginal": uniform_noise(shape, generator, device)}

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundBinomial]:
        """No extra terms; nothing is drawn once for a chain."""
        return {}, BoundBinomial(self)

    def timestep(self, t: Tensor) -> Tensor:
        """``(1 - a(t)) (num_train_timesteps - 1)``, what the network reads too."""
        return self.lost(t.double()) * (self.num_train_timesteps - 1)

    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`."""
        return (timestep.double() / (self.num_train_timesteps - 1)) ** (1 / self.exponent)


class BoundBinomial(BoundProcess):
    """The binomial process on one batch: see `kernels`."""

    def __init__(self, process: BinomialProcess) -> None:
        self.process = process

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """``z_t = -x`` with probability ``(1 - a_t)/2``, else x (SD15 Table 1)."""
        return torch.where(noise["marginal"] < 0.5 * self._lost(t, x), -x, x)

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        """The log-odds of each bit of the data given all other bits, (B, *data)."""
        steps = self.process.num_train_timesteps - 1
        timestep = (self.process.lost(t) * steps).to(torch.promote_types(z_t.dtype, torch.float32))
        return network(z_t, timestep.to(z_t.device).expand(z_t.shape[0])).to(z_t.dtype)

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """See `kernels.transition_kl`, summed over the bits."""
        z_t = self.sample(x, t, noise)
        logit = z_t * self.predict(network, z_t, t)
        return sum_dimensions(kernels.transition_kl(z_t == x, logit, self._lost(s, x), self._lost(t, x)))

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """See `kernels.kl_rate`, summed over the bits."""
        z_t = self.sample(x, t, noise)
        logit = z_t * self.predict(network, z_t, t)
        lost_rate = broadcast(self.process.lost_rate(t), x)
        return sum_dimensions(kernels.kl_rate(z_t == x, logit, self._lost(t, x), lost_rate))

    def prior_kl(self, x: Tensor) -> Tensor:
        """Zero: at t = 1 no signal remains."""
        return x.new_zeros(x.shape[0])

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        """Zero: z_0 is the data."""
        return x.new_zeros(x.shape[0])

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        """Fair coins, ``Bernoulli(1/2)``."""
        return torch.where(uniform_noise(shape, generator, device) < 0.5, -1.0, 1.0)

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """``z_s`` from the mixture ``p(z_s|z_t)``, and ``E[x|z_t]``."""
        lost_s, lost_t = self._lost(s, z_t), self._lost(t, z_t)
        flip = kernels.flip_probability(z_t * output, lost_s, lost_t)
        uniform = uniform_noise(z_t.shape, generator, z_t.device, z_t.dtype)
        z_s = torch.where(uniform < flip, -z_t, z_t)
        return z_s, kernels.mean_of_data(z_t, output, lost_t).to(z_t.dtype)

    def transition_probabilities(self, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``q(z_t|z_s)`` of 0 and of 1: a bit is replaced by a coin with probability ``1 - a_t/a_s``."""
        kept = broadcast(self.process.signal(t) / self.process.signal(s), z_s)
        return _by_value(z_s, 0.5 * (1 - kept))

    def reverse_probabilities(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``p(z_s|z_t)`` of 0 and of 1: see `kernels.flip_probability`."""
        return _by_value(z_t, kernels.flip_probability(z_t * output, self._lost(s, z_t), self._lost(t, z_t)))

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        """The bits themselves: the last transition has drawn them."""
        return self.process.quantise(z_0)

    def _lost(self, t: Tensor, like: Tensor) -> Tensor:
        """``1 - a(t)`` of times (B,) or (), ready to be combined with data."""
        return broadcast(self.process.lost(t), like)


def _by_value(z: Tensor, flip: Tensor) -> Tensor:
    """The probabilities of 0 and of 1, (*z, 2), where z, of -1 and 1, flips with a probability."""
    one = torch.where(z > 0, 1 - flip, flip)
    return torch.stack([1 - one, one], -1)
