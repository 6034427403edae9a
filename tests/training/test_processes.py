"""Real processes: launched as a user launches them, killed, resumed, and two at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from runs import LAUNCH, LEARNED, ROOT, TORCHRUN, contents, environment, finished_run, python, recipe, train_here
from vdm_hub import VDMPipeline
from vdm_hub.recipes.arguments import parse_recipe
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint


def last_checkpoint(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


def bytes_of(checkpoint: Path) -> dict[str, bytes]:
    """Weights, averages and optimiser as they lie on the disk, and the step and its learning rate."""
    state = load_checkpoint(checkpoint).state
    files = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    return files | {"step": json.dumps(state["step"]).encode()}


# ---- one process, as in the README ----------------------------------------------------------------------------------


def test_a_launched_run_leaves_everything_that_was_promised() -> None:
    run, done = finished_run()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    written = {path.name for path in run.iterdir()}
    assert written == {
        *("checkpoints", "evaluation.json", "history.json", "logs", "pipeline", "recipe.yaml", "run.json"),
        *("samples.png", "schedule.png", "training_curve.png"),
    }
    report = json.loads((run / "evaluation.json").read_text())
    for value in (report["bits_per_dim"], report["standard_error"], *report["terms"].values()):
        assert f"{value:.4f}" in done.stdout
    for name in ("reconstruction", "prior", "diffusion"):
        assert name in done.stdout
    for name in ("pipeline", "samples.png", "schedule.png"):
        assert str(run / name) in done.stdout
    assert report["num_images"] == 360
    for name in ("samples.png", "schedule.png", "training_curve.png"):
        Image.open(run / name).verify()
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert list((run / "logs").rglob("events.out.tfevents.*"))


def test_the_recipe_that_is_left_is_the_one_that_was_run() -> None:
    run, _ = finished_run()
    configuration = parse_recipe([str(run / "recipe.yaml")])
    assert configuration.recipe == "digits"
    assert configuration.training.output_dir == str(run)
    assert configuration.training.max_train_steps == 6
    assert configuration.model.unet_config["block_out_channels"] == [8]


def test_the_pipeline_that_is_left_loads_and_holds_safetensors_only() -> None:
    run, _ = finished_run()
    files = {path.suffix for path in (run / "pipeline").rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    pipeline = VDMPipeline.from_pretrained(run / "pipeline")
    published = load_checkpoint(last_checkpoint(run)).tensors["ema"]
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, published[f"network.{name}"])


def test_an_error_is_one_paragraph_and_the_launcher_can_be_quiet(tmp_path: Path) -> None:
    arguments = [recipe(tmp_path, tmp_path / "run"), "--lerning_rate", "1e-3"]
    done = python(LAUNCH[0], "--quiet", *LAUNCH[1:], "-m", "vdm_hub.train", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "unknown field 'lerning_rate'" in line
    assert "did you mean 'learning_rate'" in line
    assert not (tmp_path / "run").exists()


# ---- a kill in the middle -------------------------------------------------------------------------------------------


def kill_after(checkpoint: str, run: Path, *arguments: str) -> None:
    """Start a run and kill it, without warning, once a checkpoint is there."""
    command, here = [sys.executable, "-m", "vdm_hub.train", *arguments], environment(ACCELERATE_USE_CPU="true")
    process = subprocess.Popen(command, env=here, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    try:
        while not (run / "checkpoints" / checkpoint).is_dir():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow  # test_survival kills one process twenty times, and two
@pytest.mark.parametrize("variant", ["plain", "accumulated, learned"])
def test_a_killed_and_resumed_run_equals_the_undisturbed_one_bit_for_bit(variant: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_train_steps": 120, "checkpointing_steps": 3, "random_flip": True}
    fields |= {"logging_steps": 2, "validation_size": 20, "validation_steps": 30}
    if variant != "plain":
        fields |= {"noise_schedule": LEARNED, "gradient_accumulation_steps": 2, "train_batch_size": 8}
    train_here(tmp_path / "calm", **fields)
    run, made = tmp_path / "killed", recipe(tmp_path / "recipe", tmp_path / "killed", **fields)
    kill_after("step-00000009", run, made)
    stopped_at = load_checkpoint(last_checkpoint(run)).state["step"]
    assert stopped_at < 120
    assert not (run / "pipeline").exists()
    if variant == "plain":
        resumed = python(*LAUNCH, "-m", "vdm_hub.train", made, "--resume_from_checkpoint", "latest")
        assert resumed.returncode == 0, resumed.stderr
        assert f"resumed from {run / 'checkpoints' / f'step-{stopped_at:08d}'}" in resumed.stdout
    else:
        train_here(run, **fields, resume_from_checkpoint="latest")
    assert bytes_of(last_checkpoint(tmp_path / "calm")) == bytes_of(last_checkpoint(run))
    history = (run / "history.json").read_text()
    assert history == (tmp_path / "calm" / "history.json").read_text(), "no logged step is lost or there twice"
    assert json.loads(history)["train"]["step"] == list(range(2, 121, 2))
    assert json.loads(history)["validation"]["step"] == [30, 60, 90, 120]
    assert contents(tmp_path / "calm" / "pipeline") == contents(run / "pipeline")


# ---- two processes --------------------------------------------------------------------------------------------------

TWO = """
import json, os, sys
from pathlib import Path

