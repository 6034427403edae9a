"""A publication whose last answer was lost says that it may have happened; the next one finishes it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hub.publications import answer_of, write_run

pytestmark = pytest.mark.slow  # half a minute for all of them together
KINDS = ("dropped", "a gateway's answer", "then no rights", "never arrived")


def said_by(text: str) -> list[str]:
    """The lines of a command, without those of progress bars and of further attempts."""
    passing = ("it/s", "s/it", "B/s", "?it", "; attempt ")
    return [line for line in text.splitlines() if line and not any(word in line for word in passing)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lost")
    runs = [write_run(folder / "stock", stock=True), write_run(folder / "bare")]
    return answer_of("publish_with_lost_answers.py", *runs, folder / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_whose_answer_was_lost_may_have_been_published(results: dict[str, Any], kind: str) -> None:
    one = results[f"main: {kind}"]
    assert one["new"] == (kind != "never arrived"), "what the message can't know"
    assert "may have been published" in one["said"] and "main" in one["said"]
    assert f"{one['url']}/me/main-" in one["said"] and "publish again" in one["said"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_branch_is_named_and_main_is_as_it_was(results: dict[str, Any], kind: str) -> None:
    one = results[f"side: {kind}"]
    assert "may have been published" in one["said"] and "commit on diffusers" in one["said"]
    assert one["commits after"] == results["commits of one publication"]


def test_what_the_hub_refused_did_not_happen(results: dict[str, Any]) -> None:
    for where in ("main: refused", "side: refused", "request: refused", "preupload"):
        assert results[where]["said"] and "may have" not in results[where]["said"], where


def test_publishing_again_finishes_it_or_finds_it_done_and_nothing_is_there_twice(results: dict[str, Any]) -> None:
    for where, one in results.items():
        if where.startswith(("main", "side", "preupload", "create_repo")):
            assert one["again"] == "", where
            assert one["commits after"] == results["commits of one publication"], where


def test_a_repository_that_may_have_been_created_is_named(results: dict[str, Any]) -> None:
    one = results["create_repo"]
    assert one["there"] and one["said"].startswith("me/create_repo may have been created")


def test_a_pull_request_that_may_have_been_opened_is_looked_for_first(results: dict[str, Any]) -> None:
    one = results["request: dropped"]
    assert one["requests"] == 1, "sent once, whatever became of the answer"
    assert "may have been published" in one["said"] and f"{one['url']}/you/dropped/discussions" in one["said"]


def test_a_model_that_is_published_is_never_said_to_have_failed(results: dict[str, Any]) -> None:
    one = results["farewell"]
    assert one["new"] and "was published, as " in one["said"] and "diffusers" in one["said"]
    assert one["again"] == ""


def test_each_message_is_one_paragraph(results: dict[str, Any]) -> None:
    told = [one for one in results.values() if isinstance(one, dict) and "said" in one]
    assert all(one["struck"] for one in told), "a fault that hits nothing shows nothing"
    for one in told:
        (said,) = said_by(one["said"])
        assert 0 < len(said) <= 1020


@pytest.mark.parametrize("handled", [True, False])
@pytest.mark.parametrize("where", ["main", "side"])
def test_ctrl_c_while_a_commit_is_under_way_says_that_it_may_be_there(
    results: dict[str, Any], where: str, handled: bool
) -> None:
    one = results[f"stopped: {where}, {handled}"]
    assert one["status"] == 130 and one["again"] == ""
    assert "may have been published" in one["said"] and "/commits/" in one["said"] and "publish again" in one["said"]


def test_ctrl_c_between_two_commits_says_which_is_there(results: dict[str, Any]) -> None:
    one = results["stopped: then"]
    assert one["status"] == 130 and "on diffusers" in one["said"] and "publish again" in one["said"]


def test_ctrl_c_before_anything_is_there_says_so(results: dict[str, Any]) -> None:
    one = results["stopped: before"]
    assert one["status"] == 130 and "nothing half-written" in one["said"] and "may have" not in one["said"]


def test_ctrl_c_at_a_pull_request_sends_to_where_it_would_be_seen(results: dict[str, Any]) -> None:
    one = results["stopped: request"]
    assert one["requests"] == 1 and "may have been published" in one["said"] and "/discussions" in one["said"]


def test_what_the_hub_answers_is_one_paragraph_with_what_to_do_at_every_door(results: dict[str, Any]) -> None:
    assert len(results["answers"]) == 35
    for where, (word, said) in results["answers"].items():
        assert len(said_by(said)) == 1 and len(said_by(said)[0]) < 1010, (where, said)
        if not where.endswith("publish"):
            assert word in said, (where, said)
        else:
            assert re.search("hf auth login|write access|check the name|minutes", said), (where, said)
