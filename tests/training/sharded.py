"""Trainings one after the other, by DDP or FSDP2, on CPUs: ``torchrun ... sharded.py JOBS.json``.

accelerate knows FSDP2 on accelerators only. Everything but that choice is its own here: its plugin and its
preparation, and torch's ``fully_shard`` over gloo.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.loop import train_model

Start = Callable[[AcceleratorState, dict[str, Any]], DistributedType]
_begin = AcceleratorState.__init__


def _fsdp2(state: AcceleratorState, _: dict[str, Any]) -> DistributedType:
    """As with scripts/accelerate/fsdp2.yaml."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    if state._mixed_precision != "no":
        plugin.set_mixed_precision(state._mixed_precision)
    state.fsdp_plugin = plugin
    return DistributedType.FSDP


ENGINES: dict[str, Start | None] = {"ddp": None, "fsdp2": _fsdp2}


@contextmanager
def run_by(engine: str) -> Iterator[None]:
    """While it is in force, a new accelerator is one of this engine."""
    start = ENGINES[engine]

    def begin(state: AcceleratorState, *arguments: Any, **fields: Any) -> None:
        known = state.initialized
        _begin(state, *arguments, **fields)
        if start is not None and not known:
            state.distributed_type = PartialState._shared_state["distributed_type"] = start(state, fields)

    AcceleratorState.__init__ = begin  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = _begin  # type: ignore[method-assign]


def main(jobs: list[list[str]]) -> None:
    """Train each: the engine, a port where the processes meet, and the words of a command."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the meeting of the job before
    for engine, port, *words in jobs:
        os.environ["MASTER_PORT"] = port
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with run_by(engine):
            train_model(parse_recipe(words))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
