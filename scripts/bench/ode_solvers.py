"""What solves the probability-flow ODE: error, time and network evaluations, by solver, arithmetic and batch.

``python scripts/bench/ode_solvers.py PIPELINE`` measures a few test images of the digits by each solver and prints a
Markdown table: the figure's distance from a reference (``rk45`` in float64 at a tolerance of 1e-7, the same draws),
what the report states as its numerical error, the largest change of an image's figure between batches of one and of
all, evaluations a solve, and processor seconds without the second solution behind the stated error. torchode (all
images step by themselves) and torchdiffeq (one image at a time) take part where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_hub import (
    FlowMeasurement,
    LikelihoodReport,
    ProbabilityFlow,
    ReplicateStages,
    Trajectory,
    VDMPipeline,
    integrate_ode,
    load_split,
    measure_images,
)

REFERENCE = ProbabilityFlow(tolerance=1e-7)
INSIDE: Any = sys.modules[FlowMeasurement.__module__]
"""The module whose solver is changed for another."""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="a trained pipeline of the digits")
    parser.add_argument("--images", type=int, default=8, help="test images (default: 8)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-3, 1e-4, 1e-5, 1e-6])
    arguments = parser.parse_args()
    pipeline = VDMPipeline.from_pretrained(arguments.pipeline)
    levels = load_split("digits", "test", num_levels=pipeline.num_levels).levels[: arguments.images]
    levels = torch.as_tensor(levels)

    def report(flow: ProbabilityFlow, size: int) -> tuple[LikelihoodReport, float]:
        batches: Any = lambda indices: {"levels": levels[indices].long(), "indices": indices}  # noqa: E731
        started = time.process_time()
        measurement = _Once(pipeline.objective(), flow)
        found = measure_images(measurement, batches, len(levels), ReplicateStages(1), batch_size=size, progress=False)
        return found, time.process_time() - started

    reference = report(REFERENCE, len(levels))[0].bits_per_dim
    print("| solver | arithmetic | tolerance | error | stated | by batches | evaluations | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, solve, solver, dtype, alone in _cases():
        for tolerance in arguments.tolerances:
            flow = replace(REFERENCE, tolerance=tolerance, solver=solver, dtype=dtype)
            INSIDE.integrate_ode = solve
            size = 1 if alone else len(levels)
            found, seconds = report(flow, size)
            other, _ = report(flow, 1 + len(levels) - size) if not alone else (found, 0.0)
            by_batches = (found.per_image - other.per_image).abs().max()
            INSIDE.integrate_ode = solve
            coarser = report(replace(flow, tolerance=10 * tolerance), size)[0]
            stated = (found.per_image - coarser.per_image).abs().mean()
            evaluations = found.details["probability_flow"]["evaluations_per_solve"]
            print(
                f"| {name} | {dtype} | {tolerance:g} | {abs(found.bits_per_dim - reference):.1e} | {stated:.1e} | "
                f"{'' if alone else f'{by_batches:.1e}'} | {evaluations:.0f} | {seconds:.1f} |",
                flush=True,
            )


class _Once(FlowMeasurement):
    """Without the second solution."""

    def _checked(self, batch: Any, replicate: int, solve: Callable[[ProbabilityFlow], Any]) -> Any:
        found = solve(self.flow)
        found.diagnostics["numerical_change"] = torch.zeros_like(found.diagnostics["evaluations"])
        return found


def _cases() -> Iterator[tuple[str, Any, str, str, bool]]:
    """Name, function, scipy's method, arithmetic, and whether it takes one image at a time."""
    for dtype in ("float64", "float32"):
        yield "scipy dop853", integrate_ode, "dop853", dtype, False
        yield "scipy rk45", integrate_ode, "rk45", dtype, False
        if importlib.util.find_spec("torchode"):
            yield "torchode tsit5", _torchode, "rk45", dtype, False
    yield "scipy dop853, one image at a time", integrate_ode, "dop853", "float64", True
    if importlib.util.find_spec("torchdiffeq"):
        yield "torchdiffeq dopri8, one image at a time", _torchdiffeq("dopri8"), "dop853", "float64", True
        yield "torchdiffeq dopri5, one image at a time", _torchdiffeq("dopri5"), "rk45", "float64", True


def _norm(error: Tensor) -> Tensor:
    return error.square().mean(-1).sqrt()


def _torchode(
    field: Any, start: Any, interval: Any, tolerance: float, max_steps: int, solver: str
) -> list[Trajectory]:
    torchode: Any = importlib.import_module("torchode")
    calls = 0

    def slope(time: Tensor, state: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.from_numpy(field(time.numpy().copy(), state.numpy().copy()))

    term = torchode.ODETerm(slope, with_stats=False)
    controller = torchode.IntegralController(tolerance, tolerance, term=term, norm=_norm)
    first, last = (torch.full((len(start),), end, dtype=torch.float64) for end in interval)
    problem = torchode.InitialValueProblem(y0=torch.from_numpy(start), t_start=first, t_end=last)
    found = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller, max_steps=max_steps).solve(problem)
    return [Trajectory(state.numpy(), 0, calls, "") for state in found.ys[:, -1]]


def _torchdiffeq(method: str) -> Any:
    def solve(field: Any, start: Any, interval: Any, tolerance: float, *_: Any) -> list[Trajectory]:
        torchdiffeq: Any = importlib.import_module("torchdiffeq")
        calls = 0

        def slope(time: Tensor, state: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return torch.from_numpy(field(np.array([float(time)]), state.numpy()[None].copy()))[0]

        ends = torch.tensor(interval, dtype=torch.float64)
        state = torchdiffeq.odeint(
            slope, torch.from_numpy(start[0]), ends, method=method, rtol=tolerance, atol=tolerance
        )[-1]
        return [Trajectory(state.numpy(), 0, calls, "")]

    return solve


if __name__ == "__main__":
    main()
