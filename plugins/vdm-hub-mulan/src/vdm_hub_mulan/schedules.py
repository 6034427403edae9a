r"""A gamma per pixel, a monotone polynomial of degree five in t with learned coefficients (MuLAN section 3).

    gamma(t) = gamma_min + (gamma_max - gamma_min) s(t),   s(0) = 0, s(1) = 1,
    s(t) proportional to the integral of (a u^2 + b u + d)^2 over u from 0 to t, plus a linear part,

with a, b and d one number a pixel. The integrand is a square, so s never falls; where it touches zero it would not
rise either, which the linear part, 1 % of the whole whatever the coefficients, makes up for. A gamma per pixel changes
the bound through its whole path, not through its endpoints alone, so all of it is trained by the bound. The two
endpoints, one number each for all pixels, are trained too, as VDM's are; MuLAN's paper holds them fixed, as
``learn_endpoints=False`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_hub import BoundGamma, ConfigurationError, Gamma, NoiseSchedule, check_endpoints, normal_noise

_LINEAR_PART = 0.01
_SMALLEST = 1e-12  # of the integral, where the largest coefficient is one
_MOST, _PLACES = 4096, 4


def polynomial(t: Tensor, coefficients: Tensor) -> Tensor:
    """``s(t)``, from 0 to 1 on [0, 1]: 0.99 of the integral's share at t, and 0.01 t.

    Args:
        t: Times, (B, 1, 1, 1).
        coefficients: a, b and d in the last dimension, (1 or B, C, H, W, 3).

    Returns:
        (B, C, H, W).

    >>> s = polynomial(torch.tensor([0.25]).reshape(1, 1, 1, 1), torch.tensor([0.0, 0.0, 7.0]).reshape(1, 1, 1, 1, 3))
    >>> round(float(s), 6)  # a = b = 0: linear, whatever d
    0.25
    """
    # s does not depend on the coefficients' size, so its derivative at their size is that of any other.
    largest = coefficients.detach().abs().amax(-1, keepdim=True)
    a, b, d = (coefficients / largest.clamp_min(torch.finfo(coefficients.dtype).tiny)).unbind(-1)
    # The integral's coefficients of t^5, ..., t (MuLAN section 3).
    fifth, fourth, third, second, first = a * a / 5, a * b / 2, (b * b + 2 * a * d) / 3, b * d, d * d
    integral = t * (first + t * (second + t * (third + t * (fourth + t * fifth))))
    whole = first + second + third + fourth + fifth
    share = (integral + _SMALLEST * t) / (whole + _SMALLEST)
    return (1 - _LINEAR_PART) * share + _LINEAR_PART * t


class MulanSchedule(NoiseSchedule):
    """MuLAN's data-independent form: one a, b and d for each pixel, the same for all data.

    It starts as ``linear`` between the endpoints.

    Args:
        shape: Of a datum, (C, H, W).
        gamma_min: gamma(0), at the start of training.
        gamma_max: gamma(1), likewise.
        learn_endpoints: Whether the bound trains those two.

    >>> MulanSchedule([1, 2, 2], -8.0, 4.0)(torch.tensor([0.0, 0.5, 1.0])).flatten(1)[:, 0].tolist()
    [-8.0, -2.0, 4.0]
    """

    scalar = False

    def __init__(
        self, shape: Sequence[int], gamma_min: float = -13.3, gamma_max: float = 5.0, learn_endpoints: bool = True
    ) -> None:
        super().__init__()
        check_endpoints("mulan", gamma_min, gamma_max)
        self.shape = _checked(shape)
        if not isinstance(learn_endpoints, bool):
            raise ConfigurationError(f"learn_endpoints is {learn_endpoints!r}: give true or false.")
        self._config: dict[str, Any] = {
            "shape": list(self.shape),
            "gamma_min": float(gamma_min),
            "gamma_max": float(gamma_max),
            "learn_endpoints": learn_endpoints,
        }
        self.gamma_min = nn.Parameter(torch.tensor(float(gamma_min)), requires_grad=learn_endpoints)
        self.gamma_max = nn.Parameter(torch.tensor(float(gamma_max)), requires_grad=learn_endpoints)
        self.coefficients = nn.Parameter(_linear_start().expand(1, *self.shape, 3).clone())

    @classmethod
    def example_config(cls) -> dict[str, Any]:
        """Arguments for the conformance kit."""
        return {"shape": [1, 8, 8]}

    def forward(self, t: Tensor) -> Tensor:
        """Gamma of each pixel at times (B,): (B, C, H, W)."""
        return self.gamma(t, self.coefficients)

    def gamma(self, t: Tensor, coefficients: Tensor) -> Tensor:
        """``gamma_min + (gamma_max - gamma_min) s(t)``, in the type of t, (B, C, H, W)."""
        first, last = self.gamma_min.to(t.dtype), self.gamma_max.to(t.dtype)
        share = polynomial(t.reshape(-1, 1, 1, 1), coefficients.to(t.dtype))
        return first * (1 - share) + last * share

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        """No extra terms; gamma is the same for all data, which are only checked to have the schedule's shape."""
        self._check(x)
        return {}, self

    def _check(self, x: Tensor | None) -> None:
        if x is not None and tuple(x.shape[1:]) != self.shape:
            raise ConfigurationError(
                f"the schedule has a gamma for each pixel of {list(self.shape)} (C, H, W), and the data are "
                f"{list(x.shape[1:])}: give the data's shape in its config."
            )

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)


