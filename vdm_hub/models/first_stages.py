"""First stages of latent VDMs besides `MarkovianHVAE` of depth 1: diffusers' autoencoders with a likelihood."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_hub.diffusion.decoders import FactorisedDecoder
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.diffusion.gaussian import alpha, information
from vdm_hub.diffusion.scaling import DataScaling, ScalingName
from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.hub.schemas import Size, Within, check_arguments, fields_of_class
from vdm_hub.models.hvae import Normal
from vdm_hub.models.loading import CheckedModel

NOT_FITTED = 0
"""``fitted_on`` of a first stage whose scale is still to be fitted: it has no likelihood yet."""

_Levels = Annotated[int, Within(2, 65_536)]
_Scale = Annotated[float, Within(1e-9, 1e9)]
_Fitted = Annotated[int, Within(0, 10**12)]


class _AutoencoderFirstStage(CheckedModel, ModelMixin, ConfigMixin):
    r"""One of diffusers' autoencoders with ``p(x|y)`` over K levels, which its mean squared error alone is not.

    The decoder's image m is the centre of a discretised Gaussian in each channel,
    ``p(x_i|y) \propto exp(-(x_i - m_i)^2 / (2 s_c^2))`` over the K levels, exactly normalised, with a scale ``s_c``
    (Rybkin et al., arXiv 2006.13202, section 3, learn it too; the sum over levels is VDM's eq. 7).
    """

    _of: ClassVar[type[Any]]
    """The class of the autoencoder."""

    def _build(self, described: Mapping[str, Any]) -> None:
        """Make the autoencoder of its config, and all that the other arguments say."""
        check_arguments(type(self), self.config)
        kind: Any = self._of
        known = fields_of_class(kind)
        for key in described:
            if key not in known and not key.startswith("_"):
                raise unknown_name("field of autoencoder_config", key, known)
        check_arguments(self._of, described, "autoencoder_config")
        self.autoencoder: Any = self._of.from_config(dict(described))
        config, own = self.autoencoder.config, self.config
        if config.in_channels != config.out_channels:
            raise ConfigurationError(
                f"the autoencoder takes {config.in_channels} channels and gives {config.out_channels}: a likelihood "
                f"of its images needs the same."
            )
        size = (own.sample_size, own.sample_size) if isinstance(own.sample_size, int) else tuple(own.sample_size)
        factor = 2 ** (len(config.block_out_channels) - 1)
        if size[0] % factor or size[1] % factor:
            raise ConfigurationError(
                f"the autoencoder halves the image {len(config.block_out_channels) - 1} times, and "
                f"{size[0]}x{size[1]} is no multiple of {factor}: resize the images, or give it fewer blocks."
            )
        channels = config.get("vq_embed_dim") or config.latent_channels
        self.image_shape: tuple[int, int, int] = (int(config.in_channels), int(size[0]), int(size[1]))
        self.latent_shape = (int(channels), size[0] // factor, size[1] // factor)
        self.num_levels, self.scaling = own.num_levels, DataScaling(own.data_scaling, own.num_levels)
        self.log_scale = nn.Parameter(torch.full((self.image_shape[0],), math.log(own.initial_scale)))

    @classmethod
    def from_autoencoder(cls, autoencoder: ModelMixin, **arguments: Any) -> Self:
        """A first stage with the weights of a trained autoencoder.

        Args:
            autoencoder: It; its own ``scaling_factor`` is not used here, as the latents are measured.
            arguments: Of this class.
        """
        described = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
        with torch.device(autoencoder.device):
            stage = cls(described, **arguments)
        stage.autoencoder.load_state_dict(autoencoder.state_dict())
        return stage

    def scale(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The x of levels 0..K-1 that the encoder sees."""
        return self.scaling.encode(levels, dtype)

    @abstractmethod
    def posterior(self, x: Tensor) -> Normal:
        """The encoder's ``q(y|x)``."""

    @property
    def is_fitted(self) -> bool:
        """Whether the scale of its decoder was trained, or fitted."""
        return bool(self.config.fitted_on != NOT_FITTED)

    @torch.no_grad()
    def fit(self, levels: Tensor, seed: int = 0, batch_size: int = 16) -> None:
        """Fit the scale of an autoencoder that was trained elsewhere, by the likelihood of these images.

        Args:
            levels: Images, integers 0..K-1, (B, C, H, W): of the training split, if test images are measured.
            seed: Of the draws of y.
            batch_size: Images at once.
        """
        generator = torch.Generator().manual_seed(seed)
        self._fit(levels, generator, batch_size)
        self.register_to_config(fitted_on=len(levels))

    def _fit(self, levels: Tensor, generator: torch.Generator, batch_size: int) -> float:
        """Set ``log_scale`` to its best value, and give ``E[-log p(x|y)]``, nats an image, there."""
        means = []
        for some in levels.split(batch_size):
            mean, scale = self.posterior(self.scale(some.to(self.device)))
            means.append(self._mean(mean + scale * normal_noise(mean.shape, generator, mean.device)).double().cpu())
        mean, levels = torch.cat(means), levels.cpu()
        rest = self.scaling.encode(levels, torch.float64) - mean
        start = rest.square().mean((0, 2, 3)).clamp(min=self.scaling.spacing**2 / 12).sqrt().log()
        best, least = _best_scale(levels, mean, start, self.scaling)
        self.log_scale.copy_(best)
        return least / len(levels)

    def log_likelihood(self, levels: Tensor, y: Tensor) -> Tensor:
        """``log p(x|y)``, nats, (B,).

        Raises:
            ConfigurationError: Its scale was not fitted yet.
        """
        if not self.is_fitted:
            raise ConfigurationError(
                "the autoencoder was trained without a likelihood, and fitted_on is 0: fit the scale of its decoder "
                "first, with pipe.fit_first_stage(images), or vdm-hub evaluate --fit_split 'train[:256]'."
            )
        z_0, gamma, unused = self._as_first_latent(y)
        return -FactorisedDecoder().negative_log_likelihood(levels, z_0, gamma, unused, unused, self.scaling)

    def decode_levels(self, y: Tensor) -> Tensor:
        """``log p(x|y)`` of every level, (B, C, H, W, K), nats, normalised over K."""
        z_0, gamma, _ = self._as_first_latent(y)
        values = self.scaling.encode(torch.arange(self.num_levels, device=y.device), z_0.dtype)
        away = (z_0 / alpha(gamma)).unsqueeze(-1) - values
        return (-0.5 * torch.exp(-gamma).unsqueeze(-1) * away**2).log_softmax(-1)

    def draw_levels(self, y: Tensor, generator: Generator = None) -> Tensor:
        """Levels drawn from ``p(x|y)``."""
        z_0, gamma, unused = self._as_first_latent(y)
        return FactorisedDecoder().sample(z_0, gamma, unused, self.scaling, generator)

    def likeliest_levels(self, y: Tensor) -> Tensor:
        """The levels nearest to the decoder's image."""
        return self.scaling.nearest(self._mean(y))

    def _as_first_latent(self, y: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The latent by which the factorised decoder finds m and s_c: ``z_0 = alpha_0 m`` and ``gamma_0 = 2 log s_c``.

        It takes no step onto the data and asks no network, so the third stands for both.
        """
        gamma = 2 * self.log_scale.reshape(1, -1, 1, 1).to(torch.promote_types(self.log_scale.dtype, torch.float32))
        return self._mean(y) * alpha(gamma), gamma, None

    def _mean(self, y: Tensor) -> Tensor:
        image: Tensor = self.autoencoder.decode(y.to(self.autoencoder.dtype)).sample
        return image.to(torch.promote_types(image.dtype, torch.float32))


class AutoencoderKLFirstStage(_AutoencoderFirstStage):
    r"""diffusers' `AutoencoderKL` with ``p(x|y)`` over K levels, which its mean squared error alone is not.

    The decoder's image m is the centre of a discretised Gaussian in each channel,
    ``p(x_i|y) \propto exp(-(x_i - m_i)^2 / (2 s_c^2))`` over the K levels, exactly normalised, with a learned scale
    ``s_c`` (Rybkin et al., arXiv 2006.13202, section 3, learn it too; the sum over levels is VDM's eq. 7).

    Args:
        autoencoder_config: That of the `AutoencoderKL`, as its ``config.json`` has it.
        sample_size: Side of the images, or (height, width).
        num_levels: K.
        data_scaling: Where the K levels lie: see `vdm_hub.diffusion.scaling.DataScaling`.
        initial_scale: ``s_c`` before training, on a range of the data from -1 to 1.
        fitted_on: On how many images the scale was fitted after training (`fit`); 0: it is still to be; ``None``: it
            was trained.

    Raises:
        ConfigurationError: The autoencoder's image is not of this size or number of channels.

    Example:
        >>> import torch
        >>> config = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
        >>> stage = AutoencoderKLFirstStage(config | {"latent_channels": 2}, sample_size=8, num_levels=17)
        >>> levels = torch.zeros(3, 1, 8, 8, dtype=torch.long)
        >>> mean, scale = stage.posterior(stage.scale(levels))
        >>> mean.shape, stage.log_likelihood(levels, mean).shape  # nats
        (torch.Size([3, 2, 8, 8]), torch.Size([3]))
    """

    _of = AutoencoderKL

    @register_to_config
    def __init__(
        self,
        autoencoder_config: Mapping[str, Any],
        sample_size: Size = 32,
        num_levels: _Levels = 256,
        data_scaling: ScalingName = "bin_centers",
        initial_scale: _Scale = 0.1,
        fitted_on: _Fitted | None = None,
    ) -> None:
        super().__init__()
        self._build(autoencoder_config)

    def posterior(self, x: Tensor) -> Normal:
        """The encoder's ``q(y|x)``."""
        q = self.autoencoder.encode(x.to(self.autoencoder.dtype)).latent_dist
        dtype = torch.promote_types(q.mean.dtype, torch.float32)
        return Normal(q.mean.to(dtype), q.std.to(dtype))


class VQModelFirstStage(_AutoencoderFirstStage):
    r"""diffusers' `VQModel` with a ``q(y|x)`` and a ``p(x|y)``, of which it has neither.

    ``q(y|x) = N(encoder(x), tau^2)`` before the vectors are quantised, which is part of the decoder, and ``p(x|y)`` as
    of `AutoencoderKLFirstStage`. Any tau gives a bound; `fit` takes the one with the least
    ``E[-log p(x|y)] + 1/2 sum_d log(1 + v_d/tau^2)``, v_d the variance of the encoder's vectors over the images: the
    best under a Gaussian prior of their moments.

    Args:
        autoencoder_config: That of the `VQModel`, as its ``config.json`` has it.
        sample_size: Side of the images, or (height, width).
        num_levels: K.
        data_scaling: Where the K levels lie.
        initial_scale: ``s_c`` before it is fitted.
        fitted_on: As of `AutoencoderKLFirstStage`.

    Raises:
        ConfigurationError: The autoencoder's image is not of this size or number of channels.

    Example:
        >>> import torch
        >>> config = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
        >>> stage = VQModelFirstStage(config | {"latent_channels": 2, "num_vq_embeddings": 8}, 8, num_levels=17)
        >>> levels = torch.randint(0, 17, (4, 1, 8, 8))
        >>> stage.fit(levels)
        >>> stage.config.fitted_on, stage.posterior(stage.scale(levels)).scale.shape
        (4, torch.Size([4, 2, 8, 8]))
    """

    _of = VQModel

    @register_to_config
    def __init__(
        self,
        autoencoder_config: Mapping[str, Any],
        sample_size: Size = 32,
        num_levels: _Levels = 256,
        data_scaling: ScalingName = "bin_centers",
        initial_scale: _Scale = 0.1,
        fitted_on: _Fitted | None = None,
    ) -> None:
        super().__init__()
        self._build(autoencoder_config)
        self.log_deviation = nn.Parameter(torch.zeros(()))

    def posterior(self, x: Tensor) -> Normal:
        """The encoder's vectors, and tau."""
        mean = self.autoencoder.encode(x.to(self.autoencoder.dtype)).latents
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        return Normal(mean, self.log_deviation.to(mean.dtype).exp().expand_as(mean))

    def _fit(self, levels: Tensor, generator: torch.Generator, batch_size: int) -> float:
        codes = self.autoencoder.quantize.embedding.weight
        widest, state = math.log(2 * float(codes.float().std())), generator.get_state()
        means = torch.cat([self.posterior(self.scale(some.to(self.device))).mean for some in levels.split(batch_size)])
        found = []
        for halvings in range(_HALVINGS):
            self.log_deviation.fill_(widest - halvings * math.log(2))
            generator.set_state(state)
            nats = super()._fit(levels, generator, batch_size)
            variances = torch.full_like(means, math.exp(2 * float(self.log_deviation)))
            found.append((nats + information(means, variances), float(self.log_deviation), self.log_scale.clone()))
        least, deviation, scale = min(found, key=lambda one: one[0])
        self.log_deviation.fill_(deviation)
        self.log_scale.copy_(scale)
        return least


_HALVINGS = 12  # of tau, from twice the deviation of the code's vectors down


def _best_scale(levels: Tensor, mean: Tensor, start: Tensor, scaling: DataScaling) -> tuple[Tensor, float]:
    """The log of the scale of each channel, (C,), that makes levels likeliest, and ``-log p`` of all of them there."""
    log_scale = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([log_scale], max_iter=30, line_search_fn="strong_wolfe")

    def nats() -> Tensor:
        gamma = 2 * log_scale.reshape(1, -1, 1, 1)
        z_0 = mean * alpha(gamma)
        return FactorisedDecoder().negative_log_likelihood(levels, z_0, gamma, gamma, lambda: mean, scaling).sum()

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = nats() / levels.numel()
            loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return log_scale.detach(), float(nats().detach())


AutoencoderKLFirstStage.__module__ = "vdm_hub"
VQModelFirstStage.__module__ = "vdm_hub"
