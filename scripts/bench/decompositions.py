"""Both forms of a VDM's bound on the same images, their totals and variances, and a picture of both over t.

``python scripts/bench/decompositions.py runs/digits/pipeline --dataset_name digits`` prints the figures of a
model, and draws docs/images/decompositions.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vdm_hub import (
    VDMObjective,
    compare_decompositions,
    decompositions,
    load_pipeline,
    load_split,
    plot_decompositions,
    transition_profile,
)

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Print, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a folder, or a Hub id, of a VDM")
    parser.add_argument("--dataset_name", default="digits", help="(default: digits)")
    parser.add_argument("--split", default="test[:100]", help="(default: test[:100])")
    parser.add_argument("--transitions", type=int, default=32, help="T (default: 32)")
    parser.add_argument("--draws", type=int, default=32, help="of each image at each transition (default: 32)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "decompositions.png")
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.pipeline)
    levels = load_split(arguments.dataset_name, arguments.split, num_levels=pipeline.num_levels).levels
    batch = {"levels": levels.to(pipeline.device_of_latents)}
    objective = pipeline.objective(arguments.transitions)
    print(compare_decompositions(objective, batch, arguments.draws))
    forms = decompositions(objective)
    profiles = {
        name: transition_profile(form, batch, arguments.draws)
        for name, form in forms.items()
        if isinstance(form, VDMObjective)
    }
    plot_decompositions(profiles, arguments.picture)
    print(f"{len(levels)} images, {arguments.transitions} transitions: {arguments.picture}")


if __name__ == "__main__":
    main()
