"""A Hugging Face Hub on 127.0.0.1: the unmodified `huggingface_hub` client publishes to it and loads from it.

It speaks the protocol of models: repositories, branches, tags and pull requests, atomic commits with uploads
as base64, by Git LFS or by Xet, listings, downloads, evaluation results, tokens. A Space is
"spaces/owner/name" of `repositories`; a dataset, "datasets/owner/name", can be read. Anything else is answered 501.

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.environment(tmp_path), check=True)
    assert hub.calls[-1].route == "commit"
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub.endpoints import ROUTES, Endpoints, Right, unknown
from hub.faults import Failure, Fault
from hub.messages import Call, Response
from hub.storage import Blob, Commit, Repository
from hub.xet import XetStore

__all__ = ["Blob", "Call", "Commit", "LoopbackHub", "Repository", "Response"]


class LoopbackHub:
    """Serves until its `with` block ends, on a port of its own.

    Attributes:
        url: the endpoint.
        repositories: by "namespace/name"; a test may put one in by hand, the likes of which no client would send.
        tokens: who may do what: a "read" token sees private repositories, a "write" token changes all.
        calls: every request so far, in order.
    """

    def __init__(self, lfs_suffixes: tuple[str, ...] = (".safetensors",), xet_folder: Path | None = None) -> None:
        """Start listening.

        Args:
            lfs_suffixes: files to upload by LFS or Xet, all others as base64: () for a client with Xet switched on
                and no `xet_folder`, which can't do LFS.
            xet_folder: where clients with Xet switched on, one at a time, store what others upload by LFS.
        """
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._endpoints = Endpoints(self.url, lfs_suffixes, XetStore(xet_folder) if xet_folder else None)
        self.repositories: dict[str, Repository] = self._endpoints.repositories
        self.tokens: dict[str, Right] = self._endpoints.tokens
        self.calls: list[Call] = []
        self._failures: list[Failure] = []
        self._lock = threading.Lock()

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(
        self, cache_dir: str | os.PathLike[str], token: str | None = "hf_loopback", *, xet: bool = False
    ) -> dict[str, str]:
        """For a subprocess that takes this for the Hub, with its own HF_HOME and none of the caller's settings.

        Args:
            cache_dir: becomes HF_HOME.
            token: None for one who has none.
            xet: whether the client may use Xet, which plain LFS rules out.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        places = {"HF_ENDPOINT": self.url, "HF_HOME": str(Path(cache_dir).resolve())}
        settings = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        settings |= {"HF_TOKEN": token} if token else {}
        settings |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        return {**inherited, **places, **settings}

    def fail(self, at: int, fault: Fault, times: int | None = 1, route: str | None = None) -> Failure:
        """Let `fault` strike call number `at` from now on, 0 being the next, and the `times` - 1 after it.

        Calls that a client sends in parallel are counted in the order of their arrival. Where several faults strike
        one call, the first planned of them counts.

        Args:
            at: the number of calls that still go well.
            fault: from `hub.faults`.
            times: None for ever.
            route: count only the calls that this endpoint answers, such as "commit".

        Returns:
            a record of the calls that were struck, in `struck`.
        """
        failure = Failure(at, fault, times, route)
        with self._lock:
            self._failures.append(failure)
        return failure

    def heal(self) -> None:
        """Forget all that `fail` has planned."""
        with self._lock:
            self._failures.clear()

    def forget_uploads(self) -> None:
        """Forget every LFS object that no commit holds, as if nobody had sent it."""
        held = {
            blob.sha256
            for repository in self.repositories.values()
            for commit in repository.commits.values()
            for blob in commit.files.values()
        }
        with self._lock:
            uploads = self._endpoints.lfs_objects
            for oid in set(uploads) - held:
                del uploads[oid]

    def leaked_tokens(self) -> list[str]:
        """Where a token went that should have gone into the Authorization header alone: [] is what a test wants."""
        leaks = []
        for call in self.calls:
            others = [value for name, value in call.headers.items() if name != "Authorization"]
            said = "\n".join([call.path, *call.query, *call.query.values(), *others]).encode() + call.body
            leaks += [f"call {call.index}, {call.route}" for token in self.tokens if token.encode() in said]
        for name, repository in self.repositories.items():
            for commit in repository.commits.values():
                words = f"{commit.title}\n{commit.message}".encode()
                told = {"its message": words, **{path: blob.content for path, blob in commit.files.items()}}
                leaked = (place for place, text in told.items() for token in self.tokens if token.encode() in text)
                leaks += [f"{name}, commit {commit.oid}: {place}" for place in leaked]
        return leaks

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Response:
        """Log the call, and handle it by its route, unless a fault comes between."""
        url = urlsplit(target)
        query = {name: ",".join(values) for name, values in parse_qs(url.query).items()}
        route, parts = ROUTES.find(method, url.path) or (None, {})
        with self._lock:
            name = route.name if route else "unknown"
            call = Call(len(self.calls), name, method, unquote(url.path), query, headers, body)
            self.calls.append(call)
            faults = [failure.fault for failure in self._failures if failure.strikes(call)]

        def handle() -> Response:
            with self._lock:
                return self._endpoints.answer(call, route, parts) if route else unknown(call)

        return faults[0](handle) if faults else handle()


class _Handler(BaseHTTPRequestHandler):
    """Carries requests from the socket to the hub and its responses back, one per connection."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def _handle(self) -> None:
        self.close_connection = True
        try:
            headers = {name.title(): value for name, value in self.headers.items()}
            response = self.hub.answer(self.command, self.path, headers, self._read_body())
            self.send_response(response.status)
            framing = {"Content-Length": str(len(response.body)), "Connection": "close"}
            for name, value in {**framing, **response.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else response.body)
        except ConnectionError:  # the client has left, or a fault hangs up
            return

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        """Read the whole body: half of one, from a client that died, must never be handled."""
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) != size:
            raise ConnectionError("the client left in the middle of its request")
        return body

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: `hub.calls` is the log."""
