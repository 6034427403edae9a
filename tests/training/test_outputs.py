"""The folder of a run by itself: whose it is, who may write to it and when, and what is written at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import tiny_tokens
from naming import naming, paragraph
from runs import LEARNED, configuration, contents
from spaces import kinds
from tiny import quiet
from vdm_hub.data.loading import load_data
from vdm_hub.errors import CheckpointError, DataError, OutputError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.likelihood.methods import VariationalBound
from vdm_hub.pipelines.by_name import open_pipeline
from vdm_hub.training.parts.setup import build_objective
from vdm_hub.training.state import outputs
from vdm_hub.training.state.checkpoints import save_checkpoint
from vdm_hub.training.state.history import History
from vdm_hub.training.state.outputs import OutputFolder, own_method, publish_locally, results, save_samples

FIGURES = {"evaluation_replicates": 2, "num_sample_images": 3, "transitions": 4, "eval_batch_size": 100, "seed": 5}


def folder_of(place: Path, **fields: Any) -> tuple[OutputFolder, Any]:
    chosen = configuration(place, **fields)
    return OutputFolder(chosen), chosen


def checkpoint(folder: OutputFolder, step: int) -> Path:
    return save_checkpoint(folder.checkpoints, step, {"objective": {"a": torch.zeros(1)}}, {"step": step})


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[OutputFolder, Any]]:
    """A folder that was claimed by a run, and the recipe that goes on with it."""
    folder, chosen = folder_of(tmp_path / "run")
    folder.claim(chosen)
    yield folder, configuration(tmp_path / "run", resume_from_checkpoint="latest")


# ---- whose it is ------------------------------------------------------------------------------------------------


def test_two_runs_are_never_at_work_in_one_folder(tmp_path: Path) -> None:
    folder, chosen = folder_of(tmp_path / "run")
    with folder.reserved(chosen):
        for more in ({}, {"dry_run": True}, {"resume_from_checkpoint": "latest"}):
            second, other = folder_of(tmp_path / "run", **more)
            with (
                pytest.raises(CheckpointError, match=naming(str(folder.path), "--output_dir")),
                second.reserved(other),
            ):
                pass
            assert folder.lock.exists()
    with folder.reserved(chosen):
        pass


def test_a_lock_that_is_taken_at_the_last_moment_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chosen = folder_of(tmp_path / "run")
    with folder.reserved(chosen):
        monkeypatch.setattr(OutputFolder, "_refuse_second", lambda self: None)
        with pytest.raises(CheckpointError, match=naming(str(folder.path))), folder.reserved(chosen):
            pass


def test_what_another_run_left_in_between_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, chosen = folder_of(tmp_path / "run")

    @contextmanager
    def late(lock: Path) -> Iterator[None]:
        (lock.parent / "recipe.yaml").write_text("of another")
        yield

    monkeypatch.setattr(outputs, "locked", late)
    with pytest.raises(CheckpointError, match=naming(str(folder.path))), folder.reserved(chosen):
        pass


def test_of_a_run_that_wrote_nothing_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    folder, chosen = folder_of(tmp_path / "before" / "a" / "b")
    with pytest.raises(ValueError, match="ends"), folder.reserved(chosen):
        assert folder.path.is_dir()
        raise ValueError("ends")
    assert list((tmp_path / "before").iterdir()) == []
    with folder.reserved(chosen):
        folder.claim(chosen)
    assert [path.name for path in folder.path.iterdir()] == ["recipe.yaml"]
    there, chosen = folder_of(tmp_path / "before", dry_run=True)
    dry, chosen = folder_of(tmp_path / "dry", dry_run=True)
    with dry.reserved(chosen):
        assert not dry.path.exists()
    empty, chosen = folder_of(tmp_path / "empty")
    empty.path.mkdir()
    with empty.reserved(chosen):
        pass
    assert empty.path.is_dir() and there.path.is_dir()


def test_a_folder_with_anything_in_it_is_refused_and_only_a_run_can_be_gone_on_with(tmp_path: Path) -> None:
    folder, chosen = folder_of(tmp_path / "run")
    folder.path.mkdir()
    folder.check(chosen)
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty") as refused:
        folder.check(chosen)
    assert "--resume_from_checkpoint" not in str(refused.value)
    folder.claim(chosen)
    with pytest.raises(CheckpointError, match=naming("a run", "--resume_from_checkpoint latest")):
        folder.check(chosen)
    dry, chosen = folder_of(folder.path, dry_run=True)
    with pytest.raises(CheckpointError), dry.reserved(chosen):
        pass
    file, chosen = folder_of(folder.path / "notes.txt")
    with pytest.raises(CheckpointError, match=naming(str(file.path), "choose another")):
        file.check(chosen)


def test_an_output_among_the_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("L", (8, 8)).save(data / "a.png")
    folder, chosen = folder_of(data / "run", dataset_name=None, train_data_dir=str(data))
    with pytest.raises(DataError, match=naming("output_dir")):
        folder.check(chosen)


def test_a_run_goes_on_in_its_own_folder(own: Any, tmp_path: Path) -> None:
    folder, latest = own
    folder.check(latest)  # which ended before its first checkpoint
    checkpoint(folder, 2)
    folder.check(latest)
    named = str(folder.checkpoints / "step-00000002")
    folder.check(configuration(folder.path, resume_from_checkpoint=named))
    folder.check(configuration(folder.path, resume_from_checkpoint=named, learning_rate=0.5))
    other, _ = folder_of(tmp_path / "other")
    for wrong in (str(checkpoint(other, 2)), None):
        with pytest.raises(CheckpointError, match=naming("--output_dir")):
            folder.check(configuration(folder.path, resume_from_checkpoint=wrong))
    folder.recipe.unlink()
    with pytest.raises(CheckpointError, match=naming("--output_dir")):
        folder.check(latest)


def test_a_run_without_a_checkpoint_begins_again_with_its_very_recipe_alone(own: Any) -> None:
    folder, latest = own
    for name in ("logs", "checkpoints", "samples", "initial"):
        (folder.path / name).mkdir()
    folder.check(latest)
    with pytest.raises(CheckpointError, match=naming("--output_dir")):
        folder.check(configuration(folder.path, resume_from_checkpoint="latest", seed=7))
    before = folder.recipe.read_text()
    folder.recipe.write_text("model: [")
    with pytest.raises(CheckpointError, match=naming("--output_dir")):
        folder.check(latest)
    folder.recipe.write_text(before)
    (folder.path / "pipeline").mkdir()
    with pytest.raises(CheckpointError, match=naming("--output_dir")):
        folder.check(latest)


def test_what_a_killed_run_left_half_written_counts_as_nothing_and_is_cleared(own: Any) -> None:
    folder, latest = own
    half = [folder.path / name for name in (".recipe-0123abcd.yaml", ".samples-0123abcd.png", ".initial-0123abcd")]
    half += [
        folder.path / ".pipeline-0123abcd",
        folder.path / ".run-0123abcd.json",
        folder.path / ".schedule-0123abcd.png",
    ]
    for path in half:
        path.write_text("half")
    folder.lock.touch()
    folder.check(latest)
    folder.claim(latest)
    assert {path.name for path in folder.path.iterdir()} == {"recipe.yaml", folder.lock.name}
    (folder.path / ".other-0123abcd").touch()
    with pytest.raises(CheckpointError):
        folder.check(latest)


def test_what_lies_where_a_checkpoint_would_is_named(own: Any) -> None:
    folder, latest = own
    checkpoint(folder, 2)
    (folder.checkpoints / "step-00000004").write_text("mine")
    with pytest.raises(CheckpointError, match=naming("step-00000004")):
        folder.check(latest)


class Kept:
    """A model that a run begins from, which counts how often it is kept."""

    times = 0

    def keep(self, folder: Path) -> None:
        self.times += 1
        folder.mkdir()


def test_a_claim_keeps_the_model_once_and_as_many_checkpoints_as_asked_for(own: Any) -> None:
    folder, _ = own
    model: Any = Kept()
    for step in (1, 2, 3):
        checkpoint(folder, step)
    for _ in range(2):
        folder.claim(configuration(folder.path, checkpoints_total_limit=2, learning_rate=0.125), model)
    assert model.times == 1 and "0.125" in folder.recipe.read_text()
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["step-00000002", "step-00000003"]


# ---- what is written --------------------------------------------------------------------------------------------


def test_the_course_of_a_run_is_recorded(own: Any) -> None:
    folder, _ = own
    history = History()
    history.add("train", 1, {"bits_per_dim": 2.0, "learning_rate": 0.1})
    folder.record(history, {"steps": 1})
    assert json.loads(folder.history.read_text()) == history.to_dict()
    assert json.loads(folder.provenance.read_text()) == {"steps": 1}
    assert Image.open(folder.curve).size[0] > 100
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.record(history, {"seconds": float("nan")})
    assert json.loads(folder.provenance.read_text()) == {"steps": 1}
    before = folder.history.read_text()
    history.add("train", 2, {"bits_per_dim": float("nan"), "learning_rate": 0.1})
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.record(history, {"steps": 2})
    assert folder.history.read_text() == before


@pytest.mark.parametrize("error", [OSError("no room"), SafetensorError("no room")])
def test_results_that_can_not_be_written_are_said_with_what_is_whole(error: Exception, own: Any) -> None:
    def fail() -> None:
        with results(own[0]):
            raise error

    assert "no room" in paragraph(CheckpointError, fail)
    with pytest.raises(DataError), results(own[0]):
        raise DataError("its own words")


def test_what_a_run_measures_itself_by() -> None:
    assert own_method(configuration(Path("run"), transitions=7)) == VariationalBound(7)
    assert own_method(configuration(Path("run"))) is None


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that has just ended, of an objective as it begins."""
    chosen = configuration(tmp_path_factory.mktemp("published") / "run", **FIGURES, test_split=None, test_size=200)
    folder, data = OutputFolder(chosen), replace(load_data(chosen.data), notes=("they may have been seen",))
    objective = build_objective(chosen, data.shape)
    return folder, chosen, data, objective, publish_locally(objective, chosen, folder, data)


