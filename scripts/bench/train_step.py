"""What a training step costs over the bare network, examples/s, peak memory, and where the rest of the time goes.

``python scripts/bench/train_step.py`` prints a row and a breakdown per size. The bare step is the network alone on
tensors that are there: forward, squared error (of ``shakespeare``: cross entropy), backward, the same optimiser. The
training step is the library's own `TrainingRun.optimise`, with data, times, noise, schedule, bound, clipping, EMA and
learning rate.
Both alternate, and the ratio of each pair is taken, so that a machine whose speed drifts gives the same answer.

What follows ``--`` is passed on as fields of the recipe, for every size, such as
``-- --gradient_checkpointing true --compile regional --mixed_precision bf16 --channels_last true``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdm_hub import (
    ImageLevels,
    MuonAndAdamW,
    OutputFolder,
    RunData,
    TokenNetwork,
    TrainingRun,
    build_accelerator,
    build_condition,
    hidden_matrices,
    load_data,
    parse_recipe,
)

RGB = {"shape": (3, 32, 32), "num_levels": 256, "noise_schedule": "linear", "max_train_steps": 100000}
SIZES: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist": RGB
    | {
        "shape": (1, 28, 28),
        "train_batch_size": 32,
        "unet": {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8, "dropout": 0.0},
    },
    "rgb32_flat": RGB
    | {
        "train_batch_size": 16,
        "unet": {
            "block_out_channels": [32],
            "layers_per_block": 4,
            "norm_num_groups": 8,
            "mid_block_attention": False,
        },
    },
    "rgb32_two_resolutions": RGB
    | {
        "train_batch_size": 16,
        "unet": {"block_out_channels": [32, 64], "layers_per_block": 2, "norm_num_groups": 8},
    },
    "cifar10_paper": RGB | {"train_batch_size": 128, "unet": {}},
}
TEXTS = "shakespeare"  # the recipe as it is, on random characters; it needs the package vdm-hub-tokens
ON_CPU = [name for name in SIZES if name != "cifar10_paper"]  # the paper's network takes minutes a step there


def main() -> None:
    """Print the table, each size measured in a process of its own, as peak memory never falls."""
    own, fields = split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=[*SIZES, TEXTS], default=ON_CPU, help="(default: those that fit a CPU)"
    )
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps of each kind (default: 15)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(own)
    if arguments.here:
        print(json.dumps(measure(arguments.sizes[0], arguments.pairs, fields)))
        return
    print(f"{'size':<24}{'bare step':>12}{'step':>12}{'ratio':>8}{'examples/s':>12}{'peak memory':>14}")
    for name in arguments.sizes:
        command = [sys.executable, __file__, "--here", "--sizes", name, "--pairs", str(arguments.pairs), "--", *fields]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        _show(name, json.loads(done.stdout.splitlines()[-1]))


def measure(size: str, pairs: int, fields: list[str]) -> dict[str, Any]:
    """One row of the table."""
    before = _memory()
    run = build_run(size, fields)
    step = training_step(run)
    step(), step()
    peak = _memory() - before
    bare, whole, ratio = alternate(bare_step(run), step, pairs, run.accelerator.device)
    return {
        "bare": bare,
        "step": whole,
        "ratio": ratio,
        "examples_per_second": run.training.train_batch_size / whole,
        "peak_mib": peak / 2**20,
        "parts": breakdown(run, step, pairs),
    }


def build_run(size: str, fields: list[str]) -> TrainingRun:
    """A run of that size on random images or characters, before its first step."""
    words = ["--output_dir", tempfile.mkdtemp(), "--report_to", "none"]
    if size == TEXTS:
        configuration = parse_recipe([TEXTS, *words, "--dataset_name", _random_text(), *fields])
        data = load_data(configuration.data)
    else:
        chosen = dict(SIZES[size])
        shape, levels = chosen.pop("shape", (1, 8, 8)), chosen.get("num_levels", 17)
        for key, value in chosen.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        configuration = parse_recipe(["digits", *words, *fields])
        images = torch.randint(0, levels, (1024, *shape), dtype=torch.uint8)
        data = RunData(ImageLevels(images, shape, levels), None, None)
    return run_of(configuration, data)


def run_of(configuration: Any, data: RunData) -> TrainingRun:
    """A run on some data, before its first step."""
    folder = OutputFolder(configuration)
    accelerator = build_accelerator(configuration, folder.path, folder.logs)
    return TrainingRun(configuration, accelerator, data, folder, build_condition(configuration, data, accelerator))


def _random_text() -> str:
    """The path of a file of random characters, as many different ones as tinyshakespeare has."""
    path = Path(tempfile.mkdtemp()) / "text.txt"
    path.write_text("".join(random.Random(0).choices(string.printable[:65], k=100_000)))
    return str(path)


def training_step(run: TrainingRun) -> Callable[[], object]:
    """The library's own."""
    batches = run.batches()
    return lambda: run.optimise(next(batches))


