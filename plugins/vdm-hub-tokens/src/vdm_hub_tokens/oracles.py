"""A Markov chain over values with its exact posterior as the network: every likelihood of it is known.

For tests, benchmarks and the documentation; what is measured of a trained network is checked on this one first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_hub_tokens.processes import AbsorbingProcess, TokenProcess


class MarkovChain:
    """``p(x) = p(x_1) prod p(x_l|x_{l-1})`` over K values, in float64.

    Args:
        initial: Of the first value, (K,).
        transition: Rows by the value before, (K, K); all positive.

    >>> chain = MarkovChain.random(3, seed=0)
    >>> chain.draw(2, 4, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 4])
    """

    def __init__(self, initial: Tensor, transition: Tensor) -> None:
        self.initial, self.transition = initial.double(), transition.double()

    @classmethod
    def random(cls, num_levels: int, seed: int = 0, sharpness: float = 1.5) -> MarkovChain:
        """A chain whose probabilities are a softmax of normal draws, times the sharpness."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(num_levels + 1, num_levels, generator=generator, dtype=torch.float64)
        probabilities = (sharpness * logits).softmax(-1)
        return cls(probabilities[0], probabilities[1:])

    @property
    def num_levels(self) -> int:
        """K."""
        return len(self.initial)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` of ids (B, L), nats, (B,)."""
        return self.initial.log()[x[:, 0]] + self.transition.log()[x[:, :-1], x[:, 1:]].sum(1)

    def draw(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """Ids (size, length)."""
        x = torch.multinomial(self.initial.expand(size, -1), 1, generator=generator)
        for _ in range(length - 1):
            x = torch.cat([x, torch.multinomial(self.transition[x[:, -1]], 1, generator=generator)], 1)
        return x

    def posterior(self, seen: Tensor) -> Tensor:
        """``log p(x_l = v | what is seen of all other sites)``, (B, L, K), by messages from both sides.

        Args:
            seen: Up to a factor, the probability of what is seen of a site for each of its values, (B, L, K).
        """
        length = seen.shape[1]
        left = [self.initial.expand(len(seen), -1)]
        right = [torch.ones_like(seen[:, 0])]
        for step in range(1, length):
            message = (left[-1] * seen[:, step - 1]) @ self.transition
            left.append(message / message.sum(-1, keepdim=True))
            message = (right[-1] * seen[:, length - step]) @ self.transition.mT
            right.append(message / message.sum(-1, keepdim=True))
        return torch.log_softmax((torch.stack(left, 1) * torch.stack(right[::-1], 1)).log(), -1)


class MarkovDenoiser(nn.Module):
    """The network that knows the chain: the best there is, for either process.

    Args:
        chain: What the data are drawn from.
        process: What corrupts them.
    """

    def __init__(self, chain: MarkovChain, process: TokenProcess) -> None:
        super().__init__()
        self.chain, self.process = chain, process

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """The logits, in float64."""
        k = self.chain.num_levels
        one_hot = F.one_hot(sample.long(), k + 1).double()
        if isinstance(self.process, AbsorbingProcess):
            return (self.chain.posterior(one_hot[..., :k] + one_hot[..., k:]),)
        lost = (timestep.double() / (self.process.num_train_timesteps - 1)).reshape(-1, 1, 1)
        return (self.chain.posterior((1 - lost) * one_hot[..., :k] + lost / k),)
