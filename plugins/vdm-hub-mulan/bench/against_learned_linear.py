"""MuLAN's two forms against `learned_linear` on digits, at equal steps and at equal time: the table of the README.

``python plugins/vdm-hub-mulan/bench/against_learned_linear.py`` trains the digits recipe with each schedule and seed,
all else alike, and prints the paired differences on the same test images and draws, with the standard error over the
seeds. At equal time, MuLAN takes as many steps as fit into what `learned_linear` took (measured at equal steps). On
two idle cores a run takes about a minute and a half; three seeds are fifteen runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import statistics
import tempfile
from pathlib import Path

from vdm_hub.training.arguments import parse
from vdm_hub.training.loop import train

ENDS = {"gamma_min": -7.65, "gamma_max": 5.5}  # of the recipe; both learn them from there
BASELINE = "learned_linear"
SCHEDULES = {
    BASELINE: {"name": BASELINE, "config": ENDS},
    "mulan": {"name": "mulan", "config": ENDS | {"shape": [1, 8, 8]}},
    "mulan_latent": {"name": "mulan_latent", "config": ENDS | {"shape": [1, 8, 8]}},
}


def main() -> None:
    """Print a line per run, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1700, help="of the baseline (default: the recipe's, 1700)")
    arguments, overrides = parser.parse_known_args()
    differences: dict[tuple[str, str], list[float]] = {}
    for seed in arguments.seeds:
        baseline, seconds = _train(BASELINE, seed, arguments.steps, overrides)
        for name in (name for name in SCHEDULES if name != BASELINE):
            steps = {"steps": arguments.steps}
            for kind in ("steps", "time"):
                bits, taken = _train(name, seed, steps[kind], overrides)
                differences.setdefault((name, kind), []).append(bits - baseline)
                steps["time"] = max(1, round(steps[kind] * seconds / taken))
    print("| schedule | equal | bits/dim less learned_linear's, each seed | mean | standard error |")
    print("| --- | --- | --- | --- | --- |")
    for (name, kind), each in sorted(differences.items()):
        error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
        shown = ", ".join(f"{difference:+.4f}" for difference in each)
        print(f"| {name} | {kind} | {shown} | {statistics.mean(each):+.4f} | {error:.4f} |")


def _train(name: str, seed: int, steps: int, overrides: list[str]) -> tuple[float, float]:
    """Bits/dim on the test split, and the seconds of training."""
    conditioning = {"name": "affine", "config": ENDS}  # the same timesteps for all
    words = ["--noise_schedule", json.dumps(SCHEDULES[name]), "--conditioning", json.dumps(conditioning)]
    words += ["--seed", str(seed), "--max_train_steps", str(steps), "--num_sample_images", "0", "--report_to", "none"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        report = train(parse(["digits", *words, "--output_dir", str(Path(folder) / "run"), *overrides]))
    seconds = re.search(r"trained \d+ steps in ([\d.]+) s", printed.getvalue())
    assert report is not None and seconds is not None
    print(f"{name}, seed {seed}, {steps} steps: {report.bits_per_dim:.4f} bits/dim, {seconds.group(1)} s", flush=True)
    return report.bits_per_dim, float(seconds.group(1))


if __name__ == "__main__":
    main()