def test_a_run_leaves_its_pipeline_pictures_and_figure(published: Any) -> None:
    folder, _, data, objective, report = published
    assert {path.name for path in folder.path.iterdir()} == {
        *("pipeline", "samples.png", "schedule.png", "evaluation.json")
    }
    assert not list(folder.pipeline.rglob("*.bin")) and not objective.training
    assert json.loads(folder.evaluation.read_text()) == report.to_dict()
    pipe: Any = open_pipeline(str(folder.pipeline))
    again = evaluate(pipe, data.test, VariationalBound(4), replicates=2, seed=5, batch_size=100, progress=False)
    assert torch.equal(again.per_image, report.per_image) and "they may have been seen" in str(report)
    described = report.details["dataset"]
    assert described["split"] == outputs.SPLIT and pipe.held_out["fingerprint"] == described["fingerprint"]
    assert pipe.held_out["size"] == 200 and report.num_images == 200
    drawn = pipe.sample(3, torch.Generator().manual_seed(5), 3)
    outputs.save_grid(drawn, folder.path.parent / "again.png", None)
    assert (folder.path.parent / "again.png").read_bytes() == folder.samples.read_bytes()


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"evaluation_replicates": 0}, {"evaluation.json"}),
        ({"num_sample_images": 0}, {"samples.png"}),
        ({"evaluation_replicates": 1, "num_sample_images": 1}, set()),
    ],
)
def test_what_is_not_asked_for_is_not_done(changes: Any, missing: set[str], published: Any, tmp_path: Path) -> None:
    _, _, data, objective, _ = published
    folder, chosen = folder_of(tmp_path / "run", **FIGURES | changes)
    report = publish_locally(objective, chosen, folder, data)
    written = {path.name for path in folder.path.iterdir()}
    assert {"samples.png", "schedule.png", "evaluation.json"} - written == missing
    assert (report is None) == ("evaluation.json" in missing)
    assert report is None or report.replicates == chosen.training.evaluation_replicates


