"""The public PyTorch VDM, addtt's ``variational-diffusion-models``, trained and measured on the data of a run of ours.

It is read from the folder that ``--addtt`` names, and no line of it is here. Of it are run: its network
(``vdm_unet.UNetVDM``), its model and loss (``vdm.VDM``), its settings (``utils.TrainConfig``, with the defaults of
its ``train.py``) and its evaluation (``utils.evaluate_model``). Its loop is repeated: AdamW(2e-4, (0.9, 0.99), weight
decay 0.01), the gradient's norm clipped at 1, and the average of the weights that ema_pytorch makes of decay 0.9999
and power 3/4, which is diffusers' `EMAModel` with these numbers. Its reading of CIFAR-10 is left out: it gets the
images of the shards as tensors on the device. As its ``accelerate_config.yaml`` says, it computes in float32 (with
TF32 where torch has it) and is not compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from records import error_of_mean, fingerprint, read, sha256
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdm_hub import ConfigurationError, load_split, written_beside

DEFAULTS = {  # of its train.py
    "embedding_dim": 128,
    "n_blocks": 32,
    "n_attention_heads": 1,
    "dropout_prob": 0.1,
    "norm_groups": 32,
    "input_channels": 3,
    "use_fourier_features": True,
    "attention_everywhere": False,
    "batch_size": 128,
    "noise_schedule": "fixed_linear",
    "gamma_min": -13.3,
    "gamma_max": 5.0,
    "antithetic_time_sampling": True,
    "lr": 2e-4,
    "weight_decay": 0.01,
    "clip_grad_norm": True,
}
FILES = ("vdm.py", "vdm_unet.py", "utils.py")
CHECKPOINT_SECONDS = 20.0
MOST_PASSES = 8


class PublicVDM:
    """Its model, optimiser and averaged weights, built from its own classes.

    Args:
        folder: A checkout of its repository.
        fields: Settings other than its defaults.
        shape: Of one image, (C, H, W).

    Raises:
        ConfigurationError: The folder is no such checkout.
    """

    def __init__(self, folder: Path, fields: dict[str, Any], shape: tuple[int, ...]) -> None:
        modules, self.stood_in_for = load_modules(folder)
        settings = DEFAULTS | fields | {"input_channels": shape[0]}
        if unknown := sorted(settings.keys() - DEFAULTS.keys()):
            raise ConfigurationError(f"addtt's settings have no {unknown[0]}: choose from {', '.join(DEFAULTS)}.")
        self.settings, self.evaluate_model = settings, modules["utils"].evaluate_model
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = modules["utils"].TrainConfig(**settings)
        model = modules["vdm"].VDM(modules["vdm_unet"].UNetVDM(config), config, image_shape=torch.Size(shape))
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            settings["lr"],
            betas=(0.9, 0.99),
            weight_decay=settings["weight_decay"],
            eps=1e-8,
        )
        self.ema = EMAModel(
            self.model.parameters(),
            decay=0.9999,
            update_after_step=100,
            use_ema_warmup=True,
            power=3 / 4,
        )

    def train_step(self, images: Tensor) -> Tensor:
        """One step of its loop, on (B, C, H, W) in [0, 1]; returns its loss, in bits/dim."""
        self.model.train()
        self.optimizer.zero_grad()
        loss, _ = self.model(images)
        loss.backward()
        if self.settings["clip_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        return loss.detach()

    def evaluate(self, levels: Tensor, draw: int, batches: range) -> list[float]:
        """The bits/dim of some batches by its own evaluation of the weights as they are; each batch seeds its draws.

        Args:
            levels: All images, uint8 of shape (N, C, H, W).
            draw: The number of this pass over them.
            batches: The numbers of the batches.
        """
        rows: list[float] = []

        def model(batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
            loss, metrics = self.model(batch)
            rows.append(float(metrics["bpd"]))
            return loss, metrics

        def seeded() -> Iterator[Tensor]:
            size = self.settings["batch_size"]
            for number in batches:
                seed = 1_000_003 * draw + number
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - what its times are drawn by
                yield as_images(levels[number * size : (number + 1) * size].to(self.device))

        self.model.eval()
        with torch.no_grad():
            self.evaluate_model(model, seeded())
        return rows

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the model has the averaged weights."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        yield
        self.ema.restore(self.model.parameters())

    def description(self) -> dict[str, Any]:
        """What of it runs, and how."""
        return {
            "ran": "its UNetVDM, VDM, TrainConfig and evaluate_model, in a loop like its own",
            "found_by": "its own evaluate_model, of its averaged weights, without the last, incomplete batch",
            "stood_in_for": self.stood_in_for,
            "settings": self.settings,
            "parameters": sum(one.numel() for one in self.model.parameters()),
            "device": self.device.type,
            "mixed_precision": "no",
            "compile": "no",
        }

    def load(self, weights: Path) -> None:
        """Take over weights that `addtt` saved."""
        self.model.load_state_dict(load_file(weights, str(self.device)))


def as_images(levels: Tensor) -> Tensor:
    """Levels as numbers in [0, 1], as torchvision's ToTensor makes them."""
    return levels.float() / 255


