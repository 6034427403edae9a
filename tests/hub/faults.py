"""Ways for a call to fail, as the client meets them on the socket.

A fault stands between a call and its handling: it may send another answer, hang up, wait, or spoil the answer.

    with LoopbackHub() as hub:
        failure = hub.fail(at=3, fault=DroppedAfter())  # the fourth call from now on
        ...
    assert failure.struck
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hub.messages import Call, Response, error_response


class Fault(Protocol):
    """Given how the call would be handled, return the response to send, or raise ConnectionError to hang up."""

    def __call__(self, handle: Callable[[], Response]) -> Response: ...


@dataclass(frozen=True)
class Status:
    """An error instead of an answer: the call is not handled.

    With {"Retry-After": "0"} the client tries again after 1 s where it would have waited 1, 2, 4, 8, 8 s.
    """

    status: int
    message: str = "the loopback Hub was told to fail"
    headers: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, handle: Callable[[], Response]) -> Response:
        return error_response(self.status, self.message, self.headers)


def rate_limited(seconds: int = 0) -> Status:
    """429 with the headers by which the Hub says how long to wait; the client waits a second more."""
    limits = {"RateLimit": f'"api";r=0;t={seconds}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    return Status(429, "We had to rate limit you", limits | {"Retry-After": str(seconds)})


@dataclass(frozen=True)
class DroppedBefore:
    """The connection ends before the call is handled: nothing has happened."""

    def __call__(self, handle: Callable[[], Response]) -> Response:
        raise ConnectionAbortedError


@dataclass(frozen=True)
class DroppedAfter:
    """The call is handled and its answer lost: a commit is there, and the client never hears of it."""

    def __call__(self, handle: Callable[[], Response]) -> Response:
        handle()
        raise ConnectionAbortedError


@dataclass(frozen=True)
class Slow:
    """The call is handled at once and answered only `seconds` later."""

    seconds: float

    def __call__(self, handle: Callable[[], Response]) -> Response:
        response = handle()
        time.sleep(self.seconds)
        return response


@dataclass(frozen=True)
class Truncated:
    """The call is handled, but only half of the announced answer is sent. An answer to HEAD has no body to cut."""

    def __call__(self, handle: Callable[[], Response]) -> Response:
        response = handle()
        announced = {"Content-Length": str(max(1, len(response.body)))}
        return Response(response.status, response.body[: len(response.body) // 2], {**response.headers, **announced})


FAULTS: Mapping[str, Fault] = {
    "500": Status(500, "Internal Error"),
    "502": Status(502, "Bad Gateway"),
    "503": Status(503, "Service Unavailable"),
    "504": Status(504, "Gateway Timeout"),
    "401": Status(401, "Invalid credentials in Authorization header"),
    "403": Status(403, "Forbidden: you do not have the rights to do this"),
    "404": Status(404, "Repository not found", {"X-Error-Code": "RepoNotFound"}),
    "409": Status(409, "Conflict with another operation"),
    "429": rate_limited(),
    "dropped before": DroppedBefore(),
    "dropped after": DroppedAfter(),
    "truncated": Truncated(),
}
"""One of every kind that can hit any call, but for `Slow`, which hurts only a client that does not wait."""


@dataclass
class Failure:
    """Strikes the calls number `at` to `at + times - 1` of those on `route`, counted from 0 since it was planned.

    Attributes:
        times: None for ever.
        route: None for all.
        struck: the calls that have failed, in order.
    """

    at: int
    fault: Fault
    times: int | None = 1
    route: str | None = None
    struck: list[Call] = field(default_factory=list)
    _seen: int = field(default=0, init=False, repr=False)

    def strikes(self, call: Call) -> bool:
        """Count `call`, and say whether it is one that fails."""
        if self.route not in (None, call.route):
            return False
        since = self._seen - self.at
        self._seen += 1
        strikes = since >= 0 and (self.times is None or since < self.times)
        if strikes:
            self.struck.append(call)
        return strikes
