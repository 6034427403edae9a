"""The objective of a diffusion of tokens: its bits are counted by what a window scores."""

from __future__ import annotations

from torch import Tensor

from vdm_hub.data.conditions import Condition
from vdm_hub.diffusion.forward_process import ForwardProcess, Noise
from vdm_hub.models.token_networks import TokenNetwork
from vdm_hub.objectives.variational_bound import Batch, Bound, VDMObjective


class TokenObjective(VDMObjective):
    """The bound of a diffusion of tokens.

    Args:
        network: The network.
        process: Of K values, one for each token but the mask.
        transitions: T, or ``None`` for continuous time.
        condition: What the network is told of each window.
        scored: How many tokens a window scores, where some are given as its context; all where not given. Bits are
            counted by them, by the same number in every batch.
    """

    network: TokenNetwork

    def __init__(
        self,
        network: TokenNetwork,
        process: ForwardProcess,
        transitions: int | None = None,
        condition: Condition | None = None,
        scored: int | None = None,
    ) -> None:
        super().__init__(network, process, transitions, condition)
        self.scored = scored

    def forward(self, batch: Batch, times: Tensor, noise: Noise) -> Bound:
        """The terms of the bound: see `VDMObjective`."""
        bound = super().forward(batch, times, noise)
        return bound if self.scored is None else Bound(bound.terms, self.scored)
