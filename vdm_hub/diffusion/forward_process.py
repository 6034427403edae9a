"""What corrupts the data: the interface between a process and everything built on it.

A `ForwardProcess` is bound to data (or to none, when sampling) and to its base noise; the `BoundProcess` then answers
for one batch. Gaussian diffusion is one implementation; a process without gamma or parameterization is another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub.diffusion.draws import Generator
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.errors import ConfigurationError

Network = Callable[..., Tensor]
"""``(sample (B, *data), timestep (B,)) -> output``: the bare network, its other arguments closed over.

The output has `ForwardProcess.output_shape`, which for most processes is the sample's. Where the process has
a `ForwardProcess.context_size`, it is given ``context=`` (B, context_size) too.
"""

Noise = Mapping[str, Tensor]
"""Base noise by name, as `ForwardProcess.draw_noise` gives it."""


class BoundProcess(ABC):
    """A forward process bound to one batch. KLs and likelihoods are per datum, (B,), in nats.

    Times are (B,) in a bound, and (), float64, while sampling, where all data are at one time.
    """

    def origin(self, x: Tensor) -> Tensor:
        """The tensor that is corrupted: the data, or a latent of theirs."""
        return x

    @abstractmethod
    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """``z_t`` from ``q(z_t|x)``."""

    @abstractmethod
    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        """Prepare the network's inputs, call it, and return its prediction in the terms of this process."""

    @abstractmethod
    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """A one-draw estimate of ``E KL(q(z_s|z_t, x) || p(z_s|z_t))``."""

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        """A one-draw estimate of the transition KL per unit of time, in the limit of infinitely many transitions."""
        raise ConfigurationError(
            f"{type(self).__name__} has no continuous-time limit: give a finite number of transitions."
        )

    @abstractmethod
    def prior_kl(self, x: Tensor) -> Tensor:
        """``KL(q(z_1|x) || p(z_1))``."""

    @abstractmethod
    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        """A one-draw estimate of ``E[-log p(x|z_0)]``."""

    def terms_by_dimension(
        self, levels: Tensor, x: Tensor, t: Tensor, noise: Noise, network: Network
    ) -> dict[str, Tensor]:
        """What each dimension adds to `reconstruction`, `prior_kl` and `kl_rate`, (B, *data), nats.

        The terms are called ``reconstruction``, ``prior`` and ``diffusion``.

        Raises:
            ConfigurationError: They are no sums over the dimensions of the data, or nobody has said how.
        """
        raise ConfigurationError(
            f"the bound of {type(self).__name__} is not known to be a sum over the data's own dimensions: ask for its "
            f"terms as a whole (log_likelihood)."
        )

    @abstractmethod
    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        """``z_1`` from ``p(z_1)``."""

    @abstractmethod
    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """``z_s`` from ``p(z_s|z_t)`` and the estimate of the data behind it.

        ``output`` is the prediction at ``z_t``.
        """

    def reverse_kernel(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ReverseKernel]:
        """The estimate of the data, and ``p(z_s|z_t)`` as an object, of which `reverse_step` is a draw.

        Raises:
            ConfigurationError: The reverse step is not Gaussian.
        """
        raise ConfigurationError(
            f"the reverse step of {type(self).__name__} is not Gaussian, so it has no kernel: draw from it by step()."
        )

    def marginal_kernel(self, x: Tensor, t: Tensor) -> ReverseKernel:
        """``q(z_t|x)`` as an object, of which `sample` is a draw; see `ForwardProcess.has_gaussian_kernels`.

        Raises:
            ConfigurationError: It is not Gaussian.
        """
        raise ConfigurationError(f"q(z_t|x) of {type(self).__name__} is not Gaussian: draw from it by sample().")

    def posterior_kernel(self, x: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseKernel:
        """``q(z_s|z_t, x)`` as an object; see `ForwardProcess.has_gaussian_kernels`.

        Raises:
            ConfigurationError: It is not Gaussian.
        """
        raise ConfigurationError(f"q(z_s|z_t, x) of {type(self).__name__} is not Gaussian.")

    def transition_probabilities(self, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``q(z_t|z_s)`` of each value, (B, *data, K), of a process whose latents are values of the data.

        Raises:
            ConfigurationError: Its latents are others.
        """
        raise ConfigurationError(f"the latents of {type(self).__name__} are no values with probabilities.")

    def reverse_probabilities(self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``p(z_s|z_t)`` of each value, (B, *data, K), of which `reverse_step` is a draw.

        ``output`` is the prediction at ``z_t``. See `transition_probabilities`.
        """
        raise ConfigurationError(f"the latents of {type(self).__name__} are no values with probabilities.")

    @abstractmethod
    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        """Levels from ``p(x|z_0)``, int64."""


class ForwardProcess(nn.Module, ABC):
    """A forward process: it may hold parameters (a learned schedule), and is rebuilt from a scheduler's config."""

    num_levels: int
    num_train_timesteps: int

    example_shape: tuple[int, ...] = (1, 8, 8)
    """Of a datum, without the batch, that the conformance kit may put it under its laws with."""

    has_discrete_latents: bool = False
    """Whether z_0 is the data, and each latent values of theirs, any alike at t = 1: then a `BoundProcess` says
    `BoundProcess.transition_probabilities` and `BoundProcess.reverse_probabilities`."""

    has_gaussian_kernels: bool = False
    """Whether the latents of the data are Gaussian, and N(0, I) at t = 1 for the model: then a `BoundProcess` says
    `BoundProcess.marginal_kernel`, `BoundProcess.posterior_kernel` and `BoundProcess.reverse_kernel`."""

    has_weights: bool = False
    """Whether it holds parameters, beside its noise schedule's, that no config can hold: a pipeline carries it."""

    @property
    def likelihood_method(self) -> Any:
        """The likelihood method that measures it best, in its serialised form, where nobody names one."""
        return "bound"

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the network's output for ``z_t`` of a shape, both without the batch.

        It is the same, unless the network says more of each dimension than one number: K logits of each level of an
        image may be (C K, H, W), and those of each token of a text (L, K).
        """
        return tuple(shape)

    @property
    def context_size(self) -> int | None:
        """Length of the vector that the network is told beside the timestep; ``None`` where there is none."""
        return None

    @property
    def scalar_gamma(self) -> NoiseSchedule | None:
        """The noise schedule of a Gaussian process of the data with one gamma a time; ``None`` for any other."""
        return None

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse data of a shape, without the batch, that the process is not made for.

        Raises:
            ConfigurationError: Naming both shapes.
        """

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> ForwardProcess:
        """Build the process from a `VDMScheduler`'s config fields.

        Args:
            fields: The config; each process reads the fields it needs, its own arguments from
                ``fields["forward_process"]["config"]``.
            schedule: A noise schedule that has weights, already built, where the pipeline carries one.
        """

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """The scheduler's config fields that rebuild this process as it is now, learned values baked in."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The trained submodules, by role."""
        return {"schedule": self}

    def prepare(self, levels: Iterable[Tensor]) -> str | None:
        """Take from some of the data, before training, what the process is to know of them.

        Args:
            levels: Batches, (B, *data), to be read only if they are needed.

        Returns:
            What is to be said of it, if anything.
        """
        return None

    @property
    def diffused(self) -> ForwardProcess:
        """The process of what is corrupted: itself, or that of the data's latents."""
        return self

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of ``z_t`` for data of a shape, both (B, ...)."""
        return tuple(shape)

    def carried_schedule(self) -> nn.Module | None:
        """The noise schedule whose weights no config can hold; the pipeline carries it as a component."""
        return None

    @abstractmethod
    def encode(self, levels: Tensor) -> Tensor:
        """The data x that the process corrupts, of levels 0..K-1."""

    @abstractmethod
    def quantise(self, x: Tensor) -> Tensor:
        """The nearest levels of data that a sampler left in the space of x, int64."""

    def reconstruction_by_level(self) -> Tensor | None:
        """The reconstruction term's expectation over z_0 for a dimension at each level, (K,), nats, float64.

        None where it is no sum over dimensions of a function of each one's level: then it is estimated by draws.
        """
        return None

    @abstractmethod
    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        """All base noise that one evaluation of the bound on data of this shape needs, by name."""

    def draw_context(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        """The part of `draw_noise` that `bind` needs, which sampling needs too; none for most."""
        return {}

    @abstractmethod
    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundProcess]:
        """Named extra bound terms ((B,), nats; none for most) and the process bound to this batch.

        ``x`` is ``None`` when sampling: what q would draw from x is then drawn from p.
        """

    def bind_given(self, x: Tensor, noise: Noise, given: Tensor) -> tuple[dict[str, Tensor], BoundProcess]:
        """What `bind` gives, where a part of each datum is told, such as a prompt, a left context or padding.

        What is given is never corrupted and in no term, so the bound is one on ``-log p(the others|the given)``;
        while sampling it keeps its value.

        Args:
            x: The data; while sampling only what is given of them is read.
            noise: As in `bind`.
            given: Which dimensions are, bool, (B, *data).

        Raises:
            ConfigurationError: The process corrupts all of a datum, as those do that do not say otherwise.
        """
        raise ConfigurationError(
            f"{type(self).__name__} takes no given data, and {int(given.sum())} dimensions of this batch are said to "
            f"be given: leave 'given' out of the batch, or choose a process that takes them."
        )

    def timestep(self, t: Tensor) -> Tensor:
        """The timestep that stands for time t in a sampler's grid, strictly increasing, (N,) -> (N,), float64."""
        return t.double() * (self.num_train_timesteps - 1)

    def time(self, timestep: Tensor) -> Tensor:
        """The time of a timestep: the inverse of `timestep`."""
        return timestep.double() / (self.num_train_timesteps - 1)
