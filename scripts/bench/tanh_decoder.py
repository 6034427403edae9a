r"""What a tanh in place of the normal distribution function does to DDPM's decoder (eq. 13), in bits per dimension.

guided-diffusion's ``approx_standard_normal_cdf``, which its published figures went through, is
``(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))/2``, and no probability is taken below 1e-12. The table compares the
expected ``-log2`` of both for one pixel whose estimate is off by a normal error: its deviation, in units of the
decoder's own, stands above the columns; the decoder's, in bins, before the rows (0.94: linear betas, 0.60: squared
cosine, both 1,000 betas with the posterior's variance).

    python scripts/bench/tanh_decoder.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEVIATIONS = (0.60, 0.94)
ERRORS = (1.0, 1.05, 1.1, 1.25, 1.5)


def approximate(x: Tensor) -> Tensor:
    """The normal distribution function as guided-diffusion computes it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def excess(deviation: float, error: float) -> float:
    """Bits per dimension that the approximation adds, both integrals by the trapezoidal rule."""
    off = torch.linspace(-8 * error, 8 * error, 20_001, dtype=torch.float64)  # of the estimate, in deviations
    density = torch.exp(-0.5 * (off / error) ** 2)
    half, far = 0.5 / deviation, off.abs()  # in the lower tail, where neither term rounds to one
    exact = torch.special.log_ndtr(half - far).exp() - torch.special.log_ndtr(-half - far).exp()
    other = (approximate(off + half) - approximate(off - half)).clamp(min=1e-12)
    bits = (exact.log2() - other.log2()) * density
    return float(bits.sum() / density.sum())


def main() -> None:
    """Print the table."""
    print(f"| deviation | {' | '.join(f'{error:.2f}' for error in ERRORS)} |")
    for deviation in DEVIATIONS:
        print(f"| {deviation:.2f} bins | {' | '.join(f'{excess(deviation, error):.1e}' for error in ERRORS)} |")


if __name__ == "__main__":
    main()
