"""Several trainings one after the other, each under DDP or FSDP2, on CPUs: ``torchrun ... sharded.py JOBS.json``.

accelerate knows FSDP2 on accelerators only. Everything but that choice is its own here: its plugin and its
preparation, torch's ``fully_shard``, over gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from vdm_hub.training.arguments import parse
from vdm_hub.training.loop import train


class Sharded:
    """While it is in force, a new accelerator shards, as with scripts/accelerate/fsdp2.yaml."""

    begin = AcceleratorState.__init__

    def __enter__(self) -> None:
        def begin(state: AcceleratorState, *arguments: Any, **fields: Any) -> None:
            known = state.initialized
            Sharded.begin(state, *arguments, **fields)
            if known:
                return
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
            if state._mixed_precision != "no":
                plugin.set_mixed_precision(state._mixed_precision)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

        AcceleratorState.__init__ = begin  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        AcceleratorState.__init__ = Sharded.begin  # type: ignore[method-assign]


def main(jobs: list[list[str]]) -> None:
    """Train each: the engine, a port where the processes meet, and the words of a command."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the meeting of the job before
    for engine, port, *words in jobs:
        os.environ["MASTER_PORT"] = port
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if engine == "fsdp2":
            with Sharded():
                train(parse(words))
        else:
            train(parse(words))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
