"""Publishes to a loopback Hub of its own whose answers are lost, and which then is gone; prints JSON.

``python publish_with_lost_answers.py STOCK BARE CACHE``: two runs, of which only the first has a twin. It is a process
of its own, because the client reads its endpoint when it is imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.faults import DroppedAfter, DroppedBefore, Failure, Fault, Status, rate_limited
from hub.messages import Response, error_response
from hub.server import LoopbackHub
from hub.storage import Repository


@dataclass(frozen=True)
class StatusAfter:
    """The call is handled, and a gateway answers that it has waited too long."""

    status: int = 504

    def __call__(self, handle: Callable[[], Response]) -> Response:
        handle()
        return error_response(self.status, "Gateway Time-out")


@dataclass(frozen=True)
class Once:
    """A fault that strikes only after another has."""

    other: Failure
    fault: Fault

    def __call__(self, handle: Callable[[], Response]) -> Response:
        return self.fault(handle) if self.other.struck else handle()


@dataclass(frozen=True)
class Stopping:
    """Ctrl-C, as a terminal sends it, while the answer is on its way; the call was handled, or was not yet."""

    handled: bool

    def __call__(self, handle: Callable[[], Response]) -> Response:
        response = handle() if self.handled else error_response(503, "too late to matter")
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(1)
        return response


# What the Hub says to who may not, and one word of what to do then.
ANSWERS: dict[str, tuple[Fault, str]] = {
    "401": (Status(401, "Invalid credentials", {"X-Error-Code": "RepoNotFound"}), "hf auth login"),
    "gated": (Status(403, "Access to it is restricted", {"X-Error-Code": "GatedRepo"}), "terms"),
    "403": (Status(403, "Forbidden"), "access"),
    "private": (Status(404, "Repository not found", {"X-Error-Code": "RepoNotFound"}), "name"),
    "429": (rate_limited(), "minutes"),
}


LOST: dict[str, tuple[Fault, ...]] = {
    "dropped": (DroppedAfter(), DroppedBefore()),
    "a gateway's answer": (StatusAfter(), DroppedBefore()),
    "then no rights": (DroppedAfter(), Status(403, "Forbidden")),
    "never arrived": (DroppedBefore(), DroppedBefore()),
    "refused": (Status(403, "Forbidden"), DroppedBefore()),
}


class Trials:
    def __init__(self, hub: LoopbackHub, stock: Path, bare: Path) -> None:
        self.hub, self.stock, self.bare = hub, stock, bare

    def publish(self, folder: Path, name: str, **arguments: Any) -> str:
        from vdm_hub.errors import PublishError
        from vdm_hub.publishing.publishing import publish

        try:
            publish(folder, name, **arguments)
        except PublishError as error:
            return str(error)
        return ""

    def lose(
        self, at: int, faults: tuple[Fault, ...], folder: Path, name: str, route: str = "commit", **arguments: Any
    ) -> dict[str, Any]:
        """Publish with a fault at one call of a route and another at all calls after it; then again, without."""
        repository = self.hub.repositories.get(name)
        before = repository.branches.get("main") if repository else None
        lost = self.hub.fail(at, faults[0], route=route)
        self.hub.fail(0, Once(lost, faults[1]), times=None)
        said = self.publish(folder, name, **arguments)
        self.hub.heal()
        repository = self.hub.repositories.get(name)
        told = {"said": said, "url": self.hub.url, "there": repository is not None, "struck": len(lost.struck)}
        if repository is not None:
            told["new"] = repository.branches["main"] != before and "README.md" in repository.at("main").files
            told["requests"] = len(repository.pull_requests)
            told["commits"] = len(repository.commits)
        told["again"] = self.publish(folder, name, **arguments)
        told["commits after"] = len(self.hub.repositories[name].commits)
        return told

    def stop(self, folder: Path, name: str, at: int, route: str, handled: bool, *options: str) -> dict[str, Any]:
        """Ctrl-C at one call of a route."""
        failure = self.hub.fail(at, Stopping(handled), route=route)
        status, said = self.command("publish", str(folder), name, *options)
        self.hub.heal()
        return {"status": status, "said": said, "struck": len(failure.struck), "again": self.publish(folder, name)}

    def command(self, *words: str) -> tuple[int, str]:
        from vdm_hub.commands import main

        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            status = main(words)
        return status, said.getvalue()

    def answers(self, name: str, folder: Path) -> dict[str, list[str]]:
        """What each door says of each answer of the Hub, to every call."""
        from diffusers import DiffusionPipeline

        from vdm_hub import UNetVDMModel, VDMPipeline
        from vdm_hub.errors import VDMHubError

        doors: dict[str, Callable[[], Any]] = {
            "from_pretrained": lambda: VDMPipeline.from_pretrained(name),
            "DiffusionPipeline": lambda: DiffusionPipeline.from_pretrained(name),
            "a part": lambda: UNetVDMModel.from_pretrained(name, subfolder="unet"),
            "from_diffusers": lambda: VDMPipeline.from_diffusers(name, 17),
            "evaluate": lambda: self.command("evaluate", name, "--dataset_name", "digits"),
            "sample": lambda: self.command("sample", name, "--output", "nowhere/grid.png"),
            "publish": lambda: self.command("publish", str(folder), name),
        }
        found = {}
        for kind, (fault, word) in ANSWERS.items():
            self.hub.fail(0, fault, times=None)
            for door, load in doors.items():
                try:
                    told = load()
                    said = told[1] if isinstance(told, tuple) and told[0] == 2 else f"no error: {told}"
                except VDMHubError as error:
                    said = f"{error}\n"
                found[f"{kind}: {door}"] = [word, said]
            self.hub.heal()
        return found


def main(stock: str, bare: str, cache: str) -> None:
    with LoopbackHub() as hub:
        settings = hub.environment(cache)
        os.environ.clear()
        os.environ.update(settings)
        time.sleep = lambda seconds: None  # the waits between attempts, which nobody needs here
        trials = Trials(hub, Path(stock), Path(bare))
        assert trials.publish(trials.stock, "me/whole") == ""
        results: dict[str, Any] = {"commits of one publication": len(hub.repositories["me/whole"].commits)}
        for kind, faults in LOST.items():
            name = kind.replace(" ", "-").replace("'", "")
            results[f"main: {kind}"] = trials.lose(1, faults, trials.stock, f"me/main-{name}")
            results[f"side: {kind}"] = trials.lose(0, faults, trials.stock, f"me/side-{name}")
        for route in ("preupload", "create_repo"):
            results[route] = trials.lose(0, LOST["dropped"], trials.stock, f"me/{route}", route)
        for kind in ("dropped", "refused"):
            name = f"you/{kind}"
            hub.repositories[name] = Repository(False, {})
            results[f"request: {kind}"] = trials.lose(0, LOST[kind], trials.bare, name, create_pr=True)
        # A model without a twin over one with: the last commit tells the readers of the branch that the model is gone.
        assert trials.publish(trials.stock, "me/over") == ""
        results["farewell"] = trials.lose(1, LOST["never arrived"], trials.bare, "me/over")
        for where, at in (("side", 0), ("main", 1)):
            for handled in (True, False):
                told = trials.stop(trials.stock, f"me/stop-{where}-{handled}", at, "commit", handled)
                results[f"stopped: {where}, {handled}"] = told
        results["stopped: before"] = trials.stop(trials.stock, "me/stop-before", 0, "preupload", True)
        results["stopped: then"] = trials.stop(trials.stock, "me/stop-then", 1, "preupload", True)
        hub.repositories["you/stopped"] = Repository(False, {})
        request = trials.stop(trials.bare, "you/stopped", 0, "commit", True, "--create_pr")
        results["stopped: request"] = request | {"requests": len(hub.repositories["you/stopped"].pull_requests)}
        results["answers"] = trials.answers("me/whole", trials.bare)
    print("ANSWER" + json.dumps(results))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    main(*sys.argv[1:])
