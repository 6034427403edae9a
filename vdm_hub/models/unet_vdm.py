r"""The network of *Variational Diffusion Models* (Kingma et al., arXiv 2107.00630, App. B), and smaller relatives.

Likelihood is decided at noise levels that hardly touch the image, so the network keeps full resolution and sees the
input's last bits through Fourier features. It reads the noise level as a timestep ``tau(gamma)``, never as time. The
defaults are the paper's CIFAR-10 model; several entries in ``block_out_channels`` give a multi-resolution one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from vdm_hub.errors import ConfigurationError
from vdm_hub.hub.schemas import Count, Depth, Dropout, Size, Within, check_arguments
from vdm_hub.models.loading import CheckedModel

_ALIGNMENT = 64  # bytes: where torch's own allocator puts a CPU tensor
Exponent = Annotated[float, Within(-64, 64)]

_CUT_DEVIATION = 0.8796256610342398  # of a standard normal that is cut at -2 and 2

Module = TypeVar("Module", bound=nn.Module)
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@dataclass
class UNetVDMOutput(BaseOutput):
    """The output of `UNetVDMModel`.

    Attributes:
        sample: The prediction, (B, out_channels, H, W), in the input's dtype.
    """

    sample: Tensor


class UNetVDMModel(CheckedModel, ModelMixin, ConfigMixin):
    r"""The VDM paper's U-Net: residual blocks with skips, and no downsampling unless asked for.

    A convolution of the input and its Fourier features; ``layers_per_block`` residual blocks per resolution on the way
    down; block, attention, block in the middle; ``layers_per_block + 1`` blocks per resolution on the way up, each on
    its input and one skip; a convolution that starts at zero, plus the input.

    Args:
        sample_size: Side of the images that it is trained on, or (height, width); other sizes work too.
        in_channels: Channels of the input.
        out_channels: Channels of the prediction.
        block_out_channels: Width of each resolution, the finest first; with one entry it never downsamples.
        layers_per_block: Residual blocks of each resolution on the way down; there is one more on the way up.
        fourier_features: Exponents n for which ``sin(2^n pi z)`` and ``cos(2^n pi z)`` of the input are appended; the
            paper's are 7 and 8, for 256 levels in [-1, 1].
        norm_num_groups: Groups of each normalisation.
        norm_eps: Its epsilon.
        dropout: Probability of dropout in each residual block.
        attention_levels: Resolutions (indices into ``block_out_channels``) with attention after each block.
        mid_block_attention: Whether there is attention in the middle.
        attention_head_dim: Width of an attention head; ``None`` is a single head.
        resnet_time_scale_shift: ``default`` adds the noise level's embedding to the features, ``scale_shift`` scales
            and shifts them by it.
        add_input: Whether the input is added to the output, so that an ``epsilon`` network starts at
            ``eps_hat = z``, which is right at high noise.
        num_class_embeds: Number of classes for ``class_labels``; ``None`` is unconditional.
        num_train_timesteps: Timesteps lie in [0, num_train_timesteps - 1].
        context_size: Length of a vector ``context`` that is told beside the timestep, as a process with a
            `context_size` gives it; ``None`` takes none.
        cross_attention_dim: Width D of ``encoder_hidden_states``, a caption's tokens, which are then attended to in
            the middle and after each attention of ``attention_levels``; ``None`` takes none. Those branches start at
            zero, and with one seed all other weights start as without them.

    Raises:
        ConfigurationError: If the arguments contradict each other.

    Example:
        >>> import torch
        >>> unet = UNetVDMModel(in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1)
        >>> z_t, timestep = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 999.0])
        >>> torch.equal(unet(z_t, timestep).sample, z_t)  # before training it is the identity
        True
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock"]
    _repeated_blocks = ["ResnetBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: Size | None = None,
        in_channels: Count = 3,
        out_channels: Count = 3,
        block_out_channels: Annotated[Sequence[Count], Within(1, 16)] = (128,),
        layers_per_block: Depth = 32,
        fourier_features: Annotated[Sequence[Exponent], Within(0, 64)] = (7, 8),
        norm_num_groups: Count = 32,
        norm_eps: Annotated[float, Within(0, 1)] = 1e-6,
        dropout: Dropout = 0.1,
        attention_levels: Annotated[Sequence[int], Within(0, 16)] = (),
        mid_block_attention: bool = True,
        attention_head_dim: Count | None = None,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        add_input: bool = True,
        num_class_embeds: Count | None = None,
        num_train_timesteps: Annotated[int, Within(2, 20_000)] = 1000,
        context_size: Count | None = None,
        cross_attention_dim: Count | None = None,
    ) -> None:
        super().__init__()
        check_arguments(type(self), self.config)
        _check(block_out_channels, norm_num_groups, attention_levels, attention_head_dim)
        if add_input and in_channels != out_channels:
            raise ConfigurationError(
                f"in_channels={in_channels} and out_channels={out_channels} differ: the input can't be added to the "
                f"output: set add_input to false."
            )
        self.gradient_checkpointing = False
        widths, embedding = list(block_out_channels), 4 * block_out_channels[0]
        self.time_embedding = TimeEmbedding(widths[0], embedding, num_train_timesteps, num_class_embeds, context_size)
        self.input_features = FourierFeatures(fourier_features)
        self.conv_in = _lecun(nn.Conv2d(in_channels * (1 + 2 * len(fourier_features)), widths[0], 3, padding=1))
        attend = partial(AttentionBlock, groups=norm_num_groups, eps=norm_eps, head_dim=attention_head_dim)

        def block(channels: int, out: int, attention: bool) -> ResnetBlock:
            scale_shift = resnet_time_scale_shift == "scale_shift"
            after = attend(out) if attention else None
            return ResnetBlock(channels, out, embedding, norm_num_groups, norm_eps, dropout, scale_shift, after)

        channels, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            if level > 0:
                self.down_blocks.append(Downsample(channels))
                skips.append(channels)
            for _ in range(layers_per_block):
                self.down_blocks.append(block(channels, width, level in attention_levels))
                channels = width
                skips.append(channels)
        self.mid_blocks = nn.ModuleList(block(channels, channels, mid_block_attention and i == 0) for i in range(2))
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(layers_per_block + 1):
                self.up_blocks.append(block(channels + skips.pop(), width, level in attention_levels))
                channels = width
            if level > 0:
                self.up_blocks.append(Upsample(channels))
        self.norm_out = nn.GroupNorm(norm_num_groups, channels, norm_eps)
        self.conv_out = _zero(nn.Conv2d(channels, out_channels, 3, padding=1))
        if cross_attention_dim is not None:  # at last, so that no other first weight is another draw
            blocks: list[Any] = [*self.down_blocks, *self.mid_blocks, *self.up_blocks]
            for one in blocks:
                if one is self.mid_blocks[0] or isinstance(getattr(one, "attention", None), AttentionBlock):
                    sizes = one.norm2.num_channels, cross_attention_dim
                    one.cross_attention = CrossAttentionBlock(*sizes, norm_num_groups, norm_eps, attention_head_dim)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load as diffusers does, into memory that gives the same output bit for bit as the network that was saved."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            # Weights mapped from a file start where the file has them; CPU kernels sum in another order there.
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        context: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> UNetVDMOutput | tuple[Tensor]:
        """Predict from a noisy latent.

        Args:
            sample: ``z_t``, (B, in_channels, H, W); best in float32 even where the weights are not, as the Fourier
                features read bits that half precision does not have.
            timestep: ``tau(gamma)`` in [0, num_train_timesteps - 1], fractions included, () or (B,).
            class_labels: Integers below num_class_embeds, (B,), for class-conditional models.
            return_dict: Whether to return a `UNetVDMOutput` or a tuple.
            context: (B, context_size), for models that take it.
            encoder_hidden_states: What an encoder makes of each image's caption, (B, L, cross_attention_dim) of any
                floating dtype, for models that take it.
            encoder_attention_mask: (B, L), bool, true where there is a token; ``None`` where all are. An image without
                any is told nothing.

        Raises:
            ConfigurationError: If the resolutions do not divide the image, or labels, context or states are missing,
                uncalled for or of another shape.
        """
        self._check_size(sample)
        _check_text(self.config.cross_attention_dim, len(sample), encoder_hidden_states, encoder_attention_mask)
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if context is not None and (not isinstance(context, Tensor) or context.shape[:-1] != sample.shape[:1]):
            given = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ConfigurationError(
                f"the context is {given}, and there are {len(sample)} images: give a tensor, (B, context_size)."
            )
        embedding = self.time_embedding(times, class_labels, context)
        hidden = self.conv_in(self.input_features(sample).to(self.conv_in.weight.dtype))
        states = None if encoder_hidden_states is None else encoder_hidden_states.to(hidden.dtype)
        told: tuple[Tensor | None, ...] = (embedding, states, encoder_attention_mask)
        skips = [hidden]
        for block in self.down_blocks:
            hidden = self._run(block, hidden, *told)
            skips.append(hidden)
        for block in self.mid_blocks:
            hidden = self._run(block, hidden, *told)
        for block in self.up_blocks:
            if isinstance(block, ResnetBlock):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(block, hidden, *told)
        output: Tensor = self.conv_out(F.silu(self.norm_out(hidden))).to(sample.dtype)
        if self.config.add_input:
            output = output + sample
        return UNetVDMOutput(sample=output) if return_dict else (output,)

    def _run(self, block: nn.Module, hidden: Tensor, *told: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden, *told)
        return block(hidden, *told)

    def _check_size(self, sample: Tensor) -> None:
        halvings = len(self.config.block_out_channels) - 1
        height, width = sample.shape[-2:]
        if height % 2**halvings or width % 2**halvings:
            raise ConfigurationError(
                f"an input of {height}x{width} can't be halved {halvings} times, as this network's {halvings + 1} "
                f"resolutions require: give images, or latents, whose sides are multiples of {2**halvings}, "
                f"or block_out_channels fewer entries."
            )


