"""Figures among the Hub's own evaluation results: what a publication states, as the client of the Hub reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResultEntry, parse_eval_result_entries

from hub.clients import run_client
from hub.publications import EVALUATION, IMAGES, write_run
from hub.server import LoopbackHub
from hub.storage import Blob
from hub.test_publishing import files, history, vdm_hub
from vdm_hub.publishing.contents import is_managed
from vdm_hub.publishing.eval_results import OWN_RESULTS, Stated, entry_of, not_stated, published_results, stated

ON_THE_HUB = IMAGES | {"name": "me/digits"}
RECORD: dict[str, Any] = EVALUATION | {"dataset": ON_THE_HUB, "options": {}}
URL = "https://huggingface.co/me/tiny/blob/main/evaluation.json"
ASK = """
info = model_info("me/tiny", revision=(sys.argv[1:] or [None])[0], expand=["evalResults"])
answer([vars(entry) for entry in info.eval_results or []])
"""


def entry(record: dict[str, Any]) -> EvalResultEntry:
    """The one entry of a publication's file, as huggingface_hub reads it."""
    text, why = published_results(record, URL)
    assert why == ""
    (read,) = parse_eval_result_entries(yaml.safe_load(text))
    return read


# ---- the file -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_the_client_reads() -> None:
    place = stated(ON_THE_HUB, "bound", {})
    assert entry(RECORD) == entry_of(RECORD, place, URL)


def test_a_figure_is_stated_with_its_unit_errors_and_protocol() -> None:
    read = entry(RECORD)
    assert (read.dataset_id, read.value) == ("me/digits", EVALUATION["bits_per_dim"])
    assert read.task_id == "bits_per_dim_test_17_levels", "17 levels of 256 are another task"
    assert (read.source_url, read.source_name) == (URL, "evaluation.json")
    assert read.notes is not None
    for said in ("bits/dim", "upper bound", "0.01 (Monte Carlo, 4 replicates)", "0.02 (over images)", "360 images"):
        assert said in read.notes
    assert read.notes.endswith("; protocol: bound.")


def test_what_is_not_known_is_left_out() -> None:
    read = entry(RECORD)
    assert read.verify_token is None and read.date is None and read.dataset_revision is None
    assert "unknown (Monte Carlo" in str(entry(RECORD | {"standard_error": None, "replicates": 1}).notes)


