r"""The kernels of uniform diffusion, per site, and draws of values.

With signal ``a_t = alpha(t)`` the marginal is ``q(z_t|x) = a_t [z_t = x] + (1 - a_t)/K``. The reverse kernel is the
mixture ``p(z_s|z_t) = sum_x p(x|z_t) q(z_s|z_t, x)`` (UDLM is another: it puts a fractional x into the posterior). A
network that gives the log-probabilities of a site's value given all *other* sites, ``pi = softmax(F)``, has
``p(x|z_t)`` proportional to ``pi_x q(z_t|x)``, and the mixture is the posterior with pi in the place of the one-hot x:

    p(z_s = y|z_t = z) = q(z|y) A_s(y)/A_t(z),   A(y) = K a pi_y + 1 - a   (in units of 1/K),

with ``q(z|y) = a_ts [y = z] + (1 - a_ts)/K`` the step from s to t. So data and prediction differ in A alone, and agree
exactly where the network is certain and right. Every KL is a sum of ``q log(q/p) - q + p``, none of them negative and
each of second order where q and p are near, so that nothing cancels between values. K = 2 is binomial diffusion
(Sohl-Dickstein et al., arXiv 1503.03585, Table 1), with F the log-odds halved, once for each bit.

Sources: D3PM is Austin et al., arXiv 2107.03006; UDLM is Schiff et al., arXiv 2412.10193.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """How much of the signal is left at a time: alpha and ``lost = 1 - alpha``, broadcastable to (B, *data, K)."""

    alpha: Tensor
    lost: Tensor


def log_mixed(log_pi: Tensor, at: Level) -> Tensor:
    """``log A(y) = log(1 - a + K a pi_y)`` of each value y, (B, *data, K).

    As ``log(1 + a (K pi_y - 1))`` where little signal is left and A is near one, and as a sum of logarithms where
    much is, and pi_y may be tiny.
    """
    k = log_pi.shape[-1]
    near_one = torch.log1p(at.alpha.clamp(max=0.5) * (k * log_pi.exp() - 1))
    scaled = torch.logaddexp(torch.log(at.lost), math.log(k) + torch.log(at.alpha) + log_pi)
    return torch.where(at.alpha < 0.5, near_one, scaled)


def log_known(is_value: Tensor, at: Level, k: int) -> Tensor:
    """`log_mixed` where the value is known: pi one-hot, as the bools say."""
    return torch.where(is_value, torch.log1p(at.alpha * (k - 1)), torch.log(at.lost))


def step_probabilities(is_z: Tensor, alpha: Tensor, lost: Tensor) -> Tensor:
    """``q(z_t|z_s = y)`` of each y: alpha and lost those of the step, ``a_t/a_s`` and the rest."""
    return torch.where(is_z, alpha + lost / is_z.shape[-1], lost / is_z.shape[-1])


def reverse_probabilities(z: Tensor, logits: Tensor, at_s: Level, at_t: Level, opened: Tensor) -> Tensor:
    """``p(z_s = y|z_t)``, (B, *data, K), for the logits of a network.

    Args:
        z: z_t, ids, (B, *data).
        logits: F, (B, *data, K).
        at_s: At the earlier time.
        at_t: At the later.
        opened: ``(a_s - a_t)/(1 - a_t)``.

    >>> half, zero, one = torch.tensor(0.5), torch.tensor(0.0), torch.tensor(1.0)
    >>> z, nothing_known = torch.tensor([[0]]), torch.zeros(1, 1, 4)
    >>> reverse_probabilities(z, nothing_known, Level(one, zero), Level(half, half), one).tolist()
    [[[0.625, 0.125, 0.125, 0.125]]]
    """
    log_pi, is_z = torch.log_softmax(logits, -1), _one_hot(z, logits.shape[-1])
    step = step_probabilities(is_z, at_t.alpha / at_s.alpha, opened * at_t.lost / at_s.alpha)
    return step * torch.exp(log_mixed(log_pi, at_s) - _at_z(log_mixed(log_pi, at_t), z))


def log_posterior(z: Tensor, logits: Tensor, at: Level) -> Tensor:
    """``log p(x|z_t)`` up to a constant, (B, *data, K): the network's word on a site, and the site's own."""
    return torch.log_softmax(logits, -1) + log_known(_one_hot(z, logits.shape[-1]), at, logits.shape[-1])


def transition_kl(x: Tensor, z: Tensor, logits: Tensor, at_s: Level, at_t: Level, opened: Tensor) -> Tensor:
    """``KL(q(z_s|z_t, x) || p(z_s|z_t))`` of each site in nats, (B, *data).

    Args:
        x: The data, ids, (B, *data).
        z: As in `reverse_probabilities`, as all that follow.
        logits: As there.
        at_s: As there.
        at_t: As there.
        opened: As there.
    """
    k = logits.shape[-1]
    log_pi, is_x, is_z = torch.log_softmax(logits, -1), _one_hot(x, k), _one_hot(z, k)
    step = step_probabilities(is_z, at_t.alpha / at_s.alpha, opened * at_t.lost / at_s.alpha)
    log_q = log_known(is_x, at_s, k) - log_known((x == z).unsqueeze(-1), at_t, k)
    log_p = log_mixed(log_pi, at_s) - _at_z(log_mixed(log_pi, at_t), z)
    return (step * divergence(log_q, log_p)).sum(-1)


def kl_rate(x: Tensor, z: Tensor, logits: Tensor, at: Level, lost_rate: Tensor) -> Tensor:
    """The transition KL of each site per unit of time, in nats, as s -> t: (B, *data).

    The chain jumps to each value at the rate ``beta/K``, ``beta = -a'/a``, and its reverse given x from z to y at
    ``R = beta/K A_x(y)/A_x(z)``; that of the model has pi's A. The KL rate of two jump processes is
    ``sum over y != z of R log(R/R_hat) - R + R_hat``.

    Args:
        x: The data, ids, (B, *data).
        z: z_t, ids, (B, *data).
        logits: F, (B, *data, K).
        at: At the time t > 0.
        lost_rate: ``-a'``, broadcastable.
    """
    k, tiny = logits.shape[-1], torch.finfo(logits.dtype).eps
    at = Level(at.alpha.clamp(min=tiny), at.lost.clamp(min=1e-12))
    log_pi, is_x, is_z = torch.log_softmax(logits, -1), _one_hot(x, k), _one_hot(z, k)
    log_q = log_known(is_x, at, k) - log_known((x == z).unsqueeze(-1), at, k)
    mixed = log_mixed(log_pi, at)
    each = divergence(log_q, mixed - _at_z(mixed, z))
    return (lost_rate / at.alpha).squeeze(-1) / k * torch.where(is_z, 0.0, each).sum(-1)


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``q log(q/p) - q + p``, elementwise, of the logarithms; p itself where q is zero, and never negative.

    >>> log_q = torch.tensor([0.0, -float("inf")])
    >>> divergence(log_q, log_q.new_zeros(2)).tolist()
    [0.0, 1.0]
    """
    zero = torch.isneginf(log_q)
    q, d = log_q.exp(), torch.where(zero, 0.0, log_q - log_p)
    near = d.abs() < 0.05  # d + expm1(-d) by its series: both are about d
    small, large = torch.where(near, d, 0.0), torch.where(near | (d < -1), 1.0, d)
    series = small**2 * (0.5 - small / 6 * (1 - small / 4 * (1 - small / 5 * (1 - small / 6))))
    excess = torch.where(near, series, large + torch.expm1(-large))
    return torch.where(zero | (d < -1), log_p.exp() - q + q * d, q * excess)


def draw_values(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Ids drawn by the inverse of the distribution function, in float64: (..., K), (...) -> (...), int64.

    Args:
        probabilities: Up to a factor, not negative.
        uniforms: In [0, 1).

    >>> draw_values(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0.25])).tolist()
    [2]
    """
    cumulative = probabilities.double().cumsum(-1)
    wanted = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, wanted.contiguous(), right=True).squeeze(-1)
    return drawn.clamp(max=probabilities.shape[-1] - 1)


def _one_hot(ids: Tensor, k: int) -> Tensor:
    return F.one_hot(ids.long(), k).bool()


def _at_z(values: Tensor, z: Tensor) -> Tensor:
    return values.gather(-1, z.long().unsqueeze(-1))
