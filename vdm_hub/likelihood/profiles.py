"""Where the bits of a bound lie: over time, with how much one evaluation scatters there, and over pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdm_hub.diffusion.draws import image_generator
from vdm_hub.errors import ConfigurationError
from vdm_hub.fields import whole_number
from vdm_hub.models.calls import evaluating
from vdm_hub.objectives.variational_bound import Batch, VDMObjective

_PROFILE, _PIXELS = 105, 106  # streams of draws


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


@dataclass(frozen=True)
class PixelProfile:
    """The bits over the pixels of images, and over t.

    Attributes:
        terms: By name, the bits that each pixel adds, (B, *data), float64.
        times: Of the evaluations, (B, n), float64, rising.
        over_time: The diffusion term's bits/dim per unit of time there, (B, n): their mean is the term.
    """

    terms: dict[str, Tensor]
    times: Tensor
    over_time: Tensor

    @property
    def bits(self) -> Tensor:
        """The bits of each pixel, (B, *data)."""
        return torch.stack(list(self.terms.values())).sum(0)

    @property
    def bits_per_dim(self) -> Tensor:
        """The bound of each image in bits/dim, (B,); its error is that of so many evaluations."""
        return self.bits.flatten(1).mean(1)


@torch.no_grad()
def pixel_profile(
    objective: VDMObjective, batch: Batch, evaluations: int = 64, seed: int = 0, batch_size: int = 256
) -> PixelProfile:
    """The bits of each pixel, in continuous time, at stratified times: one in each of n equal parts of [0, 1).

    Summed over pixels they estimate the bound without bias, with no control variate: what each pixel adds is that of
    the terms of VDM (arXiv 2107.00630), eq. 11 and 17, which for a Gaussian process are sums over dimensions.

    Args:
        objective: The bound of a VDM of the pixels themselves.
        batch: The images, and what the network is told of them.
        evaluations: n, of each image.
        seed: Of all draws: an image's are a function of it and the image's place in the batch.
        batch_size: Evaluations in one call of the network; it changes no figure.

    Raises:
        ConfigurationError: The bits lie on no pixel, as those of latents.

    >>> from vdm_hub import UNetVDMModel, VDMScheduler
    >>> unet = UNetVDMModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    >>> objective = VDMObjective(unet, VDMScheduler(num_levels=17).process)
    >>> profile = pixel_profile(objective, {"levels": torch.zeros(2, 1, 8, 8, dtype=torch.long)}, evaluations=4)
    >>> profile.bits.shape, profile.bits_per_dim.shape, profile.over_time.shape
    (torch.Size([2, 1, 8, 8]), torch.Size([2]), torch.Size([2, 4]))
    """
    n, levels = whole_number("evaluations", evaluations), batch["levels"]
    images = len(levels)
    generators = [[image_generator(seed, i, draw, _PIXELS) for draw in range(n)] for i in range(images)]
    offsets = [[float(torch.rand((), generator=one, dtype=torch.float64)) for one in row] for row in generators]
    times = (torch.arange(n, dtype=torch.float64) + torch.tensor(offsets, dtype=torch.float64)) / n
    sums: dict[str, Tensor] = {}
    over_time = torch.empty(images * n, dtype=torch.float64)
    rows, flat = torch.arange(images).repeat_interleave(n), [one for row in generators for one in row]
    with evaluating(objective):
        for part in torch.arange(images * n).split(whole_number("batch_size", batch_size)):
            chosen = rows[part]
            repeated = {name: value[chosen.to(value.device)] for name, value in batch.items()}
            noise = objective.draw_noise(repeated, [flat[i] for i in part.tolist()])
            terms = objective.terms_by_dimension(repeated, times.flatten()[part].float().to(levels.device), noise)
            for name, value in terms.items():
                bits = value.double().cpu() / math.log(2)
                sums.setdefault(name, torch.zeros(levels.shape, dtype=torch.float64)).index_add_(0, chosen, bits / n)
            over_time[part] = terms[objective.integrand].double().cpu().flatten(1).mean(1) / math.log(2)
    return PixelProfile(sums, times, over_time.view(images, n))


def _one_draw(objective: VDMObjective, batch: Batch, times: Tensor, key: Sequence[int]) -> Tensor:
    generators = [image_generator(*key, i, _PROFILE) for i in range(len(times))]
    return objective(batch, times, objective.draw_noise(batch, generators)).terms[objective.integrand].double().cpu()
