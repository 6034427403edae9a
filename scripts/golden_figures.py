"""The package's figures, bit for bit: written before a change that should alter none, and compared after it.

    python scripts/golden_figures.py --write golden.json
    python scripts/golden_figures.py --compare golden.json     # exit status 1, and what differs

Bounds, gradients and samples of every schedule, target, conditioning and decoder, of each method and sampler, and of
each rung of the ladder; then four short runs of the digits' recipes with their weights, reports and cards. Figures
are floats in hexadecimal; tensors and texts are SHA-256 sums. Only what the package exports is used, and its commands.
Takes about 4 minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from vdm_hub import (
    HVAEPipeline,
    ImportanceWeighted,
    LatentVDMPipeline,
    LikelihoodMethod,
    MarkovianHVAE,
    UNetVDMModel,
    VariationalBound,
    VDMObjective,
    VDMPipeline,
    VDMScheduler,
    registry,
)

LEVELS, SIDE = 17, 8
NET: dict[str, Any] = {"sample_size": SIDE, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4}
NET |= {"block_out_channels": (8,), "layers_per_block": 1}
NEEDED: dict[str, dict[str, Any]] = {
    "tabulated": {"gammas": [-7.0, 0.0, 5.0]},
    "discrete_betas": {"betas": [1e-3, 2e-2, 0.3, 0.9]},
    "table": {"gammas": [-13.3, -2.0, 1.0, 5.0]},
}
SHORT = {"max_train_steps": 8, "lr_warmup_steps": 2, "evaluation_replicates": 2, "checkpointing_steps": 8}
SHORT |= {"num_sample_images": 4, "num_inference_steps": 3, "report_to": "none"}
UNSTABLE = re.compile(r"(?i)[^\n]*(seconds|version|commit|20\d\d-\d\d|/tmp/|minutes|\d s on \d)[^\n]*\n")
"""Lines of a card that say when, where and with what."""


def digest(value: Tensor | str | bytes) -> str:
    """The sum of a tensor's bytes, or of a text."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:16]


def random_weights(network: Any, seed: int = 0) -> Any:
    """No layer stays at its initial zero, so that every input moves the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def network(cls: type = UNetVDMModel, **arguments: Any) -> Any:
    """A tiny network with fixed weights."""
    torch.manual_seed(0)
    return random_weights(cls(**NET | arguments))


def levels(count: int = 3) -> Tensor:
    """Images, as levels."""
    return torch.randint(LEVELS, (count, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(1))


def quiet(pipeline: Any) -> Any:
    """Without a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def schedulers() -> Iterator[tuple[str, VDMScheduler]]:
    """One for each thing that is registered, the others at their defaults."""
    fields = {"noise_schedules": "noise_schedule", "parameterizations": "prediction_type"}
    fields |= {"conditionings": "conditioning", "decoders": "decoder"}
    for kind, field in fields.items():
        for name in registry.BUILT_INS[kind]:
            form = {"name": name, "config": NEEDED[name]} if name in NEEDED else name
            yield f"{field}={name}", VDMScheduler(num_levels=LEVELS, **{field: form})


def bounds() -> Iterator[tuple[str, Any]]:
    """Terms and gradients of a batch."""
    batch, times = {"levels": levels()}, torch.tensor([0.1, 0.45, 0.93])
    for name, scheduler in schedulers():
        for transitions in (None, 4):
            objective = VDMObjective(network(), scheduler.process, transitions)
            bound = objective(batch, times, objective.draw_noise(batch, torch.Generator().manual_seed(2)))
            sum(term.sum() for term in bound.terms.values()).backward()
            gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
            for term, value in bound.terms.items():
                yield f"bound {name} T={transitions} {term}", [number.hex() for number in value.tolist()]
            yield f"bound {name} T={transitions} gradient", digest(torch.cat(gradients).double())


