r"""Gaussian diffusion in the negative log signal-to-noise ratio gamma.

With ``gamma = -log SNR``, ``alpha^2 = sigmoid(-gamma)`` and ``sigma^2 = sigmoid(gamma)``, a latent is
``z_t = alpha_t x + sigma_t eps``. Every function below takes gamma, never alpha or sigma, so nothing cancels: at
gamma = -13.3, sigma^2 = 1.67e-6, where float32's ``1 - alpha^2`` is already wrong by 0.3 %.

Sources: VDM is Kingma et al., arXiv 2107.00630; Luo is arXiv 2208.11970; SDE is Song et al., arXiv 2011.13456.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def broadcast(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient of shape (), (B,) or (B, *data), ready to multiply ``like`` of shape (B, *data)."""
    if coefficient.ndim == 0:  # left so: one number does not raise the precision of what it multiplies
        return coefficient
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def sum_dimensions(values: Tensor) -> Tensor:
    """The sums over everything but the batch: (B, *data) -> (B,)."""
    return values.flatten(1).sum(1)


def alpha(gamma: Tensor) -> Tensor:
    """``alpha = sqrt(sigmoid(-gamma))`` (VDM eq. 3 and 4)."""
    return torch.exp(0.5 * F.logsigmoid(-gamma))


def sigma(gamma: Tensor) -> Tensor:
    """``sigma = sqrt(sigmoid(gamma))`` (VDM eq. 3 and 4)."""
    return torch.exp(0.5 * F.logsigmoid(gamma))


def marginal_sample(x: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
    """``z_t = alpha_t x + sigma_t eps``, a draw from ``q(z_t|x)`` (VDM eq. 1).

    >>> float(marginal_sample(torch.tensor([[1.0]]), torch.tensor([0.0]), torch.tensor([[1.0]])))
    1.4142135381698608
    """
    gamma = broadcast(gamma, x)
    return alpha(gamma) * x + sigma(gamma) * eps


def transition(gamma_s: Tensor, gamma_t: Tensor) -> tuple[Tensor, Tensor]:
    """``(alpha_ts, sigma_ts^2)`` of ``q(z_t|z_s) = N(alpha_ts z_s, sigma_ts^2 I)``, s < t (VDM eq. 20 to 24).

    ``alpha_ts = alpha_t / alpha_s`` and ``sigma_ts^2 = -expm1(softplus(gamma_s) - softplus(gamma_t))``.
    """
    log_ratio = F.logsigmoid(-gamma_t) - F.logsigmoid(-gamma_s)  # log alpha_t^2 / alpha_s^2
    return torch.exp(0.5 * log_ratio), -torch.expm1(log_ratio)


def posterior(gamma_s: Tensor, gamma_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(weight_z, weight_x, variance)`` of ``q(z_s|z_t, x)`` (VDM eq. 25 to 28; Luo eq. 84 with abar_t = alpha_t^2).

    With ``c = -expm1(gamma_s - gamma_t)`` the mean is ``alpha_s ((1-c) z_t / alpha_t + c x)`` and the variance
    ``sigma_s^2 c``.
    """
    c = -torch.expm1(gamma_s - gamma_t)
    alpha_s = alpha(gamma_s)
    weight_z = alpha_s / alpha(gamma_t) * torch.exp(gamma_s - gamma_t)
    return weight_z, alpha_s * c, torch.sigmoid(gamma_s) * c


def kl_divergence(mean_q: Tensor, variance_q: Tensor, mean_p: Tensor, variance_p: Tensor) -> Tensor:
    """Elementwise KL of two diagonal Gaussians in nats: ``1/2 (ln(v_p/v_q) + (v_q + (m_q - m_p)^2) / v_p - 1)``.

    >>> one = torch.ones(1)
    >>> float(kl_divergence(0 * one, one, 2 * one, one))
    2.0
    """
    return 0.5 * (torch.log(variance_p / variance_q) + (variance_q + (mean_q - mean_p) ** 2) / variance_p - 1)


def transition_kl(error: Tensor, weight: Tensor, log_ratio: Tensor) -> Tensor:
    """Elementwise ``KL(q(z_s|z_t, x) || p(z_s|z_t))`` in nats, where the two variances differ.

    `kl_divergence` with ``r = v_q / v_p`` and ``(mu_q - mu_p)^2 / v_q = expm1(gamma_t - gamma_s) |eps - eps_hat|^2``:
    ``1/2 (r - 1 - ln r + r expm1(gamma_t - gamma_s) |eps - eps_hat|^2)``.

    Args:
        error: ``|eps - eps_hat|^2``.
        weight: ``expm1(gamma_t - gamma_s)``.
        log_ratio: ``ln r``, at zero the VDM's own reverse step.

    >>> float(transition_kl(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(0.0)))
    3.0
    """
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + torch.exp(log_ratio) * weight * error)


def prior_kl(x: Tensor, gamma_1: Tensor) -> Tensor:
    """``KL(q(z_1|x) || N(0, I))`` per datum in nats, (B, *data) -> (B,) (VDM section 3.2, the prior loss)."""
    return sum_dimensions(prior_kl_by_dimension(x, gamma_1))


def prior_kl_by_dimension(x: Tensor, gamma_1: Tensor) -> Tensor:
    """`prior_kl` of each dimension, (B, *data), nats."""
    gamma = broadcast(gamma_1, x)
    log_variance = F.logsigmoid(gamma)
    # sigma^2 - log sigma^2 - 1 as expm1: near gamma_1 = 13 its terms cancel.
    return 0.5 * (torch.expm1(log_variance) - log_variance + torch.sigmoid(-gamma) * x**2)


def sde_coefficients(gamma: Tensor, gamma_prime: Tensor) -> tuple[Tensor, Tensor]:
    """``(f, g^2)`` of the forward SDE ``dz = f z dt + g dW``: ``-1/2 sigma^2 gamma'`` and ``sigma^2 gamma'``.

    From ``f = d log alpha / dt`` and ``g^2 = d sigma^2/dt - 2 f sigma^2`` (SDE eq. 5; VDM eq. 19).
    """
    g_squared = torch.sigmoid(gamma) * gamma_prime
    return -0.5 * g_squared, g_squared


COLLAPSED = 0.01
"""The least information of a latent that is of use, in nats: one that says less of its datum carries nothing."""


def information(mean: Tensor, variance: Tensor) -> float:
    """The information of draws from ``N(mean, variance)`` on which datum they are of, in nats, by all moments.

    ``1/2 sum log(1 + var(mean) / E[variance])``, over dimensions: exact where the means are Gaussian and independent,
    and zero only where the means are all the same, so it tells a latent that has collapsed.

    Args:
        mean: One for each datum, (N, *latent).
        variance: As mean.

    >>> one = torch.ones(2, 1)
    >>> information(one, one), round(information(torch.tensor([[-1.0], [1.0]]), one), 4)
    (0.0, 0.3466)
    """
    spread = mean.double().var(0, correction=0) / variance.double().mean(0)
    return float(0.5 * torch.log1p(spread).sum())
