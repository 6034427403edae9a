"""First stages of latent VDMs besides `MarkovianHVAE` of depth 1: diffusers' `AutoencoderKL` with a likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_hub.diffusion.decoders import FactorisedDecoder
from vdm_hub.diffusion.draws import Generator
from vdm_hub.diffusion.gaussian import alpha
from vdm_hub.diffusion.scaling import DataScaling, ScalingName
from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.hub.schemas import Size, Within, check_arguments, fields_of_class
from vdm_hub.models.hvae import Normal
from vdm_hub.models.loading import CheckedModel


class AutoencoderKLFirstStage(CheckedModel, ModelMixin, ConfigMixin):
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

    @register_to_config
    def __init__(
        self,
        autoencoder_config: Mapping[str, Any],
        sample_size: Size = 32,
        num_levels: Annotated[int, Within(2, 65_536)] = 256,
        data_scaling: ScalingName = "bin_centers",
        initial_scale: Annotated[float, Within(1e-9, 1e9)] = 0.1,
    ) -> None:
        super().__init__()
        check_arguments(type(self), self.config)
        known = fields_of_class(AutoencoderKL)
        for key in autoencoder_config:
            if key not in known and not key.startswith("_"):
                raise unknown_name("field of autoencoder_config", key, known)
        check_arguments(AutoencoderKL, autoencoder_config, "autoencoder_config")
        self.autoencoder: Any = AutoencoderKL.from_config(dict(autoencoder_config))
        config = self.autoencoder.config
        if config.in_channels != config.out_channels:
            raise ConfigurationError(
                f"the autoencoder takes {config.in_channels} channels and gives {config.out_channels}: a likelihood "
                f"of its images needs the same."
            )
        size = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        factor = 2 ** (len(config.block_out_channels) - 1)
        if size[0] % factor or size[1] % factor:
            raise ConfigurationError(
                f"the autoencoder halves the image {len(config.block_out_channels) - 1} times, and "
                f"{size[0]}x{size[1]} is no multiple of {factor}: resize the images, or give it fewer blocks."
            )
        self.image_shape: tuple[int, int, int] = (int(config.in_channels), int(size[0]), int(size[1]))
        self.latent_shape = (int(config.latent_channels), size[0] // factor, size[1] // factor)
        self.num_levels, self.scaling = num_levels, DataScaling(data_scaling, num_levels)
        self.log_scale = nn.Parameter(torch.full((self.image_shape[0],), math.log(initial_scale)))

    @classmethod
    def from_autoencoder(cls, autoencoder: AutoencoderKL, **arguments: Any) -> AutoencoderKLFirstStage:
        """A first stage with the weights of a trained autoencoder.

        Args:
            autoencoder: It; its own ``scaling_factor`` is not used, as the latents are measured.
            arguments: Of this class.
        """
        described = {key: value for key, value in autoencoder.config.items() if not key.startswith("_")}
        with torch.device(autoencoder.device):
            stage = cls(described, **arguments)
        stage.autoencoder.load_state_dict(autoencoder.state_dict())
        return stage

    def scale(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The x in [-1, 1] of levels 0..K-1."""
        return self.scaling.encode(levels, dtype)

    def posterior(self, x: Tensor) -> Normal:
        """The encoder's ``q(y|x)``."""
        q = self.autoencoder.encode(x.to(self.autoencoder.dtype)).latent_dist
        dtype = torch.promote_types(q.mean.dtype, torch.float32)
        return Normal(q.mean.to(dtype), q.std.to(dtype))

    def log_likelihood(self, levels: Tensor, y: Tensor) -> Tensor:
        """``log p(x|y)``, nats, (B,)."""
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


AutoencoderKLFirstStage.__module__ = "vdm_hub"
