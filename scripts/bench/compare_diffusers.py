"""A training step on the bound against one on diffusers' DDPM objective: one network, batch, optimiser and loop.

``python scripts/bench/compare_diffusers.py`` prints a row per size of `train_step.py`. diffusers' step is that of its
``examples/unconditional_image_generation/train_unconditional.py``: images in [-1, 1], `torch.randn`, random integer
timesteps, `DDPMScheduler.add_noise`, the network, the squared error, clipping, optimiser, learning rate, EMA. It gets
this library's faster settings, too: images in memory as uint8, fused AdamW, foreach EMA. Both steps alternate in the
same process, and the median ratio of the pairs is printed: below 1, this library's step is the faster one.

What follows ``--`` is passed on as fields of the recipe, as in `train_step.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from train_step import ON_CPU, SIZES, alternate, bare_network, build_run, split, training_step

from vdm_hub import TrainingRun


def main() -> None:
    """Print the table."""
    own, fields = split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=ON_CPU, help="(default: those that fit a CPU)")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps of each kind (default: 15)")
    arguments = parser.parse_args(own)
    print(f"{'size':<24}{'diffusers':>12}{'vdm_hub':>12}{'ratio':>8}")
    for name in arguments.sizes:
        run = build_run(name, fields)
        device = run.accelerator.device
        theirs, ours, ratio = alternate(diffusers_step(run), training_step(run), arguments.pairs, device)
        print(f"{name:<24}{theirs * 1e3:>9.1f} ms{ours * 1e3:>9.1f} ms{ratio:>8.3f}", flush=True)


def diffusers_step(run: TrainingRun) -> Callable[[], object]:
    """The body of the loop of diffusers' example, on a copy of the run's network."""
    training, accelerator, network = run.training, run.accelerator, bare_network(run)
    device = accelerator.device
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        weight_decay=training.adam_weight_decay,
        eps=training.adam_epsilon,
        fused=True,
    )
    model, optimizer = accelerator.prepare(network, optimizer)
    ema = EMAModel(network.parameters(), decay=training.ema_max_decay, use_ema_warmup=True, foreach=True)
    ema.to(device)
    lr_scheduler = get_scheduler(
        training.lr_scheduler, optimizer, num_warmup_steps=training.lr_warmup_steps, num_training_steps=100_000
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    batches = run.source.batches()
    top = run.data.train.num_levels - 1

    def step() -> None:
        model.train()
        levels = next(batches)["levels"].to(device, non_blocking=True)
        images = levels.float() * (2 / top) - 1
        noise = torch.randn(images.shape, device=device)
        timesteps = torch.randint(0, 1000, (images.shape[0],), device=device).long()
        noisy = scheduler.add_noise(images, noise, timesteps)
        with accelerator.accumulate(model):
            output = model(noisy, timesteps, return_dict=False)[0]
            accelerator.backward(F.mse_loss(output.float(), noise.float()))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(network.parameters())

    return step


if __name__ == "__main__":
    main()