def test_without_test_images_there_is_no_figure(published: Any, tmp_path: Path) -> None:
    _, _, data, objective, _ = published
    folder, chosen = folder_of(tmp_path / "run", **FIGURES)
    assert publish_locally(objective, chosen, folder, replace(data, test=None, held_out_test=None)) is None
    assert not folder.evaluation.exists() and folder.samples.exists()
    report = publish_locally(objective, chosen, folder, replace(data, held_out_test=None))
    assert report is not None and report.details["dataset"]["split"] == chosen.data.test_split
    assert open_pipeline(str(folder.pipeline)).held_out is None


def test_a_model_without_a_schedule_shows_none(tmp_path: Path) -> None:
    """Not even that of an earlier end of the run."""
    stage = {"latent_shapes": [[4]], "block_out_channels": [8], "norm_num_groups": 4}
    folder, chosen = folder_of(tmp_path / "run", model="hvae", hvae=stage, unet={}, noise_schedule="linear")
    folder.path.mkdir()
    folder.schedule.write_text("of an earlier end")
    data = load_data(chosen.data)
    for _ in range(2):
        publish_locally(build_objective(chosen, data.shape), chosen, folder, data)
        assert not folder.schedule.exists() and folder.pipeline.is_dir()


def test_a_pipeline_with_a_file_of_someone_else_in_it_is_not_replaced(published: Any, tmp_path: Path) -> None:
    _, _, data, objective, _ = published
    folder, chosen = folder_of(tmp_path / "run")
    publish_locally(objective, chosen, folder, data)
    (folder.pipeline / "notes.txt").write_text("mine")
    before = contents(folder.pipeline)
    with pytest.raises(OutputError, match=naming("notes.txt")):
        publish_locally(objective, chosen, folder, data)
    assert contents(folder.pipeline) == before


