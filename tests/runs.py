"""Small real runs on digits, in this process or in processes of their own."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset

from vdm_hub.commands import main
from vdm_hub.data import loading
from vdm_hub.data.images import ImageLevels, ImageReader, decode_all
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.plots import plot_schedule, plot_training_curve
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import OF_A_MODEL
from vdm_hub.training.loop import TrainingRun, build_accelerator, load_run, train_model
from vdm_hub.training.parts.initial_models import open_initial_model
from vdm_hub.training.state import outputs
from vdm_hub.training.state.outputs import OutputFolder

ROOT = Path(__file__).resolve().parents[1]
UNET = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
TINY: dict[str, Any] = {
    "dataset_name": "digits",
    "num_levels": 17,
    "noise_schedule": {"name": "linear", "config": {"gamma_min": -7.87, "gamma_max": 5.0}},
    "unet": UNET,
    "max_train_steps": 6,
    "train_batch_size": 16,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "num_inference_steps": 3,
    "num_sample_images": 0,
    "evaluation_replicates": 0,
    "report_to": "none",
}
LEARNED = {"name": "learned_monotone", "config": {"gamma_min": -7.87, "gamma_max": 5.0, "hidden_features": 32}}
LAUNCH = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SHIM = str(ROOT / "scripts" / "train.py")


def _schedule_once(process: ForwardProcess, report: LikelihoodReport | None, path: Path) -> None:
    """Runs draw the same pictures again and again, for half a second: in this process each is drawn once."""
    schedule, t = process.diffused.scalar_gamma, torch.linspace(0, 1, 201, dtype=torch.float64)
    if report is not None or schedule is None:
        return plot_schedule(process, report, path)
    with torch.no_grad():
        curve = schedule(t.to(next(schedule.parameters(), t).device)).cpu().numpy().tobytes()
    _draw_once(curve, lambda: plot_schedule(process, report, path), path)


def _course_once(history: Mapping[str, Any], path: Path, unit: str = "bits/dim") -> None:
    """One picture for all courses of the same terms and numbers of steps: what it shows is tests/test_plots.py's."""
    sizes = {part: {name: len(values) for name, values in columns.items()} for part, columns in history.items()}
    _draw_once(json.dumps(sizes) + unit, lambda: plot_training_curve(history, path, unit), path)


def _draw_once(shown: object, draw: Callable[[], None], path: Path) -> None:
    if shown not in _drawn:
        draw()
        _drawn[shown] = path.read_bytes()
    path.write_bytes(_drawn[shown])


def _decode_once(
    dataset: Dataset, column: str, reader: ImageReader, labels: torch.Tensor | None = None
) -> ImageLevels:
    """Most runs train on the digits: images that these bytes were decoded to in this process are taken again."""
    rows = dataset[:][column] if len(dataset) < 2000 and reader.open_file is None else [None]
    if not all(isinstance(row, dict) and row.get("bytes") for row in rows):
        return decode_all(dataset, column, reader, labels)
    key = reader, tuple((row["bytes"], row.get("path")) for row in rows)
    if key not in _decoded:
        _decoded[key] = decode_all(dataset, column, reader)
    return replace(_decoded[key], labels=labels)


_drawn: dict[object, bytes] = {}
_decoded: dict[object, ImageLevels] = {}
outputs.plot_schedule, outputs.plot_training_curve = _schedule_once, _course_once
loading.decode_all = _decode_once


def configuration(output: Path, **fields: Any) -> Configuration:
    begins = "init_from" in fields  # from a model that answers the rest
    usual = {name: value for name, value in TINY.items() if not (begins and name in OF_A_MODEL)}
    return Configuration.from_dict(usual | {"output_dir": str(output)} | fields, recipe="tiny")


def recipe(folder: Path, output: Path, **fields: Any) -> str:
    """The path of a recipe file for another process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(configuration(output, **fields).to_yaml())
    return str(path)


def forget_accelerator() -> None:
    """accelerate keeps its state for the life of a process; each run here begins as in a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def as_process(index: int, number: int) -> None:
    """What accelerate would say in one process of several."""
    for state in (AcceleratorState, PartialState):
        state._shared_state.update(process_index=index, num_processes=number)


def vdm_hub_here(*words: object) -> int:
    """``vdm-hub`` with a command line, in this process; its exit status."""
    return main([str(word) for word in words])


def train_here(output: Path, **fields: Any) -> LikelihoodReport | None:
    forget_accelerator()
    return train_model(configuration(output, **fields))


def start(output: Path, **fields: Any) -> TrainingRun:
    """A run before its first step."""
    forget_accelerator()
    chosen, folder = configuration(output, **fields), OutputFolder(configuration(output, **fields))
    accelerator = build_accelerator(chosen, folder.path, folder.logs)
    if (initial := open_initial_model(chosen, folder.initial)) is not None:
        chosen = initial.configuration
    data, condition = load_run(chosen, accelerator, initial)
    return TrainingRun(chosen, accelerator, data, folder, condition, initial)


def environment(**changes: str) -> dict[str, str]:
    left_out = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return kept | quiet | changes


def python(module: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments``, to its end; forked, and so are its workers."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(**changes), cwd=ROOT, check=False
    )


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vdm_hub_runs_")


@functools.cache
def finished_run() -> tuple[Path, subprocess.CompletedProcess[str]]:
    """``accelerate launch scripts/train.py digits`` to its end, once a session; for tests that only read."""
    output = Path(_scratch().name) / "digits"
    fields = TINY | {"num_sample_images": 4, "evaluation_replicates": 2, "checkpointing_steps": 4}
    fields |= {"report_to": "tensorboard", "output_dir": str(output)}
    words = [
        word
        for name, value in fields.items()
        if name != "dataset_name"
        for word in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]
    return output, python(*LAUNCH, SHIM, "digits", *words)


def contents(folder: Path) -> dict[str, str]:
    """Every path below a folder, and what is in each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def weights(run: TrainingRun) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])
