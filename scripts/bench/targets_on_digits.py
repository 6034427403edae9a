"""The digits recipe with each target, measured by the same bound: the table of the README.

``python scripts/bench/targets_on_digits.py`` trains the recipe's network once for each target and seed,
all else alike, each on the bound itself; they differ in what the network predicts, reads, and is told of the noise.
The log-SNR is linear, as the recipe's own schedule was shaped for one of them. On two idle cores a run takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from vdm_hub import parse_recipe, train_model

TARGETS: dict[str, dict[str, object]] = {
    "epsilon": {"prediction_type": "epsilon"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "score": {"prediction_type": "score"},
    "flow_prediction": {"prediction_type": "flow_prediction", "conditioning": "flow_time"},
    "edm": {"prediction_type": {"name": "edm", "config": {"sigma_data": 0.7}}, "conditioning": "edm_noise"},
}
LINEAR = {"name": "linear", "config": {"gamma_min": -7.65, "gamma_max": 5.5}}


def main() -> None:
    """Print a row per target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments, overrides = parser.parse_known_args()
    print("| target | bits/dim, each seed | mean | standard error of one |\n| --- | --- | --- | --- |")
    for target in arguments.targets:
        measured = [_train(target, seed, overrides) for seed in arguments.seeds]
        each = [bits for bits, _ in measured]
        shown = ", ".join(f"{bits:.4f}" for bits in each)
        print(f"| {target} | {shown} | {statistics.mean(each):.4f} | {measured[0][1]:.4f} |", flush=True)


def _train(target: str, seed: int, overrides: list[str]) -> tuple[float, float]:
    words = ["--seed", str(seed), "--num_sample_images", "0", "--report_to", "none"]
    words += ["--noise_schedule", json.dumps(LINEAR)]
    for name, value in TARGETS[target].items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        report = train_model(parse_recipe(["digits", *words, "--output_dir", str(Path(folder) / "run"), *overrides]))
    assert report is not None
    return report.bits_per_dim, report.standard_error


if __name__ == "__main__":
    main()
