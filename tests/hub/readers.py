"""People with a Python, an environment and a folder of their own, who do what a card says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import runs
from hub.server import LoopbackHub

# What a test adds to a card's snippet: fewer steps, and an answer that can be compared.
SHORTER = (r"num_inference_steps=\d+", "num_inference_steps=3")


@dataclass(frozen=True)
class Reader:
    """Someone with a Python, an environment and a folder of their own."""

    python: Path
    environment: Mapping[str, str]
    home: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = dict(self.environment) | {"OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            command, env=environment, cwd=self.home, capture_output=True, text=True, timeout=600, check=False
        )

    def python_block(self, code: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.python), "-c", re.sub(*SHORTER, code))

    def shell_block(self, code: str) -> str:
        said = ""
        for line in code.strip().splitlines():
            done = self.run(*shlex.split(line))
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            said += done.stdout
        return said


def reader(home: Path, hub: LoopbackHub, token: str | None = None) -> Reader:
    home.mkdir()
    environment = hub.environment(home / "cache", token=token)
    return Reader(Path(sys.executable), environment | {"PYTHONPATH": str(runs.ROOT)}, home)
