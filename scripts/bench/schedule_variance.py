"""The variance of the bound's estimator under four noise schedules with the same endpoints, on real images.

``python scripts/bench/schedule_variance.py FOLDER`` trains one small network per schedule and seed, on the images in
FOLDER (``datasets`` reads it: Fashion-MNIST, MNIST, ...), and prints, for the held-out images, the bound and the
variance of its diffusion term when each image gets one independent uniform time and one noise: the variance within an
image, averaged over the images. Every schedule runs from the same gamma_min to the same gamma_max: ``cosine`` and
``linear beta`` (Song et al. 2021, beta from 0.1 to 20) are cut in t there, and ``learned`` keeps its endpoints and
learns its shape by that very variance (VDM App. I.2).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from vdm_hub import UNetVDMModel, VDMObjective, VDMScheduler, load_split, stratified_times

GAMMA_MIN, GAMMA_MAX = -13.3, 5.0
BETA_MIN, BETA_MAX = 0.1, 20.0
KNOTS = 2001


def linear_beta() -> dict[str, object]:
    """``gamma(t) = log expm1(beta_min t + (beta_max - beta_min) t^2 / 2)``, cut where gamma is GAMMA_MIN and _MAX."""

    def time_at(gamma: float) -> float:
        integral, slope = math.log1p(math.exp(gamma)), BETA_MAX - BETA_MIN
        return (math.sqrt(BETA_MIN**2 + 2 * slope * integral) - BETA_MIN) / slope

    t = torch.linspace(time_at(GAMMA_MIN), time_at(GAMMA_MAX), KNOTS, dtype=torch.float64)
    gammas = torch.log(torch.expm1(BETA_MIN * t + (BETA_MAX - BETA_MIN) * t**2 / 2))
    gammas[0], gammas[-1] = GAMMA_MIN, GAMMA_MAX
    return {"name": "tabulated", "config": {"gammas": gammas.tolist()}}


def schedules() -> dict[str, dict[str, object]]:
    """The four, in the order of VDM's figure 4b."""
    ends = {"gamma_min": GAMMA_MIN, "gamma_max": GAMMA_MAX}
    return {
        "learned": {"name": "learned_monotone", "config": ends | {"hidden_features": 256}},
        "linear log-SNR": {"name": "linear", "config": ends},
        "linear beta": linear_beta(),
        "cosine": {"name": "cosine", "config": ends},
    }


def main() -> None:
    """Train, measure, print a table, and write every figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the images, with splits train and test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of each network")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--images", type=int, default=512, help="held-out images")
    parser.add_argument("--replicates", type=int, default=64, help="independent estimates of each image")
    parser.add_argument("--output", type=Path, help="a JSON file, extended after each network")
    arguments = parser.parse_args()
    train = load_split(arguments.folder, "train").levels
    test = load_split(arguments.folder, f"test[:{arguments.images}]").levels
    rows: list[dict[str, object]] = []
    for seed in arguments.seeds:
        for name, schedule in schedules().items():
            started = time.perf_counter()
            objective = fit(train, schedule, seed, arguments)
            row = {"schedule": name, "seed": seed} | measure(objective, test, arguments.replicates, seed)
            rows.append(row | {"seconds": time.perf_counter() - started})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def fit(train: Tensor, schedule: dict[str, object], seed: int, arguments: argparse.Namespace) -> VDMObjective:
    """Train one network under one schedule; the same images, times' offsets and noise for all schedules of a seed."""
    torch.manual_seed(seed)
    unet = UNetVDMModel(
        sample_size=tuple(train.shape[2:]),
        in_channels=train.shape[1],
        out_channels=train.shape[1],
        block_out_channels=tuple(arguments.channels),
        layers_per_block=1,
        norm_num_groups=8,
        dropout=0.0,
    )
    objective = VDMObjective(unet, VDMScheduler(noise_schedule=schedule).build_process())
    learns = []
    for name, parameter in objective.process.named_parameters():
        parameter.requires_grad_(not name.endswith(("gamma_min", "gamma_max")))
        learns += [parameter] if parameter.requires_grad else []
    optimizer = torch.optim.AdamW(
        [{"params": list(unet.parameters()), "lr": 1e-3}, {"params": learns, "lr": 1e-2, "weight_decay": 0.0}]
        if learns
        else unet.parameters(),
        lr=1e-3,
        betas=(0.9, 0.99),
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(arguments.steps):
        chosen = torch.randint(len(train), (arguments.batch_size,), generator=generator)
        batch = {"levels": train[chosen]}
        times = stratified_times(arguments.batch_size, float(torch.rand((), generator=generator)))
        objective(batch, times, objective.draw_noise(batch, generator)).loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    return objective.eval()


@torch.no_grad()
def measure(objective: VDMObjective, images: Tensor, replicates: int, seed: int) -> dict[str, float]:
    """Bits/dim, and the variance within an image of one uniform time and one noise, in (bits/dim)^2."""
    generator = torch.Generator().manual_seed(1000 + seed)
    totals, diffusion = [], []
    for _ in range(replicates):
        parts = []
        for start in range(0, len(images), 256):
            batch = {"levels": images[start : start + 256]}
            times = torch.rand(len(batch["levels"]), generator=generator, dtype=torch.float64).float()
            bound = objective(batch, times, objective.draw_noise(batch, generator))
            parts.append({name: value.double() for name, value in bound.bits_per_dim().items()})
        diffusion.append(torch.cat([part["diffusion"] for part in parts]))
        totals.append(torch.cat([torch.stack(list(part.values())).sum(0) for part in parts]))
    each = torch.stack(diffusion)
    return {
        "bits_per_dim": float(torch.stack(totals).mean()),
        "variance": float(each.var(0).mean()),
        "variance_standard_error": float(each.var(0).std() / math.sqrt(each.shape[1])),
    }


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: a row per schedule, over the seeds."""
    lines = ["| schedule | variance, (bits/dim)^2, per seed | mean | bits/dim |", "| --- | --- | --- | --- |"]
    for name in schedules():
        own = [row for row in rows if row["schedule"] == name]
        variances = [float(row["variance"]) for row in own]  # type: ignore[arg-type]
        bits = statistics.mean(float(row["bits_per_dim"]) for row in own)  # type: ignore[arg-type]
        each = ", ".join(f"{value:.3f}" for value in variances)
        lines.append(f"| {name} | {each} | {statistics.mean(variances):.3f} | {bits:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
