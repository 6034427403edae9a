"""A noise schedule of your own: `forward` is gamma(t) = -log SNR(t), `to_config` gives the constructor's arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vdm_hub import ConfigurationError, NoiseSchedule, check_endpoints


class BowedSchedule(NoiseSchedule):
    """``gamma(t) = gamma_min + (gamma_max - gamma_min) (t + bow t (1 - t))``: linear log-SNR, bowed.

    Args:
        bow: How far the middle lies from the straight line; between -1 and 1.
        gamma_min: gamma(0), minus the log-SNR of the least noisy latent.
        gamma_max: gamma(1), that of the noisiest.

    >>> BowedSchedule(bow=0.5).endpoints()
    (-13.3, 5.0)
    """

    def __init__(self, bow: float = 0.5, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        check_endpoints("bowed", gamma_min, gamma_max)
        if not -1 < bow < 1:
            raise ConfigurationError(
                f"the schedule 'bowed' got bow={bow}: it increases only for bow between -1 and 1."
            )
        self.bow, self.gamma_min, self.gamma_max = bow, gamma_min, gamma_max

    def forward(self, t: Tensor) -> Tensor:
        """Gamma at times t of shape (B,)."""
        bowed = t + self.bow * t * (1 - t)
        return self.gamma_min * (1 - bowed) + self.gamma_max * bowed

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"bow": self.bow, "gamma_min": self.gamma_min, "gamma_max": self.gamma_max}