import torch

from vdm_hub.data.loading import load_data
from vdm_hub.training import loop
from vdm_hub.recipes.arguments import parse_recipe

folder = Path(sys.argv[1])
seen = []


class Recording(loop.TrainingRun):
    def optimise(self, batches):
        noise = [self._noise(batch, part)["marginal"] for part, batch in enumerate(batches)]
        times = [self._times(part) for part in range(len(batches))]
        levels = [batch["levels"].flatten(1) for batch in batches]
        seen.append({"noise": torch.cat(noise), "times": torch.cat(times), "levels": torch.cat(levels)})
        return super().optimise(batches)

    def finish(self):
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        torch.save({"seen": seen, "weights": weights}, folder / f"rank{self.accelerator.process_index}.pt")
        return super().finish()


loop.TrainingRun = Recording
loop.train_model(parse_recipe(sys.argv[2:]))
"""


def test_two_processes_train_what_one_trains_on_the_same_global_draws(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "max_train_steps": 8,
        "train_batch_size": 8,
        "noise_schedule": LEARNED,
        "checkpointing_steps": 5,
        "logging_steps": 2,
        "label_column": "label",
        "condition_dropout": 0.4,
    }
    fields |= {"adam_epsilon": 1e-3}  # Adam's first steps are signs of gradients, which rounding may turn at zero
    (tmp_path / "two.py").write_text(TWO)
    path = recipe(tmp_path, tmp_path / "two", **fields, evaluation_replicates=1, report_to="tensorboard")
    script = [str(tmp_path / "two.py"), str(tmp_path), path]
    done = python(*TORCHRUN, *script, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(tensor, ranks[1]["weights"][name]), name
    for first, second in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True):
        images = {tuple(image.tolist()) for rank in (first, second) for image in rank["levels"]}
        assert len(images) == 16, "the two saw an image twice"
        both = torch.cat([first["noise"].flatten(1), second["noise"].flatten(1)])
        assert len({tuple(row.tolist()) for row in both}) == 16
        times = torch.cat([first["times"], second["times"]]).sort().values
        assert (times.double().diff() - 1 / 16).abs().max() < 1e-6
    # Written once: one set of checkpoints, one summary, one event file of the run, nothing half-written.
    assert [path.name for path in checkpoints(tmp_path / "two" / "checkpoints")] == ["step-00000005", "step-00000008"]
    assert done.stdout.count("360 images, ") == 1, "of the report"
    assert len(list((tmp_path / "two" / "logs" / "vdm_hub").glob("events.*"))) == 1
    assert not [name for name in contents(tmp_path / "two") if "/." in name or name.startswith(".")]

    train_here(tmp_path / "one", **fields, gradient_accumulation_steps=2)
    one, two = (load_file(last_checkpoint(tmp_path / name) / "objective.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    # Both record one course of the global batch, and how they divided it.
    courses = [json.loads((tmp_path / name / "history.json").read_text())["train"] for name in ("one", "two")]
    assert courses[0]["step"] == courses[1]["step"] == [2, 4, 6, 8]
    for column, values in courses[0].items():
        assert courses[1][column] == pytest.approx(values, rel=1e-4), column
    told = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [(run["processes"], run["gradient_accumulation_steps"]) for run in told] == [(1, 2), (2, 1)]
    assert [run["global_batch_size"] for run in told] == [16, 16]
    assert told[1]["command"].startswith("accelerate launch --num_processes 2 ")


def test_processes_that_know_nothing_of_each_other_are_refused(tmp_path: Path) -> None:
    done = python(*TORCHRUN, "-m", "vdm_hub.train", recipe(tmp_path, tmp_path / "run"))
    assert done.returncode != 0
    assert "error: 2 processes were launched, but accelerate runs 1 each on its own" in done.stderr
    assert "ACCELERATE_USE_CPU=true" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_are_refused(tmp_path: Path) -> None:
    """As nodes do that do not share the folder: one would go on where the other begins."""
    (tmp_path / "apart.py").write_text(APART)
    for steps in (3, 6):
        path = recipe(tmp_path, tmp_path / "run", max_train_steps=steps, train_batch_size=8)
        script = [str(tmp_path / "apart.py"), path, str(tmp_path / "run")]
        done = python(*TORCHRUN, *script, ACCELERATE_USE_CPU="true")
        assert (done.returncode == 0) == (steps == 3), done.stderr
    assert "error: the processes found checkpoints of different steps (3, 0)" in done.stderr
    assert not (tmp_path / "run1").exists()


APART = """
import os
import sys