def load_modules(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Its modules, and for what of its imports an empty module stands in: it is asked for nothing that runs here."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ConfigurationError(
            f"{folder} holds no {missing[0]}: name a checkout of github.com/addtt/variational-diffusion-models."
        )
    sys.path.insert(0, str(folder))
    stood_in_for = []
    for name in ("torchinfo", "torchvision"):
        if importlib.util.find_spec(name) is None:
            stood_in_for.append(name)
            for one in [name, *([f"{name}.transforms", f"{name}.datasets"] if name == "torchvision" else [])]:
                sys.modules[one] = types.ModuleType(one)
    if "torchvision" in stood_in_for:
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
        sys.modules["torchvision.datasets"].CIFAR10 = None  # type: ignore[attr-defined]
    return {Path(name).stem: importlib.import_module(Path(name).stem) for name in FILES}, stood_in_for


def addtt(plan: dict[str, Any], output: Path, until: float, folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Train it for as many seconds as ours was, and measure it by its own evaluation, once at least.

    Args:
        plan: That of all phases.
        output: The folder of the results.
        until: The time, by ``time.perf_counter``, at which it is to be done.
        folder: A checkout of its repository.
        fields: Settings other than its defaults.
    """
    train_levels, test_levels = (
        load_split(plan["data"], plan[split], num_levels=256).levels for split in ("train_split", "test_split")
    )
    seconds = read(output / "phases" / "train.json")["training_seconds"]
    torch.manual_seed(plan["seed"])
    public = PublicVDM(folder, {"batch_size": plan["batch_size"]} | fields, tuple(test_levels.shape[1:]))
    trained = train(public, train_levels, output / "addtt" / "checkpoint.pt", seconds, plan["seed"])
    weights, batches = output / "addtt" / "weights.safetensors", len(test_levels) // public.settings["batch_size"]
    with public.averaged():
        with written_beside(weights) as beside:
            save_file({name: one.contiguous() for name, one in public.model.state_dict().items()}, beside)
        rows = passes(public, test_levels, batches, until)
    found = {"num_images": batches * public.settings["batch_size"], "rows": rows, "weights": sha256(weights)}
    found |= {"images": fingerprint(test_levels), "files": {name: sha256(folder / name) for name in FILES}}
    return trained | addtt_figures(rows) | found | {"commit": commit_of(folder)} | public.description()


def passes(public: PublicVDM, levels: Tensor, batches: int, until: float) -> list[list[float]]:
    """The bits/dim of each batch in as many passes as there is time for."""
    if batches == 0:
        raise ConfigurationError(
            f"{len(levels)} test images are less than a batch of {public.settings['batch_size']}, and its evaluation "
            f"leaves incomplete ones out: give a smaller train_batch_size."
        )
    rows: list[list[float]] = []
    longest = 0.0
    while len(rows) < MOST_PASSES and (not rows or time.perf_counter() + longest < until):
        start = time.perf_counter()
        rows.append(public.evaluate(levels, len(rows), range(batches)))
        longest = max(longest, time.perf_counter() - start)
    return rows


def addtt_figures(rows: list[list[float]]) -> dict[str, Any]:
    """The mean over passes and batches, and its Monte Carlo error from the passes (null for one)."""
    means = [float(np.mean(row)) for row in rows]
    return {"bits_per_dim": float(np.mean(means)), "standard_error": error_of_mean(means), "passes": len(rows)}


def train(public: PublicVDM, levels: Tensor, checkpoint: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Train until so many seconds of training are over, from the checkpoint where there is one."""
    step, before, curve = restore(public, checkpoint)
    torch.manual_seed(seed + step)
    np.random.seed(seed + step)  # noqa: NPY002 - what its times are drawn by
    levels, order = levels.to(public.device), Order(len(levels), public.settings["batch_size"], seed)
    start = saved = time.perf_counter()
    spent = before
    while spent < seconds or step == 0:
        loss = public.train_step(as_images(levels[order.batch(step).to(public.device)]))
        step, value = step + 1, float(loss)  # waits for the device, as its own loop does
        spent = before + time.perf_counter() - start
        if step % max(1, step // 50) == 0 or spent >= seconds:
            curve["step"].append(step)
            curve["bits_per_dim"].append(value)
        if time.perf_counter() - saved > CHECKPOINT_SECONDS or spent >= seconds:
            save(public, {"step": step, "seconds": spent, "curve": curve}, checkpoint)
            saved = time.perf_counter()
    return {"steps": step, "training_seconds": spent, "curve": curve}


class Order:
    """The order of the images: each epoch is a permutation, and its last, incomplete batch is left out."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self._epoch, self._order = -1, torch.zeros(0)

    def batch(self, step: int) -> Tensor:
        """The indices of the images of a step, (B,)."""
        epoch, place = divmod(step, self.count // self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + 7_919 * epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self._order[place * self.size : (place + 1) * self.size]


def restore(public: PublicVDM, checkpoint: Path) -> tuple[int, float, dict[str, list[float]]]:
    """Take over a checkpoint, where there is one: its step, the seconds of training until there, and the curve."""
    if not checkpoint.exists():
        return 0, 0.0, {"step": [], "bits_per_dim": []}
    kept = torch.load(checkpoint, map_location=public.device, weights_only=True)
    public.model.load_state_dict(kept["model"])
    public.optimizer.load_state_dict(kept["optimizer"])
    public.ema.load_state_dict(kept["ema"])
    return kept["done"]["step"], kept["done"]["seconds"], kept["done"]["curve"]


def save(public: PublicVDM, done: dict[str, Any], place: Path) -> None:
    """Write a checkpoint."""
    with written_beside(place) as beside:
        torch.save(
            {
                "model": public.model.state_dict(),
                "optimizer": public.optimizer.state_dict(),
                "ema": public.ema.state_dict(),
                "done": done,
            },
            beside,
        )


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout; ``None`` of a folder that is none."""
    if not (folder / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
