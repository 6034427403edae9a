"""`AbsorbingProcess` and `UniformProcess`: what they say to the bound and the sampler."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
from vdm_hub_tokens import kernels
from vdm_hub_tokens.kernels import Level
from vdm_hub_tokens.schedules import build_schedule

_MOST_LEVELS = 2**24
"""Ids are carried as float32, which holds whole numbers up to here."""
_MOST_TIMESTEPS = 10**7


def _whole(name: str, value: Any, least: int, most: int) -> int:
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or not least <= operator.index(value) <= most:
        raise ConfigurationError(f"{name} is {value!r:.100}: give a whole number from {least} to {most:,}.")
    return operator.index(value)


class TokenProcess(ForwardProcess):
    """A process of ids 0..K-1 whose z_0 is the data and whose z_1 knows nothing of them.

    So the prior and the reconstruction term are zero, and the first transition is the decoder. The network reads ids,
    int64, and ``(1 - alpha)(num_train_timesteps - 1)`` as the timestep; its output is K logits of each site's value,
    given all other sites, (B, *data, K). A part of each datum may be given: see `ForwardProcess.bind_given`.

    Args:
        num_levels: K, the values of the data.
        schedule: The name of alpha(t): see `build_schedule`.
        exponent: Of the schedule ``polynomial``.
        num_train_timesteps: The range of the timesteps.
    """

    example_shape = (16,)
    example_num_levels = 5
    """For `vdm-hub plugins --check`."""

    def __init__(
        self,
        num_levels: int = 256,
        schedule: str = "linear",
        exponent: float | None = None,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.num_levels = _whole("num_levels", num_levels, 1, _MOST_LEVELS)
        self.num_train_timesteps = _whole("num_train_timesteps", num_train_timesteps, 2, _MOST_TIMESTEPS)
        self.schedule = build_schedule(schedule, exponent)
        self.exponent = exponent

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> TokenProcess:
        """See `ForwardProcess.from_fields`; it reads ``num_levels``, ``num_train_timesteps`` and its own config."""
        _, arguments = registry.resolve("forward_processes", fields["forward_process"])
        names = ("num_levels", "num_train_timesteps")
        return cls(**arguments | {name: fields[name] for name in names if name in fields})

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments that the scheduler's config does not hold itself."""
        return {"schedule": self.schedule.name, "exponent": self.exponent}

    def extra_repr(self) -> str:
        """What `print` shows: K, and what decides how sites are lost."""
        chosen = {"num_levels": self.num_levels} | self.to_config()
        return ", ".join(f"{name}={value!r}" for name, value in chosen.items())

    def fields(self) -> dict[str, Any]:
        """See `ForwardProcess.fields`."""
        return {
            "forward_process": registry.serialise("forward_processes", self),
            "num_levels": self.num_levels,
            "num_train_timesteps": self.num_train_timesteps,
        }

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """K logits of each site: (L,) -> (L, K)."""
        return (*shape, self.num_levels)

    def encode(self, levels: Tensor) -> Tensor:
        """The ids, as float32."""
        return levels.float()

    def quantise(self, x: Tensor) -> Tensor:
        """The ids, as int64; what is none is the nearest."""
        return x.round().long().clamp(0, self.num_levels - 1)

    @abstractmethod
    def bind_given(
        self, x: Tensor | None, noise: Noise, given: Tensor | None
    ) -> tuple[dict[str, Tensor], BoundTokens]:
        """No extra terms; nothing is drawn once for a chain."""

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundTokens]:
        """As `bind_given`, of nothing given."""
        return self.bind_given(x, noise, None)

    def timestep(self, t: Tensor) -> Tensor:
        """``(1 - alpha(t)) (num_train_timesteps - 1)``, what the network reads too."""
        return self.schedule.lost(t.double()) * (self.num_train_timesteps - 1)

    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`."""
        return self.schedule.time(timestep.double() / (self.num_train_timesteps - 1))


class BoundTokens(BoundProcess):
    """A process of tokens on one batch, of which a part may be given."""

    def __init__(self, process: TokenProcess, x: Tensor | None, given: Tensor | None) -> None:
        self.process, self.schedule, self.x, self.given = process, process.schedule, x, given

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        """K logits of each site's value given all other sites, (B, *data, K)."""
        timestep = self.schedule.lost(t) * (self.process.num_train_timesteps - 1)
        timestep = timestep.to(device=z_t.device, dtype=torch.promote_types(z_t.dtype, torch.float32))
        return network(z_t.long(), timestep.expand(z_t.shape[0])).to(z_t.dtype)

    def prior_kl(self, x: Tensor) -> Tensor:
        """Zero: at t = 1 no signal remains."""
        return x.new_zeros(x.shape[0])

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        """Zero: z_0 is the data."""
        return x.new_zeros(x.shape[0])

    def _held(self, z: Tensor) -> Tensor:
        """The latent, the data's own where they are given."""
        return z if self.given is None or self.x is None else torch.where(self.given, self.x.to(z.dtype), z)

    def _scored(self, values: Tensor) -> Tensor:
        """The sum over sites that are not given, (B,)."""
        return sum_dimensions(values if self.given is None else torch.where(self.given, 0.0, values))


class AbsorbingProcess(TokenProcess):
    r"""Sites are masked, each by itself: ``q(z_t|x)`` keeps x with alpha(t), else it is the mask, the id K.

    Bound in continuous time: ``int -alpha'/(1 - alpha) E[sum over masked sites of -log p(x_l|z_t)] dt`` (MDLM eq. 10;
    MD4 eq. 4), the same for every schedule; with T transitions, the weights ``(alpha_s - alpha_t)/(1 - alpha_t)``.

    With ``remasking`` the sampler masks open sites again, at a probability that leaves all marginals right (ReMDM,
    arXiv 2503.00307, eq. 5): ``sigma = min(remasking_cap, remasking min(1, (1 - alpha_s)/alpha_t))``, and masked ones
    open with ``(alpha_s - (1 - sigma) alpha_t)/(1 - alpha_t)``. That is another model, with a bound of its own at
    finite T, above that without, and none in continuous time; train and measure without, and sample from
    `with_remasking`.

    Args:
        num_levels: K, the values of the data, without the mask.
        schedule: See `TokenProcess`.
        exponent: See `TokenProcess`.
        num_train_timesteps: See `TokenProcess`.
        remasking: The share of the most remasking that there may be, from 0 to 1; 0 is none.
        remasking_cap: The most of a step, from 0 to 1.

    >>> process = AbsorbingProcess(num_levels=3)
    >>> noise = {"marginal": torch.tensor([[0.1, 0.4, 0.9]])}
    >>> x = process.encode(torch.tensor([[0, 1, 2]]))
    >>> process.bind(x, noise)[1].sample(x, torch.tensor([0.5]), noise)  # 3 is the mask
    tensor([[3., 3., 2.]])
    """

    def __init__(
        self,
        num_levels: int = 256,
        schedule: str = "linear",
        exponent: float | None = None,
        num_train_timesteps: int = 1000,
        remasking: float = 0.0,
        remasking_cap: float = 1.0,
    ) -> None:
        super().__init__(num_levels, schedule, exponent, num_train_timesteps)
        for name, value in {"remasking": remasking, "remasking_cap": remasking_cap}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigurationError(f"{name} is {value!r:.100}: give a number from 0 to 1.")
        self.remasking, self.remasking_cap = float(remasking), float(remasking_cap)

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments that the scheduler's config does not hold itself."""
        return super().to_config() | {"remasking": self.remasking, "remasking_cap": self.remasking_cap}

    @property
    def mask_id(self) -> int:
        """The id of a masked site, K: the network has K + 1 embeddings, and K logits."""
        return self.num_levels

    @property
    def likelihood_method(self) -> Any:
        """``masked_counts``, which has a small part of the bound's variance; with remasking its own chain's bound."""
        return "bound" if self.remasking else {"name": "masked_counts", "package": "vdm-hub-tokens"}

    def with_remasking(self, remasking: float, cap: float = 1.0) -> AbsorbingProcess:
        """The same process whose sampler masks open sites again.

        Args:
            remasking: The share of the most that there may be.
            cap: The most of a step.
        """
        again = self.to_config() | {"remasking": remasking, "remasking_cap": cap}
        return type(self)(self.num_levels, num_train_timesteps=self.num_train_timesteps, **again)

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        """One uniform a site."""
        return {"marginal": uniform_noise(shape, generator, device)}

    def bind_given(
        self, x: Tensor | None, noise: Noise, given: Tensor | None
    ) -> tuple[dict[str, Tensor], BoundAbsorbing]:
        """No extra terms; nothing is drawn once for a chain."""
        return {}, BoundAbsorbing(self, x, given)


class BoundAbsorbing(BoundTokens):
    """Masking on one batch."""

    process: AbsorbingProcess

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """``z_t``: the mask where the site's uniform is below ``1 - alpha(t)``, else x."""
        masked = noise["marginal"] < broadcast(self.schedule.lost(t), x)
        return self._held(torch.where(masked, float(self.process.mask_id), x))

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``(alpha_s - (1 - sigma) alpha_t)/(1 - alpha_t)`` times the masked sites' ``-log p(x|z_t)``."""
        return self.opening(s, t) * self._masked_costs(x, t, noise, network)

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """``-alpha'/(1 - alpha)`` times the masked sites' ``-log p(x|z_t)``.

        Raises:
            ConfigurationError: The process remasks.
        """
        if self.process.remasking:
            raise ConfigurationError(
                f"remasking is {self.process.remasking:g}, and a sampler that remasks has no bound in continuous "
                f"time: give a number of transitions, VariationalBound(transitions=100) or --transitions 100, or "
                f"measure the process with remasking 0."
            )
        return self.schedule.opening_rate(t) * self._masked_costs(x, t, noise, network)

    def _masked_costs(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        z_t = self.sample(x, t, noise)
        costs = site_costs(self.predict(network, z_t, t), x)
        return sum_dimensions(torch.where(z_t == self.process.mask_id, costs, 0.0))

    def opening(self, s: Tensor, t: Tensor) -> Tensor:
        """The probability that a masked site opens in a step."""
        again = self.closing(s, t) * self.schedule.alpha(t) / self.schedule.lost(t)
        return self.schedule.opened(s, t) + again

    def closing(self, s: Tensor, t: Tensor) -> Tensor:
        """sigma, the probability that an open site is masked again in a step."""
        most = self.schedule.lost(s) / self.schedule.alpha(t).clamp(min=1e-30)
        return (self.process.remasking * most.clamp(max=1)).clamp(max=self.process.remasking_cap)

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        """All masked but what is given."""
        return self._held(torch.full(shape, float(self.process.mask_id), device=device))

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """``z_s``, any number of sites opened at once, each for itself; and the likeliest data behind it."""
        masked = z_t == self.process.mask_id
        turns, values = _two_uniforms(z_t, generator)
        opening = masked & (turns < broadcast(self.opening(s, t), z_t))
        z_s = torch.where(~masked & (turns < broadcast(self.closing(s, t), z_t)), self.process.mask_id, z_t.long())
        z_s[opening] = kernels.draw_values(torch.softmax(output[opening].double(), -1), values[opening])
        estimate = torch.where(masked, output.argmax(-1).to(z_t.dtype), z_t)
        return self._held(z_s.to(z_t.dtype)), self._held(estimate)

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        """The ids themselves: the last transition has opened all; what is masked all the same is drawn."""
        masked = z_0 == self.process.mask_id
        levels = self.process.quantise(z_0)
        if bool(masked.any()):
            output = self.predict(network, z_0, z_0.new_zeros(z_0.shape[0]))
            values = uniform_noise(z_0.shape, generator, z_0.device, torch.float64)
            levels[masked] = kernels.draw_values(torch.softmax(output[masked].double(), -1), values[masked])
        return levels


class UniformProcess(TokenProcess):
    r"""Sites are replaced, each by itself: ``q(z_t|x) = alpha(t) [z_t = x] + (1 - alpha(t))/K`` (D3PM's uniform).

    The reverse model is the mixture over the data that the network thinks possible: see `kernels`. K = 2 is binomial
    diffusion. In continuous time the bound depends on the schedule not at all where the network reads no time but
    through it, and its estimator's variance does.

    >>> process = UniformProcess(num_levels=4)
    >>> noise = {"marginal": torch.tensor([[0.1, 0.9]]), "value": torch.tensor([[0.4, 0.4]])}
    >>> x = process.encode(torch.tensor([[1, 1]]))
    >>> process.bind(x, noise)[1].sample(x, torch.tensor([0.5]), noise)
    tensor([[3., 1.]])
    """

    has_discrete_latents = True

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        """Two uniforms a site: whether it changes, and to which of the other values."""
        return {name: uniform_noise(shape, generator, device) for name in ("marginal", "value")}

    def bind_given(
        self, x: Tensor | None, noise: Noise, given: Tensor | None
    ) -> tuple[dict[str, Tensor], BoundUniform]:
        """No extra terms; nothing is drawn once for a chain."""
        return {}, BoundUniform(self, x, given)


class BoundUniform(BoundTokens):
    """Uniform diffusion on one batch: see `kernels`."""

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """``z_t``: another value with probability ``(1 - alpha)(K - 1)/K``, each alike, else x."""
        k = self.process.num_levels
        changed = noise["marginal"] < broadcast(self.schedule.lost(t), x) * ((k - 1) / k)
        other = (x + 1 + (noise["value"] * (k - 1)).floor().clamp(max=max(k - 2, 0))) % k
        return self._held(torch.where(changed, other, x))

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """See `kernels.transition_kl`, summed over the sites."""
        z_t = self.sample(x, t, noise)
        logits = self.predict(network, z_t, t)
        at_s, at_t = self._level(s, logits), self._level(t, logits)
        opened = broadcast(self.schedule.opened(s, t), logits)
        return self._scored(kernels.transition_kl(x, z_t, logits, at_s, at_t, opened))

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """See `kernels.kl_rate`, summed over the sites."""
        z_t = self.sample(x, t, noise)
        logits = self.predict(network, z_t, t)
        lost_rate = broadcast(self.schedule.lost_rate(t), logits)
        return self._scored(kernels.kl_rate(x, z_t, logits, self._level(t, logits), lost_rate))

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        """Any of the K values, each alike, but what is given."""
        uniforms = uniform_noise(shape, generator, device, torch.float64)
        return self._held((uniforms * self.process.num_levels).floor().float())

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """``z_s`` from the mixture ``p(z_s|z_t)``, and the likeliest data given z_t."""
        uniforms = uniform_noise(z_t.shape, generator, z_t.device, torch.float64)
        z_s = kernels.draw_values(self.reverse_probabilities(output, z_t, s, t), uniforms).to(z_t.dtype)
        logits = output.double()
        estimate = kernels.log_posterior(z_t, logits, self._level(t, logits)).argmax(-1).to(z_t.dtype)
        return self._held(z_s), self._held(estimate)

    def transition_probabilities(self, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``q(z_t|z_s)``: a value is replaced by any, each alike, with probability ``1 - alpha_t/alpha_s``."""
        k = self.process.num_levels
        kept = broadcast(self.schedule.alpha(t) / self.schedule.alpha(s), z_s).double().unsqueeze(-1)
        return kept * F.one_hot(z_s.long(), k) + (1 - kept) / k

    def reverse_probabilities(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``p(z_s|z_t)``: see `kernels.reverse_probabilities`; float64."""
        logits = output.double()
        at_s, at_t = self._level(s, logits), self._level(t, logits)
        opened = broadcast(self.schedule.opened(s, t).double(), logits)
        return kernels.reverse_probabilities(z_t, logits, at_s, at_t, opened)

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        """The ids themselves: the last transition has drawn them."""
        return self.process.quantise(z_0)

    def _level(self, t: Tensor, like: Tensor) -> Level:
        """The signal at times (B,) or (), ready to be combined with logits."""
        return Level(*(broadcast(value.to(like), like) for value in (self.schedule.alpha(t), self.schedule.lost(t))))


def site_costs(logits: Tensor, x: Tensor) -> Tensor:
    """``-log p(x_l)`` of each site in nats, (B, *data), of logits (B, *data, K)."""
    k = logits.shape[-1]
    return F.cross_entropy(logits.reshape(-1, k), x.long().flatten(), reduction="none").reshape(x.shape)


def _two_uniforms(z: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0], 2, *z.shape[1:])
    first, second = uniform_noise(shape, generator, z.device, torch.float64).unbind(1)
    return first, second
