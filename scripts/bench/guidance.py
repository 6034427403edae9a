"""What guidance does: the share of samples that are of the class asked for, and how varied they are, by its scale.

``python scripts/bench/guidance.py PIPELINE`` draws as many samples of each class at each scale, from the same noise,
and asks the model itself whose they are (`pipe.classify`). Variety is the mean distance of two samples of a class,
root mean square over pixels in [0, 1]. ``--picture PNG`` keeps a grid: columns for each scale, a row for each class.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from vdm_hub import VDMPipeline, save_grid


def main() -> None:
    """Draw, classify, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a class-conditional model, trained with condition dropout")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--images", type=int, default=20, help="of each class at each scale (default: 20)")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--guider", default="ClassifierFreeGuidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    parser.add_argument("--columns", type=int, default=6, help="of the picture, for each scale (default: 6)")
    arguments = parser.parse_args()
    pipe = VDMPipeline.from_pretrained(arguments.pipeline)
    classes = pipe.num_classes or 0
    labels = torch.arange(classes).repeat_interleave(arguments.images)
    print("| guidance scale | of the class asked for | variety within a class |\n| --- | --- | --- |")
    drawn: dict[float, Tensor] = {}
    for scale in arguments.scales:
        drawn[scale] = pipe(
            generator=torch.Generator().manual_seed(arguments.seed),
            num_inference_steps=arguments.num_inference_steps,
            class_labels=labels,
            guidance_scale=scale,
            guider=arguments.guider,
            output_type="pt",
        ).images
        report = pipe.classify(drawn[scale], labels=labels, seed=arguments.seed)
        variety = torch.stack([_variety(part) for part in drawn[scale].split(arguments.images)]).mean()
        share = f"{100 * report.accuracy:.1f} ± {100 * report.accuracy_error:.1f} %"
        print(f"| {scale:g} | {share} | {variety:.3f} |", flush=True)
    if arguments.picture is not None:
        blocks = [
            images.unflatten(0, (classes, arguments.images))[:, : arguments.columns] for images in drawn.values()
        ]
        gap = torch.ones_like(blocks[0][:, :1])
        parts = [part for block in blocks for part in (block, gap)][:-1]
        grid = torch.cat(parts, dim=1)
        save_grid(grid.flatten(0, 1), arguments.picture, columns=grid.shape[1])


def _variety(images: Tensor) -> Tensor:
    """The mean root mean square difference of two of these images."""
    pairs = [(images[i] - images[j]).square().mean().sqrt() for i, j in combinations(range(len(images)), 2)]
    return torch.stack(pairs).mean()


if __name__ == "__main__":
    main()
