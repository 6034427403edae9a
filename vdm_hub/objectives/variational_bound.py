r"""The variational bound in named terms, and the objective that trains on it.

``-log p(x) <= KL(q(z_1|x) || p(z_1)) + E[-log p(x|z_0)] + L_diffusion`` (VDM eq. 11; Luo eq. 58, the
denoising-matching form). With T transitions ``L_diffusion`` is T times the mean transition KL (VDM eq. 13); with
infinitely many, the integral of its rate (VDM eq. 17).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub.data.conditions import Condition
from vdm_hub.data.kinds import IMAGES, TOKENS, DataKind
from vdm_hub.diffusion.draws import Generator
from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess, Network, Noise
from vdm_hub.diffusion.times import discretise
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.fields import whole_number
from vdm_hub.models.calls import Call, check_context, checked_output, told

Terms = dict[str, Tensor]
"""The terms of a bound by name, each per datum, (B,), in nats."""

Batch = Mapping[str, Tensor]
"""``levels``: integers 0..K-1, (B, *data), such as (B, C, H, W).

``given``, where it is there: which of them are told, bool, (B, *data): see `ForwardProcess.bind_given`. All else
(``class_labels``, ...) is passed to the network by name.
"""


@dataclass
class Bound:
    """An upper bound on ``-log p(x)`` as named terms, each per datum, (B,), in nats.

    >>> Bound({"prior": torch.tensor([1.0]), "diffusion": torch.tensor([2.0])}, dimensions=3).total
    tensor([3.])
    """

    terms: dict[str, Tensor]
    dimensions: int

    @property
    def total(self) -> Tensor:
        """The bound per datum in nats, (B,)."""
        return torch.stack(list(self.terms.values())).sum(0)

    @property
    def loss(self) -> Tensor:
        """The mean bound over the batch in bits per dimension, what training minimises."""
        return self.total.mean() / (self.dimensions * math.log(2))

    def bits_per_dim(self) -> dict[str, Tensor]:
        """The terms per datum in bits per dimension."""
        return {name: term / (self.dimensions * math.log(2)) for name, term in self.terms.items()}


class Objective(nn.Module, ABC):
    """Network, process and encoders in one module, so that accelerate prepares one; every draw comes in explicitly.

    Attributes:
        kind: Of the data, by which words of them are chosen.
        transitions: T, or ``None`` for continuous time, and where there is no time.
        condition: What the network is told of each datum; ``None`` for nothing.
    """

    kind: DataKind = IMAGES
    transitions: int | None = None
    condition: Condition | None = None

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The network, or all networks: what is compiled, checkpointed and counted."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The trained submodules, by role: all are counted, and the ``schedule`` is not decayed."""
        return {"network": self.body}

    def prepare(self, batches: Iterable[Batch]) -> str | None:
        """Prepare the process: see `ForwardProcess.prepare`."""
        return None

    @abstractmethod
    def forward(self, batch: Batch, times: Tensor, noise: Noise) -> Bound:
        """The bound of one batch at one time per datum.

        Args:
            batch: See `Batch`.
            times: In [0, 1), (B,); not read where there is no time.
            noise: Base noise, as `draw_noise` gives it.
        """

    @abstractmethod
    def draw_noise(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """The base noise that one `forward` on this batch needs."""


class VDMObjective(Objective):
    """The bound of a variational diffusion model.

    Everything but the body of the network runs in float32, outside autocast: at gamma = -13.3 the noise would vanish
    in bfloat16.

    Args:
        network: Any module called as ``network(sample, timestep, return_dict=False, **conditioning)[0]``.
        process: The forward process, with its schedule's parameters.
        transitions: T, or ``None`` for continuous time.
        condition: What the network is told of each datum.

    Raises:
        ConfigurationError: The process tells its network a context, and the network takes none, or another.

    Attributes:
        integrand: The name of the term that is an integral, or a mean, over times; the others have no time.
        sampling: What the scheduler's config of the model is to say to samplers, beside the process.

    >>> from vdm_hub import UNetVDMModel, VDMScheduler
    >>> unet = UNetVDMModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    >>> objective = VDMObjective(unet, VDMScheduler(num_levels=17).process)
    >>> batch = {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long)}
    >>> noise = objective.draw_noise(batch, torch.Generator().manual_seed(0))
    >>> bound = objective(batch, torch.tensor([0.25, 0.75]), noise)
    >>> {name: tuple(term.shape) for name, term in bound.terms.items()}
    {'reconstruction': (2,), 'prior': (2,), 'diffusion': (2,)}
    """

    integrand: str = "diffusion"
    sampling: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        network: nn.Module,
        process: ForwardProcess,
        transitions: int | None = None,
        condition: Condition | None = None,
    ) -> None:
        super().__init__()
        self.transitions = None if transitions is None else whole_number("transitions", transitions)
        check_context(process.context_size, network)
        self.network, self.process, self.condition = network, process, condition
        self.call = Call.of(network)

    @property
    def body(self) -> nn.Module:
        """The network."""
        return self.network

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The network, and those of the process."""
        return {"network": self.network} | self.process.parts

    def prepare(self, batches: Iterable[Batch]) -> str | None:
        """Prepare the process: see `ForwardProcess.prepare`."""
        return self.process.prepare(batch["levels"] for batch in batches)

    def forward(self, batch: Batch, times: Tensor, noise: Noise) -> Bound:
        """The terms ``reconstruction``, ``prior`` and ``diffusion``, and those that the process adds."""
        levels, network = batch["levels"], self.network_on(batch)
        _check_draws(levels, times, self.process.num_levels, self.kind)
        with torch.autocast(levels.device.type, enabled=False):
            x = self.process.encode(levels)
            extras, bound = bind_batch(self.process, batch, x, noise)
            terms = {
                "reconstruction": bound.reconstruction(levels, x, noise, network),
                "prior": bound.prior_kl(x),
                "diffusion": self._diffusion(bound, x, times, noise, network),
            }
        return Bound(terms | extras, dimensions=levels[0].numel())

    def network_terms(self, batch: Batch, times: Tensor, noise: Noise, *, reconstruction: bool) -> Terms:
        """The terms that the network has a say in, and so what it is told; the others are the same for any condition.

        Args:
            batch: See `forward`, as the next two.
            times: In [0, 1), (B,).
            noise: Base noise.
            reconstruction: Whether the reconstruction is one of them, as with a decoder that asks the network.
        """
        levels, network = batch["levels"], self.network_on(batch)
        _check_draws(levels, times, self.process.num_levels, self.kind)
        with torch.autocast(levels.device.type, enabled=False):
            x = self.process.encode(levels)
            _, bound = bind_batch(self.process, batch, x, noise)
            terms = {"reconstruction": bound.reconstruction(levels, x, noise, network)} if reconstruction else {}
            return terms | {self.integrand: self._diffusion(bound, x, times, noise, network)}

    def terms_by_dimension(self, batch: Batch, times: Tensor, noise: Noise) -> Terms:
        """What each dimension of the data adds to the terms of `forward` in continuous time, (B, *data), nats.

        Those that a process adds of its own lie on no dimension, and are left out.

        Args:
            batch: See `forward`, as the next two.
            times: In [0, 1), (B,).
            noise: Base noise.

        Raises:
            ConfigurationError: The terms are no sums over dimensions, as in a diffusion of latents.
        """
        levels, network = batch["levels"], self.network_on(batch)
        _check_draws(levels, times, self.process.num_levels, self.kind)
        with torch.autocast(levels.device.type, enabled=False):
            x = self.process.encode(levels)
            _, bound = bind_batch(self.process, batch, x, noise)
            return bound.terms_by_dimension(levels, x, times, noise, network)

    def network_on(self, batch: Batch) -> Network:
        """The network as a process calls it, told what the batch holds beside its data.

        It runs under the autocast that is in force here, also where a process calls it within a float32 island.
        """
        return _OutsideIslands(self.process, self.call, self.network, batch["levels"].device.type, told(batch))

    def _diffusion(self, bound: Any, x: Tensor, times: Tensor, noise: Noise, network: Any) -> Tensor:
        if self.transitions is None:
            rate: Tensor = bound.kl_rate(x, times, noise, network)
            return rate
        s, t = discretise(times, self.transitions)
        kl: Tensor = bound.transition_kl(x, s, t, noise, network)
        return self.transitions * kl

    def draw_noise(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """The noise of the process: see `ForwardProcess.draw_noise`."""
        levels = batch["levels"]
        return self.process.draw_noise(tuple(levels.shape), generator, levels.device)


_MAPPED = {
    IMAGES.name: ("levels", "map the pixels to levels with vdm_hub.levels_from_images"),
    TOKENS.name: ("values of tokens", "encode the texts with the model's own tokenizer"),
}
"""What data consist of, and how they become that, by their kind."""


def _check_draws(levels: Tensor, times: Tensor, num_levels: int, kind: DataKind) -> None:
    """Refuse draws without a bound; on a CPU only, where looking costs no synchronisation, and not compiled."""
    if levels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high >= num_levels:
        what, remedy = _MAPPED[kind.name]
        raise DataError(
            f"the batch holds {what} {low} to {high}, and the process knows 0 to {num_levels - 1}: give its "
            f"num_levels to VDMScheduler, or {remedy}."
        )
    if not bool(((times >= 0) & (times <= 1)).all()):
        raise DataError(f"times run from {float(times.min()):g} to {float(times.max()):g}: give values in [0, 1].")


def bind_batch(
    process: ForwardProcess, batch: Batch, x: Tensor, noise: Noise
) -> tuple[dict[str, Tensor], BoundProcess]:
    """The extra terms, and the process bound to a batch, and to what is given of it where it says so.

    Args:
        process: Any.
        batch: See `Batch`.
        x: Its data, as the process encodes them.
        noise: Base noise.

    Raises:
        ConfigurationError: A part of the data is given, and the process takes none.
        DataError: ``given`` is no bool for each level.
    """
    given = batch.get("given")
    if given is None:
        return process.bind(x, noise)
    levels = batch["levels"]
    if given.dtype != torch.bool or given.shape != levels.shape:
        raise DataError(
            f"'given' is {given.dtype} of shape {tuple(given.shape)}: give a bool for each of the levels, "
            f"{tuple(levels.shape)}."
        )
    return process.bind_given(x, noise, given)


def check_nothing_given(process: ForwardProcess, batch: Batch) -> None:
    """Refuse a batch of which a part is given, for what is measured of whole data alone.

    Raises:
        ConfigurationError: A part is.
    """
    if (given := batch.get("given")) is not None:
        raise ConfigurationError(
            f"{int(given.sum())} dimensions of this batch are said to be given, and this likelihood of "
            f"{type(process).__name__} is of whole data: leave 'given' out of the batch, or ask for method 'bound'."
        )


class _OutsideIslands:
    """A wrapper that calls the network under the autocast that was in force outside the float32 islands."""

    def __init__(
        self, process: ForwardProcess, call: Call, network: nn.Module, device_type: str, arguments: dict[str, Tensor]
    ) -> None:
        self._process, self._call, self._network = process, call, network
        self._device_type, self._arguments = device_type, arguments
        self._enabled = torch.is_autocast_enabled(device_type)

    def __call__(self, sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        with torch.autocast(self._device_type, enabled=self._enabled):  # its dtype holds within the islands
            output = self._call(self._network, sample, timestep, **self._arguments, **context)
        return checked_output(output, sample, self._network, self._process)


def check_finite_ends(process: ForwardProcess) -> None:
    """Refuse a schedule whose ends have no finite log-SNR: its prior or reconstruction term would have no value.

    Raises:
        ConfigurationError: gamma(0) or gamma(1) is not finite.
    """
    schedule = process.diffused.scalar_gamma
    if schedule is None:
        return
    device = next((parameter.device for parameter in process.parameters()), torch.device("cpu"))
    with torch.no_grad():
        ends = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)).tolist()
    for time, gamma in zip((0, 1), ends, strict=True):
        if not abs(gamma) < float("inf"):
            raise ConfigurationError(
                f"{type(schedule).__name__} has gamma({time}) = {gamma}, and a bound needs finite endpoints: "
                f"cut the schedule in t where it passes, say, gamma = -13.3 and 5."
            )
