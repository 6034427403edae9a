r"""Diffusion of the latents of a first stage: a latent VDM and its bound on the data.

With ``y ~ q(y|x)`` of the first stage and a VDM as the prior of y, whose last step is ``p(y|z_0) = N(y; z_0 / alpha_0,
exp(gamma_0) I)``,

    -log p(x) <= E_q[-log p(x|y) + log q(y|x) - log p(y)],
    -log p(y) <= KL(q(z_1|y) || N(0, I)) + E[-log p(y|z_0)] + L_diffusion(y)

(Luo, arXiv 2208.11970, eq. 19 with eq. 58 for the prior; Vahdat et al., arXiv 2106.05931, eq. 6, train so). All is a
bound on the data, in nats of x, whatever the dimension of y. ``E[log q(y|x) - log p(y|z_0)]`` is a difference of two
Gaussian entropies, ``1/2 sum(gamma_0 - log s^2)`` with s the scale of ``q(y|x)``, and needs no draw.

The diffusion works on ``(y - shift) / scale``. Both densities of y are divided by the same Jacobian, so it is nowhere
in the bound: with s taken in the same coordinates, the bound of a shifted and scaled first stage is the same number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.first_stage import FirstStage
from vdm_hub.diffusion.forward_process import ForwardProcess, Network, Noise
from vdm_hub.diffusion.gaussian import broadcast, sum_dimensions
from vdm_hub.diffusion.gaussian_process import BoundGaussian, GaussianProcess
from vdm_hub.diffusion.noise_schedules import Gamma
from vdm_hub.errors import ConfigurationError

_NORMALISED = (0.5, 2.0)  # deviations that a prior of N(0, I) and a schedule made for deviation 1 can bear
_SMALLEST = 1e-6  # deviation: what is smaller is rounding


class LatentProcess(ForwardProcess):
    """A Gaussian process of latents: data are encoded first, and decoded last.

    Args:
        first_stage: A `FirstStage` and a module; its parameters are part of the process.
        gaussian: The process of the latents. Its data scaling and decoder are not used.
        shift: Of the latents, one number, or one a channel (a vector's entries are its channels).
        scale: What the shifted latents are divided by, as ``shift``.

    Attributes:
        normalises: Whether `prepare` sets shift and scale by what it measures.
        frozen: Whether the first stage stays in evaluation mode.

    Raises:
        ConfigurationError: The numbers of levels differ, the reverse step's variance is not the posterior's, or shift
            and scale are not numbers to shift and scale by.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        first_stage: nn.Module,
        gaussian: GaussianProcess,
        shift: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        self.first_stage, self.gaussian = first_stage, gaussian
        self.num_levels, self.num_train_timesteps = gaussian.num_levels, gaussian.num_train_timesteps
        if self.coder.num_levels != self.num_levels:
            raise ConfigurationError(
                f"the first stage decodes {self.coder.num_levels} levels, and num_levels is {self.num_levels}: give "
                f"the one that the images have."
            )
        if not gaussian.variance.is_posterior:
            raise ConfigurationError("latents are diffused with the posterior's variance: leave variance_type out.")
        channels = self.coder.latent_shape[0]
        for name, given in (("shift", shift), ("scale", scale)):
            values = torch.as_tensor(given, dtype=torch.float32, device="cpu")
            if values.numel() not in (1, channels) or not bool(values.isfinite().all()):
                raise ConfigurationError(f"latent_{name} is {given}: give one finite number, or {channels}.")
            if name == "scale":
                _check_positive(values)
            self.register_buffer(name, torch.empty(channels, 1, 1).copy_(values.reshape(-1, 1, 1)))
        self.normalises, self.frozen = True, False

    def train(self, mode: bool = True) -> LatentProcess:
        """Set the training mode, as of any module, but leave a frozen first stage in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.first_stage.eval()
        return self

    @property
    def coder(self) -> FirstStage:
        """The first stage, by its interface."""
        coder: Any = self.first_stage
        return coder

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: nn.Module | None = None) -> LatentProcess:
        """Refuse to build: a config alone does not hold the first stage.

        Raises:
            ConfigurationError: Always: a config holds no first stage.
        """
        raise ConfigurationError("a config holds no first stage: give LatentProcess one, with its Gaussian process.")

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"first_stage": self.first_stage, "schedule": self.gaussian}

    @property
    def diffused(self) -> GaussianProcess:
        return self.gaussian

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the latents for data of a shape, both (B, ...); a vector is a picture of one pixel."""
        latent = tuple(self.coder.latent_shape)
        return (shape[0], *latent, *(1,) * (3 - len(latent)))

    def fields(self) -> dict[str, Any]:
        return self.gaussian.fields()

    def carried_schedule(self) -> nn.Module | None:
        return self.gaussian.carried_schedule()

    def encode(self, levels: Tensor) -> Tensor:
        return self.coder.scale(levels)

    def quantise(self, x: Tensor) -> Tensor:
        return self.coder.likeliest_levels(self.unscaled(x))

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        latent = self.latent_shape(shape)
        own = {"latent": normal_noise(latent, generator, device)}
        return own | self.gaussian.draw_noise(latent, generator, device)

    @property
    def context_size(self) -> int | None:
        return self.gaussian.context_size

    def draw_context(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        return self.gaussian.draw_context(self.latent_shape(shape), generator, device)

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], BoundLatent]:
        """The extra term ``latent``, ``E[log q(y|x) - log p(y|z_0)]``, may be negative; only the sum is a bound."""
        if x is None:
            extras, gamma = self.gaussian.schedule.bind(None, noise)
            return extras, BoundLatent(self, gamma)
        mean, scale = self.posterior(x)
        y = mean + scale * noise["latent"].to(mean.dtype)
        extras, gamma = self.gaussian.schedule.bind(y, noise)
        bound = BoundLatent(self, gamma, y)
        gamma_0 = broadcast(gamma(torch.zeros(y.shape[0], device=y.device, dtype=y.dtype)), y)
        return extras | {"latent": sum_dimensions(0.5 * gamma_0 - scale.log())}, bound

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of ``q(y|x)`` as the diffusion sees y: shifted, scaled, in the shape `latent_shape`."""
        mean, scale = self.coder.posterior(x)
        shape = self.latent_shape(x.shape)
        return (mean.reshape(shape) - self.shift) / self.scale, scale.reshape(shape) / self.scale

    def unscaled(self, y: Tensor) -> Tensor:
        """The latents as the first stage sees them, of those that the diffusion sees."""
        return (y * self.scale + self.shift).reshape(y.shape[0], *self.coder.latent_shape)

    @torch.no_grad()
    def measure(self, levels: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel of ``y ~ q(y|x)`` over images, both (C,), float64, before any scaling.

        By the moments of q, so that nothing is drawn.
        """
        return _by_channel(*self._moments(levels))

    def _moments(self, levels: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Means and variances of ``q(y|x)``, (N, *latent_shape), float64, without dropout."""
        training = self.first_stage.training
        self.first_stage.eval()
        found = [self.coder.posterior(self.encode(batch)) for batch in levels]
        self.first_stage.train(training)
        mean, scale = (torch.cat([each[i] for each in found]).double() for i in (0, 1))
        shape = self.latent_shape(mean.shape)
        return mean.reshape(shape), scale.reshape(shape) ** 2

    @torch.no_grad()
    def examine(self, levels: Iterable[Tensor]) -> tuple[dict[str, Any], list[str]]:
        """Figures of the latents of images as the diffusion sees them, and the notes that follow from them.

        Where q(y|x) says nothing of x (`gaussian.information`), the posterior has collapsed.
        """
        means, variances = self._moments(levels)
        information = gaussian.information(means, variances)
        mean, deviation = _by_channel(means, variances)
        mean, deviation = (mean - self.shift.flatten()) / self.scale.flatten(), deviation / self.scale.flatten()
        description = {
            "images": len(means),
            "mean": mean.tolist(),
            "standard_deviation": deviation.tolist(),
            "information": information,
        }
        found, fits = describe_latents(mean, deviation, len(means))
        notes = []
        if len(means) > 1 and information < gaussian.COLLAPSED:
            notes.append(
                f"posterior collapse: over {len(means)} images q(y|x) hardly depends on x ({information:.2g} nats of "
                f"information by its moments), so the latents carry nothing of the data"
            )
        if not fits:
            notes.append(
                f"the latents are not normalised: {found}. Schedule and prior are made for about 0 and 1: set "
                f"latent_scaling, and train the network on such latents"
            )
        return description, notes

    def prepare(self, levels: Iterable[Tensor]) -> str:
        """Measure the latents and, if `normalises`, shift and scale them by what was found."""
        levels = list(levels)
        mean, deviation = self.measure(levels)
        found, fits = describe_latents(mean, deviation, sum(len(batch) for batch in levels))
        if self.normalises:
            self.normalise(mean, deviation)
            return f"{found}: they are shifted and scaled to 0 and 1, channel by channel."
        if fits:
            return f"{found}."
        return (
            f"warning: the first stage's latents are not normalised: {found}. The prior is N(0, I), and the schedule "
            f"made for a deviation of 1: leave scale_latents at true."
        )

    def scaling(self) -> dict[str, list[float]]:
        """The shift and the scale as plain numbers."""
        return {"shift": self.shift.flatten().tolist(), "scale": self.scale.flatten().tolist()}

    def normalise(self, mean: Tensor, deviation: Tensor) -> None:
        """Shift and scale the latents by what `measure` found, from here on.

        Raises:
            ConfigurationError: A channel is the same for all images.
        """
        _check_positive(deviation)
        self.shift.copy_(mean.reshape(self.shift.shape))
        self.scale.copy_(deviation.reshape(self.scale.shape))


def _by_channel(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (C,), of latents with these moments, (N, C, H, W)."""
    spread = means.var((0, 2, 3), correction=0) + variances.mean((0, 2, 3))
    return means.mean((0, 2, 3)), spread.sqrt()


def _check_positive(scale: Tensor) -> None:
    if not bool((scale >= _SMALLEST).all()):
        raise ConfigurationError(
            f"a channel of the latents would be scaled by {float(scale.min()):g}: a deviation is positive, and not "
            f"below {_SMALLEST:g}. Is the first stage trained, and does it use the channel?"
        )


def describe_latents(mean: Tensor, deviation: Tensor, images: int) -> tuple[str, bool]:
    """What `LatentProcess.measure` found in words, and whether a prior of N(0, I) suits them as they are.

    >>> describe_latents(torch.tensor([0.0, 9.0]), torch.tensor([1.0, 4.0]), 256)
    ('over 256 images the latents have means 0 to 9 and standard deviations 1 to 4', False)
    """
    low, high = _NORMALISED
    fits = bool((mean.abs() <= deviation).all() and (deviation >= low).all() and (deviation <= high).all())
    means, deviations = (" to ".join(f"{value:.3g}" for value in _ends(each)) for each in (mean, deviation))
    return f"over {images} images the latents have means {means} and standard deviations {deviations}", fits


def _ends(values: Tensor) -> list[float]:
    ends = [float(values.min()), float(values.max())]
    return ends if not math.isclose(*ends) else ends[:1]


class BoundLatent(BoundGaussian):
    """The process bound to one batch: whatever is asked of the data is answered for their latents."""

    def __init__(self, latent: LatentProcess, gamma: Gamma, y: Tensor | None = None) -> None:
        super().__init__(latent.gaussian, gamma)
        self.latent, self.y = latent, y

    def origin(self, x: Tensor) -> Tensor:
        assert self.y is not None, "the process was bound without data"
        return self.y

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        return super().sample(self.origin(x), t, noise)

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        return super().transition_kl(self.origin(x), s, t, noise, network)

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        return super().kl_rate(self.origin(x), t, noise, network)

    def prior_kl(self, x: Tensor) -> Tensor:
        return super().prior_kl(self.origin(x))

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        """``-log p(x|y)`` at the batch's own y."""
        return -self.latent.coder.log_likelihood(levels, self.latent.unscaled(self.origin(x)))

    def terms_by_dimension(
        self, levels: Tensor, x: Tensor, t: Tensor, noise: Noise, network: Network
    ) -> dict[str, Tensor]:
        raise ConfigurationError(
            "the bits of a latent diffusion are those of its latents, and lie on no pixel: ask for its terms as a "
            "whole (log_likelihood)."
        )

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        """``y ~ p(y|z_0)``, then levels from ``p(x|y)``."""
        gamma_0 = broadcast(self._at(0.0, z_0), z_0)
        eps = normal_noise(z_0.shape, generator, z_0.device, z_0.dtype)
        y = z_0 / gaussian.alpha(gamma_0) + torch.exp(0.5 * gamma_0) * eps
        return self.latent.coder.draw_levels(self.latent.unscaled(y), generator)
