"""The profile of a bound over time: each transition's bits, and how much one evaluation of it scatters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import image_generator
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.calls import evaluating
from vdm_hub.objectives.variational_bound import Batch, VDMObjective

_PROFILE = 105  # a stream of draws


@dataclass(frozen=True)
class TransitionProfile:
    """The bits over t, as data of a plot; all (T,), float64.

    Attributes:
        times: The later end of each transition.
        bits_per_dim: The term per unit of time, so that its mean over t is the term itself.
        spread: The standard deviation of one evaluation at that t within an image, root mean square over images.
    """

    times: Tensor
    bits_per_dim: Tensor
    spread: Tensor


@torch.no_grad()
def transition_profile(objective: VDMObjective, batch: Batch, draws: int = 8, seed: int = 0) -> TransitionProfile:
    """The bits over t with their spread, for either form of the bound, from T draws evaluations of each image.

    Args:
        objective: `VDMObjective` or `ConsistencyObjective`, with a number of transitions.
        batch: The images.
        draws: Of each image at each transition; at least 2.
        seed: Of all draws.

    Raises:
        ConfigurationError: The objective is in continuous time, or the draws are too few for a spread.

    >>> from vdm_hub import UNetVDMModel, VDMScheduler
    >>> unet = UNetVDMModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    >>> objective = VDMObjective(unet, VDMScheduler(num_levels=17).process, transitions=3)
    >>> profile = transition_profile(objective, {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long)}, draws=2)
    >>> profile.bits_per_dim.shape
    torch.Size([3])
    """
    transitions = objective.transitions
    if transitions is None or draws < 2:
        raise ConfigurationError(
            f"bits over transitions were asked for with transitions={transitions} and draws={draws}: give a number of "
            f"transitions, and at least 2 draws."
        )
    levels = batch["levels"]
    means, spreads = [], []
    with evaluating(objective):
        for i in range(transitions):
            times = torch.full((len(levels),), (i + 0.5) / transitions, device=levels.device)
            values = [_one_draw(objective, batch, times, (seed, i, draw)) for draw in range(draws)]
            each = torch.stack(values) / (levels[0].numel() * math.log(2))
            means.append(each.mean())
            spreads.append(each.var(0).mean().sqrt())
    ends = torch.arange(1, transitions + 1, dtype=torch.float64) / transitions
    return TransitionProfile(ends, torch.stack(means), torch.stack(spreads))


def _one_draw(objective: VDMObjective, batch: Batch, times: Tensor, key: Sequence[int]) -> Tensor:
    generators = [image_generator(*key, i, _PROFILE) for i in range(len(times))]
    return objective(batch, times, objective.draw_noise(batch, generators)).terms[objective.integrand].double().cpu()
