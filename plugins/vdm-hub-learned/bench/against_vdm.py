"""The learned forward process against the VDM of the same recipe, at equal time: the tables of the README.

``python plugins/vdm-hub-learned/bench/against_vdm.py`` trains the digits recipe with each process and seed, all else
alike, and prints the differences of the test images' bits/dim, paired image by image on the same draws, with their
standard error over the images and over the seeds. Time is the processor's, which other work on the machine does not
change: that of a step is measured first, of both in turns, and each takes as many steps as fit into ``--seconds``;
with ``--equal steps`` the learned process takes those of the VDM.
``--recipe`` names another recipe, such as fashion_mnist; what this script does not know goes to the recipe.
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

from torch import Tensor

from vdm_hub import LikelihoodReport, parse_recipe, train_model

FEW, MANY, ROUNDS = 10, 60, 3  # steps; their difference has no start in it


def main() -> None:
    """Print a line per run, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=120, help="of processor time, to train for (default: 120)")
    parser.add_argument("--equal", choices=("time", "steps"), default="time")
    parser.add_argument("--config", type=json.loads, default={}, help="of the learned process, as JSON")
    parser.add_argument("--replicates", type=int, default=32, help="of each measurement (default: 32)")
    arguments, overrides = parser.parse_known_args()
    learned = {"name": "learned", "package": "vdm-hub-learned", "config": arguments.config}
    words = {
        name: [arguments.recipe, "--forward_process", form if isinstance(form, str) else json.dumps(form), *overrides]
        for name, form in {"vdm": "gaussian", "learned": learned}.items()
    }
    costs = _seconds_per_step(words)
    steps = {name: round(arguments.seconds / seconds) for name, seconds in costs.items()}
    if arguments.equal == "steps":
        steps["learned"] = steps["vdm"]
    for name, seconds in costs.items():
        print(f"{name}: {1000 * seconds:.1f} ms of processor time a step, {steps[name]} steps", flush=True)
    print("| seed | VDM | learned | learned less VDM | standard error over the images |")
    print("| --- | --- | --- | --- | --- |")
    differences = []
    for seed in arguments.seeds:
        vdm, own = (_measure(words[name], seed, steps[name], arguments.replicates) for name in words)
        each = own - vdm
        differences.append(float(each.mean()))
        error = float(each.std()) / len(each) ** 0.5
        figures = f"{float(vdm.mean()):.4f} | {float(own.mean()):.4f} | {differences[-1]:+.4f} | {error:.4f}"
        print(f"| {seed} | {figures} |", flush=True)
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        print(f"mean over the seeds: {statistics.mean(differences):+.4f}, standard error {error:.4f}")


def _seconds_per_step(words: dict[str, list[str]]) -> dict[str, float]:
    """Processor time of a step, in turns: the median of several rounds."""

    def taken(name: str, steps: int) -> float:
        started = time.process_time()
        _train(words[name], 0, steps, replicates=0)
        return time.process_time() - started

    for name in words:
        taken(name, FEW)  # the first run pays for what is loaded once
    rounds = [{name: taken(name, MANY) - taken(name, FEW) for name in words} for _ in range(ROUNDS)]
    return {name: statistics.median(one[name] for one in rounds) / (MANY - FEW) for name in words}


def _measure(words: list[str], seed: int, steps: int, replicates: int) -> Tensor:
    """Bits/dim of each test image."""
    report = _train(words, seed, steps, replicates)
    assert report is not None
    return report.per_image


def _train(words: list[str], seed: int, steps: int, replicates: int) -> LikelihoodReport | None:
    own = ["--seed", str(seed), "--max_train_steps", str(steps), "--evaluation_replicates", str(replicates)]
    own += ["--num_sample_images", "0", "--report_to", "none"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return train_model(parse_recipe([*words, *own, "--output_dir", str(Path(folder) / "run")]))


if __name__ == "__main__":
    main()
