"""Time of a training step over the bare network's, and of a sampling step over a bare forward, in one run.

``python scripts/bench/steps.py`` prints a row per network. The bare network does forward, backward (of a sum of
squares) and the optimiser step; the training step is the library's own `Run.optimise`, with data, times, noise,
decoder, clipping, EMA and learning rate. The bare step and the library's alternate, and the ratio of each pair is
taken, so that a machine whose speed drifts gives the same answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from vdm_hub import VDMPipeline, VDMScheduler
from vdm_hub.data.images import ImageLevels
from vdm_hub.data.loading import Data
from vdm_hub.training.arguments import Configuration, parse
from vdm_hub.training.loop import Run, build_accelerator
from vdm_hub.training.outputs import OutputFolder

SIZES = {
    "digits recipe": {},
    "32x32 RGB, 32 channels, 4+5 blocks": {
        "shape": (3, 32, 32),
        "num_levels": 256,
        "train_batch_size": 16,
        "unet": {
            "block_out_channels": [32],
            "layers_per_block": 4,
            "norm_num_groups": 8,
            "mid_block_attention": False,
        },
    },
    "32x32 RGB, 32 and 64 channels, 2+3 blocks each": {
        "shape": (3, 32, 32),
        "num_levels": 256,
        "train_batch_size": 16,
        "unet": {"block_out_channels": [32, 64], "layers_per_block": 2, "norm_num_groups": 8},
    },
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps of each kind (default: 15)")
    pairs = parser.parse_args().pairs
    print(f"{'network':<42}{'bare train':>12}{'ratio':>8}{'bare forward':>14}{'ratio':>8}")
    for name, size in SIZES.items():
        run = _run(dict(size))
        train, train_ratio = _pairs(_bare_step(run), lambda run=run: run.optimise([run.source.batch(run.step)]), pairs)
        forward, sample_ratio = _sampling(run, pairs)
        print(f"{name:<42}{train * 1e3:>9.1f} ms{train_ratio:>8.3f}{forward * 1e3:>11.1f} ms{sample_ratio:>8.3f}")


def _run(size: dict) -> Run:
    shape, levels = size.pop("shape", (1, 8, 8)), size.pop("num_levels", 17)
    arguments = ["digits", "--output_dir", tempfile.mkdtemp(), "--report_to", "none", "--num_levels", str(levels)]
    if levels != 17:
        arguments += ["--noise_schedule", "linear", "--max_train_steps", "100000"]
    for key, value in size.items():
        arguments += [f"--{key}", json.dumps(value)]
    configuration: Configuration = parse(arguments)
    images = torch.randint(0, levels, (256, *shape), dtype=torch.uint8)
    data = Data(ImageLevels(images, shape, levels), None, None)
    folder = OutputFolder(configuration)
    return Run(configuration, build_accelerator(configuration, folder), data, folder)


def _bare_step(run: Run) -> Callable[[], None]:
    network = run.model.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-12, fused=True)
    shape = (run.training.train_batch_size, *run.data.image_shape)
    sample, timestep = torch.randn(shape), torch.rand(shape[0]) * 999

    def step() -> None:
        network.train()
        network(sample, timestep, return_dict=False)[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sampling(run: Run, pairs: int) -> tuple[float, float]:
    """One step of the pipeline's loop against one forward, at a batch of 64."""
    network: nn.Module = run.model.network.eval()
    pipeline = VDMPipeline(network, VDMScheduler(**run.model.process.fields()))
    pipeline.set_progress_bar_config(disable=True)
    shape, steps = (64, *run.data.image_shape), 10
    sample, timestep = torch.randn(shape), torch.rand(64) * 999

    def forward() -> None:
        with torch.no_grad():
            for _ in range(steps):
                network(sample, timestep, return_dict=False)

    bare, ratio = _pairs(forward, lambda: pipeline(64, num_inference_steps=steps, output_type="pt"), pairs)
    return bare / steps, ratio


def _pairs(bare: Callable[[], object], full: Callable[[], object], pairs: int) -> tuple[float, float]:
    """Median seconds of ``bare``, and the median ratio of ``full`` to the ``bare`` run just before it."""
    bare(), full()
    rows = [(_seconds(bare), _seconds(full)) for _ in range(pairs)]
    return statistics.median(a for a, _ in rows), statistics.median(b / a for a, b in rows)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
