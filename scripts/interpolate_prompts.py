"""Pictures between prompts.

``python scripts/interpolate_prompts.py PIPELINE "a photo of a Sneaker" "a photo of a Bag"``: what the text encoder
makes of two prompts is mixed, ``(1 - a) first + a second`` for each token, and samples are drawn from the same noise
at each a: a column for each a, a row for each noise. With more than two prompts, the next rows are of the next pair.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch

from vdm_hub import VDMPipeline, save_grid


def main() -> None:
    """Draw, and save the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a model that is told captions, trained with condition dropout")
    parser.add_argument("prompts", nargs="+", help="two or more")
    parser.add_argument("--columns", type=int, default=9, help="how many mixtures, both ends included (default: 9)")
    parser.add_argument("--rows", type=int, default=2, help="of each pair, each of its own noise (default: 2)")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("between.png"), help="the PNG to write")
    arguments = parser.parse_args()
    pipe = VDMPipeline.from_pretrained(arguments.pipeline)
    rows = []
    for pair in pairwise(arguments.prompts):
        states, mask, *_ = pipe.encode_prompt(list(pair), do_classifier_free_guidance=False)
        share = torch.linspace(0, 1, arguments.columns)[:, None, None]
        between = torch.lerp(states[:1], states[1:], share)
        for row in range(arguments.rows):
            noise = [torch.Generator().manual_seed(arguments.seed + row) for _ in range(arguments.columns)]
            images = pipe(
                generator=noise,
                prompt_embeds=between,
                prompt_attention_mask=mask.any(0).expand(arguments.columns, -1),
                guidance_scale=arguments.guidance_scale,
                num_inference_steps=arguments.num_inference_steps,
                output_type="pt",
            ).images
            rows.append(images)
    save_grid(torch.cat(rows), arguments.picture, columns=arguments.columns)


if __name__ == "__main__":
    main()
