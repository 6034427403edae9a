"""A batch of texts as every likelihood of a masked model reads it: some sites masked, the cost of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_hub import Batch, ConfigurationError, DataError, Objective, VDMObjective
from vdm_hub_tokens.processes import AbsorbingProcess


class MaskedTexts:
    """The texts of a batch, and what the model says of their masked sites.

    Sites are counted in one row a text, (B, L). Those that are given are never masked.

    Args:
        objective: The model: a `VDMObjective` of an `AbsorbingProcess`.
        batch: See `vdm_hub.VDMObjective.forward`.

    Raises:
        ConfigurationError: The model is another.
        DataError: The batch holds ids that are none, or marks of another shape.

    Attributes:
        process: The model's.
        x: The ids, int64, (B, L).
        scored: Whether a site is not given, (B, L).
        counts: How many of a text are not, (B,).
    """

    def __init__(self, objective: VDMObjective, batch: Batch) -> None:
        self.process = absorbing_of(objective)
        self.objective, self.batch = objective, batch
        levels, given = batch["levels"], batch.get("given")
        self.x = levels.long().flatten(1)
        if levels.device.type == "cpu" and levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < self.k:
            raise DataError(
                f"the batch holds ids {int(levels.min())} to {int(levels.max())}, and the process knows 0 to "
                f"{self.k - 1}: give its num_levels, the tokenizer's values without the mask."
            )
        if given is not None and (given.dtype != torch.bool or given.shape != levels.shape):
            raise DataError(
                f"'given' is {given.dtype} of shape {tuple(given.shape)}: give a bool for each of the ids, "
                f"{tuple(levels.shape)}."
            )
        self.scored = torch.ones_like(self.x, dtype=torch.bool) if given is None else ~given.flatten(1)
        self.counts = self.scored.sum(1)

    @property
    def k(self) -> int:
        """K, the values without the mask."""
        return self.process.num_levels

    def rows(self, rows: Tensor) -> MaskedTexts:
        """Some of the texts, by a mask or by indices, which may repeat them."""
        return MaskedTexts(self.objective, {name: value[rows.to(value.device)] for name, value in self.batch.items()})

    def draw_order(self, generators: list[torch.Generator]) -> Tensor:
        """The uniforms of a marginal draw, (B, L): sites are masked in their order, those that are given last."""
        shape, device = tuple(self.batch["levels"].shape), self.x.device
        uniforms = self.process.draw_noise(shape, generators, device)["marginal"].flatten(1)
        return torch.where(self.scored, uniforms, torch.inf)

    def log_probs(self, masked: Tensor, lost: Tensor) -> Tensor:
        """``log p(x_l|open sites)`` of all values, (B, L, K), float64.

        Args:
            masked: Which sites are, (B, L).
            lost: ``1 - alpha`` at the time that the network is told, (B,).
        """
        levels = self.batch["levels"]
        z = torch.where(masked, self.process.mask_id, self.x).reshape(levels.shape)
        timestep = (lost.double() * (self.process.num_train_timesteps - 1)).to(self._precision)
        logits = self.objective.network_on(self.batch)(z, timestep.to(levels.device))
        with torch.autocast(levels.device.type, enabled=False):
            return torch.log_softmax(logits.double(), -1).reshape(*self.x.shape, self.k)

    def costs(self, masked: Tensor, lost: Tensor) -> Tensor:
        """``-log p(x_l|open sites)`` of the masked sites in nats, zero for the others, (B, L), float64."""
        log_probs = self.log_probs(masked, lost)
        each = F.nll_loss(log_probs.flatten(0, 1), self.x.flatten(), reduction="none").reshape(self.x.shape)
        return torch.where(masked, each, 0.0)

    @property
    def _precision(self) -> torch.dtype:
        """What the network computes in, as far as a timestep must know."""
        double = any(one.dtype == torch.float64 for one in self.objective.network.parameters())
        return torch.float64 if double else torch.float32


def ranks_of(uniforms: Tensor) -> Tensor:
    """The place of each in its row, from 0 for the least, (B, L); ties by place.

    >>> ranks_of(torch.tensor([[0.3, 0.1, 0.2]])).tolist()
    [[2, 0, 1]]
    """
    return uniforms.argsort(dim=1, stable=True).argsort(dim=1)


def absorbing_of(objective: Objective) -> AbsorbingProcess:
    """The process of a masked model.

    Raises:
        ConfigurationError: The model is another, or remasks.
    """
    process = objective.process if isinstance(objective, VDMObjective) else None
    if not isinstance(process, AbsorbingProcess):
        raise ConfigurationError(
            f"this likelihood is that of masked diffusion, and the model's process is "
            f"{type(process or objective).__name__}: ask for method 'bound', or measure a model of 'absorbing'."
        )
    if process.remasking:
        raise ConfigurationError(
            f"remasking is {process.remasking:g}, and this likelihood is of a model whose sites stay open: measure "
            f"the process with remasking 0, or ask for method 'bound' with a number of transitions."
        )
    return process
