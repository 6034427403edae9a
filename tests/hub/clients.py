"""Clients of the loopback Hub: the unmodified `huggingface_hub`, in a process of its own, and bare HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

# Answers have a channel of their own: whatever a script prints, in Python or below it, goes to stderr.
_LOOP = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    script, sys.argv[1:] = json.loads(line)
    given = []
    try:
        exec("from huggingface_hub import *\\nimport json, sys\\n" + script, {"answer": given.append})
    except BaseException:
        traceback.print_exc()
        reply = {"failed": traceback.format_exc()}
    else:
        reply = {"answer": given[-1] if given else None}
    sys.stdout.flush()
    print(json.dumps(reply), file=answers, flush=True)
"""


class Client:
    """A fresh interpreter that runs one script after another, so that its imports are paid for once.

        with Client(hub.environment(tmp_path)) as client:
            name = client.run("answer(model_info(sys.argv[1]).id)", "me/tiny")

    A script has the names of `huggingface_hub`, its arguments in `sys.argv`, and a function `answer`.
    """

    def __init__(
        self, environment: Mapping[str, str], python: str | Path = sys.executable, cwd: str | Path | None = None
    ) -> None:
        self._printed = tempfile.TemporaryFile("a+", errors="replace")  # noqa: SIM115 (closed with the process)
        command = [str(python), "-c", _LOOP]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=dict(environment), cwd=cwd, stdin=pipe, stdout=pipe, stderr=self._printed, text=True
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._printed.close()

    def run(self, script: str, *arguments: object, timeout: float = 300) -> Any:
        """Run `script` and return the last object that it passed to `answer`.

        Raises:
            AssertionError: with the traceback, if the script raises an exception or takes more than `timeout` seconds.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        patience = threading.Timer(timeout, self._process.kill)
        patience.start()
        try:
            print(json.dumps([dedent(script), [str(argument) for argument in arguments]]), file=self._process.stdin)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            patience.cancel()
        reply = json.loads(line) if line else {"failed": f"The client died.\n{self.printed()}"}
        assert "failed" not in reply, reply["failed"]
        return reply["answer"]

    def printed(self) -> str:
        """All that the scripts have printed so far, logged, or left as a traceback."""
        self._printed.seek(0)
        return self._printed.read()


def run_client(environment: Mapping[str, str], script: str, *arguments: object) -> Any:
    """Run one script in a `Client` of its own."""
    with Client(environment) as client:
        return client.run(script, *arguments)


def http(url: str, data: bytes | None = None, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
    """Send one request, never again; return the status, the body and the headers."""
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }
