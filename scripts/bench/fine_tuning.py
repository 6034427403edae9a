"""A DDPM trained by diffusers' own script, then trained on by the bound: bits/dim before and after, at equal seconds.

``python scripts/bench/fine_tuning.py --diffusers_script train_unconditional.py`` prints a table. The script is that of
``examples/unconditional_image_generation`` in the repository of diffusers, which its package does not hold; it needs
torchvision. Of each seed four models are trained on scikit-learn's digits (8x8, 17 grey levels, as RGB images, as that
script makes all images): by its own objective for half of the seconds and for all of them, by the bound from what the
first half left, and by the bound alone for all of them. Seconds are of CPU time on one thread, of training alone: two
short runs say what a step costs, and the numbers of steps follow. All have one network and one table of betas. A run
that was stopped goes on in its ``--output`` when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image as Picture
from sklearn.datasets import load_digits

LEVELS, SIDE, BATCH, TEST = 17, 8, 64, 360
NETWORK = {
    "sample_size": SIDE,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
}
RECIPE: dict[str, Any] = {
    "num_levels": LEVELS,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "train_batch_size": BATCH,
    "ema_max_decay": 0.9999,
    "num_sample_images": 0,
    "evaluation_replicates": 0,
    "checkpointing_steps": 0,
    "report_to": "none",
    "test_split": None,
}
SEEDED = "import runpy, sys, torch; torch.manual_seed(int(sys.argv[1])); sys.argv = sys.argv[2:]; "
SEEDED += "runpy.run_path(sys.argv[0], run_name='__main__')"


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers_script", type=Path, required=True, help="diffusers' train_unconditional.py")
    parser.add_argument("--seconds", type=float, default=60, help="of CPU time of each half (default: 60)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of both objectives (default: 1e-3)")
    parser.add_argument("--replicates", type=int, default=8, help="of the evaluation (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("runs/fine_tuning"))
    arguments = parser.parse_args()
    bench = Bench(arguments)
    found = [bench.seed(seed) for seed in arguments.seeds]
    print(table(found, arguments.seconds))


class Bench:
    """The data, the untrained model, and what an epoch or a step costs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, arguments.output
        self.folder.mkdir(parents=True, exist_ok=True)
        write_digits(self.folder / "data")
        self.images = 1797 - TEST
        self.costs: dict[str, float] = {}  # CPU seconds of an epoch of the script, and of a step of the bound

    def seed(self, seed: int) -> dict[str, dict[str, float]]:
        """The figures of the four models of a seed."""
        folder, half = self.folder / f"seed{seed}", self.arguments.seconds
        untrained = folder / "untrained"
        if not untrained.exists():
            torch.manual_seed(seed)
            DDPMPipeline(UNet2DModel(**NETWORK), DDPMScheduler(clip_sample=True)).save_pretrained(untrained)
        self._calibrate(untrained)
        epochs, steps = half / self.costs["epoch"], half / self.costs["step"]
        first = self.ddpm(folder / "ddpm_half", untrained, seed, round(epochs))
        figures = {
            "ddpm, half": first,
            "then the bound": self.bound(folder / "tuned", first, seed, round(steps)),
            "ddpm": self.ddpm(folder / "ddpm", untrained, seed, round(2 * epochs)),
            "the bound": self.bound(folder / "bound", untrained, seed, round(2 * steps)),
        }
        return {name: self.measure(place) for name, place in figures.items()}

    def _calibrate(self, untrained: Path) -> None:
        """Take the cost of an epoch and of a step from the difference of two short runs each, once."""
        folder = self.folder / "calibration"
        kept = folder / "costs.json"
        if self.costs:
            return
        if kept.exists():
            self.costs = json.loads(kept.read_text())
        tasks: dict[str, tuple[tuple[int, int], Callable[[int], Path]]] = {
            "epoch": ((1, 9), lambda n: self.ddpm(folder / f"epochs{n}", untrained, 0, n)),
            "step": ((20, 220), lambda n: self.bound(folder / f"steps{n}", untrained, 0, n)),
        }
        for name, (counts, task) in tasks.items():
            if name not in self.costs:
                for count in counts:  # of a script that was stopped
                    shutil.rmtree(folder / f"{name}s{count}", ignore_errors=True)
                few, many = (seconds(task, count) for count in counts)
                self.costs[name] = (many - few) / (counts[1] - counts[0])
                kept.write_text(json.dumps(self.costs))
        batches, (epoch, step) = -(-self.images // BATCH), self.costs.values()
        half = self.arguments.seconds
        print(
            f"{half:g} CPU seconds are {round(half / epoch) * batches} steps of diffusers' script "
            f"({epoch / batches:.3f} s each) and {round(half / step)} of the bound ({step:.3f} s each)",
            flush=True,
        )

    def ddpm(self, output: Path, untrained: Path, seed: int, epochs: int) -> Path:
        """A model trained by diffusers' own script for so many epochs."""
        if (output / "model_index.json").exists():
            return output
        options = {
            "train_data_dir": self.folder / "data" / "pictures",
            "cache_dir": self.folder / "cache",
            "output_dir": output,
            "model_config_name_or_path": untrained / "unet",
            "resolution": SIDE,
            "train_batch_size": BATCH,
            "num_epochs": epochs,
            "learning_rate": self.arguments.learning_rate,
            "lr_warmup_steps": 20,
            "save_images_epochs": epochs,
            "save_model_epochs": epochs,
            "eval_batch_size": 1,
            "ddpm_num_inference_steps": 2,
            "checkpointing_steps": 10**8,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        run([sys.executable, "-c", SEEDED, str(seed), str(self.arguments.diffusers_script), *words, "--use_ema"])
        return output

    def bound(self, output: Path, start: Path, seed: int, steps: int) -> Path:
        """A model trained on from another by the bound, in continuous time."""
        if (output / "pipeline" / "model_index.json").exists():
            return output / "pipeline"
        fields = RECIPE | {"train_data_dir": str((self.folder / "data" / "train.parquet").resolve())}
        fields |= {"init_from": str(start.resolve()), "seed": seed, "max_train_steps": steps}
        fields |= {"learning_rate": self.arguments.learning_rate}
        recipe = output.with_suffix(".yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
        run([sys.executable, "-m", "vdm_hub.train", str(recipe), "--output_dir", str(output)])
        return output / "pipeline"

    def measure(self, pipeline: Path) -> dict[str, float]:
        """The bits/dim of a model on the test images, by ``vdm-hub evaluate``."""
        kept = pipeline / "fine_tuning.json"
        if not kept.exists():
            command = [sys.executable, "-m", "vdm_hub.commands", "evaluate", str(pipeline), "--json"]
            command += ["--dataset_name", str(self.folder / "data" / "test.parquet"), "--split", "train"]
            command += ["--replicates", str(self.arguments.replicates)]
            is_ours = json.loads((pipeline / "model_index.json").read_text())["_class_name"] == "VDMPipeline"
            kept.write_text(run(command + ([] if is_ours else ["--num_levels", str(LEVELS)])).splitlines()[-1])
        report = json.loads(kept.read_text())
        return {name: report[name] for name in ("bits_per_dim", "standard_error")}


def write_digits(folder: Path) -> None:
    """The digits as RGB pictures for diffusers' script, and as two Parquet files: all but the last 360, and those."""
    pictures = [
        Picture.fromarray(np.rint(255 * one / (LEVELS - 1)).astype(np.uint8)).convert("RGB")
        for one in load_digits().images
    ]
    if folder.exists():
        return
    (folder / "pictures").mkdir(parents=True)
    for number, picture in enumerate(pictures[:-TEST]):
        picture.save(folder / "pictures" / f"{number:04d}.png")
    for name, part in {"train": pictures[:-TEST], "test": pictures[-TEST:]}.items():
        Dataset.from_dict({"image": part}, Features({"image": Image()})).to_parquet(folder / f"{name}.parquet")


def run(command: list[str]) -> str:
    """What a command on one thread printed.

    Raises:
        SystemExit: It failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def seconds(task: Callable[[int], Path], count: int) -> float:
    """The CPU time, user's and system's, of the processes that a task starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    task(count)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(found: list[dict[str, dict[str, float]]], half: float) -> str:
    """The table of the means over seeds, in Markdown."""
    names = {
        "ddpm, half": f"{half:g} s of diffusers' script",
        "then the bound": f"the same, then {half:g} s of the bound",
        "ddpm": f"{2 * half:g} s of diffusers' script",
        "the bound": f"{2 * half:g} s of the bound",
    }
    lines = ["| training | bits/dim | seeds | Monte Carlo error |", "| --- | --- | --- | --- |"]
    for key, words in names.items():
        bits = [one[key]["bits_per_dim"] for one in found]
        spread = f" ± {statistics.stdev(bits):.4f}" if len(bits) > 1 else ""
        error = max(one[key]["standard_error"] for one in found)
        each = ", ".join(f"{value:.4f}" for value in bits)
        lines.append(f"| {words} | {statistics.fmean(bits):.4f}{spread} | {each} | {error:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
