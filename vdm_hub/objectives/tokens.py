"""The objective of a diffusion of tokens: its bits are counted by what a window scores."""

from __future__ import annotations

from torch import Tensor

from vdm_hub.data.conditions import Condition
from vdm_hub.data.kinds import TOKENS
from vdm_hub.diffusion.forward_process import ForwardProcess, Noise
from vdm_hub.errors import ConfigurationError
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

    Raises:
        ConfigurationError: The process is none of tokens.
    """

    network: TokenNetwork
    kind = TOKENS

    def __init__(
        self,
        network: TokenNetwork,
        process: ForwardProcess,
        transitions: int | None = None,
        condition: Condition | None = None,
        scored: int | None = None,
    ) -> None:
        check_token_process(process)
        super().__init__(network, process, transitions, condition)
        self.scored = scored

    def forward(self, batch: Batch, times: Tensor, noise: Noise) -> Bound:
        """The terms of the bound: see `VDMObjective`."""
        bound = super().forward(batch, times, noise)
        return bound if self.scored is None else Bound(bound.terms, self.scored)


def check_token_process(process: ForwardProcess) -> None:
    """Refuse a process whose network does not say K logits of each token, as one of images does not.

    Raises:
        ConfigurationError: It is such a process, or has weights of its own.
    """
    tried = (2,)
    try:
        is_of_tokens = tuple(process.output_shape(tried)) == (*tried, process.num_levels)
    except Exception:  # a plugin's process of data of another shape may raise anything
        is_of_tokens = False
    if not is_of_tokens or process.has_weights:
        why = "has weights of its own" if is_of_tokens else "does not take K logits of each token"
        raise ConfigurationError(
            f"the forward_process is a {type(process).__name__}, which {why}: give a process of tokens, such as "
            f"forward_process: {{name: absorbing, package: vdm-hub-tokens}}."
        )