def pipelines() -> Iterator[tuple[str, Any]]:
    """One of each rung."""
    yield "vdm", VDMPipeline(network(), VDMScheduler(num_levels=LEVELS))
    velocity = VDMScheduler(num_levels=LEVELS, noise_schedule="learned_monotone", prediction_type="v_prediction")
    yield "velocity", VDMPipeline(network(), velocity)
    stock = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    ddpm = DDPMPipeline(network(UNet2DModel, **stock), DDPMScheduler(num_train_timesteps=20, clip_sample=False))
    with tempfile.TemporaryDirectory() as folder:
        ddpm.save_pretrained(folder)
        yield "ddpm", VDMPipeline.from_diffusers(folder)
    torch.manual_seed(0)
    shapes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "num_levels": LEVELS}
    hvae = MarkovianHVAE(sample_size=SIDE, in_channels=1, depth=2, latent_shapes=[[1, 8, 8], [4]], **shapes)
    yield "hvae", HVAEPipeline(random_weights(hvae))
    torch.manual_seed(0)
    stage = MarkovianHVAE(sample_size=SIDE, in_channels=1, depth=1, latent_shapes=[[1, 8, 8]], **shapes)
    yield "latent", LatentVDMPipeline(random_weights(stage), network(), VDMScheduler(num_levels=LEVELS))


def likelihoods() -> Iterator[tuple[str, Any]]:
    """Each method, and samples by each sampler."""
    for name, pipeline in pipelines():
        quiet(pipeline)
        ways: dict[str, LikelihoodMethod] = {
            "{}": VariationalBound(),
            "{'transitions': 4}": VariationalBound(4),
            "{'method': 'importance_weighted', 'transitions': 4, 'draws': 2}": ImportanceWeighted(4, draws=2),
        }
        for way, method in ways.items():
            words = f"likelihood {name} {way}"
            try:
                report = pipeline.log_likelihood(levels(), method, replicates=2)
            except ValueError as error:  # the model has no such likelihood
                yield words, type(error).__name__
                continue
            yield words, [number.hex() for number in report.per_image.tolist()]
            yield f"{words} error", float(report.standard_error).hex()
        samplers = ["ancestral"] if name in ("hvae", "latent", "ddpm") else ["ancestral", *SAMPLERS]
        for sampler in samplers:
            chosen = {} if sampler == "ancestral" else {"sampler": sampler}
            drawn = pipeline.sample(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)], 5, **chosen)
            yield f"sample {name} {sampler}", digest(drawn)


SAMPLERS = ("reverse_sde", "probability_flow", "predictor_corrector", "annealed_langevin")


def run(folder: Path, *words: object) -> str:
    """One of the package's commands."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def ways_to_measure(recipe: str) -> dict[str, tuple[object, ...]]:
    """Options of ``vdm-hub evaluate``, by what a figure is called."""
    ways: dict[str, tuple[object, ...]] = {"bound": ("--max_images", 20)}
    weighted = ("--method", "importance_weighted", "--max_images", 5, "--draws", 2)
    if recipe != "digits_latent":
        ways["importance weighted"] = weighted if "vae" in recipe else (*weighted, "--transitions", 5)
    if recipe == "digits":
        ways["ode"] = ("--method", "ode", "--max_images", 1, "--tolerance", 0.1)
    return ways


def runs() -> Iterator[tuple[str, Any]]:
    """Weights, reports and cards of short runs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for recipe in ("digits", "digits_hvae", "digits_vae", "digits_latent"):
            fields = [word for name, value in SHORT.items() for word in (f"--{name}", value)]
            run(folder, "vdm_hub.train", recipe, *fields)
            saved = folder / "runs" / recipe / "pipeline"
            for weights in sorted(saved.rglob("*.safetensors")):
                yield f"run {recipe} {weights.relative_to(saved)}", digest(weights.read_bytes())
            for name, options in ways_to_measure(recipe).items():
                words = ("--dataset_name", "digits", "--replicates", 2, "--json", *options)
                report = json.loads(run(folder, "vdm_hub.commands", "evaluate", f"runs/{recipe}", *words))
                yield f"run {recipe} {name}", float(report["bits_per_dim"]).hex()
            run(folder, "vdm_hub.commands", "publish", f"runs/{recipe}", f"me/{recipe}", "--dry_run")
            card = next(folder.rglob(f"*{recipe}*/**/README.md"))
            yield f"run {recipe} card", UNSTABLE.sub("", card.read_text()).splitlines()


def main() -> int:
    """Write the figures, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", type=Path)
    choice.add_argument("--compare", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {name: value for part in (bounds, likelihoods, runs) for name, value in part()}
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{len(figures)} figures: {arguments.write}")
        return 0
    before = json.loads(arguments.compare.read_text())
    different = [name for name in {**before, **figures} if before.get(name) != figures.get(name)]
    for name in different:
        print(f"{name}\n  before: {before.get(name)}\n  now:    {figures.get(name)}")
    print(f"{len(figures)} figures, {len(different)} of them other than before")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
