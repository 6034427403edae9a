"""The app in a real browser: a click samples, a picture gets its figure, a wrong one its message."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hub.server import Blob, LoopbackHub, Repository
from spaces.browser import browsed, message, needs_browser, served
from spaces.kinds import KINDS, saved
from vdm_hub import VariationalBound, save_grid

pytestmark = needs_browser


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "log.txt"


@pytest.fixture(scope="module")
def address(log: Path) -> Iterator[str]:
    with served(saved("classes", log.parent / "tiny"), log, "--title", "A tiny model") as found:
        yield found


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with browsed(address) as found:
        yield found


def picture(path: Path, pixels: Any) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def digit(seed: int = 0) -> Any:
    levels = np.random.default_rng(seed).integers(0, 17, (8, 8))
    return np.round(255 * levels / 16).astype(np.uint8)


def shown(page: Any, place: str) -> Image.Image:
    """The picture in a place, as the browser has it."""
    script = """async source => { const bytes = new Uint8Array(await (await fetch(source)).arrayBuffer());
                return btoa(String.fromCharCode(...bytes)) }"""
    content = page.evaluate(script, page.locator(f"{place} img").get_attribute("src"))
    return Image.open(io.BytesIO(base64.b64decode(content)))


def upload(page: Any, place: int, file: Path) -> None:
    page.locator("input[type=file]").nth(place).set_input_files(file)
    page.get_by_label("Remove Image").nth(place).wait_for()


def test_a_click_samples_with_the_chain_in_view(page: Any) -> None:
    page.get_by_role("heading", name="A tiny model").wait_for()
    assert page.title() == "A tiny model"
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("from noise to images").wait_for()
    page.get_by_text("16 samples.").wait_for()
    pipe = KINDS["classes"]()
    images = pipe.sample(16, [torch.Generator().manual_seed(i) for i in range(16)], 100, class_labels=0)
    save_grid(images, expected := io.BytesIO())
    assert np.array_equal(np.asarray(shown(page, "#chain")), np.asarray(Image.open(expected)))  # those very samples


def test_a_class_and_guidance_are_taken(page: Any) -> None:
    page.get_by_label("class").first.click()
    page.get_by_role("option", name="bird").click()
    page.get_by_role("spinbutton", name="guidance").fill("3")
    page.get_by_role("spinbutton", name="images").fill("1")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("1 samples.").wait_for()
    pipe = KINDS["classes"]()
    images = pipe.sample(1, [torch.Generator().manual_seed(0)], 100, class_labels="bird", guidance_scale=3.0)
    save_grid(images, expected := io.BytesIO())
    assert np.array_equal(np.asarray(shown(page, "#chain")), np.asarray(Image.open(expected)))


def test_a_picture_gets_its_figure_and_two_are_compared(page: Any, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Bits of a picture").click()
    upload(page, 0, picture(tmp_path / "first.png", digit(0)))
    page.get_by_role("button", name="Measure").click()
    page.get_by_role("columnheader", name="bits in all").wait_for()
    pipe, method = KINDS["classes"](), VariationalBound(times_per_datum=16)
    levels = torch.from_numpy(np.stack([np.round(digit(seed) / 255 * 16) for seed in (0, 1)])).long()[:, None]
    report = pipe.log_likelihood(levels[:1], method, 16, class_labels=0)
    bits, error = float(report.per_image[0]), float(report.standard_error_per_image[0])
    assert page.get_by_role("cell", name=f"at most {bits:.3f} ± {error:.4f}").first.is_visible()
    one_row = shown(page, "#where").height
    upload(page, 1, picture(tmp_path / "second.png", digit(1)))
    page.get_by_role("button", name="Measure").click()
    both = pipe.log_likelihood(levels, method, 16, class_labels=0).per_image
    page.get_by_text(f"Picture {1 + int(both.argmin())} takes fewer bits").wait_for()
    assert shown(page, "#where").height == 2 * one_row


def test_a_wrong_picture_gets_the_message_and_no_traceback(page: Any, tmp_path: Path, log: Path) -> None:
    page.get_by_role("tab", name="Bits of a picture").click()
    page.get_by_role("button", name="Measure").click()
    assert "picture" in message(page)
    deep = picture(tmp_path / "deep.png", np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    large = picture(tmp_path / "large.png", np.zeros((20, 30, 3), np.uint8))
    between = picture(tmp_path / "between.png", np.full((8, 8), 100, np.uint8))
    (tmp_path / "none.png").write_text("no picture")
    wrong = {deep: "8 bits", large: "30x20", between: "100", tmp_path / "none.png": "no picture"}
    for file, word in wrong.items():
        upload(page, 0, file)
        page.get_by_role("button", name="Measure").click()
        assert word in message(page)
        page.get_by_label("Remove Image").click()
    upload(page, 0, large)
    page.get_by_role("checkbox").check()  # convert it
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("converted from RGB to grey, resized from 30x20 to 8x8").wait_for()
    # What the server says of a browser that no longer waits for an answer is its own affair.
    assert 'app.py", line' not in log.read_text()


def test_a_sample_of_the_model_may_be_the_picture(page: Any) -> None:
    page.get_by_role("tab", name="Bits of a picture").click()
    page.get_by_role("button", name="Take a sample").click()
    page.get_by_label("Remove Image").wait_for()
    page.get_by_role("button", name="Measure").click()
    page.get_by_role("columnheader", name="bits in all").wait_for()


def test_a_sampling_may_be_stopped(page: Any, log: Path) -> None:
    page.get_by_role("spinbutton", name="steps").fill("1000")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("from noise to images").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("spinbutton", name="steps").fill("2")
    for _ in range(60):  # a click while the first is being stopped is not heard
        page.get_by_role("button", name="Sample", exact=True).click()
        page.wait_for_timeout(1000)
        if page.get_by_text("16 samples.").is_visible():
            break
    assert page.get_by_text("16 samples.").is_visible()
    assert "2/2" in log.read_text() and "1000/1000" not in log.read_text()


def test_a_model_on_the_hub_is_shown_and_linked(tmp_path: Path) -> None:
    model = saved("unconditional", tmp_path / "tiny")
    files = {path.relative_to(model).as_posix(): Blob(path.read_bytes()) for path in model.rglob("*.*")}
    with LoopbackHub() as hub:
        hub.repositories["me/tiny"] = Repository(False, files)
        settings = hub.environment(tmp_path / "home", token=None) | {"HF_HUB_OFFLINE": "0"}
        with served("me/tiny", tmp_path / "log.txt", settings=settings) as address, browsed(address) as page:
            assert page.get_by_role("link", name="me/tiny").get_attribute("href") == "https://huggingface.co/me/tiny"
            page.get_by_role("button", name="Sample", exact=True).click()
            page.get_by_text("16 samples.").wait_for()
        assert any(call.route == "resolve" for call in hub.calls)
