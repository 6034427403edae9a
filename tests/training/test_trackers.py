"""What the trackers get: terms, images/s, samples and plots; and what is said of one that is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from naming import naming
from runs import start, train_here
from vdm_hub.errors import ConfigurationError

SHOWN: dict[str, Any] = {
    "report_to": "tensorboard",
    "logging_steps": 1,
    "validation_size": 32,
    "validation_steps": 3,
    "sample_steps": 3,
    "num_sample_images": 4,
    "evaluation_replicates": 2,
}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    run = tmp_path_factory.mktemp("tracked") / "run"
    train_here(run, **SHOWN)
    return EventAccumulator(str(run / "logs" / "vdm_hub")).Reload()


def test_the_bound_its_terms_and_the_speed_are_logged_at_each_step(events: EventAccumulator) -> None:
    for name in ("bits_per_dim", "reconstruction", "prior", "diffusion", "images_per_second"):
        assert [one.step for one in events.Scalars(f"train/{name}")] == [1, 2, 3, 4, 5, 6]
    parts = [events.Scalars(f"train/{name}") for name in ("reconstruction", "prior", "diffusion")]
    for total, *terms in zip(events.Scalars("train/bits_per_dim"), *parts, strict=True):
        assert total.value == pytest.approx(sum(term.value for term in terms), rel=1e-5), "tensorboard keeps float32"
    assert [one.step for one in events.Scalars("validation/bits_per_dim")] == [3, 6]
    assert [one.step for one in events.Scalars("test/bits_per_dim")] == [6]


def test_samples_and_plots_are_logged(events: EventAccumulator) -> None:
    shown = {tag.split("/")[0]: [one.step for one in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {"samples": [3, 6, 6], "schedule": [6], "training_curve": [6]}


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "comet_ml"])
def test_one_that_is_not_installed_says_how_to_install_it(tracker: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(ConfigurationError, match=naming("pip install", tracker.replace("_", "-"))):
        start(tmp_path / "run", report_to=tracker)
