"""What the trackers get: terms, images/s, samples and plots; and what is said of one that is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from naming import naming
from runs import forget_accelerator, start, train_here
from vdm_hub.errors import ConfigurationError
from vdm_hub.training.tracking import Trackers

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


class Recorder(GeneralTracker):
    """A tracker of one's own, as accelerate takes it: it keeps what it is given."""

    requires_logging_directory = False
    tracker: Any = None
    name: str

    def __init__(self, name: str = "recorder") -> None:
        self.name, self.given = name, list[tuple[str, Any, Any]]()
        super().__init__()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.given.append(("config", values, None))

    def log(self, values: dict[str, Any], step: int | None = None, **others: Any) -> None:
        self.given.append(("log", values, step))

    def finish(self) -> None:
        self.given.append(("finish", None, None))


class ShowsPictures(Recorder):
    """One that shows pictures, too."""

    def log_images(self, values: dict[str, Any], step: int | None = None, **others: Any) -> None:
        assert all(picture.dtype == np.uint8 for picture in values.values())
        self.given.append((f"images {others}", {name: picture.shape for name, picture in values.items()}, step))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A grey picture, a text, data, and what does not exist."""
    Image.new("L", (5, 4)).save(tmp_path / "samples.png")
    (tmp_path / "samples.txt").write_text("one\ntwo", "utf-8")
    (tmp_path / "samples.json").write_text("{}")
    names = {"picture": "samples.png", "text": "samples.txt", "data": "samples.json"}
    return {name: tmp_path / file for name, file in (names | {"none": "none.png", "nothing": "none.txt"}).items()}


def test_a_tracker_gets_what_it_can_show_and_is_finished(files: dict[str, Path], monkeypatch: Any) -> None:
    """And none fails, which would be a warning."""
    forget_accelerator()
    trackers = [Recorder(), ShowsPictures("own"), ShowsPictures("tensorboard"), Recorder("trackio")]
    accelerator = Accelerator(cpu=True, log_with=trackers)
    module: Any = ModuleType("trackio")
    module.Image = lambda picture: ("trackio's", picture.shape)
    monkeypatch.setitem(sys.modules, "trackio", module)
    one = Trackers(accelerator, wanted=True)
    config = {
        "steps": 3,
        "rate": 0.5,
        "on": True,
        "name": "x",
        "sizes": [8],
        "report_to": "own",
        "hub_token": "secret",
    }
    one.open(config)
    one.log({"bits": 2.0}, 1)
    one.log_pictures(files, 7)
    one.log_pictures({"picture": files["picture"]}, 8)
    one.close()
    assert accelerator.trackers == []
    kept = {"steps": 3, "rate": 0.5, "on": True, "name": "x", "sizes": "[8]", "report_to": "own"}
    for tracker in trackers:
        (first, told, _), *between, last = tracker.given
        assert first == "config" and {name: told[name] for name in kept} == kept
        assert all(type(told[name]) is type(value) for name, value in kept.items())
        assert between[:2] == [("log", {"bits": 2.0}, 1), ("log", {"text": "    one\n    two\n"}, 7)]
        shown = {
            "recorder": [],
            "own": [("images {}", {"picture": (1, 4, 5, 3)}, step) for step in (7, 8)],
            "tensorboard": [("images {'dataformats': 'NHWC'}", {"picture": (1, 4, 5, 3)}, step) for step in (7, 8)],
            "trackio": [("log", {"picture": ("trackio's", (4, 5, 3))}, step) for step in (7, 8)],
        }
        assert between[2:] == shown[tracker.name] and last == ("finish", None, None)


def test_where_none_is_wanted_nothing_is_opened_or_read(files: dict[str, Path]) -> None:
    forget_accelerator()
    tracker = ShowsPictures()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    accelerator.trackers = [tracker]
    one = Trackers(accelerator, wanted=False)
    one.open({"report_to": "none"})
    one.log_pictures(files, 7)
    assert tracker.given == []
