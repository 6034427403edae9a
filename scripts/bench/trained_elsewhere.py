"""Networks that flow matching and EDM's own recipe trained, no bound involved, measured as the VDMs that they are.

``python scripts/bench/trained_elsewhere.py`` trains the digits recipe's network by either loss, in a loop
that knows nothing of gamma, and prints the bound on the test split. On two idle cores each takes about a minute and a
half.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler, evaluate, load_split, parse_recipe

SIGMA_DATA = 0.7
Loss = Callable[[torch.nn.Module, Tensor], Tensor]


def flow_matching(unet: torch.nn.Module, x: Tensor) -> Tensor:
    """``|F - (eps - x)|^2`` at a uniform u (Liu et al., arXiv 2209.03003, eq. 1)."""
    eps, u = torch.randn_like(x), torch.rand(len(x), 1, 1, 1)
    output = unet((1 - u) * x + u * eps, 1000 * u.flatten(), return_dict=False)[0]
    return (output - (eps - x)).square().mean()


def edm(unet: torch.nn.Module, x: Tensor) -> Tensor:
    """``|F - (x - c_skip y)/c_out|^2`` at ``ln s ~ N(-1.2, 1.2^2)`` (Karras et al., arXiv 2206.00364, eq. 8)."""
    log_s = 1.2 * torch.randn(len(x), 1, 1, 1) - 1.2
    s, sd = log_s.exp(), SIGMA_DATA
    norm, y = (s**2 + sd**2).sqrt(), x + s * torch.randn_like(x)
    output = unet(y / norm, log_s.flatten() / 4, return_dict=False)[0]
    return (output - (x - sd**2 / norm**2 * y) * norm / (s * sd)).square().mean()


FORMS: dict[str, tuple[Loss, dict[str, object]]] = {
    "flow matching": (flow_matching, {"prediction_type": "flow_prediction", "conditioning": "flow_time"}),
    "EDM": (
        edm,
        {"prediction_type": {"name": "edm", "config": {"sigma_data": SIGMA_DATA}}, "conditioning": "edm_noise"},
    ),
}


def main() -> None:
    """Print a row per loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--replicates", type=int, default=32)
    arguments = parser.parse_args()
    recipe = parse_recipe(["digits"])
    images, levels = load_split("digits", "test", num_levels=17), load_split("digits", "train", num_levels=17).levels
    print("| trained by | bits/dim | standard error |\n| --- | --- | --- |")
    for name, (loss, fields) in FORMS.items():
        scheduler = VDMScheduler(noise_schedule=recipe.diffusion.noise_schedule, num_levels=17, **fields)
        torch.manual_seed(0)
        unet = UNetVDMModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1} | recipe.model.unet_config)
        fit(unet, loss, scheduler.process.encode(levels), arguments.steps)
        report = evaluate(VDMPipeline(unet, scheduler), images, replicates=arguments.replicates, progress=False)
        print(f"| {name} | {report.bits_per_dim:.4f} | {report.standard_error:.4f} |", flush=True)


def fit(unet: torch.nn.Module, loss: Loss, x: Tensor, steps: int) -> None:
    """The digits recipe's optimisation: AdamW, a cosine, an average of the weights."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=min(100 / steps, 0.5))
    average = EMAModel(unet.parameters(), decay=0.99, use_ema_warmup=True, power=0.75)
    for _ in range(steps):
        loss(unet, x[torch.randint(len(x), (64,))]).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        average.step(unet.parameters())
    average.copy_to(unet.parameters())


if __name__ == "__main__":
    main()
