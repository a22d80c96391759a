"""What a route is: a method on a path whose parts are parameters, where a body is not JSON or an answer is a stream.

Calls (``call.py``) take a JSON object and answer one; everything else is a route. Routes are found after the calls.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from elemento_storage.api.auth import Caller
from elemento_storage.api.decode import decode
from elemento_storage.api.metrics import Metrics
from elemento_storage.api.schemas import ClientRequest
from elemento_storage.disk import within
from elemento_storage.errors import MethodNotAllowed, StorageError, Unavailable
from elemento_storage.service.access import Actor
from elemento_storage.service.services import Services

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One request on a route, and what a handler has besides."""

    services: Services
    caller: Caller
    request: Request
    parameters: Mapping[str, str]  #: the parts of the path in braces
    metrics: Metrics
    stopping: asyncio.Event
    payload: Json = field(default_factory=dict)  #: what the caller gets back with a fault of ours

    def actor(self, named: str | None = None) -> Actor:
        """On whose behalf it is; ``client_uid`` of the query names the client where nothing else does."""
        if named is None:
            query, _ = decode(dict(self.request.query_params), ClientRequest, from_query=True)
            named = query.client_uid
        return self.caller.actor(named)

    async def change(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry out a change that goes on when its caller has gone, or has waited for the disk time-out.

        Raises Unavailable, and what ``work`` raises.
        """
        patience_s = self.services.core.settings.disk_timeout
        try:
            return await within(patience_s, work)
        except TimeoutError:
            raise Unavailable(
                f"the storage did not answer within {patience_s:g} s; it may still be carried out: look at the volume "
                "before you try again"
            ) from None


@dataclass(frozen=True)
class Route:
    """One method on one path, such as ``GET jobs/{id}``. The handler's docstring documents it.

    A last part such as ``{base64...}`` takes what is left of the path, slashes included.
    """

    method: str
    path: str
    handle: Callable[[Exchange], Awaitable[Response]]
    answers: Mapping[str, Json]  #: of the OpenAPI operation, by status; errors come from ``errors``
    errors: tuple[type[StorageError], ...] = ()
    parameters: tuple[Json, ...] = ()  #: of the OpenAPI operation, but for those in the path
    body: Json | None = None  #: the OpenAPI ``requestBody``
    types: tuple[type[msgspec.Struct], ...] = ()  #: structs whose schemas ``answers`` and ``body`` refer to
    admin_only: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)  #: that every answer has, of errors too

    @property
    def doc(self) -> str:
        """The handler's docstring."""
        return self.handle.__doc__ or ""


def prefers_async(request: Request) -> bool:
    """Whether the caller would rather have the job's address than wait for its end (RFC 7240)."""
    preferences = request.headers.get("prefer", "").lower().split(",")
    return any(preference.strip().startswith("respond-async") for preference in preferences)


@dataclass(frozen=True)
class Routes:
    """All routes, found by path and method."""

    routes: tuple[Route, ...]
    _by_path: dict[str, dict[str, Route]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for route in self.routes:
            self._by_path.setdefault(route.path, {})[route.method] = route

    def paths(self) -> Iterable[tuple[str, Mapping[str, Route]]]:
        """Every path with its methods."""
        return self._by_path.items()

    def named(self, path: str) -> str | None:
        """The path as documents and metrics name it, such as ``jobs/<id>``; None when there is no such route."""
        pattern = self.pattern(path)
        return None if pattern is None else pattern.replace("...}", ">").replace("{", "<").replace("}", ">")

    def headers(self, path: str) -> Mapping[str, str]:
        """What every answer about this path has among its headers."""
        pattern = self.pattern(path)
        return {} if pattern is None else next(iter(self._by_path[pattern].values())).headers

    def pattern(self, path: str) -> str | None:
        """The path with parameters that ``path`` is one of; None when there is none."""
        return next((pattern for pattern in self._by_path if _match(pattern, path) is not None), None)

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route and its parameters; None when there is no such path. Raises MethodNotAllowed."""
        pattern = self.pattern(path)
        if pattern is None:
            return None
        methods = self._by_path[pattern]
        if method not in methods:
            allowed = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"{method} is not allowed here, use {allowed}", allowed=allowed)
        return methods[method], _match(pattern, path) or {}


def _match(pattern: str, path: str) -> dict[str, str] | None:
    parts = pattern.split("/")
    takes_rest = parts[-1].endswith("...}")
    given = path.split("/", len(parts) - 1 if takes_rest else -1)
    if len(parts) != len(given):
        return None
    parameters = {}
    for part, value in zip(parts, given, strict=True):
        if part.startswith("{") and value:
            parameters[part[1:-1].removesuffix("...")] = value
        elif part != value:
            return None
    return parameters
