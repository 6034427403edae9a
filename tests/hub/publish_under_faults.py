"""Publishes again and again to a loopback Hub of its own, each time with a fault at another call; prints JSON.

``python publish_under_faults.py OLD NEW CACHE KIND...`` publishes the run OLD, and then, for each kind of fault and
each call of a publication, the run NEW over a copy of it. A process of its own, because the client reads its endpoint
when it is imported.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hub.faults import FAULTS
from hub.server import LoopbackHub
from hub.storage import Blob, Repository

OLD, NEW, TWICE = "old", "new", "neither"
COMMIT = re.compile(r"\b[0-9a-f]{40}\b")


class Trials:
    """What a fault at the n-th call leaves behind."""

    def __init__(self, hub: LoopbackHub, old: Path, new: Path, cache: Path) -> None:
        from vdm_hub.publishing.card import Edition
        from vdm_hub.publishing.publishing import prepared_publication, publish

        self.hub, self.cache = hub, cache
        publish(old, "old/model")
        self.context = prepared_publication(new, Edition("new/model"), None, twin=True, remote_code=True)
        self.prepared = self.context.__enter__()
        self.weights = {OLD: self.load("old/model")}
        self.states = {OLD: self.main("old/model")}
        self.states[NEW], self.calls = self.publish_over_old("new/model")
        self.weights[NEW] = self.load("new/model")
        self.start_afresh("new/model")
        assert self.states[OLD] != self.states[NEW] and self.weights[OLD] != self.weights[NEW]

    def start_afresh(self, done: str) -> None:
        """Without what was published there, so that the next publication has to upload all of it."""
        del self.hub.repositories[done]
        self.hub.forget_uploads()

    def publish_over_old(self, name: str) -> tuple[Any, int]:
        """Publish the new run over a copy of the old repository; its files, and the calls that it took."""
        self.hub.repositories[name] = copy.deepcopy(self.hub.repositories["old/model"])
        before = len(self.hub.calls)
        self.send(name)
        return self.main(name), len(self.hub.calls) - before

    def send(self, name: str) -> None:
        from vdm_hub.publishing.publishing import send
        from vdm_hub.publishing.repository import HubRepository

        edition = replace(self.prepared.edition, repo_id=name)
        send(replace(self.prepared, edition=edition), HubRepository(name))

    def main(self, name: str) -> dict[str, str]:
        """The files on main by content, with the commits that the card names only checked to exist."""
        repository = self.hub.repositories[name]
        files = repository.at("main").files
        return {path: self.content(repository, path, blob, name) for path, blob in files.items()}

    def content(self, repository: Repository, path: str, blob: Blob, name: str) -> str:
        if path != "README.md":
            return blob.sha256
        text = blob.content.decode()
        for commit in COMMIT.findall(text):
            assert commit in repository.commits, f"{name}: the card names {commit}, which does not exist"
        return COMMIT.sub("COMMIT", text).replace(name, "me/model").replace("old/model", "me/model")

    def load(self, name: str) -> Any:
        from vdm_hub import VDMPipeline

        pipeline = VDMPipeline.from_pretrained(name, cache_dir=self.cache / name)
        return [float(parameter.sum()) for parameter in pipeline.unet.parameters()]

    def run(self, kind: str, call: int, times: int | None) -> dict[str, Any]:
        """One publication under one fault, and the next one without."""
        name = f"{re.sub('[^a-z0-9]', '-', kind)}-{call}-{times}/model"
        self.hub.repositories[name] = copy.deepcopy(self.hub.repositories["old/model"])
        failure = self.hub.fail(at=call, fault=FAULTS[kind], times=times)
        error = self.attempt(name)
        self.hub.heal()
        state = next((which for which, files in self.states.items() if files == self.main(name)), TWICE)
        loaded = next((which for which, weights in self.weights.items() if weights == self.load(name)), TWICE)
        again = self.attempt(name)
        after = self.main(name) == self.states[NEW]
        self.start_afresh(name)
        return {
            "kind": kind,
            "call": call,
            "times": times,
            "struck": [struck.route for struck in failure.struck],
            "error": error,
            "main": state,
            "loaded": loaded,
            "next": again or ("published" if after else "not what was to be published"),
        }

    def attempt(self, name: str) -> str:
        from vdm_hub.errors import PublishError

        try:
            self.send(name)
        except PublishError as error:
            return str(error)
        return ""


def main(old: str, new: str, cache: str, *kinds: str) -> None:
    """Try every call with every kind; ``KIND*`` fails from that call on for ever."""
    with LoopbackHub() as hub:
        settings: Mapping[str, str] = hub.environment(cache)
        os.environ.clear()
        os.environ.update(settings)
        time.sleep = lambda seconds: None  # the waits between attempts, which nobody needs here
        trials = Trials(hub, Path(old), Path(new), Path(cache))
        results = [
            trials.run(kind.removesuffix("*"), call, None if kind.endswith("*") else 1)
            for kind in kinds
            for call in range(trials.calls)
        ]
        trials.context.__exit__(None, None, None)
    print("ANSWER" + json.dumps({"calls": trials.calls, "results": results}))


if __name__ == "__main__":
    main(*sys.argv[1:])