# ---- samples ----------------------------------------------------------------------------------------------------


def drawn(pipe: Any, path: Path, **fields: Any) -> Path:
    save_samples(pipe, configuration(path.parent / "run", num_inference_steps=2, **fields), path)
    return path


def test_samples_are_of_the_seed_and_the_number_of_steps(tmp_path: Path) -> None:
    pipe = kinds.unconditional()
    files = [
        drawn(pipe, tmp_path / f"{n}.png", num_sample_images=4, **more).read_bytes()
        for n, more in enumerate(({}, {}, {"seed": 1}))
    ]
    assert files[0] == files[1] != files[2]
    outputs.save_grid(pipe.sample(4, torch.Generator().manual_seed(1), 2), tmp_path / "own.png", None)
    assert (tmp_path / "own.png").read_bytes() == files[2]


@pytest.mark.parametrize("make", [kinds.classes, kinds.captions])
def test_what_a_network_is_told_has_rows_of_its_own(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = make()
    choices, argument = pipe.condition.choices, pipe.condition.argument
    path = drawn(pipe, tmp_path / "a.png", num_sample_images=7)
    columns = 7 // len(choices)
    told = [choice for choice in choices for _ in range(columns)]
    again = pipe.sample(len(told), torch.Generator().manual_seed(0), 2, **{argument: told})
    outputs.save_grid(again, tmp_path / "b.png", columns)
    assert path.read_bytes() == (tmp_path / "b.png").read_bytes()
    said = capsys.readouterr()
    assert ("a b; c d" in said.out + said.err) == (make is kinds.captions)


def test_a_model_of_captions_without_examples_is_told_the_empty_text(tmp_path: Path, capsys: Any) -> None:
    pipe = kinds.captions()
    told = dict(pipe.config.captions) | {"examples": []}
    text = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    bare: Any = quiet(type(pipe)(pipe.unet, pipe.scheduler, captions=told, **text))
    path = drawn(bare, tmp_path / "a.png", num_sample_images=2)
    outputs.save_grid(bare.sample(2, torch.Generator().manual_seed(0), 2, prompt=""), tmp_path / "b.png", None)
    assert path.read_bytes() == (tmp_path / "b.png").read_bytes() and "a row" not in capsys.readouterr().out


@pytest.mark.usefixtures("token_plugin")
@pytest.mark.parametrize(("asked", "count"), [(3, 3), (40, 16)])
def test_of_texts_a_few_screens_at_most_are_drawn(asked: int, count: int, tmp_path: Path) -> None:
    pipe = tiny_tokens.pipeline()
    fields = tiny_tokens.run_fields(tmp_path) | {"num_sample_images": asked, "seed": 3}
    path = drawn(pipe, tmp_path / "a.txt", **fields)
    texts = pipe(count, num_inference_steps=2, generator=torch.Generator().manual_seed(3), return_dict=False)[0]
    assert path.read_text("utf-8") == outputs.joined_texts(texts)


# ---- the summary ------------------------------------------------------------------------------------------------


def test_a_summary_has_the_figure_and_where_it_is(published: Any) -> None:
    folder, chosen, data, _, report = published
    said = folder.summary(chosen, data, report, None)
    assert "test images held out of digits" in said and str(report) in said
    for place in (folder.pipeline, folder.samples, folder.schedule):
        assert f"{place}" in said
    plain = configuration(folder.path)
    assert f"{plain.data.test_split} split of digits" in folder.summary(
        plain, replace(data, held_out_test=None), report, None
    )
    validation = {"step": 12, "bits_per_dim": 2.34567, "standard_error": 0.01, "images": 40}
    said = folder.summary(chosen, data, None, validation)
    assert "2.3457 bits/dim" in said and "step 12" in said and "40 images" in said and "0.0100" in said
    assert str(report) in folder.summary(chosen, data, report, validation)
    nothing = folder.summary(chosen, data, None, None)
    assert "bits/dim" not in nothing and str(folder.pipeline) in nothing
    other, chosen = folder_of(folder.path.parent / "nowhere", dataset_name=None, train_data_dir="pictures")
    assert other.summary(chosen, data, None, None) == ""
    assert "pictures" in other.summary(chosen, data, None, validation)


def test_learned_schedules_are_shown(tmp_path: Path) -> None:
    folder, chosen = folder_of(tmp_path / "run", noise_schedule=LEARNED)
    data = load_data(chosen.data)
    assert publish_locally(build_objective(chosen, data.shape), chosen, folder, data) is None
    assert folder.schedule.exists() and set(contents(folder.path)) >= {"schedule.png"}
