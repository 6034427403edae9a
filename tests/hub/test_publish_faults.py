"""Whatever call of a publication fails, main is the old one or the new one, and the next publication succeeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hub.publications import answer_of, write_run

ONE_ATTEMPT = ("503", "403", "dropped after")
REST = ("dropped before", "truncated", "500", "502", "504", "401", "404", "409", "429")
FOR_EVER = ("503*", "dropped before*", "401*")


def trials(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    old = write_run(folder / "old", stock=True)
    new = write_run(folder / "new", stock=True, seed=1)
    (new / "training_curve.png").unlink()
    return answer_of("publish_under_faults.py", old, new, folder / "cache", *kinds)


def check(answer: dict[str, Any], kinds: tuple[str, ...]) -> None:
    results = answer["results"]
    assert len(results) == answer["calls"] * len(kinds)
    assert all(result["struck"] for result in results), "a fault that hit nothing shows nothing"
    for result in results:
        assert result["main"] in ("old", "new"), result
        assert result["loaded"] == result["main"], result
        assert result["main"] == ("old" if result["error"] else "new"), result
        assert result["next"] == "published", result


@pytest.mark.slow  # tests/hub/test_lost_answers.py has the answers that matter, one by one
def test_after_an_answer_is_lost_at_any_call_main_is_whole_and_the_next_publishes(tmp_path: Path) -> None:
    check(trials(tmp_path, ("dropped after",)), ("dropped after",))


@pytest.mark.slow
def test_what_passes_is_tried_again_and_what_is_refused_is_said(tmp_path: Path) -> None:
    answer = trials(tmp_path, ONE_ATTEMPT)
    check(answer, ONE_ATTEMPT)
    passing = [result for result in answer["results"] if result["kind"] not in ("403",)]
    assert not [result for result in passing if result["error"]], "what passes is tried again"
    refused = [result for result in answer["results"] if result["kind"] == "403"]
    assert all("may not write" in result["error"] for result in refused if result["error"])
    assert len({result["main"] for result in refused}) == 1 or any(result["main"] == "new" for result in refused)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [REST, FOR_EVER])
def test_every_other_fault_too(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    check(trials(tmp_path, kinds), kinds)
