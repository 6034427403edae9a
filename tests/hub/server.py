"""A Hugging Face Hub on 127.0.0.1: the unmodified `huggingface_hub` client publishes to it and loads from it.

It speaks the model side of the protocol: repositories, atomic commits with base64 and Git LFS uploads, branches,
listings, downloads. Anything else (Xet, tags, pull requests, access rights) is answered 501.

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "publish.py"], env=hub.environment(tmp_path), check=True)
    assert hub.calls[-1].route == "commit"
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # type: ignore[import-untyped, unused-ignore]


@dataclass(frozen=True)
class Blob:
    """A file, kept in git itself or, with `lfs`, beside it."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def in_git(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.lfs else self.content

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def lfs_entry(self, digest_name: str) -> dict[str, object] | None:
        entry = {digest_name: self.sha256, "size": len(self.content), "pointerSize": len(self.in_git)}
        return entry if self.lfs else None


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    date: str
    files: Mapping[str, Blob]


class Repository:
    """Commits by id and branches by name; it starts with one commit on main, as on the Hub."""

    def __init__(self, private: bool, files: Mapping[str, Blob]) -> None:
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", "initial commit", files)

    def commit(self, branch: str, title: str, files: Mapping[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        identity = [len(self.commits), parent, title, sorted((path, blob.oid) for path, blob in files.items())]
        oid = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, date, dict(files))
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
        return self.commits[oid]


@dataclass(frozen=True)
class Call:
    """A request: `index` counts them from 0, `route` names the method of LoopbackHub that answers it."""

    index: int
    route: str
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """Becomes an error response; the client makes exceptions of its own of the header X-Error-Code."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.response = json_response({"error": message}, status, headers)


def card_metadata(readme: str) -> dict[str, Any]:
    """Parse the YAML block at the head of a README.md; {} without one."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", readme, flags=re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}


