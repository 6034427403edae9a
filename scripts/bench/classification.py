"""What classification by the bound costs: evaluations of the network an image, against how many classes are found.

``python scripts/bench/classification.py PIPELINE --dataset_name digits`` measures a class-conditional model in three
ways:

- *adaptive, shared*: `pipe.classify`, at several confidences;
- *equal effort, shared*: the same draws, and no class dropped, at several budgets;
- *equal effort, independent*: the bound of each class by itself (`pipe.log_likelihood`, with all that lowers its
  variance), on draws of its own: 1, 2, 4, ... replicates.

A pilot's evaluations are not counted in the column of evaluations, and given beside it. The last lines say how many
times fewer evaluations the adaptive rounds took than the others for the same accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdm_hub import ClassificationEffort, VDMPipeline, load_split

ADAPTIVE, SHARED, INDEPENDENT = "adaptive, shared", "equal effort, shared", "equal effort, independent"


def main() -> None:
    """Measure, print a table, and write every figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a trained class-conditional pipeline")
    parser.add_argument("--dataset_name", required=True, help="'digits', a folder, or a Hub dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--confidences", type=float, nargs="*", default=[0.55, 0.65, 0.9, 0.95])
    parser.add_argument("--draws", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help="of equal effort, shared")
    parser.add_argument("--replicates", type=int, default=64, help="the most of independent draws")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    pipe = VDMPipeline.from_pretrained(arguments.pipeline)
    images = load_split(
        arguments.dataset_name,
        arguments.split,
        num_levels=pipe.num_levels,
        label_column=arguments.label_column,
        max_samples=arguments.images,
    )
    rows = []
    for row in measured(pipe, images.levels, images.labels, arguments):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(rows, indent=1))
    print("\n".join([table(rows), *comparison(rows)]))


def measured(
    pipe: VDMPipeline, levels: Tensor, labels: Tensor, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each method and setting."""
    settings = [(ADAPTIVE, ClassificationEffort(confidence=each)) for each in arguments.confidences]
    for draws in arguments.draws:
        effort = ClassificationEffort(confidence=None, budget=draws * pipe.num_classes, first_draws=1)
        settings.append((SHARED, effort))
    for method, effort in settings:
        started = time.perf_counter()
        report = pipe.classify(
            levels, labels=labels, effort=effort, seed=arguments.seed, batch_size=arguments.batch_size
        )
        yield {
            "method": method,
            "confidence": effort.confidence,
            "accuracy": report.accuracy,
            "evaluations": report.evaluations_per_image,
            "pilot": report.pilot_evaluations / len(levels),
            "seconds": round(time.perf_counter() - started, 1),
        }
    yield from independent(pipe, levels, labels, arguments)


def independent(
    pipe: VDMPipeline, levels: Tensor, labels: Tensor, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of the bound of each class on draws of its own, by the number of replicates."""
    bounds, pilot, started = [], 0, time.perf_counter()
    for number in range(pipe.num_classes):
        told = torch.full((len(levels),), number)
        report = pipe.log_likelihood(
            levels,
            class_labels=told,
            replicates=arguments.replicates,
            seed=1000 * (arguments.seed + 1) + number,
            batch_size=arguments.batch_size,
        )
        bounds.append(torch.stack(list(report.terms_per_image.values())).sum(0))
        pilot += report.network_evaluations - arguments.replicates * len(levels)
    whole, powers = torch.stack(bounds, 2), [2**power for power in range(arguments.replicates.bit_length())]
    for replicates in sorted({*powers, arguments.replicates}):
        found = whole[:replicates].mean(0)
        yield {
            "method": INDEPENDENT,
            "confidence": None,
            "accuracy": float((found.argmin(1) == labels).double().mean()),
            "evaluations": replicates * pipe.num_classes,
            "pilot": pilot / len(levels),
            "seconds": round(time.perf_counter() - started, 1),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method and setting."""
    lines = [
        "| method | confidence | evaluations an image, and of the pilot | accuracy |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        confidence = "" if row["confidence"] is None else row["confidence"]
        lines.append(
            f"| {row['method']} | {confidence} | {row['evaluations']:.1f}, {row['pilot']:.1f} | "
            f"{100 * row['accuracy']:.2f} % |"
        )
    return "\n".join(lines)


def comparison(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How many times the evaluations of the adaptive rounds the others took for at least their accuracy."""
    for row in (row for row in rows if row["method"] == ADAPTIVE):
        for method in (SHARED, INDEPENDENT):
            reached = [
                other["evaluations"]
                for other in rows
                if other["method"] == method and other["accuracy"] >= row["accuracy"]
            ]
            most = max((other["evaluations"] for other in rows if other["method"] == method), default=math.nan)
            times = (
                f"{min(reached) / row['evaluations']:.1f}" if reached else f"more than {most / row['evaluations']:.1f}"
            )
            yield f"confidence {row['confidence']}: {method} took {times} times the evaluations"


if __name__ == "__main__":
    main()
