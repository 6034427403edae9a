r"""The variational autoencoder and its hierarchy: Markovian, with learned Gaussian encoders and decoders.

    q(z_1..z_T|x) = q(z_1|x) prod_{t=2..T} q(z_t|z_{t-1}),
    p(x, z_1..z_T) = p(z_T) p(x|z_1) prod_{t=2..T} p(z_{t-1}|z_t),    p(z_T) = N(0, I)

(Luo, arXiv 2208.11970, eq. 23 and 24). At depth T = 1 it is the variational autoencoder (Luo eq. 19). All Gaussians
are diagonal; the data have K levels, and ``p(x|z_1)`` is a categorical distribution over them, pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Annotated, Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_hub.diffusion.draws import Generator, uniform_noise
from vdm_hub.diffusion.gaussian import sum_dimensions
from vdm_hub.diffusion.scaling import DataScaling, ScalingName
from vdm_hub.errors import ConfigurationError
from vdm_hub.hub.schemas import Count, Depth, Dropout, Size, Within, check_arguments
from vdm_hub.models.hvae_networks import GaussianNetwork, LevelNetwork, Shape
from vdm_hub.models.loading import CheckedModel


class Normal(NamedTuple):
    """A diagonal Gaussian: mean and scale (the standard deviation), both (B, *latent)."""

    mean: Tensor
    scale: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """The draw ``mean + scale * noise``, reparameterised (Luo section 2.3)."""
        return self.mean + self.scale * noise


class MarkovianHVAE(CheckedModel, ModelMixin, ConfigMixin):
    """A Markovian hierarchical variational autoencoder of K-level images; at ``depth=1`` the VAE.

    The networks are convolutional by default. Any module may take their place: an encoder and a decoder map (B, ...)
    to ``(mean, scale)``, both (B, *latent_shape), the scale positive; the level decoder maps ``z_1`` to logits
    (B, C, H, W, K). A model with modules of one's own has no config, so its weights are saved by ``state_dict``.

    Args:
        sample_size: Side of the images, or (height, width).
        in_channels: Channels of the images.
        num_levels: K.
        depth: T, the number of latents.
        latent_shapes: Shape of each latent, ``z_1`` first: (C, H, W), or (D,) for a vector. One is for all.
        block_out_channels: Width of the networks that map images to ``z_1`` and back, and of the others; one is for
            both.
        layers_per_block: Residual blocks of each network.
        norm_num_groups: Groups of each normalisation.
        dropout: Probability of dropout in each residual block.
        data_scaling: Where the K levels lie: see `vdm_hub.diffusion.scaling.DataScaling`.
        encoders: T modules, ``q(z_1|x)`` first, in place of the networks.
        decoders: T - 1 modules, ``p(z_1|z_2)`` first.
        level_decoder: ``p(x|z_1)``.

    Raises:
        ConfigurationError: The depth is below 1, or shapes do not chain.

    Example:
        >>> import torch
        >>> model = MarkovianHVAE(8, in_channels=1, num_levels=17, depth=2, latent_shapes=[(4, 4, 4), (8,)])
        >>> levels = torch.zeros(3, 1, 8, 8, dtype=torch.long)
        >>> noise = [torch.zeros(3, *shape) for shape in model.latent_shapes]
        >>> [tuple(z.shape) for z in model.latents(model.scale(levels), noise)]
        [(3, 4, 4, 4), (3, 8)]
    """

    ignore_for_config = ["encoders", "decoders", "level_decoder"]

    @register_to_config
    def __init__(
        self,
        sample_size: Size = 32,
        in_channels: Count = 3,
        num_levels: Annotated[int, Within(2, 65_536)] = 256,
        depth: Annotated[int, Within(1, 1_024)] = 1,
        latent_shapes: Annotated[Sequence[Sequence[Count]], Within(1, 1_024)] = ((16, 8, 8),),
        block_out_channels: Annotated[Sequence[Count], Within(1, 2)] = (64,),
        layers_per_block: Depth = 2,
        norm_num_groups: Count = 8,
        dropout: Dropout = 0.0,
        data_scaling: ScalingName = "bin_centers",
        encoders: Sequence[nn.Module] | None = None,
        decoders: Sequence[nn.Module] | None = None,
        level_decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_arguments(type(self), self.config)
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.image_shape: tuple[int, int, int] = (in_channels, height, width)
        self.depth, self.num_levels = depth, num_levels
        self.latent_shapes = _latent_shapes(latent_shapes, depth)
        self.scaling = DataScaling(data_scaling, num_levels)
        outer, inner = block_out_channels[0], block_out_channels[-1]
        common: dict[str, Any] = {"layers": layers_per_block, "groups": norm_num_groups, "dropout": dropout}
        shapes = [self.image_shape, *self.latent_shapes]
        if encoders is None:
            encoders = [
                GaussianNetwork(shapes[t], shapes[t + 1], width=inner if t else outer, **common) for t in range(depth)
            ]
        if decoders is None:
            decoders = [GaussianNetwork(shapes[t + 1], shapes[t], width=inner, **common) for t in range(1, depth)]
        if level_decoder is None:
            level_decoder = LevelNetwork(shapes[1], self.image_shape, num_levels, width=outer, **common)
        for name, modules, count in (("encoders", encoders, depth), ("decoders", decoders, depth - 1)):
            if len(modules) != count:
                raise ConfigurationError(
                    f"{len(modules)} {name} were given for depth {depth}: give {count}, of z_1 first."
                )
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)
        self.level_decoder = level_decoder

    def scale(self, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The x in [-1, 1] that the encoder sees, of levels 0..K-1."""
        return self.scaling.encode(levels, dtype)

    def encode(self, t: int, z: Tensor) -> Normal:
        """``q(z_t|z_{t-1})`` at ``z``, where ``z_0`` stands for x; t from 1 to T.

        Raises:
            ConfigurationError: The encoder's answer has another shape than ``latent_shapes`` says, or a scale that is
                not positive.
        """
        return _checked(self.encoders[t - 1](z), z, self.latent_shapes[t - 1], f"the encoder of z_{t}")

    def decode(self, t: int, z: Tensor) -> Normal:
        """``p(z_t|z_{t+1})`` at ``z = z_{t+1}``; t from 1 to T - 1.

        Raises:
            ConfigurationError: As `encode`.
        """
        return _checked(self.decoders[t - 1](z), z, self.latent_shapes[t - 1], f"the decoder of z_{t}")

    def decode_levels(self, z: Tensor) -> Tensor:
        """``log p(x|z_1)`` of every level at ``z = z_1``, (B, C, H, W, K), nats, normalised over K.

        Raises:
            ConfigurationError: The level decoder's logits have another shape.
        """
        logits: Tensor = self.level_decoder(z)
        expected = (z.shape[0], *self.image_shape, self.num_levels)
        if tuple(logits.shape) != expected:
            raise ConfigurationError(
                f"the level decoder gives logits of shape {tuple(logits.shape)}, where {expected} are needed (batch, "
                f"channels, height, width, levels): change the module, or sample_size, in_channels and num_levels."
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    # ---- as a first stage: see `vdm_hub.diffusion.first_stage.FirstStage` ------------------------------------------

    @property
    def latent_shape(self) -> Shape:
        """The shape of the one latent of a VAE.

        Raises:
            ConfigurationError: There are several.
        """
        if self.depth != 1:
            raise ConfigurationError(
                f"a latent VDM's first stage has one latent, and this hierarchy has {self.depth}: give one of depth 1."
            )
        return self.latent_shapes[0]

    def posterior(self, x: Tensor) -> Normal:
        """``q(z_1|x)``."""
        return self.encode(1, x)

    def log_likelihood(self, levels: Tensor, z: Tensor) -> Tensor:
        """``log p(x|z_1)``, nats, (B,)."""
        log_p = self.decode_levels(z).gather(-1, levels.long().unsqueeze(-1))
        return sum_dimensions(log_p.squeeze(-1))

    def draw_levels(self, z: Tensor, generator: Generator = None) -> Tensor:
        """Levels from ``p(x|z_1)``, by the inverse of its distribution function."""
        cumulated = self.decode_levels(z).exp().cumsum(-1)
        uniform = uniform_noise(tuple(cumulated.shape[:-1]), generator, z.device, cumulated.dtype)
        return (cumulated < uniform.unsqueeze(-1)).sum(-1).clamp(max=self.num_levels - 1)

    def likeliest_levels(self, z: Tensor) -> Tensor:
        """Each pixel's likeliest level under ``p(x|z_1)``."""
        levels: Tensor = self.decode_levels(z).argmax(-1)
        return levels

    # ---- the hierarchy ----------------------------------------------------------------------------------------------

    def latents(self, x: Tensor, noise: Sequence[Tensor]) -> list[Tensor]:
        """``z_1..z_T`` from ``q(z_1..z_T|x)``, by a standard normal for each."""
        return [z for _, z in self.climb(x, noise)]

    def climb(self, x: Tensor, noise: Sequence[Tensor]) -> Iterator[tuple[Normal, Tensor]]:
        """``q(z_t|z_{t-1})`` and a draw from it, from t = 1 to T."""
        z = x
        for t, eps in enumerate(noise, 1):
            q = self.encode(t, z)
            z = q.at(eps.to(q.mean.dtype))
            yield q, z

    def descend(self, z: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """``z_1`` from ``z_T`` by ``p(z_t|z_{t+1})``; one standard normal for each of t = T - 1 to 1."""
        for t, eps in zip(range(self.depth - 1, 0, -1), noise, strict=True):
            z = self.decode(t, z).at(eps)
        return z

    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the model as `ModelMixin.save_pretrained` does.

        Raises:
            ConfigurationError: A module of one's own is in it, which no config describes.
        """
        networks = [*self.encoders, *self.decoders, self.level_decoder]
        foreign = [type(net).__name__ for net in networks if not isinstance(net, GaussianNetwork | LevelNetwork)]
        if foreign:
            raise ConfigurationError(
                f"this MarkovianHVAE holds {foreign[0]}, which its config can't describe: keep its state_dict, or "
                f"derive a class whose __init__ builds it."
            )
        super().save_pretrained(save_directory, *args, **kwargs)


def _latent_shapes(given: Sequence[Sequence[int]], depth: int) -> tuple[Shape, ...]:
    shapes = tuple(tuple(shape) for shape in given)
    shapes = shapes * depth if len(shapes) == 1 else shapes
    if len(shapes) != depth:
        raise ConfigurationError(
            f"latent_shapes has {len(shapes)} entries ({', '.join(map(str, shapes))}) for depth {depth}: give one for "
            f"each latent, z_1 first, or one for all."
        )
    for shape in shapes:
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ConfigurationError(
                f"a latent has the shape {shape}: give (channels, height, width), or (dimensions,) for a vector."
            )
    return shapes


def _checked(output: Any, given: Tensor, shape: Shape, name: str) -> Normal:
    """The Gaussian of a module, in at least float32; refused where it is none of this shape."""
    if not (isinstance(output, tuple | list) and len(output) == 2 and all(torch.is_tensor(each) for each in output)):
        raise ConfigurationError(
            f"{name} gives a {type(output).__name__}, and two tensors are needed: the mean and the scale."
        )
    mean, scale = output
    expected = (given.shape[0], *shape)
    for what, value in (("mean", mean), ("scale", scale)):
        if tuple(value.shape) != expected:
            raise ConfigurationError(
                f"{name} gives a {what} of shape {tuple(value.shape)} for an input of shape {tuple(given.shape)}, and "
                f"latent_shapes asks for {expected}: the shapes do not chain."
            )
    dtype = torch.promote_types(mean.dtype, torch.float32)
    # On a GPU, looking would make the host wait in every step; there the loss is made NaN, which stops a run too.
    if scale.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool((scale > 0).all()):
            raise ConfigurationError(
                f"{name} gives a scale of {float(scale.min()):g}, and a standard deviation is positive: let it end in "
                f"softplus or exp, or look for NaN in its input."
            )
        if not bool(scale.isfinite().all() and mean.isfinite().all()):
            raise ConfigurationError(f"{name} gives a mean or a scale that is not finite: look for it in its weights.")
    return Normal(mean.to(dtype), torch.where(scale > 0, scale, torch.nan).to(dtype))


MarkovianHVAE.__module__ = "vdm_hub"
