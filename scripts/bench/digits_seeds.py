"""Train the digits recipe with three seeds, one after the other, and print each test bound and their mean.

``python scripts/bench/digits_seeds.py`` runs what a user runs, ``accelerate launch scripts/train.py digits``, and
reads each run's ``evaluation.json``. On two cores it takes about seven minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Print a row per seed, then the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds (default: 0 1 2)")
    parser.add_argument("--recipe", default="digits", help="a recipe's name or file (default: digits)")
    arguments, overrides = parser.parse_known_args()
    totals = []
    print(f"{'seed':>4}{'bits/dim':>10}{'se':>8}{'reconstruction':>16}{'prior':>8}{'diffusion':>11}{'training':>10}")
    for seed in arguments.seeds:
        report, seconds = _train(arguments.recipe, seed, overrides)
        terms = report["terms"]
        totals.append(report["bits_per_dim"])
        print(
            f"{seed:>4}{totals[-1]:>10.4f}{report['standard_error']:>8.4f}{terms['reconstruction']:>16.4f}"
            f"{terms['prior']:>8.4f}{terms['diffusion']:>11.4f}{seconds:>8.0f} s",
            flush=True,
        )
    spread = f" (standard deviation {statistics.stdev(totals):.4f})" if len(totals) > 1 else ""
    print(f"mean{statistics.mean(totals):>10.4f}{spread}")


def _train(recipe: str, seed: int, overrides: list[str]) -> tuple[dict, float]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--num_cpu_threads_per_process", str(os.cpu_count())]
        command = [*launcher, str(ROOT / "scripts" / "train.py"), recipe, "--seed", str(seed)]
        command += ["--output_dir", str(output), "--num_sample_images", "0", "--report_to", "none", *overrides]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = re.search(r"trained \d+ steps in ([\d.]+) s", done.stdout)
        assert seconds is not None, done.stdout
        return json.loads((output / "evaluation.json").read_text()), float(seconds.group(1))


if __name__ == "__main__":
    main()
