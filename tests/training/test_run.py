"""The loop, piece by piece: what is due when, what is measured, kept and said, and by which process."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.auto import tqdm

from naming import naming, paragraph
from runs import as_process, contents, start, train_here, weights
from vdm_hub import VariationalBound, VDMPipeline
from vdm_hub.errors import ConfigurationError, PublishError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.files import is_locked
from vdm_hub.training import loop
from vdm_hub.training.loop import TrainingRun
from vdm_hub.training.parts.setup import build_pipeline
from vdm_hub.training.signals import TrainingStopped
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint

WATCHED: dict[str, Any] = {"validation_size": 40, "validation_images": 24, "eval_batch_size": 8, "transitions": 10}
WATCHED |= {"early_stopping_patience": 5, "validation_steps": 2, "max_train_samples": 200, "lr_warmup_steps": 0}
EVERYTHING: dict[str, Any] = WATCHED | {"max_train_steps": 5, "logging_steps": 1, "checkpointing_steps": 4}
EVERYTHING |= {"sample_steps": 3, "num_sample_images": 1, "evaluation_replicates": 1, "report_to": "tensorboard"}


def steps(run: Path) -> list[int]:
    return [load_checkpoint(path).state["step"] for path in checkpoints(run / "checkpoints")]


def test_the_figure_on_the_test_images_is_told_to_the_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run", evaluation_replicates=2, transitions=5)
    told: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(run.trackers, "log", lambda values, step: told.append((values, step)))
    run.step = 3
    report = run.finish()
    assert report is not None and told == [
        ({"test/bits_per_dim": report.bits_per_dim, "test/standard_error": report.standard_error}, 3)
    ]


def test_two_runs_at_once_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would draw weights and dropout from the same generator, and end with others, unsaid."""
    refused: list[str] = []

    def publish(configuration: Any, folder: Any) -> None:
        def second() -> None:
            refused.append(paragraph(ConfigurationError, train_here, tmp_path / "second", max_train_steps=1))

        (thread := threading.Thread(target=second)).start()
        thread.join()

    monkeypatch.setattr(loop, "publish_run", publish)
    train_here(tmp_path / "first", max_train_steps=1)
    assert len(refused) == 1 and not (tmp_path / "second").exists()
    monkeypatch.setattr(loop, "publish_run", lambda *given: None)
    train_here(tmp_path / "second", max_train_steps=1)


def test_a_run_is_published_once_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []

    def publish(configuration: Any, folder: Any) -> None:
        given.append((configuration.training.output_dir, (folder.pipeline / "model_index.json").exists()))

    monkeypatch.setattr(loop, "publish_run", publish)
    train_here(tmp_path / "run", max_train_steps=1)
    assert given == [(str(tmp_path / "run"), True)]


# ---- what is due, measured and shown --------------------------------------------------------------------------------


def test_what_happens_every_so_many_steps_is_due_at_their_multiples(tmp_path: Path) -> None:
    run = start(tmp_path / "run", logging_steps=1, checkpointing_steps=3, sample_steps=0)
    due: dict[str, list[int]] = {"logging_steps": [], "checkpointing_steps": [], "sample_steps": []}
    for run.step in range(1, 8):
        for field, found in due.items():
            found += [run.step] if run.is_due(field) else []
    assert due == {"logging_steps": [1, 2, 3, 4, 5, 6, 7], "checkpointing_steps": [3, 6], "sample_steps": []}


def test_a_measurement_is_that_of_the_averaged_weights_and_the_best_are_kept(tmp_path: Path) -> None:
    run = start(tmp_path / "run", **WATCHED)
    for _ in range(2):  # the first average is of the first step alone
        run.optimise(next(run.batches()))
    own = weights(run)
    run.validate()
    assert torch.equal(weights(run), own)
    with run._averaged() as model:
        assert model is run.model and not torch.equal(weights(run), own)
        kept = {name: value.detach().clone() for name, value in model.named_parameters()}
        report = evaluate(
            build_pipeline(model), run.data.validation, VariationalBound(10), replicates=2, batch_size=8, max_images=24
        )
    (figure,) = run.history.to_dict()["validation"]["bits_per_dim"]
    assert figure == report.bits_per_dim == run.early_stopping.best and run.early_stopping.best_step == 2
    assert all(torch.equal(value, kept[name]) for name, value in run.early_stopping.weights.items()) and kept
    run.early_stopping.best = 0.0  # which nothing improves on
    run.optimise(next(run.batches()))
    run.validate()
    assert all(torch.equal(value, kept[name]) for name, value in run.early_stopping.weights.items())
    assert (run.early_stopping.best_step, run.early_stopping.waited) == (2, 1)


