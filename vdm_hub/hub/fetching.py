"""Files of one commit on the Hub, brought into the client's cache and held against the listing.

The client (huggingface_hub 2.4) takes a file's place in its cache from the ETag as a server sends it, and writes all
that a server sends. So what is fetched here lies where its content hash says, which the listing gives; a server that
announces or sends anything else is refused, and nothing of it stays.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
from huggingface_hub import constants, file_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils._headers import build_hf_headers

from vdm_hub.errors import CheckpointError, HubError, VDMHubError, in_one_line

# What the client's HTTP library raises without an answer, whichever library its version stands on.
HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]
_CONTENT_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN; and check the name",
    403: "log in with `hf auth login` as someone who may read it, or ask its owner for access",
    404: "check the name and the revision; of a private repository, log in with `hf auth login` first",
    402: "its owner's plan does not serve it: ask its owner",
    429: "wait some minutes, as the Hub limits how often it may be asked, and try again",
    451: "it may not be served for legal reasons: load another model",
}
_PATIENCE = 60.0  # seconds that an answer may ask a reader to wait


@dataclass(frozen=True)
class Listed:
    """The size and the hash of a file, as a listing gives them.

    Attributes:
        size: Its bytes.
        content_hash: SHA-256 of what git LFS or Xet keeps, else git's own SHA-1; ``None`` where nobody says it.
    """

    size: int
    content_hash: str | None = None


def fetch(
    repo_id: str,
    path: str,
    commit: str,
    listed: Listed,
    *,
    token: str | bool | None,
    folder: Path,
    force: bool = False,
) -> Path:
    """A file in the cache, whose content is what the listing says; downloaded where it is not there yet.

    Args:
        repo_id: The repository.
        path: The file's, within it.
        commit: Of the repository.
        listed: Size and hash.
        token: The reader's.
        folder: The repository's in the cache.
        force: Download it even if it is there.

    Returns:
        Its place in the snapshot of the commit.

    Raises:
        CheckpointError: The server announces or sends another file than is listed.
        HubError: It can't be reached, or does not give it.
    """
    name, pointer = f"{repo_id}: {path}", folder / "snapshots" / commit / path
    if listed.content_hash is None or not _CONTENT_HASH.fullmatch(listed.content_hash):
        raise CheckpointError(
            f"{name} is listed with the hash {listed.content_hash!r}, which is none (40 or 64 hexadecimal digits): "
            f"nothing of it is used. Load it from another endpoint of the Hub than {constants.ENDPOINT}."
        )
    if not force and pointer.is_file() and is_content(pointer, listed):
        return pointer
    blob = folder / "blobs" / listed.content_hash
    if force or not (blob.is_file() and is_content(blob, listed)):
        url = huggingface_hub.hf_hub_url(repo_id, path, revision=commit)
        with hub_explained(f"{name} can't be downloaded"):
            _check_announced(name, url, commit, listed, token)
            _download(name, url, blob, listed, token)
    _point(pointer, blob)
    return pointer


def is_content(path: Path, listed: Listed) -> bool:
    """Whether a file has the size and the hash that a listing says."""
    size = path.stat().st_size
    if size != listed.size:
        return False
    if listed.content_hash is None:
        return True
    is_git = len(listed.content_hash) == 40
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size) if is_git else hashlib.sha256())
    return digest.hexdigest() == listed.content_hash


def in_cache(path: Path) -> Listed:
    """The size and the hash of a snapshot's file in the cache, where a link's target is named after its content."""
    name = path.resolve().name if path.is_symlink() else ""
    return Listed(path.stat().st_size, name if _CONTENT_HASH.fullmatch(name) else None)


@contextmanager
def hub_explained(what: str) -> Iterator[None]:
    """Turn whatever the client raises into one paragraph with what to do.

    Raises:
        HubError: The Hub said no, or nothing.
    """
    try:
        with _no_long_waits():
            yield
    except VDMHubError:
        raise
    except hub_errors.OfflineModeIsEnabled as error:
        raise HubError(f"{what}: HF_HUB_OFFLINE is set, and the cache has not got it: load it once online.") from error
    except Exception as error:  # an answer may be anything, and the client trusts it
        raise HubError(f"{what} ({_said(error)}): {_remedy(error)}.") from error


def _said(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    # The client's own message spans paragraphs, with advice for browsers.
    if status:
        return f"{type(error).__name__}, status {status}"
    if isinstance(error, (LookupError, TypeError, ValueError, AttributeError)):  # what is no such answer breaks it
        return f"what it answers can't be understood: {type(error).__name__}, {in_one_line(error)[:200].rstrip('. ')}"
    return in_one_line(error)[:300].rstrip(". ")


def _remedy(error: Exception) -> str:
    if isinstance(error, hub_errors.GatedRepoError):
        return "it is gated: accept its terms in a browser, and log in with `hf auth login`"
    if isinstance(error, PermissionError):
        return f"the cache can't be written: set HF_HOME to a folder that can ({constants.HF_HUB_CACHE} is used now)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and not isinstance(error, (HTTP_ERROR, OSError)):
        return f"check that {constants.ENDPOINT} is a Hub (HF_ENDPOINT), and try again"
    return _REMEDIES.get(status or 0, "check the network, and try again")


@contextmanager
def _no_long_waits() -> Iterator[None]:
    """Refuse an answer that asks to wait longer than a minute, as the client would do, up to five times.

    Raises:
        HubError: Saying how long.
    """
    session = huggingface_hub.get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _refuse_long_wait]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def _refuse_long_wait(response: Any) -> None:
    asked = response.headers.get("Retry-After", "")
    reset = re.search(r"\bt=(\d{1,9})", response.headers.get("RateLimit", ""))
    seconds = float(asked) if re.fullmatch(r"\d{1,9}(\.\d*)?", asked) else 0.0
    if asked and not seconds:  # a date
        with suppress(ValueError, TypeError):
            seconds = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
    seconds = max(seconds, float(reset[1]) if reset and response.status_code == 429 else 0.0)
    if response.status_code >= 400 and seconds > _PATIENCE:
        raise HubError(
            f"the Hub answers {response.status_code} and asks to wait {seconds:,.0f} s: try again after that, or load "
            f"from a local folder."
        )


def _check_announced(name: str, url: str, commit: str, listed: Listed, token: str | bool | None) -> None:
    """Refuse a server that announces another file than it listed."""
    announced = huggingface_hub.get_hf_file_metadata(url, token=token, retry_on_errors=True)
    for what, found, expected in (
        ("ETag", announced.etag, listed.content_hash),
        ("size", announced.size, listed.size),
        ("commit", announced.commit_hash, commit),
    ):
        if found != expected and not (what == "size" and found is None):
            raise CheckpointError(
                f"{name} is announced with the {what} {found!r}, and was listed with {expected!r}: nothing of it is "
                f"used. Try again; if it stays so, {constants.ENDPOINT} is not to be trusted."
            )


class _NoMoreThan:
    """A file object that takes so many bytes and no more."""

    def __init__(self, name: str, file: BinaryIO, size: int) -> None:
        self._name, self._file, self._size = name, file, size

    def write(self, chunk: bytes) -> int:
        if self._file.tell() + len(chunk) > self._size:
            raise CheckpointError(
                f"{self._name} is listed with {self._size:,} bytes, and the server sends more: nothing of it is kept. "
                f"Try again; if it stays so, {constants.ENDPOINT} is not to be trusted."
            )
        return self._file.write(chunk)

    def __getattr__(self, attribute: str) -> object:
        return getattr(self._file, attribute)


def _download(name: str, url: str, blob: Path, listed: Listed, token: str | bool | None) -> None:
    blob.parent.mkdir(parents=True, exist_ok=True)
    beside = blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")
    headers = build_hf_headers(token=token)
    try:
        with beside.open("wb") as file:
            limited = _NoMoreThan(name, file, listed.size)
            file_download.http_get(url, limited, headers=headers, expected_size=listed.size)  # type: ignore[arg-type]
        if not is_content(beside, listed):
            raise CheckpointError(
                f"{name} came with another content than is listed (its SHA hash is not {listed.content_hash}): it was "
                f"changed on the way, and nothing of it is kept. Try again."
            )
        beside.replace(blob)
    finally:
        beside.unlink(missing_ok=True)


def _point(pointer: Path, blob: Path) -> None:
    """Make the snapshot's entry for a blob: a link, or a copy where there are no links."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    beside = pointer.with_name(f".{pointer.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        shutil.copyfile(blob, beside)
    beside.replace(pointer)
