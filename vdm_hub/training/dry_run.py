"""``--dry_run``: everything is built, a step is taken, and nothing is written."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from datetime import timedelta

import torch
from torch import Tensor

from vdm_hub.training.parts.networks import count_parameters
from vdm_hub.training.parts.shards import local_part
from vdm_hub.training.state.run_state import RunState

_MIB = 2**20
_REPETITIONS = 5


def describe_run(run: RunState) -> str:
    """Take the first step, and take it again for its time, as only the first pays for memory and compilation.

    Returns:
        A table of parameters, data, memory and the estimated time.
    """
    left = run.total_steps - run.step
    batches = next(run.batches(), None)
    if batches is None:
        return f"nothing is left to do: the run has taken its {run.step:,} steps."
    run.optimise(batches)
    seconds = _seconds(run, batches)
    device, network = run.accelerator.device, count_parameters(run.model.body)
    data = run.data.kind.data
    schedule = count_parameters(run.model) - network
    rows = {
        "network": f"{type(run.model.body).__name__}, {network:,} parameters",
        "beside it": f"{schedule:,} learned parameters" if schedule else "nothing is learned",
        data: f"{_number_of_images(run)}, {'x'.join(map(str, run.data.shape))}",
        "global batch": f"{run.global_batch_size} {data} on {run.accelerator.num_processes} x {device.type}",
        "state": f"{_bytes(run) / _MIB:,.1f} MiB: weights, gradients, the optimiser's state and the moving average",
        "peak memory": f"{_peak(device) / _MIB:,.0f} MiB of {'the GPU' if device.type == 'cuda' else 'the process'}",
        "a step": f"{seconds:.3f} s, {run.global_batch_size / seconds:,.1f} {data}/s",
        "training": f"{_duration(left * seconds)} for {left:,} steps, without reading a stream, validation, sampling "
        "and the evaluation at the end",
    }
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def _seconds(run: RunState, batches: list[dict[str, Tensor]]) -> float:
    """The seconds of a step: the median, so that one that something else held up, or waited for, does not decide."""

    def once() -> float:
        started = time.perf_counter()
        run.optimise(batches)
        _wait(run.accelerator.device)
        return time.perf_counter() - started

    return statistics.median(once() for _ in range(_REPETITIONS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _number_of_images(run: RunState) -> str:
    train = run.data.train
    return "a stream" if train.is_stream else f"{train.count:,}"


def _bytes(run: RunState) -> int:
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    averages = [] if run.ema is None else run.ema.shadow_params
    weights = list(run.model.parameters())
    gradients = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]  # of their sizes
    kept = [*weights, *gradients, *moments, *averages]
    parts = [local_part(tensor) for tensor in kept if isinstance(tensor, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in parts)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