def test_without_patience_or_images_held_out_nothing_waits(tmp_path: Path) -> None:
    run = start(tmp_path / "run", **WATCHED | {"early_stopping_patience": None})
    run.validate()
    assert run.early_stopping.state() == {"best": None, "best_step": 0, "waited": 0}
    assert len(run.history.to_dict()["validation"]["step"]) == 1
    run.data = replace(run.data, validation=None)
    run.validate()
    assert len(run.history.to_dict()["validation"]["step"]) == 1 and run._validation() is None


def test_the_figure_of_a_run_is_the_last_before_the_weights_that_are_published(tmp_path: Path) -> None:
    run = start(tmp_path / "run", **WATCHED)
    assert run._validation() is None
    rows = [{"step": step, "bits_per_dim": bits, "standard_error": 0.1} for step, bits in ((2, 3.0), (4, 3.5))]
    for row in rows:
        run.history.add("validation", int(row["step"]), row)
    run.step = 5
    assert run._validation() == rows[1] | {"images": 24}
    run.early_stopping.look(3.0, 2)
    assert run._validation() == rows[1] | {"images": 24}, "no weights were kept"
    run.early_stopping.keep(run.model)
    assert run._validation() == rows[0] | {"images": 24}
    run.training = replace(run.training, validation_images=None)
    assert run._validation() == rows[0] | {"images": 40}
    run.data = replace(run.data, validation=start(tmp_path / "streamed", streaming=True).data.train)
    assert run._validation() == rows[0] | {"images": None}