from vdm_hub import train

recipe, folder = sys.argv[1:]
sys.argv[1:] = [recipe, "--output_dir", folder + os.environ["RANK"], "--resume_from_checkpoint", "latest"]
sys.exit(train.main())
"""


def test_two_processes_stop_together_where_one_loss_is_not_finite(tmp_path: Path) -> None:
    """Only the second process meets a NaN; no checkpoint of the first may hold what came of it."""
    (tmp_path / "poison.py").write_text(POISON)
    fields = {"max_train_steps": 8, "train_batch_size": 8, "checkpointing_steps": 1}
    path = recipe(tmp_path, tmp_path / "run", **fields)
    done = python(*TORCHRUN, str(tmp_path / "poison.py"), path, ACCELERATE_USE_CPU="true")
    assert done.returncode != 0
    assert "error: the loss of step 3 is not finite" in done.stderr
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000001", "step-00000002"]
    for tensor in load_checkpoint(kept[-1]).tensors["objective"].values():
        assert bool(tensor.isfinite().all())


POISON = """
import sys

import torch

from vdm_hub import train
from vdm_hub.training import loop


class Poisoned(loop.TrainingRun):
    def _noise(self, batch, part):
        noise = super()._noise(batch, part)
        if self.step == 2 and self.accelerator.process_index == 1:
            noise["marginal"][0] = torch.nan
        return noise


loop.TrainingRun = Poisoned
sys.exit(train.main())
"""


UNWRAPPED = """
import gc, sys
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from vdm_hub.train import main
destroy = torch.distributed.destroy_process_group
def checked(*group):
    print("wrapped:", [type(one) for one in gc.get_objects() if type(one) is DistributedDataParallel])
    destroy(*group)
torch.distributed.destroy_process_group = checked
sys.exit(main())
"""


def test_nothing_wraps_the_model_when_the_group_ends(tmp_path: Path) -> None:
    """A reducer that is the last to hold the group takes it down with Python's lock held, and may wait for ever."""
    script = tmp_path / "unwrapped.py"
    script.write_text(UNWRAPPED)
    path = recipe(tmp_path / "recipe", tmp_path / "run", max_train_steps=2)
    done = python(*TORCHRUN, str(script), path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrapped: []") == done.stdout.count("wrapped:") == 2
