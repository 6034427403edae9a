"""What the loopback Hub keeps: files, commits, and the names that point at commits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from hub.messages import HubError

HEADS, TAGS, PULL_REQUESTS = "refs/heads/", "refs/tags/", "refs/pr/"


@dataclass(frozen=True)
class Blob:
    """A file, kept in git itself or, with `lfs`, beside it; `xet_hash` if it came there by Xet."""

    content: bytes
    lfs: bool = False
    xet_hash: str | None = None

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

    def tree_entry(self, path: str) -> dict[str, object]:
        size, xet = len(self.content), {"xetHash": self.xet_hash} if self.xet_hash else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": size, "lfs": self.lfs_entry("oid"), **xet}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    date: str
    files: Mapping[str, Blob]
    message: str = ""

    def folders(self) -> dict[str, str]:
        """An id for every folder: the same for the same content."""
        folders: dict[str, list[str]] = {}
        for path, blob in sorted(self.files.items()):
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                folders.setdefault("/".join(parts[:depth]), []).append(f"{path} {blob.oid}")
        return {folder: hashlib.sha1("\n".join(below).encode()).hexdigest() for folder, below in folders.items()}

    def entry(self, path: str) -> dict[str, object] | None:
        """Describe the file or folder at `path`; None if there is neither."""
        if path in self.files:
            return self.files[path].tree_entry(path)
        oid = self.folders().get(path)
        return {"type": "directory", "path": path, "oid": oid, "size": 0} if oid else None

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, object]]:
        """Describe what is below `folder` ("" for all): at every depth, or only what lies in it directly."""
        if folder and folder not in self.folders():
            raise HubError(404, f"{folder} does not exist at {self.oid}", {"X-Error-Code": "EntryNotFound"})
        prefix = f"{folder}/" if folder else ""
        below = (path for path in sorted([*self.folders(), *self.files]) if path.startswith(prefix) and path != folder)
        entries = (self.entry(path) for path in below if recursive or "/" not in path.removeprefix(prefix))
        return [entry for entry in entries if entry is not None]


class Repository:
    """Commits by id and refs by full name; it starts with one commit on main, as on the Hub."""

    def __init__(self, private: bool = False, files: Mapping[str, Blob] | None = None) -> None:
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.pull_request_titles: dict[int, str] = {}
        self.commit("main", "initial commit", files or {})

    @property
    def branches(self) -> dict[str, str]:
        return self._refs_below(HEADS)

    @property
    def tags(self) -> dict[str, str]:
        return self._refs_below(TAGS)

    @property
    def pull_requests(self) -> dict[int, str]:
        return {int(number): oid for number, oid in self._refs_below(PULL_REQUESTS).items()}

    def _refs_below(self, prefix: str) -> dict[str, str]:
        return {ref.removeprefix(prefix): oid for ref, oid in self.refs.items() if ref.startswith(prefix)}

    def commit(self, branch: str, title: str, files: Mapping[str, Blob], message: str = "") -> Commit:
        """Put a commit of exactly `files` on a branch, which may be new, or on a pull request ("refs/pr/1")."""
        ref = branch if branch.startswith("refs/") else HEADS + branch
        parent = self.refs.get(ref)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        identity = [len(self.commits), parent, title, sorted((path, blob.oid) for path, blob in files.items())]
        oid = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, date, dict(files), message)
        self.refs[ref] = oid
        return self.commits[oid]

    def open_pull_request(self, title: str, base: str = "main") -> int:
        """Start a pull request from the branch `base`, without changes yet; return its number."""
        number = len(self.pull_request_titles) + 1
        self.refs[f"{PULL_REQUESTS}{number}"] = self.at(base).oid
        self.pull_request_titles[number] = title
        return number

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full ref or a commit id names."""
        names = (revision, HEADS + revision, TAGS + revision)
        oid = next((self.refs[name] for name in names if name in self.refs), revision)
        if oid not in self.commits:
            raise revision_not_found(revision)
        return self.commits[oid]

    def head(self, revision: str) -> str:
        """The full ref of a branch or pull request: what a commit can be put on."""
        for ref in (HEADS + revision, revision):
            if ref in self.refs and not ref.startswith(TAGS):
                return ref
        raise revision_not_found(revision)

    def history(self, revision: str) -> Iterator[Commit]:
        """From the commit at `revision` back to the first."""
        oid: str | None = self.at(revision).oid
        while oid is not None:
            yield self.commits[oid]
            oid = self.commits[oid].parent


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
