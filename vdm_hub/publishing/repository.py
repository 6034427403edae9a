"""A model repository on the Hub, as a publisher needs it: whole commits, retried where that is safe."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._validators import validate_repo_id
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from vdm_hub.errors import ConfigurationError, PublishError
from vdm_hub.hub.fetching import HTTP_ERROR
from vdm_hub.version import __version__

MAIN = "main"
_ATTEMPTS = 3
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_NO_ANSWER = (ConnectionError, TimeoutError)  # as an upload by Xet raises them, whatever the reason
_LOGGER = logging.getLogger(__name__)

R = TypeVar("R")


def check_ready(repo_id: str) -> None:
    """Find out before a long run what would stop its publication: asks nobody, uses no network.

    Raises:
        ConfigurationError: ``repo_id`` is no valid name.
        PublishError: There is no token.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise PublishError(
            "publishing needs a Hugging Face token with write access, and there is none: run `hf auth login`, or set "
            "HF_TOKEN."
        )


def check_repo_id(repo_id: str) -> None:
    """Refuse what the Hub could not take as a name.

    >>> check_repo_id("me/vdm-digits")
    >>> check_repo_id("me/vdm/digits")
    Traceback (most recent call last):
    ...
    vdm_hub.errors.ConfigurationError: the repository 'me/vdm/digits' is no valid name: give NAME, or OWNER/NAME, \
of letters, digits, '-', '_' and '.'.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(
            f"the repository {repo_id!r} is no valid name: give NAME, or OWNER/NAME, of letters, digits, '-', '_' and "
            f"'.'."
        ) from error


class HubRepository:
    """One model repository. The token is the client's own: HF_TOKEN, or what ``hf auth login`` stored.

    Args:
        repo_id: ``owner/name``, or a name in the token's own namespace.
    """

    def __init__(self, repo_id: str) -> None:
        check_ready(repo_id)
        self.repo_id = repo_id
        self._api = HfApi(library_name="vdm-hub", library_version=__version__)

    def create(self, private: bool | None = None) -> None:
        """Create it where it does not exist.

        Raises:
            PublishError: It is to be private, exists, and is public; or something else is creating it.
        """
        try:
            created = self._retried(lambda: self._api.create_repo(self.repo_id, private=private, exist_ok=True))
        except KeyError as error:  # the client took a conflict for a repository that exists, and was told of none
            raise PublishError(
                f"publishing to {self.repo_id} failed: the Hub says that it is being changed: try again."
            ) from error
        self.repo_id = created.repo_id
        if private and not self._info(MAIN).private:
            raise PublishError(
                f"{self.repo_id} exists and is public, but --private was asked for: nothing was sent. Make it private "
                f"in its settings on the Hub, or choose another name."
            )

    def head(self, revision: str = MAIN) -> str:
        """The commit that a branch is at."""
        return str(self._info(revision).sha)

    def branches(self) -> set[str]:
        """The names of its branches."""
        refs = self._retried(lambda: self._api.list_repo_refs(self.repo_id))
        return {ref.name for ref in refs.branches}

    def ensure_branch(self, branch: str) -> None:
        """Create a branch at main's commit, where there is none of that name."""
        if branch != MAIN:
            self._retried(lambda: self._api.create_branch(self.repo_id, branch=branch, exist_ok=True))

    def files(self, revision: str) -> dict[str, str]:
        """Paths and content hashes at a revision: SHA-256 for what git LFS keeps, git's own for the rest."""
        tree = self._retried(lambda: list(self._api.list_repo_tree(self.repo_id, revision=revision, recursive=True)))
        return {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in tree
            if isinstance(entry, RepoFile)
        }

    def commit(self, folder: Path, message: str, branch: str, parent: str, delete: Iterable[str] = ()) -> str:
        """One commit on a branch: every file of a folder, and the deletions; nothing of it, or all.

        Args:
            folder: What to send.
            message: The commit's title.
            branch: Where to.
            parent: The commit that the branch must still be at.
            delete: Paths to remove from the branch.

        Returns:
            The new commit; the parent, where it holds all of it already.

        Raises:
            PublishError: The branch has moved, the token may not, or the Hub can't be reached.
        """
        removed = list(delete)

        def attempt() -> str:
            # After an answer that was lost on its way the commit may be there already.
            head = self.head(branch)
            if head != parent:
                if self._holds(head, folder, removed):
                    return head
                raise PublishError(
                    f"{self.repo_id} got a commit from elsewhere on {branch} while this one was under way; nothing of "
                    f"this one was added there. Look at it, then publish again."
                )
            deletions = [CommitOperationDelete(path) for path in removed]
            return str(
                self._api.create_commit(
                    self.repo_id,
                    [*_additions(folder), *deletions],
                    commit_message=message,
                    revision=branch,
                    parent_commit=parent,
                ).oid
            )

        return self._retried(attempt)

    def open_pull_request(
        self, folder: Path, message: str, branch: str, parent: str, delete: Iterable[str] = ()
    ) -> str:
        """`commit` as a pull request; returns its address. Sent once: a second one would be a second request."""
        deletions = [CommitOperationDelete(path) for path in delete]

        def attempt() -> str:
            made = self._api.create_commit(
                self.repo_id,
                [*_additions(folder), *deletions],
                commit_message=message,
                revision=branch,
                create_pr=True,
                parent_commit=parent,
            )
            return str(made.pr_url)

        return self._translated(attempt)

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"{self._api.endpoint}/{self.repo_id}"

    def _info(self, revision: str) -> Any:
        return self._retried(lambda: self._api.model_info(self.repo_id, revision=revision))

    def _holds(self, revision: str, folder: Path, removed: list[str]) -> bool:
        there = self.files(revision)
        here = {path.relative_to(folder).as_posix(): _hashes(path) for path in _files(folder)}
        return not set(removed) & set(there) and all(there.get(path) in hashes for path, hashes in here.items())

    def _retried(self, call: Callable[[], R]) -> R:
        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=_wait,
            before_sleep=lambda state: _LOGGER.warning("the Hub did not answer; attempt %d", state.attempt_number + 1),
            reraise=True,
        )
        return self._translated(lambda: retrying(call))

    def _translated(self, call: Callable[[], R]) -> R:
        try:
            return call()
        except (HTTP_ERROR, RuntimeError, *_NO_ANSWER) as error:
            raise PublishError(self._explain(_cause(error))) from error

    def _explain(self, error: BaseException) -> str:
        status = _status(error)
        known = {
            401: "the Hub did not take the token: run `hf auth login` again, or set HF_TOKEN to one with write access",
            403: f"the token may not write to {self.repo_id}: use one with write access, or another repository",
            404: f"the Hub does not show {self.repo_id}, or not this revision, to this token: check the name",
            409: "the Hub says that something of that name exists already, or is being changed: try again",
            412: "the branch has moved meanwhile: try again",
            429: "the Hub limits how often it may be asked: wait some minutes and try again",
        }
        what = known.get(status or 0, "check the network and try again")
        reason = " ".join(str(error).split())[:300].rstrip(".")
        return f"publishing to {self.repo_id} failed ({_without_token(reason)}): {what}."


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _additions(folder: Path) -> Iterable[CommitOperationAdd]:
    return (CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in _files(folder))


def _hashes(path: Path) -> tuple[str, str]:
    """As git and as git LFS name the content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _cause(error: BaseException) -> BaseException:
    """What went wrong with the HTTP call: the client wraps a failed upload in a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment: no answer at all, or one that says so."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _TRANSIENT
    return isinstance(error, (HTTP_ERROR, *_NO_ANSWER))


def _wait(state: RetryCallState) -> float:
    """1, 2, 4, ... seconds, or what the Hub asks for."""
    failed = state.outcome.exception() if state.outcome else None
    error = _cause(failed) if failed else None
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), 300.0) if str(asked).isdigit() else wait_exponential(multiplier=0.5)(state)


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text
