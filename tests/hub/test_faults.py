"""Every fault as the client meets it, and which calls it strikes."""

from __future__ import annotations

import http.client
import json
import select
import time
import urllib.error
from pathlib import Path

import pytest

from hub.clients import http as send
from hub.clients import run_client
from hub.faults import FAULTS, DroppedAfter, DroppedBefore, Fault, Slow, Status, Truncated, rate_limited
from hub.server import Blob, LoopbackHub, Repository

CARD = b"# Tiny, but long enough to be cut in half"


def started(hub: LoopbackHub) -> LoopbackHub:
    hub.repositories["me/tiny"] = Repository(files={"README.md": Blob(CARD)})
    return hub


def card_status(hub: LoopbackHub) -> int:
    return send(f"{hub.url}/me/tiny/resolve/main/README.md")[0]


@pytest.mark.parametrize(
    ("at", "times", "struck"),
    [(0, 1, [0]), (2, 1, [2]), (0, 3, [0, 1, 2]), (1, 2, [1, 2]), (3, None, [3, 4, 5]), (6, 1, []), (0, 0, [])],
)
def test_a_fault_strikes_the_calls_it_was_planned_for(at: int, times: int | None, struck: list[int]) -> None:
    with started(LoopbackHub()) as hub:
        assert card_status(hub) == 200  # call 0 of the hub, before the plan
        failure = hub.fail(at=at, fault=Status(500), times=times)
        statuses = [card_status(hub) for _ in range(6)]
        hub.heal()
        assert card_status(hub) == 200
    assert [index for index, status in enumerate(statuses) if status == 500] == struck
    assert [call.index for call in failure.struck] == [1 + index for index in struck]


def test_a_fault_can_wait_for_an_endpoint_and_the_first_planned_counts() -> None:
    with started(LoopbackHub()) as hub:
        info = hub.fail(at=1, fault=Status(503), route="model_info")
        any_call = hub.fail(at=3, fault=Status(500), times=None)
        urls = [f"{hub.url}/api/models/me/tiny", f"{hub.url}/me/tiny/resolve/main/README.md"]
        statuses = [send(urls[index])[0] for index in (0, 1, 1, 0, 1)]
    assert statuses == [200, 200, 200, 503, 500]
    assert [call.index for call in info.struck] == [3]
    assert [call.index for call in any_call.struck] == [3, 4]


COMMIT = """
def commit():
    operation = CommitOperationAdd("a.txt", b"text")
    return create_commit("me/tiny", [operation], commit_message="Add").oid
try:
    commit()
except Exception as error:
    response = getattr(error, "response", None)
    first = [error.__class__.__name__, getattr(response, "status_code", None), str(error)]
answer([first, commit()])
"""
DROPPED = ("RemoteProtocolError", None)


@pytest.mark.parametrize(
    ("fault", "error", "handled"),
    [
        *((FAULTS[name], ("HfHubHTTPError", int(name)), False) for name in ("500", "502", "503", "504")),
        (FAULTS["401"], ("HfHubHTTPError", 401), False),
        (FAULTS["403"], ("HfHubHTTPError", 403), False),
        (FAULTS["404"], ("RepositoryNotFoundError", 404), False),
        (FAULTS["409"], ("HfHubHTTPError", 409), False),
        (FAULTS["429"], ("HfHubHTTPError", 429), False),
        (DroppedBefore(), DROPPED, False),
        (DroppedAfter(), DROPPED, True),
        (Truncated(), DROPPED, True),
    ],
)
def test_a_commit_struck_by_a_fault(
    tmp_path: Path, fault: Fault, error: tuple[str, int | None], handled: bool
) -> None:
    """The client never sends a commit twice by itself: what it hears is an error, whether there is a commit or not."""
    with started(LoopbackHub()) as hub:
        failure = hub.fail(at=0, fault=fault, route="commit")
        (name, status, message), oid = run_client(hub.environment(tmp_path), COMMIT)
    assert (name, status) == error
    assert not isinstance(fault, Status) or fault.message.lower() in message.lower()
    repository = hub.repositories["me/tiny"]
    assert len(failure.struck) == 1
    assert [call.route for call in hub.calls].count("commit") == (1 if handled else 2)
    assert [commit.title for commit in repository.history(oid)] == ["Add", "initial commit"]