_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Response]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Send calls whose (still quoted) path fits `pattern` to the decorated method, its <parts> as arguments."""
    named = pattern.replace("<repo>", "(?P<repo>[^/]+/[^/]+)").replace("<path>", "(?P<path>.+)")
    regex = re.compile(re.sub(r"(?<!\?P)<(\w+)>", r"(?P<\1>[^/]+)", named))

    def register(function: Callable[..., Response]) -> Callable[..., Response]:
        _ROUTES.append((method, regex, function))
        return function

    return register


class LoopbackHub:
    """Serves until its `with` block ends, on a port of its own.

    Attributes:
        url: the endpoint.
        repositories: by "namespace/name".
        calls: every request so far, in order.
        before_call: asked before each call is handled. It may return a Response to send instead, or raise
            ConnectionError to hang up without an answer. Called from several threads, without the lock.
    """

    def __init__(self, lfs_suffixes: tuple[str, ...] = (".safetensors",)) -> None:
        """Files with `lfs_suffixes` are uploaded by LFS: () for a client with Xet switched on, which can't do that."""
        self.lfs_suffixes = lfs_suffixes
        self.repositories: dict[str, Repository] = {}
        self.calls: list[Call] = []
        self.before_call: Callable[[Call], Response | None] = lambda call: None
        self._lfs_objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache_dir: str | os.PathLike[str]) -> dict[str, str]:
        """For a subprocess that takes this for the Hub, with its own HF_HOME and none of the caller's settings."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        places = {"HF_ENDPOINT": self.url, "HF_HOME": str(Path(cache_dir).resolve()), "HF_TOKEN": "hf_loopback"}
        proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**inherited, **places, **proxy, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Response:
        """Log the call, ask `before_call`, and handle it by its route."""
        url = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        verb = "GET" if method == "HEAD" else method
        found = ((handler, regex.fullmatch(url.path)) for known, regex, handler in _ROUTES if known == verb)
        handler, match = next(((handler, match) for handler, match in found if match), (LoopbackHub._unknown, None))
        with self._lock:
            call = Call(len(self.calls), handler.__name__, method, unquote(url.path), query, headers, body)
            self.calls.append(call)
        if (instead := self.before_call(call)) is not None:
            return instead
        try:
            with self._lock:
                parts = match.groupdict() if match else {}
                return handler(self, call, **{name: unquote(part) for name, part in parts.items()})
        except HubError as error:
            return error.response
        except Exception:  # a malformed request, or a bug here: 400, which the client shows and does not retry
            return json_response({"error": traceback.format_exc()}, 400)

    def _unknown(self, call: Call) -> Response:
        raise HubError(501, f"the loopback Hub does not know {call.method} {call.path}")

    def _repository(self, repo: str) -> Repository:
        if repo not in self.repositories:
            raise HubError(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        return self.repositories[repo]

    @route("POST", "/api/repos/create")
    def create_repo(self, call: Call) -> Response:
        wish = json.loads(call.body)
        if wish.get("type", "model") != "model":
            raise HubError(501, "the loopback Hub holds models only")
        repo = f"{wish.get('organization') or 'me'}/{wish['name']}"
        answer = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repositories:
            return json_response({**answer, "error": "You already created this model repo"}, 409)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in self.lfs_suffixes)
        first_files = {".gitattributes": Blob(attributes.encode())}
        self.repositories[repo] = Repository(wish.get("visibility") == "private", first_files)
        return json_response(answer)

    @route("POST", "/api/models/<repo>/branch/<branch>")
    def create_branch(self, call: Call, repo: str, branch: str) -> Response:
        repository = self._repository(repo)
        if branch in repository.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        start = json.loads(call.body).get("startingPoint", "main")
        repository.branches[branch] = repository.at(start).oid
        return json_response({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Response:
        try:
            card_metadata(json.loads(call.body)["content"])
        except yaml.YAMLError as error:
            return json_response({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return json_response({"errors": [], "warnings": []})

    @route("POST", "/api/models/<repo>/preupload/<revision>")
    def preupload(self, call: Call, repo: str, revision: str) -> Response:
        present = self._repository(repo).at(revision).files

        def advice(path: str) -> dict[str, object]:
            mode = "lfs" if path.endswith(self.lfs_suffixes) else "regular"
            oid = present[path].etag if path in present else None
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return json_response({"files": [advice(file["path"]) for file in json.loads(call.body)["files"]]})

    @route("POST", r"/<repo>\.git/info/lfs/objects/batch")
    def lfs_batch(self, call: Call, repo: str) -> Response:
        self._repository(repo)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(call.body)["objects"]]
        for item in objects:
            if item["oid"] not in self._lfs_objects:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}/{item['size']}"}}
        return json_response({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/<oid>/<size>")
    def lfs_upload(self, call: Call, oid: str, size: str) -> Response:
        if len(call.body) != int(size) or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, f"The upload is not the announced {size} bytes with sha256 {oid}")
        self._lfs_objects[oid] = call.body
        return Response()

    @route("POST", "/api/models/<repo>/commit/<branch>")
    def commit(self, call: Call, repo: str, branch: str) -> Response:
        """Move the branch when every operation has been understood, or not at all."""
        repository = self._repository(repo)
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", {"X-Error-Code": "RevisionNotFound"})
        (_, header), *operations = ((line["key"], line["value"]) for line in map(json.loads, call.body.splitlines()))
        if not repository.branches[branch].startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.at(branch).files)
        for key, value in operations:
            self._apply(files, key, value)
        oid = repository.commit(branch, header["summary"], files).oid
        return json_response({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file" and value["encoding"] == "base64":
            files[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            content = self._lfs_objects.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise HubError(400, f"{path}: there is no LFS object {value['oid']} of {value['size']} bytes")
            files[path] = Blob(content, lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise HubError(400, f"{path}: the loopback Hub can't do {key} here")

    @route("GET", "/api/models/<repo>")
    def model_info(self, call: Call, repo: str, revision: str = "main") -> Response:
        repository = self._repository(repo)
        commit = repository.at(revision)
        card = card_metadata(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}

        def sibling(path: str, blob: Blob) -> dict[str, object]:
            details = {"size": len(blob.content), "blobId": blob.oid, "lfs": blob.lfs_entry("sha256")}
            return {"rfilename": path, **(details if "blobs" in call.query else {})}

        siblings = [sibling(path, blob) for path, blob in sorted(commit.files.items())]
        identity = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid}
        state = {"private": repository.private, "gated": False, "disabled": False, "lastModified": commit.date}
        described: dict[str, object] = {"tags": card.get("tags", []), "cardData": card}
        described |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        return json_response({**identity, **state, **described, "siblings": siblings})

    @route("GET", "/api/models/<repo>/revision/<revision>")
    def model_info_at_revision(self, call: Call, repo: str, revision: str) -> Response:
        return self.model_info(call, repo, revision)

    @route("GET", "/api/models/<repo>/refs")
    def refs(self, call: Call, repo: str) -> Response:
        heads = self._repository(repo).branches.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
        return json_response({"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    @route("GET", "/api/models/<repo>/tree/<revision>")
    def tree(self, call: Call, repo: str, revision: str) -> Response:
        if call.query.get("recursive", "").lower() != "true":
            raise HubError(501, "the loopback Hub lists trees recursively only")

        def entry(path: str, blob: Blob) -> dict[str, object]:
            size = len(blob.content)
            return {"type": "file", "path": path, "oid": blob.oid, "size": size, "lfs": blob.lfs_entry("oid")}

        files = self._repository(repo).at(revision).files
        return json_response([entry(path, blob) for path, blob in sorted(files.items())])

    @route("GET", "/<repo>/resolve/<revision>/<path>")
    def resolve(self, call: Call, repo: str, revision: str, path: str) -> Response:
        commit = self._repository(repo).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist on {revision}", headers | {"X-Error-Code": "EntryNotFound"})
        blob = commit.files[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"'}
        return _in_range(blob.content, call.headers.get("Range", ""), headers)


def _in_range(content: bytes, wanted: str, headers: dict[str, str]) -> Response:
    """Answer with the whole content or, for `Range: bytes=first-` or `bytes=first-last`, with that part of it."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if match is None:
        return Response(200, content, headers)
    first, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
    if first >= stop:
        return Response(416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[first:stop], {**headers, "Content-Range": f"bytes {first}-{stop - 1}/{len(content)}"})


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
            for name, value in {**response.headers, **framing}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else response.body)
        except ConnectionError:  # the client has left, or `before_call` hangs up
            return

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        """Read the whole body: half of one, from a client that died, must never be handled."""
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) != size:
            raise ConnectionError("the client left in the middle of its request")
        return body

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: `hub.calls` is the log."""
