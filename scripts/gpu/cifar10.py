"""What one GPU reaches on CIFAR-10 in twelve minutes, beside the public PyTorch VDM in the same minutes.

``python scripts/gpu/cifar10.py --data SHARDS --addtt CHECKOUT`` trains the recipe ``cifar10_fast`` (bf16, compiled)
from Parquet shards, measures every test image, trains and measures addtt's ``variational-diffusion-models`` on the
same card, data, batch size and seconds, and takes the training step's ratio to the bare network. It prints the
training curve and writes ``results.json`` and ``curve.png``; ``python scripts/gpu/verify.py OUTPUT/results.json``
checks the former from the weights. ``python scripts/gpu/shards.py SOURCE SHARDS`` makes the shards.

Each phase has a share of the minutes, over all starts together. Killed at any moment, the same command goes on with
what is left. What has not been found is blank in the results, with the reason.

What follows ``--`` is passed on as fields of the recipe.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from curves import draw, table
from records import read, shards_of, write

from vdm_hub import ConfigurationError, OutputError, __version__, parse_recipe, report_errors

RECIPE = "cifar10_fast"
SHARES = {"step": 0.14, "train": 0.33, "measure": 0.11, "addtt": 0.36}
"""The share of the minutes of each phase; what is left over is for ends that come late."""
SPARE = 1 - sum(SHARES.values())
USED = 0.95
"""The part of a training's time that its steps are planned to take."""
CHECKPOINT_SECONDS, POINTS = 30.0, 50
STOPPED = 143
UNFINISHED = 3
"""Exit status where a phase has no result: the time was over, or it failed."""