def test_the_client_waits_out_a_rate_limit_and_tries_again(tmp_path: Path) -> None:
    script = """
    answer([file.path for file in list_repo_tree("me/tiny")])
    """
    with started(LoopbackHub()) as hub:
        failure = hub.fail(at=0, fault=rate_limited(), route="tree")
        assert run_client(hub.environment(tmp_path), script) == ["README.md"]
    assert [call.route for call in hub.calls] == ["agent_harnesses", "tree", "tree"]
    assert [call.index for call in failure.struck] == [1]


def test_a_rate_limit_says_how_long_it_lasts() -> None:
    with started(LoopbackHub()) as hub:
        hub.fail(at=0, fault=rate_limited(seconds=7))
        status, _, headers = send(f"{hub.url}/api/models/me/tiny")
    assert (status, headers["Retry-After"]) == (429, "7")
    assert (headers["RateLimit"], headers["RateLimit-Policy"]) == ('"api";r=0;t=7', '"fixed window";"api";q=500;w=300')


def test_a_slow_answer_comes_to_those_who_wait(tmp_path: Path) -> None:
    script = """
    names = []
    for patience in (0.2, None):
        try:
            names.append(model_info("me/tiny", timeout=patience).id)
        except Exception as error:
            names.append(type(error).__name__)
    answer(names)
    """
    with started(LoopbackHub()) as hub:
        hub.fail(at=0, fault=Slow(1.0), times=2, route="model_info")
        assert run_client(hub.environment(tmp_path), script) == ["ReadTimeout", "me/tiny"]


def test_a_slow_answer_is_to_a_call_that_was_handled() -> None:
    token = {"Authorization": "Bearer hf_loopback"}
    with started(LoopbackHub()) as hub:
        hub.fail(at=0, fault=Slow(30.0), route="create_repo")
        connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rsplit(":", 1)[1]), timeout=60)
        connection.request("POST", "/api/repos/create", json.dumps({"name": "new"}), token)
        while send(f"{hub.url}/api/models/me/new", None, "GET", **token)[0] != 200:
            time.sleep(0.01)
        answered, *_ = select.select([connection.sock], [], [], 0)
        connection.close()
    assert answered == []


def test_a_truncated_answer_announces_more_than_it_sends() -> None:
    with started(LoopbackHub()) as hub:
        hub.fail(at=0, fault=Truncated())
        with pytest.raises(http.client.IncompleteRead) as error:
            card_status(hub)
        assert error.value.partial == CARD[: len(CARD) // 2]
        hub.fail(at=0, fault=Truncated())
        status, body, headers = send(f"{hub.url}/me/tiny/resolve/main/README.md", method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(CARD)))


@pytest.mark.parametrize("fault", [DroppedBefore(), DroppedAfter()])
def test_a_dropped_connection_has_no_answer_at_all(fault: Fault) -> None:
    with started(LoopbackHub()) as hub:
        hub.fail(at=0, fault=fault)
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            card_status(hub)
    assert [call.index for call in hub.calls] == [0]


def test_half_a_download_is_never_taken_for_the_file(tmp_path: Path) -> None:
    """The client either goes on where it stopped or gives up; the next attempt has the whole file."""
    script = """
    from pathlib import Path
    try:
        answer(Path(hf_hub_download("me/tiny", "README.md")).read_text())
    except Exception:
        answer(None)
    """
    with started(LoopbackHub()) as hub:
        failure = hub.fail(at=1, fault=Truncated(), route="resolve")
        first = run_client(hub.environment(tmp_path), script)
        assert [call.method for call in failure.struck] == ["GET"]
        assert first in (None, CARD.decode())
        assert run_client(hub.environment(tmp_path), script) == CARD.decode()