class FourierFeatures(nn.Module):
    r"""The input with its features ``sin(2^n pi z)`` and ``cos(2^n pi z)``, in float32 (VDM App. C).

    >>> FourierFeatures([7, 8])(torch.zeros(1, 3, 4, 4)).shape
    torch.Size([1, 15, 4, 4])
    """

    def __init__(self, exponents: Sequence[float]) -> None:
        super().__init__()
        self.exponents = tuple(exponents)

    def forward(self, z: Tensor) -> Tensor:
        # Autocast lowers matrix products and convolutions only: what is float32 here stays float32.
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        angles = [z * (2.0**n * math.pi) for n in self.exponents]
        return torch.cat([z, *(angle.sin() for angle in angles), *(angle.cos() for angle in angles)], dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep beside the context, then two linear layers with SiLU; a class adds to the second.

    What a class adds is a linear layer of its row in a table. The layer starts from zero, so that nothing is said of
    the classes before they help.
    """

    def __init__(
        self, channels: int, out: int, num_train_timesteps: int, num_classes: int | None, context_size: int | None
    ) -> None:
        super().__init__()
        self.channels, self.scale = channels, 1000 / (num_train_timesteps - 1)
        self.context_size = context_size or 0
        self.linear_1, self.linear_2 = (
            _lecun(nn.Linear(channels + self.context_size, out)),
            _lecun(nn.Linear(out, out)),
        )
        self.class_embedding = None
        if num_classes is not None:
            self.class_embedding = nn.Sequential(
                nn.Embedding(num_classes, out), _zero(nn.Linear(out, out, bias=False))
            )

    def forward(self, timestep: Tensor, class_labels: Tensor | None, context: Tensor | None = None) -> Tensor:
        if (class_labels is None) != (self.class_embedding is None):
            raise ConfigurationError(
                "class_labels and num_class_embeds go together: this network "
                + ("knows no classes." if self.class_embedding is None else "needs the class of each image.")
            )
        given = None if context is None else context.shape[-1]
        if (given or 0) != self.context_size:
            raise ConfigurationError(
                f"context_size is {self.context_size or None}, and the context has {given} entries: give the network "
                f"the context_size of the process that it is trained with."
            )
        features = self.sinusoids(timestep)
        if context is not None:  # one timestep may stand for the whole batch
            features = torch.cat([features.expand(context.shape[0], -1), context.to(features.dtype)], dim=1)
        embedding = self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        return F.silu(embedding)

    def sinusoids(self, timestep: Tensor) -> Tensor:
        """``sin`` and ``cos`` of 1000 t, t in [0, 1], at frequencies from 1 down to 1e-4; (B, channels)."""
        half = self.channels // 2
        timestep = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
        exponents = torch.arange(half, dtype=timestep.dtype, device=timestep.device) / max(half - 1, 1)
        angles = self.scale * timestep[:, None] * torch.exp(-math.log(10_000) * exponents)
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.channels % 2))


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, noise level, norm, SiLU, dropout, convolution from zero; then attention where given.

    Attributes:
        cross_attention: Attention to a caption's tokens, after all else; ``None`` where there is none.
    """

    cross_attention: CrossAttentionBlock | None

    def __init__(
        self,
        channels: int,
        out: int,
        embedding: int,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        attention: nn.Module | None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = _lecun(nn.Conv2d(channels, out, 3, padding=1))
        self.time_emb_proj = _zero(nn.Linear(embedding, out * (1 + scale_shift), bias=False))
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(out, out, 3, padding=1))
        self.conv_shortcut = nn.Identity() if channels == out else _lecun(nn.Conv2d(channels, out, 1))
        self.attention = nn.Identity() if attention is None else attention
        self.cross_attention = None

    def forward(
        self, hidden: Tensor, embedding: Tensor, states: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden)))
        level = self.time_emb_proj(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = level.chunk(2, dim=1)
            inner = self.norm2(inner) * (1 + scale) + shift
        else:
            inner = self.norm2(inner + level)
        inner = self.conv2(self.dropout(F.silu(inner)))
        hidden = self.attention(self.conv_shortcut(hidden) + inner)
        if self.cross_attention is None or states is None:
            return hidden
        return self.cross_attention(hidden, states, mask)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, added to its input; its output projection starts at zero."""

    def __init__(self, channels: int, groups: int, eps: float, head_dim: int | None) -> None:
        super().__init__()
        self.head_dim = head_dim or channels
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.to_qkv = _lecun(nn.Linear(channels, 3 * channels))
        self.to_out = _zero(nn.Linear(channels, channels))

    def forward(self, hidden: Tensor) -> Tensor:
        sequence = self.norm(hidden).flatten(2).transpose(1, 2)  # (B, H W, C): no copy under channels_last
        query, key, value = self.to_qkv(sequence).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return hidden + self.to_out(attended).transpose(1, 2).view_as(hidden)


class CrossAttentionBlock(nn.Module):
    """Attention of the pixels to tokens, added to its input; its output projection starts at zero.

    Attributes:
        cross_attention_dim: Width of a token, by the name that it has in diffusers' `Attention`.
    """

    is_cross_attention = True

    def __init__(self, channels: int, width: int, groups: int, eps: float, head_dim: int | None) -> None:
        super().__init__()
        self.head_dim, self.cross_attention_dim = head_dim or channels, width
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = _lecun(nn.Linear(channels, channels))
        self.to_kv = _lecun(nn.Linear(width, 2 * channels, bias=False))  # keys need none, values have to_out's
        self.to_out = _zero(nn.Linear(channels, channels))

    def forward(self, hidden: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        sequence = self.norm(hidden).flatten(2).transpose(1, 2)
        query = self.to_q(sequence).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        key, value = self.to_kv(states).unflatten(2, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        if mask is not None:  # no softmax over nothing: where no token is, all are attended to, and what they say is 0
            some = mask.any(1)[:, None, None, None]
            value, mask = value * some, mask[:, None, None] | ~some
        attended = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        return hidden + self.to_out(attended).transpose(1, 2).view_as(hidden)


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _lecun(nn.Conv2d(channels, channels, 3, stride=2, padding=1))

    def forward(self, hidden: Tensor, *told: Tensor | None) -> Tensor:
        return self.conv(hidden)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _lecun(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, hidden: Tensor, *told: Tensor | None) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def _zero(module: Module) -> Module:
    """The module with its parameters at zero: a branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _lecun(module: Layer) -> Layer:
    """The layer with the first weights of the reference code, flax's: of variance 1/fan_in, cut at two deviations."""
    deviation = 1 / (math.sqrt(module.weight[0].numel()) * _CUT_DEVIATION)
    nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def _check(widths: Sequence[int], groups: int, attention_levels: Sequence[int], head_dim: int | None) -> None:
    for name, divisor in (("norm_num_groups", groups), ("attention_head_dim", head_dim)):
        if divisor is not None and any(width % divisor for width in widths):
            raise ConfigurationError(
                f"{name} is {divisor}, which does not divide every entry of block_out_channels {list(widths)}: choose "
                f"one that does."
            )
    if any(not 0 <= level < len(widths) for level in attention_levels):
        raise ConfigurationError(
            f"attention_levels is {list(attention_levels)}: give indices into block_out_channels, 0 to "
            f"{len(widths) - 1}."
        )


def _check_text(width: int | None, images: int, states: Tensor | None, mask: Tensor | None) -> None:
    """Refuse a caption's states, or their mask, that a network of that ``cross_attention_dim`` can't attend to."""
    if width is None and states is None and mask is None:
        return
    if width is None or states is None:
        raise ConfigurationError(
            f"encoder_hidden_states and cross_attention_dim go together: cross_attention_dim is {width}, and the "
            f"states are {_shape_of(states)}: "
            + ("leave states and mask out." if width is None else f"give (B, L, {width}) of floating numbers.")
        )
    numbers = isinstance(states, Tensor) and states.is_floating_point() and states.ndim == 3
    if not (numbers and states.shape[1] and (states.shape[0], states.shape[2]) == (images, width)):
        raise ConfigurationError(
            f"encoder_hidden_states are {_shape_of(states)}, for {images} images and cross_attention_dim={width}: "
            f"give floating-point numbers of shape ({images}, L, {width}), L at least 1."
        )
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != states.shape[:2]
    ):
        raise ConfigurationError(
            f"encoder_attention_mask is {_shape_of(mask)}, and encoder_hidden_states are {_shape_of(states)}: give "
            f"booleans of shape {tuple(states.shape[:2])}, true where there is a token."
        )


def _shape_of(given: Any) -> str:
    """The shape and dtype of what was given, in words."""
    return f"{tuple(given.shape)}, {given.dtype}" if isinstance(given, Tensor) else type(given).__name__


UNetVDMModel.__module__ = "vdm_hub"