def test_other_weights_are_published_where_they_are_given(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    zeros = {name: torch.zeros_like(value) for name, value in run.model.named_parameters()}
    before = weights(run)
    with run._averaged(zeros):
        assert not weights(run).any()
    assert torch.equal(weights(run), before)
    run.early_stopping.weights = zeros
    with run._published():
        assert not weights(run).any()


def test_a_step_is_logged_with_its_terms_its_rate_and_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run", logging_steps=2, learning_rate=3e-3, lr_scheduler="constant")
    told: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(run.trackers, "log", lambda values, step: told.append((values, step)))
    terms = {"prior": torch.tensor(0.5), "diffusion": torch.tensor(2.25)}
    with tqdm(total=6, file=io.StringIO(), mininterval=0) as bar:
        run.step = 1
        run.record(terms, bar)
        assert not told and run.history.to_dict()["train"]["step"] == []
        run.step = 2
        run.record(terms, bar)
        for _ in range(2):
            time.sleep(0.01)
            bar.update()
        run.step = 4
        run.record(terms, bar)
        per_second = bar.format_dict["rate"] * 16
        assert "bits/dim=2.750" in bar.postfix and f"images/s={per_second:.0f}" in bar.postfix
    values = {"train/bits_per_dim": 2.75, "train/prior": 0.5, "train/diffusion": 2.25, "learning_rate": 3e-3}
    assert told[0] == (values | {"train/images_per_second": 0.0}, 2)
    assert told[1] == (values | {"train/images_per_second": pytest.approx(per_second)}, 4) and per_second > 0
    columns = {"bits_per_dim": 2.75, "prior": 0.5, "diffusion": 2.25, "learning_rate": 3e-3}
    assert run.history.to_dict()["train"] == {"step": [2, 4]} | {name: [v, v] for name, v in columns.items()}


@pytest.mark.parametrize("count", [0, 1])
def test_samples_are_drawn_where_images_are_asked_for(count: int, tmp_path: Path) -> None:
    run = start(tmp_path / "run", num_sample_images=count, sample_steps=3)
    run.step = 3
    folder = tmp_path / "run" / "samples"
    folder.mkdir(parents=True)
    (folder / ".step-00000003-0123abcd.png").write_text("what a killed run left")
    run.sample()
    assert (folder / "step-00000003.png").exists() == (count == 1)
    assert len(list(folder.iterdir())) == 1


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saved(folder: Path, *at: int, **fields: Any) -> TrainingRun:
    run = start(folder, **fields)
    run.announce()
    batches = run.batches()
    while run.step < max(at):
        run.optimise(next(batches))
        if run.step in at:
            run.save()
    return run


def test_a_run_goes_on_from_its_last_whole_checkpoint_and_sets_a_damaged_one_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = saved(tmp_path / "run", 1, 2)
    seconds = [load_checkpoint(path).state["training_seconds"] for path in checkpoints(first.folder.checkpoints)]
    assert 0 < seconds[0] < seconds[1] == first.seconds < 60
    (first.folder.checkpoints / "step-00000002" / "state.json").write_text("{")
    run = start(tmp_path / "run", resume_from_checkpoint="latest", logging_steps=7)
    capsys.readouterr()
    run.resume()
    assert run.step == 1 and re.search(naming("step-00000001", "logging_steps"), capsys.readouterr().out)
    as_process(1, 1)
    run.resume()
    assert run.step == 1 and capsys.readouterr().out == "", "the main process says it"
    as_process(0, 1)
    run.preparation = "how the latents are scaled"
    with pytest.warns(UserWarning, match=naming("damaged-step-00000002")):
        run.announce()
    assert "how the latents are scaled" in capsys.readouterr().out
    assert sorted(path.name for path in run.folder.checkpoints.iterdir()) == ["damaged-step-00000002", "step-00000001"]
    assert "logging_steps: 7" in run.folder.recipe.read_text()


@pytest.mark.parametrize("wanted", [None, "latest"])
def test_a_run_without_a_checkpoint_begins_and_says_so_where_one_was_asked_for(
    wanted: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(tmp_path / "run", resume_from_checkpoint=wanted)
    capsys.readouterr()
    run.resume()
    assert run.step == 0
    assert bool(capsys.readouterr().out) == (wanted is not None)


# ---- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_is_obeyed_after_the_step_and_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Signalled(loop.TrainingRun):
        def optimise(self, batches: Any) -> Any:
            assert is_locked(self.folder.lock)
            if self.step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().optimise(batches)

    monkeypatch.setattr(loop, "TrainingRun", Signalled)
    with pytest.raises(TrainingStopped) as stopped:
        train_here(tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGINT and steps(tmp_path / "run") == [2]
    printed = capsys.readouterr()
    assert re.search(naming("step 2 of 6", "step-00000002"), printed.err) and "note: num_inf" in printed.out


def test_a_signal_after_the_last_step_is_obeyed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Signalled(loop.TrainingRun):
        def finish(self) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().finish()

    monkeypatch.setattr(loop, "TrainingRun", Signalled)
    with pytest.raises(TrainingStopped):
        train_here(tmp_path / "run", max_train_steps=1)
    assert steps(tmp_path / "run") == [1] and not (tmp_path / "run" / "pipeline").exists()


def test_several_processes_stop_where_they_have_agreed_and_the_trackers_are_closed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(tmp_path / "run", 1, report_to="tensorboard", logging_steps=1)
    assert not run.is_asked_to_stop()
    run.stop.received = signal.SIGINT
    assert run.is_asked_to_stop()
    as_process(0, 2)
    with tqdm(disable=True) as bar:
        assert not run.is_asked_to_stop()
        run.record({"prior": torch.tensor(0.5)}, bar)
        assert run.is_asked_to_stop()
        run.stop.received, run.step = None, 2
        run.record({"prior": torch.tensor(0.5)}, bar)
        assert not run.is_asked_to_stop()
    assert run.accelerator.trackers
    as_process(1, 2)
    capsys.readouterr()
    with pytest.raises(TrainingStopped) as stopped:  # the signal came to another process
        run.leave()
    assert stopped.value.code == 128 + signal.SIGTERM and not run.accelerator.trackers
    assert capsys.readouterr().err == "", "the main process says it"


# ---- processes and publication --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_process_that_is_not_the_main_one_trains_and_neither_writes_nor_speaks(
    dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []

    class Counted(loop.TrainingRun):
        def save(self) -> None:
            assert not is_locked(self.folder.lock), "the main process keeps the folder"
            taken.append(self.step)
            super().save()

    def build(*arguments: Any) -> Any:
        accelerator = loop_builds(*arguments)
        as_process(1, 2)
        return accelerator

    loop_builds = loop.build_accelerator
    monkeypatch.setattr(loop, "build_accelerator", build)
    monkeypatch.setattr(loop, "TrainingRun", Counted)
    fields = EVERYTHING | {"report_to": "none", "resume_from_checkpoint": "latest", "dry_run": dry_run}
    fields |= {"lr_warmup_steps": 9}  # of which the main process says that the run ends before
    assert train_here(tmp_path / "run", **fields) is None
    assert contents(tmp_path) == {} and taken == ([] if dry_run else [4, 5])
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_what_could_not_be_published_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(PublishError, match=naming("HF_TOKEN")):
        train_here(tmp_path / "run", push_to_hub=True)
    assert contents(tmp_path) == {}


# ---- a whole run ----------------------------------------------------------------------------------------------------


@dataclass(repr=False)
class Seen:
    """A run to its end, whose first measurement is its best by the threshold; what it said, and how long it took."""

    folder: Path
    said: str
    seconds: float
    bits_per_dim: float

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder, began = tmp_path_factory.mktemp("whole") / "run", time.perf_counter()
    with pytest.MonkeyPatch.context() as patched:
        said = io.StringIO()
        patched.setattr("sys.stdout", said)
        report = train_here(folder, **EVERYTHING, early_stopping_threshold=100.0)
    assert report is not None
    return Seen(folder, said.getvalue(), time.perf_counter() - began, report.bits_per_dim)


def test_everything_is_done_at_its_steps_and_told_to_the_trackers(seen: Seen) -> None:
    assert steps(seen.folder) == [4, 5]
    history, told = seen.read("history.json"), seen.read("run.json")
    assert history["train"]["step"] == [1, 2, 3, 4, 5] and history["validation"]["step"] == [2, 4]
    assert [path.name for path in (seen.folder / "samples").iterdir()] == ["step-00000003.png"]
    assert told["steps"] == 5 and 0 < told["training_seconds"] < seen.seconds
    events = EventAccumulator(str(seen.folder / "logs" / "vdm_hub")).Reload()
    assert [one.step for one in events.Scalars("train/images_per_second")] == [1, 2, 3, 4, 5]
    assert [one.value for one in events.Scalars("test/bits_per_dim")] == [pytest.approx(seen.bits_per_dim)]
    shown = {tag.split("/")[0]: [one.step for one in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {"samples": [3, 5], "schedule": [5], "training_curve": [5]}


def test_the_best_weights_are_published_with_their_own_figure(seen: Seen) -> None:
    measured, validation = seen.read("history.json")["validation"], seen.read("run.json")["validation"]
    assert validation == {name: values[0] for name, values in measured.items()} | {"images": 24}
    last = load_checkpoint(checkpoints(seen.folder / "checkpoints")[-1])
    assert last.state["provenance"] == {name: v for name, v in seen.read("run.json").items() if name != "validation"}
    for name, value in VDMPipeline.from_pretrained(seen.folder / "pipeline").unet.state_dict().items():
        assert torch.equal(value, last.tensors["best"][f"network.{name}"])
    assert not all(torch.equal(value, last.tensors["ema"][name]) for name, value in last.tensors["best"].items())


def test_a_run_says_what_it_is_what_it_measures_and_what_came_out(seen: Seen) -> None:
    for words in (
        "parameters",
        "step 2: held-out",
        "step 4: held-out",
        "trained 5 steps in",
        f"{seen.bits_per_dim:.4f}",
    ):
        assert words in seen.said
    assert "note: " not in seen.said
