"""What a step of sampling costs over a bare forward of the network, in one run.

``python scripts/bench/sample_step.py`` prints a row per size of `train_step.py`. The bare forward and the pipeline's
own loop alternate, and the median ratio of the pairs is printed.
"""

from __future__ import annotations

import argparse

import torch
from train_step import ON_CPU, SIZES, alternate, build_run

from vdm_hub import VDMPipeline, VDMScheduler

STEPS, BATCH = 10, 64


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=ON_CPU, help="(default: those that fit a CPU)")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of each kind (default: 15)")
    arguments = parser.parse_args()
    print(f"{'size':<24}{'bare forward':>14}{'sampling step':>15}{'ratio':>8}")
    for name in arguments.sizes:
        bare, step, ratio = measure(name, arguments.pairs)
        print(f"{name:<24}{bare * 1e3:>11.1f} ms{step * 1e3:>12.1f} ms{ratio:>8.3f}", flush=True)


def measure(size: str, pairs: int) -> tuple[float, float, float]:
    """Median seconds of a forward and of a step of the pipeline, and their ratio."""
    run = build_run(size, [])
    network, device = run.model.network.eval(), run.accelerator.device
    pipeline = VDMPipeline(network, VDMScheduler(**run.model.process.fields()))
    pipeline.set_progress_bar_config(disable=True)
    sample = torch.randn(BATCH, *run.data.shape, device=device)
    timestep = torch.rand(BATCH, device=device) * 999

    def forward() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                network(sample, timestep, return_dict=False)

    bare, step, ratio = alternate(
        forward, lambda: pipeline(BATCH, num_inference_steps=STEPS, output_type="pt"), pairs, device
    )
    return bare / STEPS, step / STEPS, ratio


if __name__ == "__main__":
    main()
