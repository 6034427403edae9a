"""What the estimator of the bound saves: network evaluations at equal Monte Carlo error, technique by technique.

``python scripts/bench/estimator.py PIPELINE --dataset_name FOLDER`` measures a trained model, in continuous time or at
``--transitions`` of them, by each technique alone and by all together, against independent uniform times on the same
network (in continuous time under a linear log-SNR schedule between the same endpoints). The factor is the ratio of
(variance of the mean over the images) x (network evaluations). Two estimates of that variance are printed:

- *direct*: of the replicates' means, over all of them; it sees what stratification over images removes, and is itself
  uncertain by sqrt(2 / (replicates - 1)) in relative terms;
- *within images*: the variance of one image's replicates, averaged over images: far less uncertain, but blind to
  stratification over images, so it says too little of what that saves.

A technique that needs a pilot pays for it: ``budget`` evaluations an image, pilot included, are what the factor is at.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdm_hub
from vdm_hub import (
    BoundEstimator,
    GaussianProcess,
    LinearSchedule,
    ReplicateStages,
    VDMObjective,
    VDMPipeline,
    load_split,
)

NOTHING = {"stratified": False, "importance_sampling": False, "control_variate": False}
BASELINE = "independent uniform times"  # under a linear log-SNR, where time is continuous
TECHNIQUES: dict[str, dict[str, Any]] = {
    BASELINE: NOTHING,
    "stratified times": NOTHING | {"stratified": True},
    "importance sampling": NOTHING | {"importance_sampling": True},
    "control variate": NOTHING | {"control_variate": True},
    "stratified times, importance sampling": NOTHING | {"stratified": True, "importance_sampling": True},
    "all": {},
    "all, 4 times an image": {"times_per_datum": 4},
    "all, 8 times an image": {"times_per_datum": 8},
}


def main() -> None:
    """Measure, print a table, and write every figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a trained pipeline")
    parser.add_argument("--dataset_name", required=True, help="'digits', a folder, or a Hub dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--transitions", type=int, help="T; continuous time without it")
    parser.add_argument("--diffusers_levels", type=int, help="K, of a DDPM that is read by VDMPipeline.from_diffusers")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--replicates", type=int, default=32, help="of each technique and repetition")
    parser.add_argument("--repetitions", type=int, default=2, help="with pilots and draws of their own")
    parser.add_argument("--pilot", type=int, default=2048, help="evaluations of the pilot")
    parser.add_argument("--budget", type=int, default=64, help="evaluations an image that the pilot is a part of")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES))
    parser.add_argument("--output", type=Path, help="a JSON file, extended after each measurement")
    arguments = parser.parse_args()
    if arguments.diffusers_levels:
        pipeline = VDMPipeline.from_diffusers(arguments.pipeline, num_levels=arguments.diffusers_levels)
    else:
        pipeline = VDMPipeline.from_pretrained(arguments.pipeline)
    levels = load_split(
        arguments.dataset_name,
        arguments.split,
        num_levels=pipeline.process.num_levels,
        max_samples=arguments.images,
    ).levels
    if arguments.pilot >= (paid := arguments.budget * len(levels)):
        parser.error(f"--pilot {arguments.pilot} leaves nothing of the {paid} evaluations of --budget: give less")
    objective = pipeline.objective(arguments.transitions)
    rows: list[dict[str, Any]] = []
    for repetition in range(arguments.repetitions):
        for name in arguments.only:
            plain = name == BASELINE and arguments.transitions is None
            model = under_linear_log_snr(objective) if plain else objective
            rows.append(
                {"technique": name, "repetition": repetition} | measure(model, levels, name, repetition, arguments)
            )
            print(json.dumps(rows[-1]), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def under_linear_log_snr(objective: VDMObjective) -> VDMObjective:
    """The same network, and its conditioning, under the linear schedule between the same endpoints."""
    process = objective.process
    assert isinstance(process, GaussianProcess)
    parts = process.parameterization, process.conditioning, process.decoder, process.scaling
    linear = LinearSchedule(*process.schedule.endpoints())
    return VDMObjective(objective.network, GaussianProcess(linear, *parts, process.num_train_timesteps)).eval()


def measure(
    objective: VDMObjective, levels: Tensor, name: str, repetition: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Bits/dim, its error, and variance x evaluations per image, in (bits/dim)^2."""
    started = time.perf_counter()
    techniques = TECHNIQUES[name]
    times = techniques.get("times_per_datum", 1)
    pilot = 0 if techniques == NOTHING | {"stratified": techniques.get("stratified", True)} else arguments.pilot
    seed = 1000 + repetition
    report = vdm_hub.measure_images(
        BoundEstimator(objective, len(levels), seed, pilot_evaluations=pilot, **techniques),
        lambda indices: {"levels": levels[indices], "indices": indices},
        len(levels),
        ReplicateStages(max(arguments.replicates // times, 2)),
        batch_size=arguments.batch_size,
        progress=False,
    )
    total = torch.stack(list(report.terms_per_image.values())).sum(0) / (report.dimensions * math.log(2))
    paid = arguments.budget * len(levels)
    overhead = paid / (paid - pilot)  # of the budget, the pilot leaves this much less to measure with
    return {
        "bits_per_dim": report.bits_per_dim,
        "error_of_8": report.standard_error * math.sqrt(report.replicates / 8),
        "standard_error": report.standard_error,
        "direct": float(total.mean(1).var()) * len(levels) * times * overhead,
        "within": float(total.var(0).mean()) * times * overhead,
        "replicates": len(total),
        "pilot": pilot,
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per technique; variances are averaged over repetitions before a ratio is taken."""
    lines = [
        "| technique | bits/dim | factor, direct | factor, within images |",
        "| --- | --- | --- | --- |",
    ]
    mean = {
        (name, key): sum(row[key] for row in rows if row["technique"] == name)
        / max(sum(row["technique"] == name for row in rows), 1)
        for name in TECHNIQUES
        for key in ("bits_per_dim", "direct", "within")
    }
    for name in TECHNIQUES:
        if mean[name, "within"] and mean[BASELINE, "within"]:
            # Independent draws: the direct variance of the baseline is that within images, which is known better.
            factors = [mean[BASELINE, "within"] / mean[name, key] for key in ("direct", "within")]
            lines.append(f"| {name} | {mean[name, 'bits_per_dim']:.4f} | {factors[0]:.1f} | {factors[1]:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
