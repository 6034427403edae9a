"""MuLAN's two forms against `learned_linear` on digits, at equal steps and at equal time: the table of the README.

``python plugins/vdm-hub-mulan/bench/against_learned_linear.py`` trains the digits recipe with each schedule and seed,
all else alike, and prints the paired differences on the same test images and draws, with the standard error over the
seeds. At equal time, MuLAN takes as many steps as fit into what `learned_linear` takes for all of its own; a step's
time is the processor's, which other work on the machine does not change. On two idle cores a run takes about a minute
and a half; three seeds are fifteen runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

from vdm_hub import LikelihoodReport, parse_recipe, train_model

ENDS = {"gamma_min": -7.65, "gamma_max": 5.5}  # of the recipe; both learn them from there
BASELINE = "learned_linear"
SCHEDULES = {
    BASELINE: {"name": BASELINE, "config": ENDS},
    "mulan": {"name": "mulan", "config": ENDS | {"shape": [1, 8, 8]}},
    "mulan_latent": {"name": "mulan_latent", "config": ENDS | {"shape": [1, 8, 8]}},
}
FEW, MANY = 20, 120  # steps; their difference has no start in it


def main() -> None:
    """Print a line per run, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1700, help="of the baseline (default: the recipe's, 1700)")
    arguments, overrides = parser.parse_known_args()
    costs = {name: _seconds_per_step(name, overrides) for name in SCHEDULES}
    for name, seconds in costs.items():
        print(f"{name}: {1000 * seconds:.1f} ms of processor time a step", flush=True)
    differences: dict[tuple[str, str], list[float]] = {}
    for seed in arguments.seeds:
        baseline = _measure(BASELINE, seed, arguments.steps, overrides)
        for name in (name for name in SCHEDULES if name != BASELINE):
            equal = {"steps": arguments.steps, "time": round(arguments.steps * costs[BASELINE] / costs[name])}
            for kind, steps in equal.items():
                bits = _measure(name, seed, steps, overrides)
                differences.setdefault((name, kind), []).append(bits - baseline)
    print("| schedule | equal | bits/dim less learned_linear's, each seed | mean | standard error |")
    print("| --- | --- | --- | --- | --- |")
    for (name, kind), each in sorted(differences.items()):
        error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
        shown = ", ".join(f"{difference:+.4f}" for difference in each)
        print(f"| {name} | {kind} | {shown} | {statistics.mean(each):+.4f} | {error:.4f} |")


def _seconds_per_step(name: str, overrides: list[str]) -> float:
    def processor_time(steps: int) -> float:
        started = time.process_time()
        _train(name, 0, steps, ["--evaluation_replicates", "0", *overrides])
        return time.process_time() - started

    processor_time(FEW)  # the first run pays for what is loaded once
    return (processor_time(MANY) - processor_time(FEW)) / (MANY - FEW)


def _measure(name: str, seed: int, steps: int, overrides: list[str]) -> float:
    """Bits/dim on the test split."""
    report = _train(name, seed, steps, overrides)
    assert report is not None
    print(f"{name}, seed {seed}, {steps} steps: {report.bits_per_dim:.4f} bits/dim", flush=True)
    return report.bits_per_dim


def _train(name: str, seed: int, steps: int, overrides: list[str]) -> LikelihoodReport | None:
    conditioning = {"name": "affine", "config": ENDS}  # the same timesteps for all
    words = ["--noise_schedule", json.dumps(SCHEDULES[name]), "--conditioning", json.dumps(conditioning)]
    words += ["--seed", str(seed), "--max_train_steps", str(steps), "--num_sample_images", "0", "--report_to", "none"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return train_model(parse_recipe(["digits", *words, "--output_dir", str(Path(folder) / "run"), *overrides]))


if __name__ == "__main__":
    main()
