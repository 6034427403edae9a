"""A plugin through the whole way: a short run of a recipe that names it, and all that is done with its result.

Plugins' own tests use it; nothing here knows which plugin it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hub.environments import link_packages, package_folders
from runs import ROOT, configuration
from vdm_hub import VDMPipeline
from vdm_hub.commands import main
from vdm_hub.training.loop import train_model


def train_a_little(folder: Path, **fields: Any) -> Path:
    """The run of a recipe with these fields: a few steps on digits, or on the data that the fields name."""
    measured = {"validation_size": 8, "validation_steps": 4, "num_sample_images": 2, "evaluation_replicates": 1}
    if "train_data_dir" in fields:
        fields |= {"dataset_name": None}
    report = train_model(configuration(folder, **measured | fields))
    assert report is not None and report.bits_per_dim > 0
    return folder


def check_the_whole_way(run: Path, dataset: str, transitions: int | None = None) -> None:
    """Evaluate, sample, load and publish (nothing is sent) by the commands that any model knows."""
    pipeline, output = str(run / "pipeline"), run.parent / f"{run.name}-output"
    output.mkdir()
    finite = [] if transitions is None else ["--transitions", str(transitions)]
    few = ["--dataset_name", dataset, "--split", "test[:16]", "--replicates", "2", *finite]
    written = ["--plot", str(output / "bits.png"), "--per_image", str(output / "images.parquet")]
    assert main(["evaluate", pipeline, *few, *written]) == 0
    sampling = ["--num_images", "2", "--num_inference_steps", "3", "--output", str(output / "samples.png")]
    assert main(["sample", pipeline, *sampling]) == 0
    publishing = ["--license", "apache-2.0", "--dry_run", "--output_dir", str(output / "card")]
    assert main(["publish", str(run), "me/model", *publishing]) == 0
    libraries = {value[0] for value in _index(run).values() if isinstance(value, list)}
    assert libraries <= {"diffusers", "vdm_hub", None}
    first, second = (_draw(Path(pipeline)) for _ in range(2))
    assert torch.equal(first, second)
    again = VDMPipeline.from_pretrained(pipeline)
    again.save_pretrained(output / "again")
    assert torch.equal(_draw(output / "again"), first)


def errors_without_plugins(folder: Path, *runs: Path) -> list[str]:
    """What loading each says where all packages of this environment are installed, but no plugin."""
    folder.mkdir()
    link_packages(package_folders(), folder)
    script = (
        "import sys\nfrom vdm_hub import VDMPipeline\nfrom vdm_hub.errors import MissingPluginError\n"
        "for pipeline in sys.argv[1:]:\n    try:\n        VDMPipeline.from_pretrained(pipeline)\n"
        "    except MissingPluginError as error:\n        print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-S", "-c", script, *(str(run / "pipeline") for run in runs)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _index(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "pipeline" / "model_index.json").read_text()))


def _draw(folder: Path) -> torch.Tensor:
    pipe = VDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images
    return images
