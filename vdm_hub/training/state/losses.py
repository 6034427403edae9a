"""Checks of losses and weights, so that a run which diverges stops, and no checkpoint holds what came after."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from vdm_hub.errors import NonFiniteLossError
from vdm_hub.recipes.configuration import TrainingArguments
from vdm_hub.training.parts.shards import full_tensor
from vdm_hub.training.state.checkpoints import find_checkpoint

GRADIENT_NORM = "gradient norm"
_DIVERGED = 1000.0  # a bound so many times the lowest one is no matter of which times were drawn


class LossWatch:
    """A watch that stops a run before its weights follow a loss that is not finite, impossible or exploded.

    On a GPU it looks only where the host waits anyway.

    Args:
        training: How often is logged, and what the message advises to lower.
        checkpoints: Where the last good checkpoint is.
        looks_at_once: Whether looking costs no synchronisation, as on a CPU.
    """

    def __init__(self, training: TrainingArguments, checkpoints: Path, *, looks_at_once: bool) -> None:
        self._training, self._checkpoints, self._looks_at_once = training, checkpoints, looks_at_once
        self._unchecked: list[tuple[int, dict[str, Tensor]]] = []
        self._lowest = math.inf

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """The terms of a step, (), before the optimiser takes it; the same on all processes, so all stop at once."""
        self._unchecked.append((step, terms))
        if self._looks_at_once or len(self._unchecked) >= self._training.logging_steps:
            self.check_losses()

    def check_losses(self) -> None:
        """Check the losses of the steps since the last check.

        Raises:
            NonFiniteLossError: With the step and its terms.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        values = torch.stack([torch.stack(list(terms.values())) for _, terms in unchecked]).cpu()
        for (step, terms), row in zip(unchecked, values, strict=True):
            found = dict(zip(terms, row.tolist(), strict=True))
            if (wrong := self._what_is_wrong(found)) is not None:
                named = ", ".join(f"{name} {value:.6g}" for name, value in found.items())
                raise NonFiniteLossError(
                    f"the loss of step {step} {wrong} ({named}; bits by dimension, or token). Training stopped; the "
                    f"last good checkpoint is {self._last_good()}. Resume from it with a lower learning_rate (now "
                    f"{self._training.learning_rate:g}) or max_grad_norm (now {self._training.max_grad_norm}), or "
                    f"use bf16 instead of fp16."
                )

    def _what_is_wrong(self, found: dict[str, float]) -> str | None:
        if not all(map(math.isfinite, found.values())):
            return "is not finite"
        total = sum(value for name, value in found.items() if name != GRADIENT_NORM)
        if total < 0:
            return "is negative, which no bound on discrete data is: a learned noise schedule has turned over"
        self._lowest = min(self._lowest, total)
        if total > _DIVERGED * max(self._lowest, 1e-3):
            return f"is more than {_DIVERGED:g} times the lowest one of this run, {self._lowest:.6g}"
        return None

    def check_weights(self, step: int, model: nn.Module) -> None:
        """Refuse weights that are not finite: a finite loss can still be followed by a bad update.

        Raises:
            NonFiniteLossError: Naming the parameter.
        """
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(full_tensor(parameter)).all()):
                raise NonFiniteLossError(
                    f"the weights {name} are not finite after step {step}. Training stopped, nothing was saved; the "
                    f"last good checkpoint is {self._last_good()}. Lower the learning rate "
                    f"({self._training.learning_rate:g}) or max_grad_norm."
                )

    def _last_good(self) -> Path | str:
        return find_checkpoint(self._checkpoints, "latest") or "none yet"
