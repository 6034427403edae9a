"""The laws of a decoder: a probability of K levels a dimension, and draws from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdm_hub.diffusion.decoders import Decoder
from vdm_hub.diffusion.gaussian import marginal_sample
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.testing.laws import Laws, require
from vdm_hub.testing.subjects import (
    json_round_trip,
    one_each,
    require_close,
    require_finite,
    require_registered,
    require_shape,
    seeded,
)

DECODER_LAWS = Laws("decoders", Decoder)
_LEVELS = 8
_SCALING = DataScaling("bin_centers", _LEVELS)
_GAMMA, _VARIANCE = torch.tensor(-2.5, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
_DRAWS = 4000


def _latents(size: int, dimensions: int) -> Tensor:
    return torch.linspace(-0.95, 0.85, size * dimensions, dtype=torch.float64).reshape(size, dimensions)


def _nll(decoder: Decoder, levels: Tensor, z_0: Tensor) -> Tensor:
    """The likelihood with a network that takes the latent for the data, nearly."""
    return decoder.negative_log_likelihood(levels, z_0, _GAMMA, _VARIANCE, lambda: 0.9 * z_0, _SCALING)


def _by_level(decoder: Decoder, z_0: Tensor) -> Tensor:
    """``log p`` of each level of one dimension, (B, K)."""
    one = z_0.reshape(-1, 1)
    return torch.stack([-_nll(decoder, torch.full_like(one, k).long(), one) for k in range(_LEVELS)], 1)


@DECODER_LAWS.add
def normalised(decoder: Decoder) -> None:
    """In each dimension, the probabilities of the K levels are finite, and sum to one."""
    log_p = _by_level(decoder, _latents(5, 1))
    require_finite(log_p, "-negative_log_likelihood()")
    require_close(log_p.exp().sum(1), torch.ones(5), f"the sum of the probabilities of {_LEVELS} levels")


@DECODER_LAWS.add
def adds_up(decoder: Decoder) -> None:
    """The negative log-likelihood of a datum is one number, the sum of its dimensions', whatever its batch."""
    z_0, levels = _latents(3, 4), torch.randint(0, _LEVELS, (3, 4), generator=seeded(1))
    found = _nll(decoder, levels, z_0)
    require_shape(found, (3,), "negative_log_likelihood() of 3 data")
    each = -_by_level(decoder, z_0).gather(1, levels.reshape(-1, 1)).reshape(3, 4)
    require_close(found, each.sum(1), "the negative log-likelihood, against the sum of its dimensions',")


@DECODER_LAWS.add
def sampling(decoder: Decoder) -> None:
    """Its `sample` gives levels, int64, as often as the likelihood says, or always the likeliest."""
    z_0 = _latents(3, 1)
    every = z_0.expand(3, _DRAWS)
    drawn = decoder.sample(every, _GAMMA, lambda: 0.9 * every, _SCALING, seeded(2))
    require(drawn.dtype == torch.int64, f"sample() gives {drawn.dtype}, not int64")
    require_shape(drawn, (3, _DRAWS), f"sample() of 3 data of {_DRAWS} dimensions")
    require((drawn >= 0).all() & (drawn < _LEVELS).all(), f"it draws levels up to {int(drawn.max())} of {_LEVELS}")
    p = _by_level(decoder, z_0).softmax(1)
    counts = torch.stack([(drawn == k).sum(1) for k in range(_LEVELS)], 1).double()
    chi_square = float(((counts - _DRAWS * p) ** 2 / (_DRAWS * p + 0.1)).sum())
    likeliest = bool((drawn == p.argmax(1, keepdim=True)).all())
    require(
        likeliest or chi_square < 80,
        f"of {_DRAWS} draws a datum, the frequencies are {(counts / _DRAWS)[0].tolist()}, and the probabilities "
        f"{p[0].tolist()}",
    )


@DECODER_LAWS.add
def draws_follow_their_generator(decoder: Decoder) -> None:
    """The levels of a datum come from its own generator alone, wherever it stands in a batch."""
    z_0 = _latents(3, 1).expand(3, 64)
    together = decoder.sample(z_0, _GAMMA, lambda: 0.9 * z_0, _SCALING, one_each(0, 1, 2))
    last = z_0[2:]
    alone = decoder.sample(last, _GAMMA, lambda: 0.9 * last, _SCALING, one_each(2))
    require_close(together[2:], alone, "a level from its own generator, against alone,", rtol=0, atol=0)


@DECODER_LAWS.add
def gradient(decoder: Decoder) -> None:
    """The gradients by the latent, gamma and the network's output are those of finite differences, in float64."""
    levels = torch.randint(0, _LEVELS, (2, 3), generator=seeded(3))
    inputs = _latents(2, 3).requires_grad_(), _GAMMA.clone().requires_grad_(), (0.8 * _latents(2, 3)).requires_grad_()

    def likelihood(z_0: Tensor, gamma: Tensor, x_hat: Tensor) -> Tensor:
        return decoder.negative_log_likelihood(levels, z_0, gamma, _VARIANCE, lambda: x_hat, _SCALING)

    value = likelihood(*inputs)
    found = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    for name, one, by in zip(("z_0", "gamma_0", "x_hat"), inputs, found, strict=True):
        for i in range(one.numel()):
            step = torch.zeros(one.numel(), dtype=torch.float64)
            step[i] = 1e-5
            with torch.no_grad():
                ends = [likelihood(*(x + s * step.view_as(x) if x is one else x for x in inputs)) for s in (1, -1)]
            slope, given = (ends[0] - ends[1]).sum() / 2e-5, torch.zeros(()) if by is None else by.flatten()[i]
            require_close(given, slope, f"the gradient by {name}", rtol=1e-4, atol=1e-4)


@DECODER_LAWS.add
def expected_by_level(decoder: Decoder) -> None:
    """What is said to be the expectation by level is the mean over draws of z_0."""
    stated = decoder.expected_by_level(float(_GAMMA), _SCALING)
    if stated is None:
        return
    require_shape(stated, (_LEVELS,), "expected_by_level()")
    levels = torch.arange(_LEVELS).repeat_interleave(_DRAWS)[:, None]
    x = _SCALING.encode(levels, torch.float64)
    noise = torch.randn(x.shape, generator=seeded(4), dtype=torch.float64)
    drawn = _nll(decoder, levels, marginal_sample(x, _GAMMA.expand(len(x), 1), noise)).reshape(_LEVELS, _DRAWS)
    error = 6 * drawn.std(1) / math.sqrt(_DRAWS) + 1e-6
    require_close(stated, drawn.mean(1), "expected_by_level(), against the mean of draws,", rtol=0, atol=error)


@DECODER_LAWS.add
def json_config(decoder: Decoder) -> None:
    """Its `to_config` is JSON, and builds the same decoder again, bit for bit."""
    config = json_round_trip(decoder.to_config(), "to_config()")
    after, before = (_by_level(one, _latents(5, 1)) for one in (type(decoder)(**config), decoder))
    require_close(after, before, f"log p of the decoder rebuilt from {config!r:.200}", rtol=0, atol=0)


@DECODER_LAWS.add
def registered(decoder: Decoder) -> None:
    """The class is the entry point of an installed package, so that a config can name it."""
    require_registered("decoders", type(decoder))
