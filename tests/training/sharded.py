"""Trainings one after the other, by DDP, FSDP2 or ZeRO-2, on CPUs: ``torchrun ... sharded.py JOBS.json``.

accelerate knows FSDP2 and DeepSpeed on accelerators only. Everything but that choice is its own here: its plugins and
its preparation, torch's ``fully_shard`` and DeepSpeed's engine, over gloo.
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

from vdm_hub.recipes.arguments import parse
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


def _zero2(state: AcceleratorState, fields: dict[str, Any]) -> DistributedType:
    """As with scripts/accelerate/deepspeed_zero2.yaml."""
    import deepspeed

    if deepspeed.comm.comm.cdb is not None:  # by the job before
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._release_process_group_references()
    # It would build a kernel of its own for one host's memory; gloo is what is at work elsewhere.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = fields["deepspeed_plugin"]
    plugin.set_mixed_precision(fields["mixed_precision"] or "no")
    plugin.select(_from_accelerator_state=True)
    state.deepspeed_plugins = plugin
    return DistributedType.DEEPSPEED


ENGINES: dict[str, Start | None] = {"ddp": None, "fsdp2": _fsdp2, "zero2": _zero2}


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
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(engine == "zero2").lower()
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
            train_model(parse(words))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
