"""Where on a noise schedule the gradient of the bound is noisy, and the schedule whose times fall there more often.

``python scripts/bench/gradient_noise.py PIPELINE --dataset_name digits`` takes the gradient of the diffusion term
with respect to the weights on small batches of training images, each batch at one time, and prints the standard
deviation of one image's gradient at each gamma. A mean over draws has the least variance where their density is
proportional to that deviation; the table at the end is the `tabulated` schedule with that density, between the same
endpoints. In continuous time it has the same bound (VDM, section 5): only the training signal's variance changes.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch

from vdm_hub import VDMObjective, VDMPipeline, load_split


def main() -> None:
    """Print the table, and the schedule as a recipe takes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a trained pipeline")
    parser.add_argument("--dataset_name", required=True, help="'digits', a folder, or a Hub dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--bins", type=int, default=14, help="of time (default: 14)")
    parser.add_argument("--batches", type=int, default=16, help="for each bin (default: 16)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--least", type=float, default=0.1, help="density, of the largest: early weights need it")
    parser.add_argument("--knots", type=int, default=13, help="of the new schedule (default: 13)")
    arguments = parser.parse_args()
    pipeline = VDMPipeline.from_pretrained(arguments.pipeline)
    levels = load_split(arguments.dataset_name, arguments.split, num_levels=pipeline.process.num_levels).levels
    objective = pipeline.objective()
    edges = torch.linspace(0, 1, arguments.bins + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    with torch.no_grad():
        gammas, between = (pipeline.process.schedule(times).tolist() for times in (edges, middles))
    deviations = []
    for time, gamma in zip(middles.tolist(), between, strict=True):
        deviations.append(deviation(objective, levels, time, arguments.batches, arguments.batch_size))
        print(f"gamma {gamma:7.2f}  deviation of an image's gradient {deviations[-1]:10.3f} bits/dim", flush=True)
    density = np.maximum(deviations, arguments.least * max(deviations))
    share = np.concatenate([[0.0], np.cumsum(density)]) / density.sum()
    knots = np.interp(np.linspace(0, 1, arguments.knots), share, gammas)
    factor = np.mean(deviations) ** 2 / np.mean(np.square(deviations))
    print(f"variance of the gradient at that density: {factor:.2f} of this schedule's")
    print("gammas:", [round(float(knot), 2) for knot in knots])


def deviation(objective: VDMObjective, levels: torch.Tensor, time: float, batches: int, size: int) -> float:
    """Root of the trace of the covariance of one image's gradient, at one time."""
    weights = [weight for weight in objective.network.parameters() if weight.requires_grad]
    generator, gradients = torch.Generator().manual_seed(0), []
    for _ in range(batches):
        batch = {"levels": levels[torch.randint(len(levels), (size,), generator=generator)]}
        bound = objective(batch, torch.full((size,), time), objective.draw_noise(batch, generator))
        loss = bound.bits_per_dim()["diffusion"].mean()
        gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]))
    return math.sqrt(size * float(torch.stack(gradients).var(0).sum()))


if __name__ == "__main__":
    main()