class MulanLatentSchedule(MulanSchedule):
    r"""MuLAN's form given an auxiliary latent c: a, b and d of each pixel are functions of c.

    While bounding, ``c ~ q(c|x) = N(mu(x), diag sigma^2(x))``, and the bound gains the term ``latent``,
    ``KL(q(c|x) || N(0, I)) = 1/2 sum (mu^2 + sigma^2 - 1 - ln sigma^2)``, exact for the very c that is drawn; while
    sampling, ``c ~ N(0, I)``, once for a chain (MuLAN section 3, where c is categorical, relaxed, and its KL another
    latent's). gamma depends on x through c alone. It starts as ``linear``, with a KL of zero.

    The network is told c beside its timestep, which is that of the mean gamma: without c it can't know which pixels
    are noised first.

    Args:
        shape: As for `MulanSchedule`.
        gamma_min: Likewise.
        gamma_max: Likewise.
        learn_endpoints: Likewise.
        latent_size: Dimensions of c.
        hidden_size: Of the one hidden layer between c and the coefficients.
        encoder_channels: Width of the small U-Net behind q(c|x).
        tells_network: Whether the network is told c.
    """

    def __init__(
        self,
        shape: Sequence[int],
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        learn_endpoints: bool = True,
        latent_size: int = 8,
        hidden_size: int = 64,
        encoder_channels: int = 16,
        tells_network: bool = True,
    ) -> None:
        super().__init__(shape, gamma_min, gamma_max, learn_endpoints)
        sizes = {"latent_size": latent_size, "hidden_size": hidden_size, "encoder_channels": encoder_channels}
        if not all(type(size) is int and 1 <= size <= _MOST for size in sizes.values()):
            raise ConfigurationError(f"the schedule 'mulan_latent' got {sizes}: give whole numbers, 1 to {_MOST}.")
        if not isinstance(tells_network, bool):
            raise ConfigurationError(f"tells_network is {tells_network!r}: give true or false.")
        self._config |= sizes | {"tells_network": tells_network}
        self.context_size = latent_size if tells_network else None
        del self.coefficients
        dimensions = self.shape[0] * self.shape[1] * self.shape[2]
        self.encoder = SmallUNet(self.shape, encoder_channels, 2 * latent_size)
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, hidden_size), nn.SiLU(), _zero(nn.Linear(hidden_size, 3 * dimensions))
        )
        last = self.decoder.get_parameter("2.bias")
        with torch.no_grad():
            last.copy_(_linear_start().repeat(dimensions))

    def forward(self, t: Tensor) -> Tensor:
        """There is none: gamma depends on a latent.

        Raises:
            ConfigurationError: Always; `bind` gives gamma.
        """
        raise ConfigurationError("the schedule 'mulan_latent' has no gamma before its latent is drawn: bind() it.")

    def draw_noise(self, batch_size: int, generator: Any, device: torch.device) -> dict[str, Tensor]:
        """Standard normals behind c, (B, latent_size)."""
        return {"latent": normal_noise((batch_size, self._config["latent_size"]), generator, device)}

    def bind(self, x: Tensor | None, noise: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Gamma]:
        """The term ``latent``, and gamma given c, as a function of t alone."""
        self._check(x)
        dtype = self.gamma_min.dtype
        latent, extras = noise["latent"].to(dtype), {}
        if x is not None:
            mean, log_variance = self.encoder(x.to(dtype)).chunk(2, dim=1)
            extras = {"latent": 0.5 * (mean**2 + torch.expm1(log_variance) - log_variance).sum(1)}
            latent = mean + torch.exp(0.5 * log_variance) * latent
        coefficients = self.decoder(latent).reshape(-1, *self.shape, 3)
        gamma = partial(self._gamma_of, coefficients)
        return extras, BoundGamma(gamma, latent) if self._config["tells_network"] else gamma

    def _gamma_of(self, coefficients: Tensor, t: Tensor) -> Tensor:
        return self.gamma(t, coefficients)


class SmallUNet(nn.Module):
    """A vector of an image: two resolutions, joined again at the finer, then averaged over at most 4 x 4 places.

    Args:
        shape: Of the image, (C, H, W), of any size.
        channels: Width of the finer resolution; the coarser has twice as many.
        outputs: Length of the vector, which starts at zero.

    >>> SmallUNet((1, 8, 8), 4, 6)(torch.ones(2, 1, 8, 8)).shape
    torch.Size([2, 6])
    """

    def __init__(self, shape: tuple[int, int, int], channels: int, outputs: int) -> None:
        super().__init__()
        inputs, *size = shape
        self._places = (min(size[0], _PLACES), min(size[1], _PLACES))
        self.fine = nn.Conv2d(inputs, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.joined = nn.Conv2d(3 * channels, channels, 3, padding=1)
        self.out = _zero(nn.Linear(channels * self._places[0] * self._places[1], outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The vector of each image, (B, outputs)."""
        fine = F.silu(self.fine(x))
        coarse = F.silu(self.coarse(F.silu(self.down(fine))))
        again = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        joined = F.silu(self.joined(torch.cat([fine, again], dim=1)))
        vector: Tensor = self.out(F.adaptive_avg_pool2d(joined, self._places).flatten(1))
        return vector


def _linear_start() -> Tensor:
    """``(a, b, d) = (0, 0, 1)``, of which gamma is linear in t."""
    return torch.tensor([0.0, 0.0, 1.0])


def _zero(layer: nn.Linear) -> nn.Linear:
    """The layer with its parameters at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _checked(shape: Sequence[int]) -> tuple[int, int, int]:
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ConfigurationError(f"shape is {shape!r}: give channels, height and width, such as [1, 8, 8].")
    channels, height, width = shape
    return channels, height, width
