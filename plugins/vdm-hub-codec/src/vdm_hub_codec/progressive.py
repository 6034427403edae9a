r"""What is known of some data after each latent of their file, the noisiest first: rate, distortion and pictures.

A file is read from its end: z_T, z_(T-1), .., x. After z_t the coder has given out some bits, of which those that drew
the latents above z_t are back already; those that drew z_t itself come back later, and of them
``-log2 q(z_t|x)`` is no news of x. So the rate is what was given out, plus ``log2 q(z_t|x)``: the sum of the bound's
terms from T down to t, on these draws (Ho et al., arXiv 2006.11239, section 4.3). The estimate of the data is the
network's at z_t. As later batches hold bits of earlier ones, it is of the last batch, which is decoded first.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vdm_hub import ConfigurationError, LikelihoodPipeline, VDMPipeline, alpha, images_from_levels, sigma
from vdm_hub_codec.chains import CLASS_LABELS, Chain
from vdm_hub_codec.codec import check_model
from vdm_hub_codec.container import Container
from vdm_hub_codec.decisions import Decisions, Integers
from vdm_hub_codec.distributions import Normal
from vdm_hub_codec.images import chain_of, coder_of
from vdm_hub_codec.spacing import times_of

_MOST = 8
"""Images."""


@dataclass(frozen=True)
class Progress:
    """What is known after some latents, the noisiest first; the last row is the data themselves.

    Attributes:
        bits_per_dim: What was read of the images until there, (R,).
        error: The root of the mean squared error of the estimates, in levels, (R,).
        estimates: Levels, (R, B, C, H, W).
    """

    bits_per_dim: list[float]
    error: list[float]
    estimates: Tensor

    def save(self, path: Path, num_levels: int) -> None:
        """Draw the first image after each latent, and distortion against rate, as a PNG."""
        rows = len(self.bits_per_dim)
        figure = Figure(figsize=(max(6.0, 0.8 * rows), 4.5), layout="constrained")
        subfigures: Any = figure.subfigures(2, 1, height_ratios=(1, 2))
        every = subfigures[0].subplots(1, rows, squeeze=False)[0]
        shown = images_from_levels(self.estimates[:, 0], num_levels, "np")
        for axes, image, bits in zip(every, shown, self.bits_per_dim, strict=True):
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{bits:.2f}", fontsize=8)
            axes.axis("off")
        axes = subfigures[1].subplots()
        axes.plot(self.bits_per_dim, self.error, marker="o")
        axes.set_xlabel(f"bits/dim read, of {self.estimates.shape[1]} images")
        axes.set_ylabel("error of the estimate, levels")
        figure.savefig(path, format="png", dpi=150)


def progress_of(pipeline: LikelihoodPipeline, content: bytes, columns: int = 12, batch_size: int = 64) -> Progress:
    """What is known of a file's last batch after latents evenly apart, and of eight of its images the estimates.

    Args:
        pipeline: The model that made the file: a VDM of one gamma a time.
        content: The file.
        columns: After how many latents.
        batch_size: As of `decode`.

    Raises:
        ConfigurationError: The model is another.
        DataError: As `decode`.
    """
    container = Container.from_bytes(content)
    check_model(pipeline, container)
    if type(pipeline) is not VDMPipeline or pipeline.process.scalar_gamma is None or not container.blocks[-1].batches:
        raise ConfigurationError(
            "only a file of a VDM with one gamma a time has estimates on the way, and only of images that are not "
            "there as they are: leave the picture out."
        )
    chain = chain_of(pipeline, container)
    coder, block = coder_of(pipeline, chain, container.coder, batch_size), container.blocks[-1]
    stack, labels = coder.opened(block)
    before, seen = stack.bits, dict[int, tuple[Integers, int]]()
    kept = set(np.linspace(1, chain.depth, columns).round().astype(int).tolist())

    def observe(t: int, numbers: Integers) -> None:
        if t in kept:
            seen[t] = numbers, before - stack.bits

    images = np.arange(block.count - block.batches[-1], block.count)
    told = coder.told(block.count, labels)[images]
    levels = coder.pop_batch(stack, images, told, Decisions.of(block.notes), observe)
    data, known = torch.from_numpy(levels).reshape(-1, *chain.shapes[0]), _Estimates.of(pipeline, container)
    rates = [given_out + known.log2_marginal(chain, t, data, numbers) for t, (numbers, given_out) in seen.items()]
    shown = [known.estimate(t, chain.value(numbers[:_MOST], t), told[:_MOST]) for t, (numbers, _) in seen.items()]
    estimates = torch.stack([*shown, data[:_MOST].double()])
    error = ((estimates - data[:_MOST]) ** 2).flatten(1).mean(1).sqrt()
    read = [one / levels.size for one in (*rates, before - stack.bits)]
    return Progress(read, error.tolist(), estimates.round().long())


@dataclass(frozen=True)
class _Estimates:
    """The marginals and the estimates at the latents of a VDM's chain, in float64."""

    objective: Any
    gammas: Tensor

    @classmethod
    def of(cls, pipeline: VDMPipeline, container: Container) -> _Estimates:
        transitions, spacing = container.coder["transitions"], container.coder.get("spacing")
        objective = copy.deepcopy(pipeline.objective(transitions)).double().eval()
        times = times_of(bytes.fromhex(spacing) if spacing else bytes([1]), transitions)
        schedule: Any = objective.process.scalar_gamma
        return cls(objective, schedule(torch.tensor(times, dtype=torch.float64)).detach().double())

    def log2_marginal(self, chain: Chain, t: int, data: Tensor, numbers: Integers) -> float:
        """``log2 q(z_t|x)`` of the bins that were drawn, summed over the data."""
        x, gamma = self.objective.process.scaling.encode(data, torch.float64), self.gammas[t - 1]
        drawn = Normal(
            (alpha(gamma) * x).flatten(1).numpy(), np.full(numbers.shape, float(sigma(gamma))), chain.width(t)
        )
        return float(drawn.log2(numbers).sum()) + numbers.size * math.log2(chain.width(t))

    @torch.no_grad()
    def estimate(self, t: int, z: Tensor, told: Integers) -> Tensor:
        """The network's estimate of the data at z_t, in levels, told the classes of these."""
        process, gamma = self.objective.process, self.gammas[t - 1].expand(len(z))
        batch = {"levels": z} | ({CLASS_LABELS: torch.from_numpy(told)} if self.objective.condition else {})
        bound, network = process.bind(None, {})[1], self.objective.network_on(batch)
        noise = bound.predict_noise(network, z, gamma)[0]
        at = gamma.reshape(-1, *(1,) * (z.ndim - 1))
        first, second = process.scaling.encode(torch.tensor([0, 1]), torch.float64)
        x: Tensor = (z - sigma(at) * noise) / alpha(at)
        return ((x - first) / (second - first)).clamp(0, process.num_levels - 1)
