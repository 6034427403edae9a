"""A served Space and a real Chromium before it; a test that has neither skips, and says what to install."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_REMEDY = "`make test-browser` installs gradio and playwright; the browser is your system's (apt-get install chromium)"
_PATIENCE = 240_000  # milliseconds: machines of CI share their cores


def missing() -> str:
    """Why there is no browser test here; empty where there is one."""
    absent = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    absent += [] if _CHROMIUM else ["chromium"]
    return f"THE APP WAS NOT TRIED IN A BROWSER: no {', '.join(absent)}. {_REMEDY}." if absent else ""


needs_browser = pytest.mark.skipif(bool(missing()), reason=missing())
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason=f"THE APP WAS NOT RUN: no gradio. {_REMEDY}."
)


@contextlib.contextmanager
def served(model: Path | str, log: Path, *options: str, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of ``vdm-hub space MODEL --serve``, in a process of its own, whose words go to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vdm_hub.commands", "space", str(model), "--serve", "--port", str(port), *options]
    environment = _environment() | dict(settings or {})
    with log.open("w") as words, subprocess.Popen(command, stdout=words, stderr=words, env=environment) as process:
        try:
            _wait(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextlib.contextmanager
def browsed(address: str) -> Iterator[Any]:
    """A page of a real browser at an address."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(_PATIENCE)
        page.goto(address)
        yield page
        browser.close()


def message(page: Any) -> str:
    """The words of the message that came up, which is then closed."""
    toast = page.locator(".toast-body")
    toast.wait_for()
    words: str = toast.inner_text()
    page.locator(".toast-close").click()
    toast.wait_for(state="detached")
    return words


def _environment() -> dict[str, str]:
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return dict(os.environ) | proxies | {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(_PATIENCE // 200):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            opener.open(address, timeout=10).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"no answer from {address}:\n{log.read_text()}")
