"""Binomial diffusion of binarised images, measured at several numbers of transitions: the tables of the README.

``python plugins/vdm-hub-binomial/bench/by_transitions.py`` binarises the digits, trains the recipe beside this folder
once for each seed, and measures the test split. A loss for comparison needs no network: that of pixels which are
independent of each other, at the frequencies of the training images. ``--source`` takes other images; what this script
does not know goes to the recipe. On two idle cores a run on digits takes about two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vdm_hub import VariationalBound, VDMPipeline, load_split, parse_recipe, train_model
from vdm_hub_binomial.binarise import binarise

RECIPE = Path(__file__).resolve().parents[1] / "binary_digits.yaml"


def main() -> None:
    """Print a row for each number of transitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="digits", help="what binarise reads (default: digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--transitions", type=int, nargs="+", default=[1, 5, 20, 100])
    parser.add_argument("--replicates", type=int, default=32)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        list(binarise(arguments.source, data, ["train", "test"]))
        test = load_split(str(data), "test", num_levels=2).levels
        print(f"independent pixels: {_independent(load_split(str(data), 'train', num_levels=2).levels, test):.4f}")
        print("| transitions | bits/dim, each seed | mean | standard error of one |\n| --- | --- | --- | --- |")
        pipes = [_train(data, Path(folder) / f"run-{seed}", seed, overrides) for seed in arguments.seeds]
        for transitions in (*arguments.transitions, None):
            found = [
                pipe.bits_per_dim(test, VariationalBound(transitions), replicates=arguments.replicates)
                for pipe in pipes
            ]
            each = [report.bits_per_dim for report in found]
            shown, name = ", ".join(f"{bits:.4f}" for bits in each), transitions or "continuous time"
            print(f"| {name} | {shown} | {statistics.mean(each):.4f} | {found[0].standard_error:.4f} |", flush=True)


def _independent(train_levels: Tensor, test_levels: Tensor) -> float:
    """Bits/dim of pixels independent of each other; half a count is added to each value."""
    ones = (train_levels.double().sum(0) + 0.5) / (train_levels.shape[0] + 1)
    return float(-torch.where(test_levels > 0, ones, 1 - ones).log2().mean())


def _train(data: Path, output: Path, seed: int, overrides: list[str]) -> VDMPipeline:
    words = ["--train_data_dir", str(data), "--output_dir", str(output), "--seed", str(seed), "--report_to", "none"]
    words += ["--num_sample_images", "0", "--evaluation_replicates", "0"]
    with contextlib.redirect_stdout(io.StringIO()):
        train_model(parse_recipe([str(RECIPE), *words, *overrides]))
    pipe: VDMPipeline = VDMPipeline.from_pretrained(output / "pipeline")
    return pipe


if __name__ == "__main__":
    main()
