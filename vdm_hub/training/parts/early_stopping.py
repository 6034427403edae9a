"""Early stopping on held-out bits/dim: the best weights are kept, and are what the run publishes."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


class EarlyStopping:
    """The rule that ends a run whose held-out bits/dim have not fallen for ``patience`` measurements.

    Args:
        patience: Measurements without improvement that end the run; ``None`` never ends it, and keeps no weights.
        threshold: By how many bits/dim a measurement must lie below the best one to be an improvement.

    >>> stopping = EarlyStopping(patience=2, threshold=0.01)
    >>> [stopping.look(bits, step) for step, bits in enumerate([3.0, 2.5, 2.495, 2.6])]
    [True, True, False, False]
    >>> stopping.is_over, stopping.best, stopping.best_step
    (True, 2.5, 1)
    """

    def __init__(self, patience: int | None, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold
        self.best, self.best_step, self.waited = math.inf, 0, 0
        self.weights: dict[str, Tensor] = {}

    def would_improve(self, bits_per_dim: float) -> bool:
        """Whether a measurement is an improvement, so that its weights are to be kept."""
        return bits_per_dim < self.best - self.threshold

    def look(self, bits_per_dim: float, step: int) -> bool:
        """Take note of a measurement, and say whether it is an improvement."""
        if self.would_improve(bits_per_dim):
            self.best, self.best_step, self.waited = bits_per_dim, step, 0
            return True
        self.waited += 1
        return False

    def keep(self, model: nn.Module) -> None:
        """Remember the weights of the best measurement."""
        if self.patience is not None:
            self.weights = {name: value.detach().cpu().clone() for name, value in model.named_parameters()}

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """The state of early stopping in a checkpoint, beside the weights."""
        best = None if math.isinf(self.best) else self.best  # JSON has no infinity
        return {"best": best, "best_step": self.best_step, "waited": self.waited}

    def load(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's `state`."""
        self.best = math.inf if state["best"] is None else state["best"]
        self.best_step, self.waited, self.weights = state["best_step"], state["waited"], weights
