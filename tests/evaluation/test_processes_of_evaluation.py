"""An evaluation on several processes, and one that is killed: the same figures, image by image."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from naming import naming
from runs import ROOT, TORCHRUN, environment, python
from tiny import tiny_pipeline
from vdm_hub import ImportanceWeighted, VariationalBound
from vdm_hub.data.loading import load_split
from vdm_hub.errors import CheckpointError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.evaluation.measuring import batches_of
from vdm_hub.evaluation.provenance import describe_images

MODULE = "vdm_hub.commands"
WORDS = ("--dataset_name", "digits", "--num_levels", "17")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


def table(path: Path) -> dict[str, list[Any]]:
    return pq.read_table(path).to_pydict()


def on_two(*words: str) -> subprocess.CompletedProcess[str]:
    return python(*TORCHRUN, "-m", MODULE, *words, ACCELERATE_USE_CPU="true")


# ---- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_find_of_each_image_what_one_does(folder: Path, tmp_path: Path) -> None:
    """Bit for bit, as the batches are the same ones; and only the main process prints."""
    words = (
        "evaluate",
        str(folder),
        *WORDS,
        "--max_images",
        "150",
        "--replicates",
        "3",
        "--batch_size",
        "16",
        "--json",
    )
    alone = python(MODULE, *words, "--per_image", str(tmp_path / "one.parquet"))
    shared = on_two(*words, "--per_image", str(tmp_path / "two.parquet"), "--journal", str(tmp_path / "journal"))
    assert alone.returncode == shared.returncode == 0, alone.stderr + shared.stderr
    one, two = (json.loads(done.stdout) for done in (alone, shared))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert table(tmp_path / "one.parquet") == table(tmp_path / "two.parquet")
    for key in ("bits_per_dim", "standard_error", "terms", "network_evaluations", "dataset", "weights"):
        assert one[key] == two[key], key
    # What two processes have finished, one finds finished.
    images = load_split("digits", "test[:150]", num_levels=17)
    resumed = evaluate(tiny_pipeline(), images, replicates=3, progress=False, journal=tmp_path / "journal")
    assert resumed.bits_per_dim == one["bits_per_dim"]


def test_fewer_images_than_processes_are_refused_by_one_voice(folder: Path) -> None:
    done = on_two("evaluate", str(folder), *WORDS, "--max_images", "1")
    assert done.returncode != 0 and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: 1 images for 2 processes: start at most 1, or evaluate more images."]


def test_a_launcher_that_accelerate_does_not_see_is_refused(folder: Path) -> None:
    done = python(MODULE, "evaluate", str(folder), *WORDS, WORLD_SIZE="2", ACCELERATE_USE_CPU="false")
    assert done.returncode == 2 and "2 processes were launched, but accelerate runs 1" in done.stderr


@pytest.mark.parametrize(("images", "batch_size", "processes"), [(50, 16, 1), (50, 16, 2), (360, 77, 4), (5, 1, 4)])
def test_every_image_is_in_one_batch_of_one_process(images: int, batch_size: int, processes: int) -> None:
    batches = list(batches_of(images, batch_size, processes))
    assert torch.equal(torch.cat(batches), torch.arange(images))
    shares = [sum(map(len, batches[rank::processes])) for rank in range(processes)]
    assert min(shares) > 0 and max(shares) - min(shares) <= len(batches) / processes
    assert max(map(len, batches)) <= batch_size


# ---- kills ----------------------------------------------------------------------------------------------------------


def kept(journal: Path) -> set[tuple[int, int]]:
    """(replicate, image) of all that is finished."""
    found = set()
    for path in journal.rglob("replicate-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            replicate = int(file.metadata()["replicate"])
            found |= {(replicate, int(image)) for image in file.get_tensor("indices")}
    return found


@pytest.mark.slow
def test_what_was_finished_before_a_kill_is_not_measured_again(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    words = [
        "evaluate",
        str(folder),
        *WORDS,
        "--split",
        "test[:90]",
        "--replicates",
        "8",
        "--batch_size",
        "5",
        "--journal",
        str(journal),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *words], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 280
    while len(list(journal.rglob("replicate-*"))) < 7:
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = kept(journal)
    assert 0 < len(finished) < 8 * 90

    images, pipeline = load_split("digits", "test[:90]", num_levels=17), tiny_pipeline()
    calls: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    arguments: dict[str, Any] = {"replicates": 8, "batch_size": 5, "progress": False}
    resumed = evaluate(pipeline, images, **arguments, journal=journal)
    hook.remove()
    whole = evaluate(pipeline, images, **arguments)
    pilot = whole.network_evaluations - 8 * 90
    assert sum(calls) in (8 * 90 - len(finished), 8 * 90 - len(finished) + pilot)
    assert resumed.network_evaluations == whole.network_evaluations, "what was done before the kill counts"
    for name, term in whole.terms_per_image.items():
        assert torch.equal(term, resumed.terms_per_image[name])
    assert list(resumed.terms) == list(whole.terms), "in the same order, too"
    before, after = resumed.details["seconds_before"], resumed.details["seconds"]
    again = evaluate(pipeline, images, **arguments, journal=journal).details["seconds_before"]
    assert 0 < before < again <= before + after, "each image's time is kept with it"
    assert len(kept(journal)) == 8 * 90
    assert not list(journal.rglob(".*")), "and nothing half-written is left"


def test_a_journal_is_of_one_measurement(tmp_path: Path) -> None:
    images, pipeline = load_split("digits", "test[:6]", num_levels=17), tiny_pipeline()
    arguments: dict[str, Any] = {"replicates": 2, "progress": False, "journal": tmp_path / "journal"}
    told = describe_images(images, "digits", "test[:6]")
    first = evaluate(pipeline, images, **arguments, dataset=told)
    more = evaluate(pipeline, images, **arguments | {"replicates": 4}, batch_size=4)
    assert torch.equal(more.terms_per_image["diffusion"][:2], first.terms_per_image["diffusion"])
    others: list[tuple[str, dict[str, Any]]] = [
        ("seed", {"seed": 1}),
        ("options", {"method": VariationalBound(5)}),
        ("images", {"max_images": 5}),
        ("method", {"method": ImportanceWeighted(transitions=3, draws=2)}),
    ]
    for name, change in others:
        with pytest.raises(CheckpointError, match=name):
            evaluate(pipeline, images, **arguments, **change)
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match="weights"):
        evaluate(pipeline, images, **arguments)


@pytest.mark.parametrize("change", ["weights", "seed", "images"])
def test_a_piece_of_another_journal_is_never_taken_for_one_of_this(change: str, tmp_path: Path) -> None:
    images, pipeline = load_split("digits", "test[:4]", num_levels=17), tiny_pipeline()
    arguments: dict[str, Any] = {"replicates": 2, "progress": False, "method": VariationalBound(pilot_evaluations=0)}
    own = evaluate(pipeline, images, **arguments, journal=tmp_path / "own")
    other = tiny_pipeline()
    if change == "weights":
        with torch.no_grad():
            next(other.unet.parameters()).add_(1)
    others = load_split("digits", "test[4:8]", num_levels=17) if change == "images" else images
    evaluate(other, others, **arguments, journal=tmp_path / "other", seed=int(change == "seed"))
    piece = next((tmp_path / "other").rglob("replicate-*"))
    copy = tmp_path / "own" / "unclipped" / piece.name
    copy.write_bytes(piece.read_bytes())
    with pytest.raises(CheckpointError, match=naming(piece.name)):
        evaluate(pipeline, images, **arguments, journal=tmp_path / "own")
    copy.unlink()
    assert evaluate(pipeline, images, **arguments, journal=tmp_path / "own").bits_per_dim == own.bits_per_dim


def test_a_folder_that_is_no_journal_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    images, pipeline = load_split("digits", "test[:4]", num_levels=17), tiny_pipeline()
    arguments: dict[str, Any] = {"replicates": 2, "progress": False}
    (tmp_path / "thesis" / "unclipped").mkdir(parents=True)
    (tmp_path / "thesis" / "unclipped" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=naming("chapter.tex")):
        evaluate(pipeline, images, **arguments, journal=tmp_path / "thesis")
    whole = evaluate(pipeline, images, **arguments, journal=tmp_path / "journal")
    shard = next((tmp_path / "journal").rglob("replicate-*"))
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=naming(shard.name)):
        evaluate(pipeline, images, **arguments, journal=tmp_path / "journal")
    shard.unlink()
    again = evaluate(pipeline, images, **arguments, journal=tmp_path / "journal")
    assert torch.equal(again.per_image, whole.per_image)
