"""What a latent VDM asks of its first stage: the encoder that it diffuses the latents of, and the decoder below it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from vdm_hub.diffusion.draws import Generator


class FirstStage(Protocol):
    """A variational autoencoder of K-level images, ``q(y|x)`` and ``p(x|y)``, without its prior.

    Attributes:
        image_shape: Channels, height and width of x.
        latent_shape: Of y: (C, H, W), or (D,) for a vector.
        num_levels: K.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def num_levels(self) -> int: ...

    def scale(self, levels: Tensor) -> Tensor:
        """The x that the encoder sees, of levels 0..K-1, at least in float32."""

    def posterior(self, x: Tensor) -> Any:
        """``q(y|x)``, a diagonal Gaussian: ``(mean, scale)``, both (B, *latent_shape), the scale positive."""

    def log_likelihood(self, levels: Tensor, y: Tensor) -> Tensor:
        """``log p(x|y)`` over K levels, normalised, nats, (B,)."""

    def draw_levels(self, y: Tensor, generator: Generator) -> Tensor:
        """Levels from ``p(x|y)``, int64, (B, C, H, W)."""

    def likeliest_levels(self, y: Tensor) -> Tensor:
        """Each pixel's likeliest level, int64, (B, C, H, W)."""
