"""The end of ``make quickstart``: load the saved pipeline in a new process, use it, and say where everything lies."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from an uninstalled checkout, too

import torch

from vdm_hub import VDMPipeline, load_split


def main() -> None:
    """Load, measure a few test images, draw one, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the folder of a finished run, such as runs/digits")
    folder = parser.parse_args().output
    pipeline = VDMPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = load_split("digits", "test[:8]", num_levels=pipeline.process.num_levels)
    eight = pipeline.bits_per_dim(images.levels, replicates=64)
    drawn = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=10).images[0]
    print(
        f"\nloaded again in a new process: 8 test images {eight.bits_per_dim:.3f} bits/dim, a sample of {drawn.size}"
    )
    report = json.loads((folder / "evaluation.json").read_text())
    print(
        f"\ntest bound  {report['bits_per_dim']:.4f} bits/dim, standard error {report['standard_error']:.4f}, "
        f"{report['num_images']} images"
    )
    for name, value in report["terms"].items():
        print(f"  {name:<16}{value:8.4f}")
    for name in ("samples.png", "schedule.png", "pipeline"):
        print(f"{name:<13}{folder / name}")


if __name__ == "__main__":
    main()
