"""Draw the pictures of docs/spaces.md: the app of a model of the digits, as a real Chromium shows it.

``make test-browser`` makes the environment that this needs; then
``python scripts/space_screenshots.py runs/digits/pipeline docs/images``.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from vdm_hub import images_from_levels, load_split

TITLE, PORT = "vdm-digits", 7897


@contextlib.contextmanager
def served(model: str) -> Iterator[str]:
    """The address of the app, in a process of its own."""
    command = [sys.executable, "-m", "vdm_hub.commands", "space", model, "--serve"]
    with subprocess.Popen([*command, "--port", str(PORT), "--title", TITLE]) as process:
        try:
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}").close()
                    break
                if process.poll() is not None:
                    sys.exit(f"the app ended with status {process.returncode}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{PORT}"
        finally:
            process.terminate()


def take(page: Any, folder: Path) -> None:
    """Click as a visitor does, and draw what is seen."""
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("16 samples.").wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=folder / "space_samples.png", clip={"x": 100, "y": 0, "width": 1000, "height": 520})
    page.get_by_role("tab", name="Bits of a picture").click()
    levels = load_split("digits", "test", num_levels=17).levels[:1]
    with tempfile.TemporaryDirectory() as temporary:
        for place, one in enumerate((levels, levels.flip(2))):  # a digit, and upside down
            file = Path(temporary) / f"{place}.png"
            images_from_levels(one, 17, "pil")[0].save(file)
            page.locator("input[type=file]").nth(place).set_input_files(file)
            page.get_by_label("Remove Image").nth(place).wait_for()
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("takes fewer bits").wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / "space_bits.png", full_page=True)


def main() -> None:
    """Serve, click, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run of the recipe digits, or its pipeline")
    parser.add_argument("folder", type=Path, help="where to")
    arguments = parser.parse_args()
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    with served(arguments.model) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(address)
        take(page, arguments.folder)
        browser.close()


if __name__ == "__main__":
    main()
