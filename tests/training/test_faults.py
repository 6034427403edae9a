"""A full disk, a damaged checkpoint, a shard that vanishes, a tracker that dies: named, and nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from naming import naming
from runs import configuration, contents, train_here
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError, NonFiniteLossError, VDMHubError
from vdm_hub.training import loop
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from vdm_hub.training.state.outputs import OutputFolder

STEPPED: dict[str, Any] = {"checkpointing_steps": 2, "max_train_steps": 6, "logging_steps": 1}


def whole(run: Path) -> list[int]:
    """The steps of the checkpoints, each of which loads."""
    return [load_checkpoint(path).state["step"] for path in checkpoints(run / "checkpoints")]


def same_end(one: Path, other: Path) -> None:
    assert contents(one / "pipeline") == contents(other / "pipeline")
    assert (one / "history.json").read_text() == (other / "history.json").read_text()
    last = [checkpoints(run / "checkpoints")[-1] for run in (one, other)]
    files = [{file.name: file.read_bytes() for file in path.glob("*.safetensors")} for path in last]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    run = tmp_path_factory.mktemp("calm") / "run"
    train_here(run, **STEPPED)
    return run


# ---- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system refuses to write a file beyond this size, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_while_saving(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    class Full(loop.TrainingRun):
        def save(self) -> None:
            if self.step not in steps:
                return super().save()
            with files_end_at(4096):
                return super().save()

    monkeypatch.setattr(loop, "TrainingRun", Full)


def test_a_periodic_checkpoint_that_does_not_fit_is_a_warning(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_while_saving(monkeypatch, 4)
    with pytest.warns(UserWarning, match=naming("step 4", "step-00000002")):
        train_here(tmp_path / "run", **STEPPED)
    assert whole(tmp_path / "run") == [2, 6]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000002", "step-00000006"}
    same_end(calm, tmp_path / "run")


def test_a_last_checkpoint_that_does_not_fit_is_an_error_and_the_run_goes_on_later(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_while_saving(monkeypatch, 6)
    with pytest.raises(CheckpointError, match=naming("step 6", "step-00000004")) as caught:
        train_here(tmp_path / "run", **STEPPED)
    assert "\n" not in str(caught.value)
    assert whole(tmp_path / "run") == [2, 4]
    monkeypatch.undo()
    train_here(tmp_path / "run", **STEPPED, resume_from_checkpoint="latest")
    same_end(calm, tmp_path / "run")


def test_results_that_do_not_fit_are_an_error_and_come_later(calm: Path, tmp_path: Path) -> None:
    shutil.copytree(calm, tmp_path / "run")
    biggest = max(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file())
    shutil.rmtree(tmp_path / "run" / "pipeline")
    before = contents(tmp_path / "run" / "checkpoints")
    assert biggest > 8192
    with files_end_at(8192), pytest.raises(CheckpointError, match="checkpoint"):
        train_here(tmp_path / "run", **STEPPED, resume_from_checkpoint="latest")
    assert contents(tmp_path / "run" / "checkpoints") == before
    assert not list((tmp_path / "run").glob(".*"))
    train_here(tmp_path / "run", **STEPPED, resume_from_checkpoint="latest")
    same_end(calm, tmp_path / "run")


def test_a_file_system_without_room(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own "no space left", where one may mount a small file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount")

    class Filling(loop.TrainingRun):
        def save(self) -> None:
            ballast = disk / "ballast"
            if self.step == 4:
                free = shutil.disk_usage(disk).free
                ballast.write_bytes(b"\0" * (free - 8192))
            super().save()
            ballast.unlink(missing_ok=True)

    monkeypatch.setattr(loop, "TrainingRun", Filling)
    try:
        with pytest.warns(UserWarning, match=naming("step 4", "No space left on device")):
            train_here(disk / "run", **STEPPED)
        assert whole(disk / "run") == [2, 6]
        same_end(calm, disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- damaged checkpoints --------------------------------------------------------------------------------------------


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "objective.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [truncate, lose_the_manifest])
def test_latest_passes_over_a_damaged_checkpoint_and_names_both(
    damage: Callable[[Path], None], calm: Path, tmp_path: Path
) -> None:
    shutil.copytree(calm, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pipeline")
    broken = tmp_path / "run" / "checkpoints" / "step-00000006"
    damage(broken)
    kept = contents(broken)
    with pytest.warns(UserWarning, match=naming(broken, "step-00000004")):
        train_here(tmp_path / "run", **STEPPED, resume_from_checkpoint="latest")
    assert whole(tmp_path / "run") == [2, 4, 6]
    same_end(calm, tmp_path / "run")
    assert contents(broken.with_name("damaged-step-00000006")) == kept, "nothing is deleted"


def test_where_all_are_damaged_the_run_is_refused_and_nothing_changes(calm: Path, tmp_path: Path) -> None:
    shutil.copytree(calm, tmp_path / "run")
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        truncate(path)
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=naming("step-00000006", "step-00000004", "step-00000002")):
        train_here(tmp_path / "run", **STEPPED, resume_from_checkpoint="latest")
    assert contents(tmp_path / "run") == before


# ---- data that change under the run ---------------------------------------------------------------------------------


def shards(folder: Path, corrupt: tuple[int, ...] = ()) -> Path:
    """Four Parquet files of twenty images of 8 x 8 pixels; some images cut short."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for shard in range(4):
        rows = []
        for number in range(20 * shard, 20 * shard + 20):
            image = folder / "image.png"
            Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(image)
            data = image.read_bytes()
            rows.append({"bytes": data[:60] if number in corrupt else data, "path": f"{number:03d}.png"})
            image.unlink()
        features = datasets.Features({"image": datasets.Image()})
        dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
        dataset.to_parquet(str(folder / f"train-{shard:05d}-of-00004.parquet"))
    return folder


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def from_shards(folder: Path, **more: Any) -> dict[str, Any]:
    fields = {"dataset_name": None, "train_data_dir": str(folder), "test_split": None, "num_levels": 256}
    buffer = {"shuffle_buffer_size": 8} if more.get("streaming", True) else {}
    return STEPPED | fields | {"streaming": True, "train_batch_size": 8} | buffer | more


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("what", ["vanishes", pytest.param("is cut short", marks=pytest.mark.slow)])
def test_a_shard_that_is_lost_is_named_and_the_run_goes_on_later(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = from_shards(shards(tmp_path / "data"), max_train_steps=16)
    train_here(tmp_path / "calm", **fields)
    saved = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}

    class Losing(loop.TrainingRun):
        def save(self) -> None:
            super().save()
            for path in saved:
                path.unlink(missing_ok=True) if what == "vanishes" else path.write_bytes(saved[path][:50])

    monkeypatch.setattr(loop, "TrainingRun", Losing)
    with pytest.raises(DataError, match="stream") as caught:
        train_here(tmp_path / "run", **fields)
    assert "resume_from_checkpoint latest" in str(caught.value)
    assert what == "is cut short" or str(tmp_path / "data" / "train-") in str(caught.value)
    assert whole(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    for path, data in saved.items():
        path.write_bytes(data)
    train_here(tmp_path / "run", **fields, resume_from_checkpoint="latest")
    same_end(tmp_path / "calm", tmp_path / "run")


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_corrupt_image_is_named_and_left_out_only_where_asked(streaming: bool, tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", corrupt=(13, 47))
    fields = from_shards(folder, streaming=streaming, max_train_steps=16)
    with pytest.raises(DataError, match=r"(013|047)\.png\W.*--skip_corrupt_images"):
        train_here(tmp_path / "refused", **fields)
    fields |= {"skip_corrupt_images": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_here(tmp_path / "run", **fields)
    said = {str(one.message) for one in caught if "left out" in str(one.message)}
    assert len(said) == 2
    assert all(any(name in one for one in said) for name in ("013.png", "047.png"))
    # A stream that starts again leaves out the same.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in range(8, 17, 2):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:08d}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_here(tmp_path / "again", **fields, resume_from_checkpoint="latest")
    same_end(tmp_path / "run", tmp_path / "again")


# ---- a tracker that dies --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_tracker_that_dies_is_dropped_with_one_warning(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's folder becomes a file, at which its writer fails."""

    class Losing(loop.TrainingRun):
        def save(self) -> None:
            super().save()
            if self.folder.logs.is_dir():
                shutil.rmtree(self.folder.logs)
                self.folder.logs.write_text("no folder")

    monkeypatch.setattr(loop, "TrainingRun", Losing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_here(tmp_path / "run", **STEPPED, report_to="tensorboard")
    said = [str(one.message) for one in caught if "tracker" in str(one.message)]
    assert len(said) == 1
    assert "tensorboard" in said[0]
    assert "goes on without it" in said[0]
    same_end(calm, tmp_path / "run")


def test_a_tracker_that_does_not_start_is_an_error_and_the_run_starts_later(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").write_text("no folder")
    (tmp_path / "run" / "recipe.yaml").write_text(configuration(tmp_path / "run", **STEPPED).to_yaml())
    fields = STEPPED | {"max_train_steps": 1, "resume_from_checkpoint": "latest"}
    with pytest.raises(ConfigurationError, match=naming("report_to", "'tensorboard'")):
        train_here(tmp_path / "run", **fields, report_to="tensorboard")
    train_here(tmp_path / "run", **fields)
    assert whole(tmp_path / "run") == [1]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_accumulation_beyond_an_epoch_is_refused(tmp_path: Path) -> None:
    fields = {"max_train_samples": 70, "gradient_accumulation_steps": 5}
    with pytest.raises(ConfigurationError, match=naming("gradient_accumulation_steps", 5, 4)):
        train_here(tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()
    train_here(tmp_path / "run", **fields | {"gradient_accumulation_steps": 4}, max_train_steps=1)


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("streaming", [True, False])
def test_an_empty_folder_or_a_tiny_dataset_is_refused(streaming: bool, tmp_path: Path) -> None:
    def refused(folder: Path, words: str, **more: Any) -> None:
        with pytest.raises(DataError, match=words):
            train_here(tmp_path / "run", **from_shards(folder, streaming=streaming, **more))
        assert not list((tmp_path / "run").glob("checkpoints/*"))

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither images nor Parquet files")
    refused(shards(tmp_path / "tiny"), "80 training images.* do not fill one batch of 100", train_batch_size=100)


def test_a_folder_that_may_not_be_written_is_refused_before_anything(tmp_path: Path) -> None:
    """In a process of its own, which gives up the rights that root has."""
    parent = Path(tempfile.mkdtemp())
    try:
        parent.chmod(0o555)
        chosen = configuration(parent / "runs" / "one")
        if (child := os.fork()) == 0:
            try:
                if os.getuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                OutputFolder(chosen).check(chosen)
                os._exit(1)
            except VDMHubError as error:
                os._exit(0 if f"you may not write in {parent}" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        parent.chmod(0o755)
        parent.rmdir()


# ---- a run that diverges, or goes on under other circumstances ------------------------------------------------------


@pytest.mark.parametrize("rate", [30.0, 1e3, 1e20])
@pytest.mark.parametrize("schedule", ["linear", "learned_monotone"])
def test_a_learning_rate_that_diverges_stops_the_run(rate: float, schedule: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "learning_rate": rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": 200,
    }
    ends = {"gamma_min": -7.87, "gamma_max": 5.0} | ({"hidden_features": 32} if schedule != "linear" else {})
    with pytest.raises(NonFiniteLossError, match=r"step \d+.*lower"):
        train_here(
            tmp_path / "run",
            **fields
            | {"noise_schedule": {"name": schedule, "config": ends}, "max_grad_norm": 1e9, "logging_steps": 1},
        )


def test_a_run_goes_on_only_with_the_images_it_began_with(tmp_path: Path) -> None:
    train_here(tmp_path / "run", max_train_steps=2)
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    checkpoint = load_checkpoint(last)
    checkpoint.state["provenance"]["dataset"] |= {"fingerprint": f"sha256:{'0' * 64}", "images": 7}
    checkpoint.state["provenance"] |= {"processes": 2, "global_batch_size": 32}
    shutil.rmtree(last)
    save_checkpoint(last.parent, 2, checkpoint.tensors, checkpoint.state)
    with pytest.raises(CheckpointError, match=naming("processes", 2, 1, 7)):
        train_here(tmp_path / "run", resume_from_checkpoint="latest")
