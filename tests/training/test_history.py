"""The logged course of a run."""

from __future__ import annotations

from vdm_hub.training.state.history import History


def test_what_is_added_is_one_more_row_of_its_part_and_nothing_else_changes() -> None:
    history = History()
    empty = {"step": [], "bits_per_dim": []}
    assert history.to_dict() == {"train": empty, "validation": empty}
    history.add("train", 2, {"bits_per_dim": 3.5, "prior": 0.5})
    before = history.to_dict()
    again = History(before)
    again.add("train", 4, {"bits_per_dim": 3.25, "prior": 0.25})
    again.add("validation", 4, {"bits_per_dim": 3.0})
    assert again.to_dict() == {
        "train": {"step": [2, 4], "bits_per_dim": [3.5, 3.25], "prior": [0.5, 0.25]},
        "validation": {"step": [4], "bits_per_dim": [3.0]},
    }
    again.to_dict()["train"]["step"].append(9)
    assert again.last("train", 9) == {"step": 4, "bits_per_dim": 3.25, "prior": 0.25}
    assert (
        before
        == history.to_dict()
        == {"train": {"step": [2], "bits_per_dim": [3.5], "prior": [0.5]}, "validation": empty}
    )


def test_the_last_row_is_that_of_a_step_or_before_it() -> None:
    history = History({"validation": {"step": [10, 20], "bits_per_dim": [3.5, 3.25]}})
    found = [history.last("validation", step) for step in (9, 10, 19, 20, 21)]
    first, second = {"step": 10, "bits_per_dim": 3.5}, {"step": 20, "bits_per_dim": 3.25}
    assert found == [None, first, first, second, second]
    assert history.last("train", 30) is None
