r"""The kernels of binomial diffusion, per bit, and the divergences between them.

Bits are x in {-1, 1}. With signal ``a_t = prod (1 - beta)`` the marginal is ``q(z_t|x) = (1 + a_t z_t x) / 2``, SD15's
``Bernoulli(1/2 + (x_0 - 1/2) prod (1 - beta))``. Everything takes ``lost = 1 - signal``, never the signal, so that
nothing cancels near the data, where the signal is one.

The reverse kernel is the mixture ``p(z_s|z_t) = sum_x p(x|z_t) q(z_s|z_t, x)``, between any two times; SD15's network
gives the probability of a flip itself, for one step (Table 1). A network that predicts the log-odds F of a bit given
all other bits has ``p(x|z_t)`` proportional to ``q(z_t|x) exp(x F / 2)``, and the mixture is the posterior of
``m = tanh(z_t F / 2)``, as if m were the bit times z_t:

    p(flip) = (1 - a_t/a_s)/2 (1 - a_s m)/(1 + a_t m),   q(flip|x): the same with z_t x for m.

So data and prediction differ in m alone, and the two agree exactly where the network is certain and right. (The mean
of ``p(x|z_t)`` in the place of m, another number, counts z_t twice.)

Sources: SD15 is Sohl-Dickstein et al., arXiv 1503.03585; F49 is Feller, Berkeley Symposium (1949).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def flip_probability(logit: Tensor, lost_s: Tensor, lost_t: Tensor) -> Tensor:
    """``p(z_s = -z_t | z_t)``, at s < t.

    Args:
        logit: ``z_t F``: the log-odds that the data's bit is z_t, given all bits but this one. Infinite where the bit
            is known.
        lost_s: ``1 - a_s``, broadcastable.
        lost_t: ``1 - a_t``, broadcastable, above ``lost_s``.

    >>> zero = torch.tensor(0.0)
    >>> float(flip_probability(zero, zero, torch.tensor(0.5)))  # nothing known: (1 - a_t) / 2
    0.25
    """
    step_lost = (lost_t - lost_s) / (1 - lost_s)
    differs = lost_s + 2 * (1 - lost_s) * torch.sigmoid(-logit)  # 1 - a_s m
    agrees = lost_t + 2 * (1 - lost_t) * torch.sigmoid(logit)  # 1 + a_t m
    return 0.5 * step_lost * differs / agrees


def transition_kl(agrees: Tensor, logit: Tensor, lost_s: Tensor, lost_t: Tensor) -> Tensor:
    """``KL(q(z_s|z_t, x) || p(z_s|z_t))`` of each bit in nats: that of two Bernoulli distributions (SD15 eq. 14).

    Args:
        agrees: Whether z_t is the data's bit.
        logit: As in `flip_probability`.
        lost_s: As there.
        lost_t: As there.
    """
    known = torch.where(agrees, torch.inf, -torch.inf).to(logit.dtype)
    flip = flip_probability(known, lost_s, lost_t)
    on_flip = _log_weight(-known, lost_s, flip) - flip * _log(-logit, lost_s)
    on_stay = _log_weight(known, lost_s, 1 - flip) - (1 - flip) * _log(logit, lost_s)
    return on_flip + on_stay + _log(logit, lost_t) - _log(known, lost_t)


def kl_rate(agrees: Tensor, logit: Tensor, lost: Tensor, lost_rate: Tensor) -> Tensor:
    """The transition KL of each bit per unit of time, in nats, as s -> t.

    The chain jumps at the rate ``r = beta / 2`` (generator ``beta/2 [[-1, 1], [1, -1]]``, F49), ``beta = -a'/a``; its
    reverse at ``r rho``, ``rho = (1 - a m)/(1 + a m)``. The KL rate of two jump processes with rates ``r rho_q`` and
    ``r rho_p`` is ``r (rho_q log(rho_q/rho_p) - rho_q + rho_p)``.

    Args:
        agrees: Whether z_t is the data's bit.
        logit: As in `flip_probability`.
        lost: ``1 - a_t``, above 0.
        lost_rate: Its derivative in t.
    """
    lost = lost.clamp(1e-12, 1 - torch.finfo(lost.dtype).eps)
    log_rho_q = torch.where(agrees, 1.0, -1.0) * (torch.log(lost) - torch.log(2 - lost))
    difference = log_rho_q - _log(-logit, lost) + _log(logit, lost)  # log(rho_q / rho_p)
    # rho_q d - rho_q + rho_q exp(-d): near a = 0, where r is large, d is small and nothing may cancel.
    return 0.5 * lost_rate / (1 - lost) * torch.exp(log_rho_q) * (difference + torch.expm1(-difference))


def transition_matrix(lost_s: Tensor, lost_t: Tensor) -> Tensor:
    """``q(z_t|z_s)`` of one bit, s <= t: rows by z_s, columns by z_t, both -1 then 1; (..., 2, 2) (SD15 Table 1).

    It solves Kolmogorov's equations (F49): ``dP/dt = P Q(t)`` forward, ``dP/ds = -Q(s) P`` backward,
    with Q of `generator`.

    >>> transition_matrix(torch.tensor(0.0), torch.tensor(0.5)).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    flip = 0.5 * (lost_t - lost_s) / (1 - lost_s)
    return torch.stack([torch.stack([1 - flip, flip], -1), torch.stack([flip, 1 - flip], -1)], -2)


def generator(lost: Tensor, lost_rate: Tensor) -> Tensor:
    """``Q(t) = beta/2 [[-1, 1], [1, -1]]``, ``beta = -a'/a``, of one bit, (..., 2, 2): SD15's step, ``I + Q dt``.

    Args:
        lost: ``1 - a_t``, below 1.
        lost_rate: Its derivative in t.

    >>> generator(torch.tensor(0.5), torch.tensor(1.0)).tolist()
    [[-1.0, 1.0], [1.0, -1.0]]
    """
    rate = 0.5 * lost_rate / (1 - lost)
    return torch.stack([torch.stack([-rate, rate], -1), torch.stack([rate, -rate], -1)], -2)


def reverse_generator(forward: Tensor, marginal: Tensor) -> Tensor:
    """The generator of the chain run backwards, ``R_ij = Q_ji q_t(j) / q_t(i)`` off the diagonal, (..., S, S).

    Source: Campbell et al., arXiv 2205.14987, Proposition 1.

    Args:
        forward: Q(t), (..., S, S).
        marginal: ``q_t``, (..., S); given the data, that of the reverse process behind `kl_rate`.
    """
    rates = forward.mT * marginal.unsqueeze(-2) / marginal.unsqueeze(-1)
    rates = rates - torch.diag_embed(rates.diagonal(dim1=-2, dim2=-1))
    return rates - torch.diag_embed(rates.sum(-1))


def mean_of_data(z_t: Tensor, output: Tensor, lost: Tensor) -> Tensor:
    """``E[x|z_t]`` of each bit, its own latent taken into account, for an output F of the network."""
    return torch.tanh(0.5 * (output + z_t * (torch.log(2 - lost) - torch.log(lost))))


def _log(logit: Tensor, lost: Tensor) -> Tensor:
    """``log(1 + a m)``, ``m = tanh(logit / 2)``, also where it tends to -inf."""
    return torch.logaddexp(torch.log(lost), torch.log1p(-lost) + math.log(2) + F.logsigmoid(logit))


def _log_weight(known: Tensor, lost: Tensor, weight: Tensor) -> Tensor:
    """``weight log(1 + a m)`` for a bit that is known, m = -1 or 1: zero where the weight is."""
    return torch.xlogy(weight, torch.where(known > 0, 2 - lost, lost))
