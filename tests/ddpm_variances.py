"""The variances of DDPM-family reverse steps in alpha-bars, apart from the library."""

from __future__ import annotations

from torch import Tensor


def by_betas(name: str, prediction: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> Tensor:
    """``v_p`` as Ho et al. (section 3.2), Nichol & Dhariwal (eq. 15) and diffusers write it, with alpha-bars."""
    bar_s, bar_t = 1 / (1 + gamma_s.exp()), 1 / (1 + gamma_t.exp())
    beta = 1 - bar_t / bar_s
    tilde = (1 - bar_s) / (1 - bar_t) * beta
    v = (prediction + 1) / 2
    interpolated = (v * beta.log() + (1 - v) * tilde.log()).exp()
    return {"fixed_small": tilde, "fixed_large": beta, "learned_range": interpolated, "learned": prediction}[
        name.removesuffix("_log")
    ]
