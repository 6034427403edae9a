"""A sampling that is watched is the same sampling, seen step by step; who leaves ends it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from tiny import sampled, seeded, tiny_pipeline
from vdm_hub import ConfigurationError, watch


def test_what_is_watched_is_the_call_itself() -> None:
    pipe, states = tiny_pipeline(), []

    def keep(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> None:
        states.append(state["latents"].clone())

    expected = sampled(pipe, steps=5, callback_on_step_end=keep)
    *steps, (end, images) = watch(lambda show: pipe.sample(2, seeded(), 5, callback_on_step_end=show))
    assert end is None and torch.equal(images, expected)
    assert [step for step, _ in steps] == list(range(5))
    assert all(torch.equal(state["latents"], kept) for (_, state), kept in zip(steps, states, strict=True))


def test_some_steps_may_be_left_out() -> None:
    pipe = tiny_pipeline()
    seen = watch(lambda show: pipe.sample(1, seeded(), 7, callback_on_step_end=show), every=3)
    assert [step for step, _ in seen] == [0, 3, 6, None]


def test_an_error_of_the_call_is_raised_where_it_is_watched() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ConfigurationError, match="sampler"):
        list(watch(lambda show: pipe.sample(1, seeded(), 5, sampler="no such", callback_on_step_end=show)))
    with pytest.raises(ConfigurationError, match="every"):
        list(watch(lambda show: None, every=0))


def test_a_sampling_that_nobody_watches_any_more_ends() -> None:
    pipe, threads = tiny_pipeline(), threading.active_count()
    seen = watch(lambda show: pipe.sample(1, seeded(), 1000, callback_on_step_end=show))
    assert next(seen)[0] == 0 and threading.active_count() == threads + 1
    seen.close()  # type: ignore[attr-defined]
    waited = 0
    while threading.active_count() > threads and waited < 600:
        time.sleep(0.1)
        waited += 1
    assert threading.active_count() == threads
