"""Train every rung of the ladder on the digits, and print the tables of docs/results.md and draw its picture.

``python scripts/bench/ladder.py`` runs what a user runs, ``accelerate launch scripts/train.py RECIPE --seed SEED``,
for the recipes ``digits_vae``, ``digits_hvae``, ``digits`` and ``digits_latent`` and three seeds, into
``runs/ladder``; a run that is there is not repeated. The last row is the latent VDM in two stages, on the latents of
the same seed's VAE. On two cores all of it takes about 30 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tqdm.auto import tqdm

from vdm_hub import LikelihoodPipeline, compare_decompositions, load_pipeline, load_split

ROOT = Path(__file__).resolve().parents[2]
RUNGS = {
    "VAE": "digits_vae",
    "hierarchical VAE": "digits_hvae",
    "VDM": "digits",
    "latent VDM": "digits_latent",
    "latent VDM, two stages": "digits_latent_two",
}
TRANSITIONS, DRAWS, IMAGES = 32, 64, 100  # of the comparison of forms
NETWORK = {"block_out_channels": [64], "dropout": 0.1, "resnet_time_scale_shift": "default"}


def main() -> None:
    """Train what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds (default: 0 1 2)")
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="of the runs (default: runs/ladder)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "ladder.png")
    arguments = parser.parse_args()
    wanted = [(rung, seed) for seed in arguments.seeds for rung in RUNGS]
    for rung, seed in tqdm(wanted, desc="runs", unit="run"):
        train(rung, seed, arguments.folder)
    print(table(arguments.folder, arguments.seeds))
    print(forms(arguments.folder, arguments.seeds[0]))
    draw(arguments.folder, arguments.seeds[0], arguments.picture)
    print(f"samples: {arguments.picture}")


def run_of(rung: str, seed: int, folder: Path) -> Path:
    """The folder of a run."""
    return folder / f"{RUNGS[rung]}-{seed}"


def train(rung: str, seed: int, folder: Path) -> None:
    """One run, unless it is there already; one that was broken off is begun anew."""
    output = run_of(rung, seed, folder)
    if (output / "run.json").is_file():
        return
    if output.exists():
        shutil.rmtree(output)
    recipe, options = RUNGS[rung], []
    if recipe == "digits_latent_two":
        first = run_of("VAE", seed, folder) / "pipeline"
        recipe = "digits_latent"
        options = ["--first_stage", "{}", "--first_stage_from", str(first), "--freeze_first_stage", "true"]
        options += ["--unet", json.dumps(NETWORK)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", str(os.cpu_count())]
    command = [*launcher, str(ROOT / "scripts" / "train.py"), recipe, "--seed", str(seed), *options]
    command += ["--output_dir", str(output), "--report_to", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])


def table(folder: Path, seeds: list[int]) -> str:
    """A row for each rung: the mean over seeds and the standard deviation between them."""
    lines = ["| rung | bits/dim | terms | parameters | training |", "| --- | --- | --- | --- | --- |"]
    for rung in RUNGS:
        runs = [run_of(rung, seed, folder) for seed in seeds]
        reports, records = (
            [json.loads((run / name).read_text()) for run in runs] for name in ("evaluation.json", "run.json")
        )
        totals = [report["bits_per_dim"] for report in reports]
        spread = f" ± {statistics.stdev(totals):.4f}" if len(totals) > 1 else ""
        terms = {name: _mean(reports, lambda report, name=name: report["terms"][name]) for name in reports[0]["terms"]}
        described = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        parameters = sum(records[0]["parameters"].values())
        seconds = statistics.mean(record["training_seconds"] for record in records)
        lines.append(
            f"| {rung} | {statistics.mean(totals):.4f}{spread} | {described} | {parameters:,} | {seconds:.0f} s |"
        )
    return "\n".join(lines)


def _mean(reports: list[dict[str, Any]], value: Any) -> float:
    return statistics.mean(value(report) for report in reports)


def forms(folder: Path, seed: int) -> str:
    """A row for each form of each rung's bound, on the same images: mean, and variance of one evaluation."""
    levels = load_split("digits", "test", num_levels=17).levels[:IMAGES]
    lines = ["| rung | form | bits/dim | variance of one evaluation |", "| --- | --- | --- | --- |"]
    for rung in RUNGS:
        pipeline = _load(run_of(rung, seed, folder))
        objective = pipeline.objective(None if pipeline.process is None else TRANSITIONS)
        compared = compare_decompositions(objective, {"levels": levels}, draws=DRAWS)
        where = "" if pipeline.process is None else f", T = {TRANSITIONS}"
        lines += [
            f"| {rung}{where} | {name} | {bits:.4f} ± {compared.standard_error[name]:.4f} | "
            f"{compared.variance[name]:.3g} |"
            for name, bits in compared.bits_per_dim.items()
        ]
    return "\n".join(lines)


def draw(folder: Path, seed: int, path: Path, count: int = 12) -> None:
    """Digits, and samples of each rung, a row each."""
    rows = {"digits": load_split("digits", "test", num_levels=17).levels[:count].float() / 16}
    for rung in RUNGS:
        pipeline = _load(run_of(rung, seed, folder))
        rows[rung] = pipeline.sample(count, torch.Generator().manual_seed(seed), 250).cpu()
    figure, axes = plt.subplots(len(rows), count, figsize=(0.62 * count + 1.6, 0.66 * len(rows)))
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


def _load(run: Path) -> LikelihoodPipeline:
    pipeline = load_pipeline(str(run / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
