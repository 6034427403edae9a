"""A repository on the Hub, as a publisher needs it: whole commits, retried where that is safe."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    RepoUrl,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._validators import validate_repo_id
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from vdm_hub.errors import ConfigurationError, Interrupted, PublishError, VDMHubError, in_one_line
from vdm_hub.hub.fetching import HTTP_ERROR
from vdm_hub.version import __version__

CommitOperation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
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
    """One repository. The token is the client's own: HF_TOKEN, or what ``hf auth login`` stored.

    Args:
        repo_id: ``owner/name``, or a name in the token's own namespace.
        repo_type: ``model``, or ``space`` for one of gradio's.
        sends: Whether anything is to be sent, for which there must be a token.
    """

    def __init__(self, repo_id: str, repo_type: Literal["model", "space"] = "model", *, sends: bool = True) -> None:
        (check_ready if sends else check_repo_id)(repo_id)
        self.repo_id, self._type = repo_id, repo_type
        self._commits: list[str] = []
        self._api = HfApi(library_name="vdm-hub", library_version=__version__)

    def create(self, private: bool | None = None) -> None:
        """Create the repository where it does not exist.

        Raises:
            PublishError: It is to be private, exists, and is public; or something else is creating it.
        """
        answer = _Answer("/repos/create", f"{self.repo_id} may have been created, and is empty", "publish again")

        def attempt() -> str:
            try:
                return answer.of(self._created(private)).repo_id
            except KeyError as error:  # the client took a conflict for a repository that exists, and was told of none
                raise PublishError(
                    f"publishing to {self.repo_id} failed: the Hub says that it is being changed: try again."
                ) from error

        with answer.missed():
            self.repo_id = self._retried(attempt)
        if private and not self._info(MAIN).private:
            raise PublishError(
                f"{self.repo_id} exists and is public, but --private was asked for: nothing was sent. Make it private "
                f"in its settings on the Hub, or choose another name."
            )

    def _created(self, private: bool | None) -> Callable[[], RepoUrl]:
        sdk = "gradio" if self._type == "space" else None
        return lambda: self._api.create_repo(
            self.repo_id, private=private, exist_ok=True, repo_type=self._type, space_sdk=sdk
        )

    def check_may_send(self) -> None:
        """Find out whether the token may only read: what else it may not, the Hub says when it is asked.

        Raises:
            PublishError: It may only read, or is none.
        """
        token = self._retried(self._api.whoami).get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise PublishError(
                f"the token may only read, and a pull request to {self.repo_id} is to be opened: run `hf auth login` "
                f"with one that may write, or set HF_TOKEN to one."
            )

    def results(self, revision: str) -> list[EvalResultEntry]:
        """The evaluation results that it states at a revision, as the Hub reads them."""
        info = self._retried(lambda: self._api.model_info(self.repo_id, revision=revision, expand=["evalResults"]))
        return info.eval_results or []

    def requests(self, title: str) -> list[int]:
        """The numbers of the open pull requests of a title."""
        discussions = self._retried(
            lambda: list(
                self._api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
            )
        )
        return [one.num for one in discussions if one.title == title]

    def head(self, revision: str = MAIN) -> str:
        """The commit that a branch is at."""
        return str(self._info(revision).sha)

    def branches(self) -> set[str]:
        """The names of its branches."""
        refs = self._retried(lambda: self._api.list_repo_refs(self.repo_id, repo_type=self._type))
        return {ref.name for ref in refs.branches}

    def ensure_branch(self, branch: str) -> None:
        """Create a branch at main's commit, where there is none of that name."""
        if branch != MAIN:
            self._retried(
                lambda: self._api.create_branch(self.repo_id, branch=branch, exist_ok=True, repo_type=self._type)
            )

    def files(self, revision: str) -> dict[str, str]:
        """Paths and content hashes at a revision: SHA-256 for what git LFS keeps, git's own for the rest."""
        tree = self._retried(
            lambda: list(
                self._api.list_repo_tree(self.repo_id, revision=revision, recursive=True, repo_type=self._type)
            )
        )
        return {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in tree
            if isinstance(entry, RepoFile)
        }

    def commit(self, folder: Path, message: str, branch: str, parent: str, delete: Iterable[str] = ()) -> str:
        """Make one commit on a branch of every file of a folder, and the deletions: of all, or of nothing.

        Args:
            folder: What to send.
            message: The commit's title.
            branch: Where to.
            parent: The commit that the branch must still be at.
            delete: Paths to remove from the branch.

        Returns:
            The new commit; the parent, where it holds all of it already.

        Raises:
            PublishError: The branch has moved, the token may not, or the Hub can't be reached. Where the Hub's answer
                was lost, and what became of the commit can't be found out, the message says so.
        """
        removed = list(delete)
        what = f"the commit on {branch} of {self.repo_id} may have been published"
        answer = _Answer("/commit/", what, f"look at {self.url}/commits/{branch}, or publish again")

        def attempt() -> str:
            # After an answer that was lost on its way the commit may be there already.
            head = self.head(branch)
            if head != parent:
                if self._holds(head, folder, removed):
                    return head
                raise PublishError(
                    f"{self.repo_id} got a commit from elsewhere on {branch} while this one was under way: look at "
                    f"{self.url}/commits/{branch}, then publish again."
                )
            operations = self._uploaded(folder, branch, removed)
            return str(answer.of(lambda: self._create_commit(operations, message, branch, parent)).oid)

        with answer.missed():
            made = self._retried(attempt)
        self._commits.append(f"{made} on {branch}")
        return made

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where Ctrl-C ends a publication that has changed the repository, say what it did.

        Raises:
            Interrupted: With what is there, and what to do.
        """
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as stop:
            if not self._commits:
                raise
            raise Interrupted(
                f"the commit {' and '.join(self._commits)} of {self.repo_id} is there, and what should follow is not: "
                f"publish again, which finishes it."
            ) from stop

    def open_pull_request(
        self,
        folder: Path,
        message: str,
        branch: str,
        parent: str,
        delete: Iterable[str] = (),
        description: str | None = None,
    ) -> str:
        """`commit` as a pull request; returns its address. Sent once: a second one would be a second request.

        Raises:
            PublishError: As of `commit`.
        """
        what = f"the pull request to {self.repo_id} may have been published"
        remedy = f"look at {self.url}/discussions first, since publishing again would open a second one"
        answer = _Answer("/commit/", what, remedy)
        removed = list(delete)

        def attempt() -> str:
            operations = self._uploaded(folder, branch, removed, create_pr=True)
            made = answer.of(
                lambda: self._create_commit(operations, message, branch, parent, create_pr=True, text=description)
            )
            return str(made.pr_url)

        with answer.missed():
            return self._translated(attempt)

    @property
    def url(self) -> str:
        """The address at which a browser finds the repository."""
        return f"{self._api.endpoint}/{'spaces/' if self._type == 'space' else ''}{self.repo_id}"

    def _uploaded(
        self, folder: Path, branch: str, removed: list[str], create_pr: bool = False
    ) -> list[CommitOperation]:
        """The operations of a commit, its large files sent beforehand: then nobody sees them yet."""
        added = list(_additions(folder))
        self._api.preupload_lfs_files(
            self.repo_id, added, repo_type=self._type, revision=branch, create_pr=create_pr, free_memory=False
        )
        return [*added, *map(CommitOperationDelete, removed)]

    def _create_commit(
        self,
        operations: list[CommitOperation],
        message: str,
        branch: str,
        parent: str,
        create_pr: bool = False,
        text: str | None = None,
    ) -> CommitInfo:
        return self._api.create_commit(
            self.repo_id,
            operations,
            commit_message=message,
            commit_description=text,
            revision=branch,
            create_pr=create_pr,
            parent_commit=parent,
            repo_type=self._type,
        )

    def _info(self, revision: str) -> Any:
        return self._retried(lambda: self._api.repo_info(self.repo_id, revision=revision, repo_type=self._type))

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
        except VDMHubError:
            raise
        except Exception as error:  # an answer of another shape, too, whatever the client makes of it
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
        return f"publishing to {self.repo_id} failed ({in_one_line(error)[:300].rstrip('.')}): {what}."


class _Answer:
    """The Hub's answer to a request that changes something there: it may be lost.

    Args:
        path: A part of the request's path: the client sends others before it, which change nothing that is seen.
        what: What may have happened.
        remedy: What to do then.
    """

    def __init__(self, path: str, what: str, remedy: str) -> None:
        self._path, self._what, self._remedy = path, what, remedy
        self._lost = self._is_open = False

    def of(self, request: Callable[[], R]) -> R:
        """The answer to a request, which may be sent more than once."""
        self._is_open = True
        try:
            return request()
        except Exception as error:
            self._is_open = self._lost = self._lost or self._is_lost(_cause(error))
            raise

    @contextmanager
    def missed(self) -> Iterator[None]:
        """Say what may have happened, where nothing said in the end whether it did."""
        try:
            yield
        except PublishError as error:
            if not self._lost:
                raise
            raise PublishError(
                f"{self._what}: the Hub's answer was lost, and then {str(error)[:400].rstrip('.')}. So {self._remedy}."
            ) from error
        except KeyboardInterrupt as stop:
            if not self._is_open:
                raise
            raise Interrupted(f"{self._what}: the Hub's answer was not waited for. So {self._remedy}.") from stop

    def _is_lost(self, error: BaseException) -> bool:
        """Whether the Hub may have acted, though it did not say so."""
        status = _status(error)
        if status is not None:
            return self._path in _path(error) and (status >= 500 or status == 408)
        if isinstance(error, (HTTP_ERROR, RuntimeError, *_NO_ANSWER)):
            return self._path in _path(error) and not type(error).__name__.startswith("Connect")  # never sent
        return not isinstance(error, VDMHubError)  # an answer that the client could not read


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _additions(folder: Path) -> Iterable[CommitOperationAdd]:
    return (CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in _files(folder))


def _hashes(path: Path) -> tuple[str, str]:
    """The hashes of a content, as git and as git LFS name it."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _cause(error: BaseException) -> BaseException:
    """The error of the HTTP call: the client wraps that of a failed upload in a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _path(error: BaseException) -> str:
    """The path of the address that was asked; empty where the error does not know it."""
    knows: Any = getattr(error, "response", None) or error  # the client's own errors know it by their response alone
    try:
        return str(knows.request.url.path)
    except (AttributeError, RuntimeError):
        return ""


def _is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment: no answer at all, or one that says so."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _TRANSIENT
    return isinstance(error, (HTTP_ERROR, *_NO_ANSWER))


def _wait(state: RetryCallState) -> float:
    """Wait for 1, 2, 4, ... seconds, or for as long as the Hub asks."""
    failed = state.outcome.exception() if state.outcome else None
    error = _cause(failed) if failed else None
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), 300.0) if str(asked).isdigit() else wait_exponential(multiplier=0.5)(state)
