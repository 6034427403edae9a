"""What the loopback Hub hears and says: calls, responses, and the routes from one to the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote


@dataclass(frozen=True)
class Call:
    """A request: `index` counts them from 0, `route` names the endpoint that answers it."""

    index: int
    route: str
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class Response:
    """Its own headers win over those of the server: a Content-Length here announces what is not sent."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as the Hub sends it; the client makes exceptions of its own of the header X-Error-Code."""
    header = {"X-Error-Message": message.encode("ascii", "replace").decode()}
    return json_response({"error": message}, status, header | dict(headers or {}))


class HubError(Exception):
    """Becomes an error response."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.response = error_response(status, message, headers)


Endpoint = Callable[..., Response]


@dataclass(frozen=True)
class Route:
    """The endpoint of the calls whose (still quoted) path fits `path`; `writes` says that it takes a write token."""

    method: str
    path: re.Pattern[str]
    endpoint: Endpoint
    writes: bool

    @property
    def name(self) -> str:
        return self.endpoint.__name__


class Routes:
    """A table of routes, filled by decorating methods."""

    def __init__(self) -> None:
        self._routes: list[Route] = []

    def add(self, method: str, pattern: str, *, writes: bool = False) -> Callable[[Endpoint], Endpoint]:
        """Send calls that fit `pattern` to the decorated method, its <parts> as arguments."""
        named = pattern.replace("<repo>", "(?P<repo>(?:(?:datasets|spaces)/)?[^/]+/[^/]+)")
        named = named.replace("<path>", "(?P<path>.+)")
        path = re.compile(re.sub(r"(?<!\?P)<(\w+)>", r"(?P<\1>[^/]+)", named))

        def register(endpoint: Endpoint) -> Endpoint:
            self._routes.append(Route(method, path, endpoint, writes))
            return endpoint

        return register

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The first route that fits, and the unquoted parts of the path; others are models of another name."""
        path = re.sub("^/api/(datasets|spaces)/(?=.+/.)", r"/api/models/\1/", path)
        wanted = "GET" if method == "HEAD" else method
        for route in self._routes:
            if route.method == wanted and (match := route.path.fullmatch(path)):
                return route, {name: unquote(part) for name, part in match.groupdict().items()}
        return None
