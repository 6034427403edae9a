"""Small runs to publish: real pipelines, and the records of a run beside them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import UNet2DModel
from PIL import Image

import fork_server
from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler
from vdm_hub.evaluation.provenance import weights_fingerprint

IMAGES: dict[str, Any] = {
    "name": "digits",
    "config": None,
    "split": "test",
    "images": 360,
    "shape": [1, 8, 8],
    "levels": 17,
    "resolution": None,
    "resized": False,
    "fingerprint": f"sha256:{'8c43' * 16}",
}
EVALUATION: dict[str, Any] = {
    "bits_per_dim": 1.75,
    "standard_error": 0.01,
    "standard_error_over_images": 0.02,
    "terms": {"reconstruction": 0.25, "prior": 0.125, "diffusion": 1.375},
    "num_images": 360,
    "network_evaluations": 1440,
    "replicates": 4,
    "transitions": None,
    "is_bound": True,
    "method": "bound",
    "dimensions": 64,
    "dataset": IMAGES,
    "seed": 0,
    "processes": 1,
    "versions": {"vdm-hub": "0.1.0"},
    "seconds": 1.0,
}
RECIPE: dict[str, Any] = {
    "dataset_name": "digits",
    "train_split": "train",
    "num_levels": 17,
    "seed": 0,
    "max_train_steps": 6,
}
RUN: dict[str, Any] = {
    "command": "accelerate launch --num_processes 1 -m vdm_hub.train recipe.yaml",
    "versions": {"vdm-hub": "0.1.0", "torch": "2.13.0"},
    "plugins": {},
    "git": None,
    "dataset": IMAGES | {"split": "train", "images": 1437},
    "augmentation": {"random_flip": False, "random_crop": False},
    "steps": 6,
    "processes": 1,
    "global_batch_size": 16,
    "training_seconds": 1.5,
    "device": "cpu",
    "gradient_accumulation_steps": 1,
    "mixed_precision": "no",
    "parameters": {"network": 100, "schedule": 0},
}


def tiny_network(stock: bool, seed: int = 0) -> torch.nn.Module:
    """8x8 grey; of diffusers' own class where ``stock``, so that the pipeline has a twin."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4}
    if not stock:
        return UNetVDMModel(**shape, block_out_channels=(8,), layers_per_block=1).eval()
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(**shape, **blocks, block_out_channels=(8,), layers_per_block=1).eval()


def tiny_pipeline(stock: bool = False, seed: int = 0, **scheduler: Any) -> VDMPipeline:
    """A pipeline for the 17 levels of the digits."""
    pipeline = VDMPipeline(tiny_network(stock, seed), VDMScheduler(num_levels=17, **scheduler))  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_run(
    folder: Path,
    stock: bool = False,
    seed: int = 0,
    evaluation: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    **scheduler: Any,
) -> Path:
    """A run's folder as training leaves it; what is given replaces the records' own fields."""
    tiny_pipeline(stock, seed, **scheduler).save_pretrained(folder / "pipeline")
    weights = weights_fingerprint(tiny_pipeline(stock, seed, **scheduler))
    records = {"evaluation.json": {"weights": weights} | (evaluation or EVALUATION), "run.json": RUN | (run or {})}
    records["history.json"] = {
        "train": {"step": [1, 2], "bits_per_dim": [9.0, 8.0 - seed]},
        "validation": {"step": [], "bits_per_dim": []},
    }
    for name, record in records.items():
        (folder / name).write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | (recipe or {})))
    for name in ("samples.png", "schedule.png", "training_curve.png"):
        Image.new("L", (4, 4), seed).save(folder / name)
    return folder


def answer_of(script: str, *words: object) -> dict[str, Any]:
    """What a script of this folder answers from a process of its own."""
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parent), str(here.parents[1])))}
    # It chooses its environment itself, before it imports what reads it.
    command = [*fork_server.NEW, str(here / script), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.split("ANSWER")[-1])
    return answer
