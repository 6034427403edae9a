"""Rank a dataset's images by their likelihood under a model, and score images of another kind: docs/likelihoods.md.

python scripts/rank_images.py PIPELINE DATASET --outliers OTHER_DATASET --picture ranking.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vdm_hub import (
    CommandLineParser,
    LikelihoodPipeline,
    check_output,
    images_from_levels,
    load_images,
    load_pipeline,
    report_errors,
)

SHOWN, MOST = 12, 500


def measure(pipe: LikelihoodPipeline, name: str, split: str | None, replicates: int) -> tuple[Tensor, Tensor]:
    """The images in [0, 1], and the bits/dim of each."""
    images, told, notes = load_images(pipe, name, split, max_images=MOST if split is None else None)
    levels = images.levels
    assert isinstance(levels, Tensor)
    report = pipe.log_likelihood(levels, replicates=replicates)
    print(
        f"{Path(name).name}, {told['split']}: {report.bits_per_dim:.3f} bits/dim, standard error "
        f"{report.standard_error:.3f} (Monte Carlo), {report.standard_error_over_images:.3f} (images); of one image "
        f"{float(report.standard_error_per_image.mean()):.3f}, and between images {float(report.per_image.std()):.3f}"
    )
    for note in notes:
        print(f"  note: {note}")
    return images_from_levels(levels, pipe.num_levels), report.per_image


def draw(path: Path, groups: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The extremes of each group as rows of images, and the histograms of all."""
    figure = Figure(figsize=(9, 2.2 + 1.5 * len(groups)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5 * len(groups), 2.2))
    rows = above.subplots(2 * len(groups), SHOWN, squeeze=False)
    for group, (name, (images, bits)) in enumerate(groups.items()):
        order = bits.argsort()
        for row, (kind, chosen) in enumerate((("most", order[:SHOWN]), ("least", order.flip(0)[:SHOWN]))):
            axes = rows[2 * group + row]
            for axis, index in zip(axes, chosen.tolist(), strict=False):
                axis.imshow(images[index].permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
                axis.set_title(f"{float(bits[index]):.2f}", fontsize=7, pad=2)
            axes[0].text(-0.2, 0.5, f"{name}\n{kind} likely", transform=axes[0].transAxes, ha="right", va="center")
    for axis in rows.flat:
        axis.set_axis_off()
    axis = below.subplots()
    for name, (_, bits) in groups.items():
        axis.hist(bits.numpy(), bins=50, density=True, alpha=0.6, label=name)
    axis.set(xlabel="bits/dim (low is likely)", ylabel="density")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """The command line."""
    parser = CommandLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a run's folder, a pipeline's, or a Hub id")
    parser.add_argument("dataset", help="images of the kind that the model was trained on")
    parser.add_argument("--outliers", help="images of another kind, of the same shape and levels")
    parser.add_argument(
        "--split",
        help="such as 'test[:500]', or held_out, what the model's run held out of its training split (default: the "
        f"first {MOST} of test, or of held_out where there is no test split)",
    )
    parser.add_argument("--outliers_split", help="of the images of another kind (default: as --split)")
    parser.add_argument("--replicates", type=int, default=8, help="estimates of each image (default: 8)")
    parser.add_argument("--picture", type=Path, default=Path("ranking.png"), help="default: ranking.png")
    return report_errors(lambda: rank(parser.parse_args()))


def rank(arguments: argparse.Namespace) -> None:
    """Measure, print and draw."""
    check_output(arguments.picture, "picture", ".png", overwrite=True)
    pipe = load_pipeline(arguments.pipeline)
    groups = {arguments.dataset: measure(pipe, arguments.dataset, arguments.split, arguments.replicates)}
    if arguments.outliers:
        split = arguments.outliers_split or arguments.split
        groups[arguments.outliers] = measure(pipe, arguments.outliers, split, arguments.replicates)
    if arguments.outliers:
        (_, own), (_, other) = groups.values()
        truth = torch.cat([torch.zeros(len(own)), torch.ones(len(other))])
        area = roc_auc_score(truth.numpy(), torch.cat([own, other]).numpy())
        what = f"AUROC of 'less likely' as a sign of {arguments.outliers}"
        print(f"{what}: {area:.3f} (0.5 is chance; below, they look likelier)")
    draw(arguments.picture, {Path(name).name: measured for name, measured in groups.items()})
    print(f"picture: {arguments.picture}")


if __name__ == "__main__":
    sys.exit(main())