def main() -> int:
    """Run what is still to be run, and write the results."""
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of Parquet shards with the splits train and test")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="(default: runs/gpu)")
    parser.add_argument("--minutes", type=float, default=12, help="of all phases and starts together (default: 12)")
    parser.add_argument("--addtt", type=Path, help="a checkout of github.com/addtt/variational-diffusion-models")
    parser.add_argument("--addtt_fields", default="{}", help="its settings that differ from its defaults, as JSON")
    parser.add_argument("--replicates", type=int, default=16, help="the most of the measurement (default: 16)")
    parser.add_argument("--pairs", type=int, default=15, help="of steps, for the ratio (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    arguments = parser.parse_args(sys.argv[1:place])
    words = (word.split("=", 1) if word.startswith("--") else [word] for word in sys.argv[place + 1 :])
    return report_errors(lambda: Run(arguments, list(chain.from_iterable(words))).go())


class Clock:
    """The seconds that each phase has taken, over all starts, in a file; a kill loses at most one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent: dict[str, float] = read(path) if path.exists() else {}

    @contextmanager
    def running(self, phase: str) -> Iterator[None]:
        """Count the time of the block."""
        before, start, over = self.spent.get(phase, 0.0), time.perf_counter(), threading.Event()

        def count() -> None:
            is_over = False
            while not is_over:
                is_over = over.wait(1)
                self.spent[phase] = before + time.perf_counter() - start
                write(self.path, self.spent)

        counting = threading.Thread(target=count)
        counting.start()
        try:
            yield
        finally:
            over.set()
            counting.join()


class Run:
    """All phases, from where they are.

    Args:
        arguments: Of the command line.
        fields: Fields of the recipe.

    Raises:
        DataError: The data are no shards below 64 MiB.
        OutputError: The output folder holds a run by another plan.
    """

    def __init__(self, arguments: argparse.Namespace, fields: list[str]) -> None:
        self.arguments, self.output, self.seconds = arguments, arguments.output, 60 * arguments.minutes
        if not 0 < arguments.minutes < 10_000:
            raise ConfigurationError(f"minutes is {arguments.minutes}: give a number above 0, such as 12.")
        self.shards, self.why = shards_of(Path(arguments.data)), dict[str, str]()
        self.plan = self._plan(fields)
        kept = self.output / "plan.json"
        if kept.exists() and (before := read(kept)) != self.plan:
            changed = [name for name, value in self.plan.items() if before.get(name) != value]
            raise OutputError(
                f"{self.output} holds a run by another plan ({', '.join(changed)} differ): name another --output, or "
                f"give the same options to go on with it."
            )
        write(kept, self.plan)
        self.clock = Clock(self.output / "clock.json")

    def _plan(self, fields: list[str]) -> dict[str, Any]:
        data = self.arguments.data
        words = ["--dataset_name", data, "--image_column", "image", "--report_to", "none"]
        words += [
            "--num_sample_images",
            "0",
            "--evaluation_replicates",
            "0",
            "--seed",
            str(self.arguments.seed),
            *fields,
        ]
        configuration = parse_recipe([RECIPE, "--output_dir", str(self.output / "train"), *words])
        return {
            "recipe": RECIPE,
            "words": words,
            "data": data,
            "shards": self.shards,
            "train_split": configuration.data.train_split,
            "test_split": configuration.data.test_split,
            "batch_size": configuration.training.train_batch_size,
            "eval_batch_size": configuration.training.eval_batch_size,
            "seed": configuration.training.seed,
            "replicates": self.arguments.replicates,
            "pairs": self.arguments.pairs,
        }

    def go(self) -> int:
        """Run the phases in order, then write and print the results."""
        self.run("step")
        self.train()
        if self.found("train") is not None:
            self.run("measure")
            if self.arguments.addtt is not None:
                told = ["--addtt", str(self.arguments.addtt), "--addtt_fields", self.arguments.addtt_fields]
                self.run("addtt", *told)
        results = self.results()
        write(self.output / "results.json", results)
        draw(results, self.output / "curve.png")
        print(table(results))
        print(f"results  {self.output / 'results.json'}\ncurve    {self.output / 'curve.png'}")
        return UNFINISHED if self.why else 0

    def found(self, phase: str) -> dict[str, Any] | None:
        """What a phase found, where it is finished."""
        path = self.output / "phases" / f"{phase}.json"
        return read(path) if path.exists() else None

    def left(self, phase: str) -> float:
        """The seconds that are left of a phase's share, and of all."""
        mine = SHARES[phase] * self.seconds - self.clock.spent.get(phase, 0.0)
        return min(mine, self.all_left())

    def all_left(self) -> float:
        """The seconds that are left of all."""
        return self.seconds - sum(self.clock.spent.values())

    def run(self, phase: str, *told: str) -> int:
        """Run a phase in a process of its own, unless it is finished; returns the exit status."""
        if self.found(phase) is not None:
            return 0
        left, most = self.left(phase), self.all_left()
        if left <= 0:
            self.why[phase] = f"not finished in its {SHARES[phase] * self.seconds:.0f} s: give more --minutes to go on"
            return UNFINISHED
        print(f"{phase}: {left:.0f} s of {most:.0f} s", flush=True)
        return self.start(phase, left, min(most, left + SPARE * self.seconds), *told)

    def start(self, phase: str, seconds: float, most: float, *told: str) -> int:
        """Start a phase's process, and end it by force where it takes the most that it may."""
        script = str(Path(__file__).with_name("phases.py"))
        command = [sys.executable, script, phase, str(self.output), f"{seconds:.1f}", *told]
        with self.clock.running(phase), subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            try:
                status = process.wait(most)
            except subprocess.TimeoutExpired:
                process.kill()
                self.why[phase] = f"ended by force after {most:.0f} s: give more --minutes to go on"
                return UNFINISHED
            except BaseException:
                process.kill()
                raise
        if status not in (0, STOPPED):
            self.why[phase] = f"failed with status {status}: its words say why; the same command tries it again"
        return status

    def train(self) -> None:
        """Train for the phase's time: so many steps as fit, by what a step took; a run that is slower ends sooner."""
        if self.found("train") is not None:
            return
        kept = self.output / "phases" / "train_words.json"
        if not kept.exists():
            write(kept, self.train_words())
        if not (told := read(kept))["ends"]:
            if self.run("train") not in (STOPPED, UNFINISHED):
                return
            steps = sorted(path.name for path in (self.output / "train" / "checkpoints").glob("step-????????"))
            if not steps:
                self.why["train"] = "its time was over before the first checkpoint: give more --minutes to go on"
                return
            reached = int(steps[-1].removeprefix("step-"))
            words = [*without("max_train_steps", told["words"]), "--max_train_steps", str(reached)]
            write(kept, told | {"words": words, "ends": True})
            print(f"train: its time was over after step {reached}, where it ends", flush=True)
        if self.all_left() > 0:
            self.why.pop("train", None)
            self.start("train", self.all_left(), self.all_left())

    def train_words(self) -> dict[str, Any]:
        """The words of the training command, and how many steps are planned; ``None`` where nothing says how many."""
        words, steps, cost = [*self.plan["words"]], None, self.found("step")
        words += ["--output_dir", str(self.output / "train"), "--resume_from_checkpoint", "latest"]
        if cost is not None and "--max_train_steps" not in words:
            before = cost["seconds_before_training"] + cost["seconds_of_first_step"]
            steps = max(1, int(USED * (self.left("train") - before) / cost["step_seconds"]))
            planned = {
                "max_train_steps": steps,
                "checkpointing_steps": max(1, int(CHECKPOINT_SECONDS / cost["step_seconds"])),
                "logging_steps": max(1, steps // POINTS),
                "lr_warmup_steps": min(500, steps // 10),
            }
            for name, value in planned.items():
                words += [] if f"--{name}" in words else [f"--{name}", str(value)]
        return {"words": words, "steps": steps, "ends": False}

    def results(self) -> dict[str, Any]:
        """All that was found, and of what is blank the reason."""
        absent = "addtt's repository was not given: --addtt names a checkout of it"
        parts: dict[str, Any] = {}
        for phase in SHARES:
            missing = absent if phase == "addtt" and self.arguments.addtt is None else "there is no trained model"
            found = self.found(phase)
            parts[phase] = {"blank": self.why.get(phase, missing)} if found is None else found
        device = parts["step"].get("device") or parts["train"].get("device")
        return {
            "format": 1,
            "vdm_hub": __version__,
            "command": shlex.join(["python", *sys.argv]),
            "device": device,
            "minutes": self.arguments.minutes,
            "seconds": {name: round(value, 1) for name, value in self.clock.spent.items()},
            "data": {name: self.plan[name] for name in ("data", "shards", "train_split", "test_split")},
            "pipeline": "train/pipeline",
            **parts,
        }


def without(name: str, words: list[str]) -> list[str]:
    """The words of a command without a field and its value.

    >>> without("seed", ["--seed", "0", "--compile", "none"])
    ['--compile', 'none']
    """
    place = words.index(f"--{name}") if f"--{name}" in words else len(words)
    return words[:place] + words[place + 2 :]


if __name__ == "__main__":
    sys.exit(main())