def bare_network(run: TrainingRun) -> nn.Module:
    """A copy of the network, compiled as the run's own is."""
    network = copy.deepcopy(run.model.network).train()
    if run.training.compile == "whole":
        network.compile()
    return network


def bare_step(run: TrainingRun) -> Callable[[], object]:
    """Forward, squared error or cross entropy, backward and the run's optimiser, on tensors that are there."""
    network, device = bare_network(run), run.accelerator.device
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    if run.training.optimizer == "muon":
        optimizer = MuonAndAdamW([{"params": network.parameters()}], hidden_matrices(network), lr=1e-6)
    shape = (run.training.train_batch_size, *run.data.shape)
    sample, target = torch.randn(shape, device=device), torch.randn(shape, device=device)
    timestep = torch.rand(shape[0], device=device) * 999
    ids = torch.randint(0, run.data.num_levels, shape, device=device)

    def loss() -> Tensor:
        with run.accelerator.autocast():
            if isinstance(network, TokenNetwork):
                logits = network.model(input_ids=ids).logits
                return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
            output = network(sample, timestep, return_dict=False)[0]
        return F.mse_loss(output.float(), target)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def breakdown(run: TrainingRun, step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median milliseconds of each part of a training step; on a GPU it waits after each, which the steps do not."""
    device, seconds = run.accelerator.device, dict.fromkeys(("objective", "network forward"), 0.0)

    def timed(owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _wait(device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            _wait(device)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, method, wrapper)

    timed(run.source, "batch", "data")
    timed(run, "_times", "times")
    timed(run, "_noise", "noise")
    timed(run.model, "_compiled_call_impl" if run.training.compile == "whole" else "forward", "objective")
    if run.training.compile != "whole":
        timed(run.model.network, "forward", "network forward")
        timed(run.model.process, "encode", "encoding")
        if (decoder := getattr(run.model.process, "decoder", None)) is not None:
            timed(decoder, "negative_log_likelihood", "decoder")
    timed(run.accelerator, "backward", "backward")
    timed(run, "_clip", "clipping")
    timed(run._stepping, "step", "optimiser")
    timed(sys.modules[TrainingRun.__base__.__module__], "step_ema", "moving average")
    rows = []
    for _ in range(repeats):
        seconds.update(dict.fromkeys(seconds, 0.0))
        whole = _seconds(step, device)
        inside = sum(seconds.get(name, 0.0) for name in ("network forward", "encoding", "decoder"))
        outside = sum(seconds.values()) - inside
        rows.append(seconds | {"objective": seconds["objective"] - inside, "loop": whole - outside})
    parts = {name: 1e3 * statistics.median(row.get(name, 0.0) for row in rows) for name in rows[-1]}
    names = {"objective": "schedule and rest of the bound" if parts["network forward"] else "objective, compiled"}
    return {names.get(name, name): value for name, value in parts.items() if value > 0}


def alternate(
    one: Callable[[], object], other: Callable[[], object], pairs: int, device: torch.device
) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio of ``other`` to the ``one`` next to it, before or after in turn."""
    for _ in range(3):  # compilation, and warm caches
        one(), other()
    rows = []
    for pair in range(pairs):
        first, second = (one, other) if pair % 2 else (other, one)
        times = {first: _seconds(first, device), second: _seconds(second, device)}
        rows.append((times[one], times[other]))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return medians[0], medians[1], statistics.median(b / a for a, b in rows)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory() -> int:
    """Peak bytes so far: of tensors on a GPU, of the process (resident) without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """What is for a script itself, and after a ``--`` what is for the recipe."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _show(name: str, row: dict[str, Any]) -> None:
    times = f"{row['bare'] * 1e3:>9.1f} ms{row['step'] * 1e3:>9.1f} ms{row['ratio']:>8.3f}"
    print(f"{name:<24}{times}{row['examples_per_second']:>12.1f}{row['peak_mib']:>10.0f} MiB")
    print("    " + ", ".join(f"{part} {value:.2f}" for part, value in row["parts"].items()) + " (ms)", flush=True)


if __name__ == "__main__":
    main()