OTHERS: dict[str, dict[str, Any]] = {
    "a configuration": {"dataset": ON_THE_HUB | {"config": "plain text"}},
    "a split": {"dataset": ON_THE_HUB | {"split": "validation"}},
    "resized": {"dataset": ON_THE_HUB | {"resolution": 8, "resized": True}},
    "grey": {"dataset": ON_THE_HUB | {"color": "grey"}},
    "levels": {"dataset": ON_THE_HUB | {"levels": 256}},
    "given its class": {"condition": "class"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_figures_of_other_data_are_of_other_tasks(other: dict[str, Any]) -> None:
    read = entry(RECORD | other)
    assert read.task_id != entry(RECORD).task_id
    assert (
        read.task_id.startswith("bits_per_dim_") and read.task_id.replace("_", "").isalnum()
    ) or "-" in read.task_id
    assert ("not comparable" in str(read.notes)) == bool(read.task_id.endswith("8x8_17_levels"))


def test_a_figure_has_the_place_of_its_protocol_and_effort_changes_none() -> None:
    place = stated(ON_THE_HUB, "bound", {})
    assert place.is_of(entry(RECORD))
    assert stated(ON_THE_HUB, "bound", {"times_per_datum": 4, "pilot_evaluations": 0}) == place
    others = [stated(ON_THE_HUB, "bound", {"transitions": 10}), stated(ON_THE_HUB, "ode", {})]
    others += [stated(ON_THE_HUB, "bound", {}, overrides={"prediction_type": "v_prediction"})]
    assert len({one.file for one in [place, *others]}) == 4
    assert not any(one.is_of(entry(RECORD)) for one in others)
    assert others[0].is_of(entry(RECORD | {"options": {"transitions": 10}}))


def test_texts_are_stated_by_byte() -> None:
    texts = {"name": "me/plays", "config": None, "split": "test", "windows": 3, "shape": [8], "levels": 40}
    figures = {"bits_per_byte": 1.25, "bits_per_token": 2.5, "perplexity": 2**2.5, "bits_per_dim": 2.5, "terms": {}}
    record = RECORD | figures | {"dataset": texts | {"window_context": 2}, "tokens": 20, "bytes": 40, "num_images": 3}
    read = entry(record)
    assert (read.value, read.task_id) == (1.25, "bits_per_byte_test")
    assert str(read.notes).startswith("bits/byte") and "window_context=2" in str(read.notes)
    assert "tokenizer" in published_results(record | {"bits_per_byte": None, "bytes": None}, URL)[1]


NOT_STATED: dict[str, dict[str, Any]] = {
    "digits of scikit-learn": {"name": "digits"},
    "a local folder": {"name": "birds"},
    "no name": {"name": None},
    "a path": {"name": "me/digits/x"},
    "a hostile name": {"name": "me/digits\n- dataset: {id: cais/hle}"},
    "held out": {"split": "held_out"},
    "a part": {"split": "test[:10]"},
    "two splits": {"split": "train+test"},
    "the first few": {"max_images": 10},
    "the first windows": {"max_windows": 10},
    "no split": {"split": None},
}


@pytest.mark.parametrize("other", NOT_STATED.values(), ids=NOT_STATED.keys())
def test_what_is_no_whole_split_of_a_dataset_on_the_hub_is_not_stated(other: dict[str, Any]) -> None:
    assert not_stated(ON_THE_HUB | other) != ""
    text, why = published_results(RECORD | {"dataset": ON_THE_HUB | other}, URL)
    assert text == "" and why != ""


def test_hostile_words_stay_one_entry() -> None:
    hostile = "x.\n- dataset: {id: a/b}\n; protocol: bound."
    record = RECORD | {"method": hostile, "options": {hostile: hostile}, "versions": {"vdm-hub": hostile}}
    read = entry(record)
    assert read.dataset_id == "me/digits"
    assert not stated(ON_THE_HUB, "bound", {}).is_of(read), "no other protocol's place is taken"


def test_a_long_name_is_a_file_all_the_same() -> None:
    place = Stated("me/digits", "bits_per_dim_" + "c" * 500, "bound")
    assert len(place.file) < 200 and place.file.endswith(".yaml")


# ---- a publication --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on a dataset of the Hub is published; then one on scikit-learn's digits in its place."""
    folder = tmp_path_factory.mktemp("results")
    first = write_run(folder / "first", evaluation=RECORD, recipe={"dataset_name": "me/digits"})
    second = write_run(folder / "second", seed=1)
    with LoopbackHub() as hub:
        environment = hub.environment(folder / "home")
        said = [vdm_hub(environment, "publish", first, "me/tiny")]
        answers = [run_client(environment, ASK)]
        repository = hub.repositories["me/tiny"]
        told = {".eval_results/mine.yaml": Blob(b"- dataset: {id: a/b, task_id: c}\n  value: 1\n")}
        repository.commit("main", "submitted", dict(repository.at("main").files) | told)
        said.append(vdm_hub(environment, "publish", second, "me/tiny"))
        answers.append(run_client(environment, ASK))
    assert [done.returncode for done in said] == [0, 0], said
    return {"said": said, "answers": answers, "hub": hub, "repository": repository}


def test_a_publication_states_its_figure_where_the_hub_shows_it(published: dict[str, Any]) -> None:
    (read,) = published["answers"][0]
    source = f"{published['hub'].url}/me/tiny/blob/main/evaluation.json"
    assert read == vars(entry(RECORD)) | {"source_url": source}
    repository = published["repository"]
    commit = history(repository)[2]
    assert {OWN_RESULTS, "README.md", "evaluation.json"} <= files(repository, commit).keys(), "in the one commit"
    assert "model-index" in files(repository, commit)["README.md"].content.decode()


def test_another_model_takes_its_own_figure_away_and_says_whose_stay(published: dict[str, Any]) -> None:
    (read,) = published["answers"][1]
    assert read["dataset_id"] == "a/b", "what others submitted stays"
    second = published["said"][1]
    assert ".eval_results/mine.yaml" in second.stderr
    assert "'digits' are no dataset" in second.stdout
    assert "no dataset" not in published["said"][0].stdout


def test_only_the_publications_own_file_is_replaced() -> None:
    assert is_managed(OWN_RESULTS, set())
    assert not is_managed(Stated("a/b", "c", "bound").file, set())


def test_a_dry_run_shows_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluation=RECORD)
    with LoopbackHub() as hub:
        done = vdm_hub(hub.environment(tmp_path), "publish", run, "me/tiny", "--dry_run")
        assert hub.calls == []
    assert done.returncode == 0, done.stderr
    (read,) = parse_eval_result_entries(yaml.safe_load((run / "publication" / "main" / OWN_RESULTS).read_text()))
    assert read.value == EVALUATION["bits_per_dim"] and "no dataset" not in done.stdout
    assert f"main/{OWN_RESULTS}" in json.loads((run / "publication" / "publication.json").read_text())


def test_a_dry_run_says_why_there_is_none(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        done = vdm_hub(hub.environment(tmp_path), "publish", write_run(tmp_path / "run"), "me/tiny", "--dry_run")
    assert done.returncode == 0 and "'digits' are no dataset" in done.stdout
