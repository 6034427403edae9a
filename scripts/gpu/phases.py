"""The phases of ``scripts/gpu/cifar10.py``, each in a process of its own: ``python phases.py PHASE OUTPUT SECONDS``.

What a phase finds is written to ``OUTPUT/phases/PHASE.json``, whole or not at all. Where a phase is killed, the next
process of the same phase goes on: training from its last checkpoint, the measurement from its journal. A process ends
with the one that started it, whose end of its standard input it waits for.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()  # before anything heavy is imported

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch  # noqa: E402
from records import figures, read, sha256, write  # noqa: E402
from train_step import alternate, bare_step, run_of, training_step  # noqa: E402

from vdm_hub import (  # noqa: E402
    LikelihoodReport,
    VDMPipeline,
    evaluate,
    load_data,
    load_split,
    parse_recipe,
    report_errors,
    train_model,
)

FOUND_BY = "vdm_hub's variational bound in continuous time"


def main() -> int:
    """Run a phase, and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("step", "train", "measure", "addtt"))
    parser.add_argument("output", type=Path)
    parser.add_argument("seconds", type=float, help="from the start of this process")
    parser.add_argument("--addtt", type=Path, help="a checkout of addtt's repository")
    parser.add_argument("--addtt_fields", type=json.loads, default={}, help="its settings that differ, as JSON")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return report_errors(lambda: run(arguments))


def _end_with_parent() -> None:
    """Wait for the end of standard input, which comes when whoever started this process ends."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def run(arguments: argparse.Namespace) -> int:
    """Run a phase, and keep what it found."""
    plan, output, until = read(arguments.output / "plan.json"), arguments.output, BEGAN + arguments.seconds
    if arguments.phase == "addtt":
        from public_vdm import addtt  # it needs what the others do not

        found = addtt(plan, output, until, arguments.addtt, arguments.addtt_fields)
    else:
        found = {"step": step, "train": train, "measure": measure}[arguments.phase](plan, output, until)
    write(output / "phases" / f"{arguments.phase}.json", found)
    return 0


def step(plan: dict[str, Any], output: Path, until: float) -> dict[str, Any]:
    """The training step over the bare network's, on the run's own data, both compiled as the recipe says."""
    words = ["--output_dir", tempfile.mkdtemp(), *plan["words"]]
    configuration = parse_recipe([plan["recipe"], *words])
    data = load_data(configuration.data)
    loaded = time.perf_counter() - BEGAN
    run = run_of(configuration, data)
    own, start = training_step(run), time.perf_counter()
    own()
    compiled = time.perf_counter() - start
    bare, whole, ratio = alternate(bare_step(run), own, plan["pairs"], run.accelerator.device)
    cuda = torch.cuda.is_available()
    return {
        "bare_seconds": bare,
        "step_seconds": whole,
        "ratio": ratio,
        "pairs": plan["pairs"],
        "images_per_second": run.training.train_batch_size / whole,
        "seconds_before_training": loaded,
        "seconds_of_first_step": compiled,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()},
    }


def train(plan: dict[str, Any], output: Path, until: float) -> dict[str, Any]:
    """The training run, from where it is; at its time's end it leaves a checkpoint, and status 143."""
    words = read(output / "phases" / "train_words.json")
    alarm = threading.Timer(until - time.perf_counter(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    if not words["ends"]:  # it is told to end where it is: nothing may stop that
        alarm.start()
    train_model(parse_recipe([plan["recipe"], *words["words"]]))
    alarm.cancel()
    record = read(output / "train" / "run.json")
    history = read(output / "train" / "history.json")
    kept = ("steps", "training_seconds", "global_batch_size", "mixed_precision", "parameters", "device", "versions")
    return {name: record[name] for name in (*kept, "git", "dataset")} | {
        "command": " ".join(["python", "-m", "vdm_hub.train", plan["recipe"], *words["words"]]),
        "planned_steps": words["steps"],
        "curve": {name: history["train"][name] for name in ("step", "bits_per_dim")},
    }


def measure(plan: dict[str, Any], output: Path, until: float) -> dict[str, Any]:
    """The bound of all test images, in as many replicates as there is time for, two at least."""
    exact_float32()
    pipeline = VDMPipeline.from_pretrained(output / "train" / "pipeline")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    images, journal = load_split(plan["data"], plan["test_split"], num_levels=256), output / "journal"
    described = {"name": Path(plan["data"]).name, "split": plan["test_split"], "levels": 256, "images": None}

    def bound(replicates: int) -> LikelihoodReport:
        how = {"batch_size": plan["eval_batch_size"], "seed": plan["seed"], "journal": journal, "dataset": described}
        return evaluate(pipeline, images, replicates=replicates, **how)

    chosen = output / "phases" / "replicates.json"
    if not chosen.exists():
        start = time.perf_counter()
        report = bound(1)
        each = (time.perf_counter() - start) * report.num_images / report.network_evaluations
        more = int((until - time.perf_counter()) / max(each, 1e-9))
        write(chosen, {"replicates": min(plan["replicates"], max(2, 1 + more)), "seconds_of_one": each})
    return record(bound(read(chosen)["replicates"]), journal / "unclipped" / "state.json")


def record(report: LikelihoodReport, pilot: Path) -> dict[str, Any]:
    """What is kept of a report, in bits/dim: its figures, those of each image, and how they were found."""
    nats = torch.stack(list(report.terms_per_image.values())).sum(0).mean(1)
    means = (nats / (report.dimensions * math.log(2))).tolist()
    per_image = {name: value.tolist() for name, value in report.terms_of_each.items()}
    details = report.details
    return figures(per_image, means) | {
        "found_by": FOUND_BY,
        "is_bound": report.is_bound,
        "num_images": report.num_images,
        "replicates": report.replicates,
        "network_evaluations": report.network_evaluations,
        "seconds": details["seconds"] + details["seconds_before"],
        **{name: details[name] for name in ("seed", "device", "dtype", "weights")},
        "images": details["dataset"]["fingerprint"],
        "protocol": details["estimator"],
        "pilot": {"file": str(pilot.relative_to(pilot.parents[2])), "sha256": sha256(pilot)},
        "replicate_means": means,
        "per_image": per_image,
    }


def exact_float32() -> None:
    """Compute in float32 what is float32, so that another machine finds the same figures."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


if __name__ == "__main__":
    sys.exit(main())
