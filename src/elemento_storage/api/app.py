"""The ASGI application: finds the call, finds the caller, decodes, carries out, answers."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elemento_storage import API_VERSION
from elemento_storage.api import openapi, schemas
from elemento_storage.api.auth import Authenticator
from elemento_storage.api.backup_calls import BACKUP_CALLS
from elemento_storage.api.body import read_json
from elemento_storage.api.call import Call, Context, Kind, Reply, idempotency_key, idempotency_scope
from elemento_storage.api.clone_calls import CLONE_CALLS
from elemento_storage.api.data_routes import DATA_ROUTES
from elemento_storage.api.decode import decode, ignored_keys, parse_object
from elemento_storage.api.errors import error_body, log_fault
from elemento_storage.api.export_calls import EXPORT_CALLS
from elemento_storage.api.history_calls import HISTORY_CALLS
from elemento_storage.api.image_calls import IMAGE_CALLS
from elemento_storage.api.iso_calls import ISO_CALLS
from elemento_storage.api.listed import ListedVolumes
from elemento_storage.api.metadata_routes import METADATA_ROUTES
from elemento_storage.api.metrics import Metrics
from elemento_storage.api.migration_calls import MIGRATION_CALLS
from elemento_storage.api.page import Page
from elemento_storage.api.plain_uploads import PLAIN_UPLOAD_ROUTES
from elemento_storage.api.route import Exchange, Routes, prefers_async
from elemento_storage.api.server_calls import SERVER_CALLS
from elemento_storage.api.snapshot_calls import SNAPSHOT_CALLS
from elemento_storage.api.stream_routes import STREAM_ROUTES
from elemento_storage.api.upload_routes import UPLOAD_ROUTES
from elemento_storage.api.volume_calls import VOLUME_CALLS
from elemento_storage.api.whoami_calls import WHOAMI_CALLS
from elemento_storage.disk import within
from elemento_storage.errors import (
    JobNotFound,
    MethodNotAllowed,
    RangeNotSatisfiable,
    RouteNotFound,
    Unavailable,
    VolumeLocked,
)
from elemento_storage.jobs import Job
from elemento_storage.model import new_uid
from elemento_storage.progress import Progress
from elemento_storage.service.services import Services

log = logging.getLogger(__name__)

CALLS: Final[tuple[Call[Any], ...]] = (
    *VOLUME_CALLS,
    *CLONE_CALLS,
    *ISO_CALLS,
    *IMAGE_CALLS,
    *SNAPSHOT_CALLS,
    *EXPORT_CALLS,
    *MIGRATION_CALLS,
    *BACKUP_CALLS,
    *SERVER_CALLS,
    *HISTORY_CALLS,
    *WHOAMI_CALLS,
)
ROUTES: Final = Routes((*STREAM_ROUTES, *METADATA_ROUTES, *DATA_ROUTES, *UPLOAD_ROUTES, *PLAIN_UPLOAD_ROUTES))
_BASE: Final = f"/api/{API_VERSION}"
_PREFIXES: Final = (_BASE + "/", "/api/v1/")
_JSON: Final = "application/json"


class Api:
    """The HTTP face of one server."""

    def __init__(self, services: Services, authenticator: Authenticator) -> None:
        self._services = services
        self._core = services.core
        self._authenticator = authenticator
        self._metrics = Metrics(services.core, services.exporting, services.migrating, services.backup_schedules)
        self._calls = {path: call for call in CALLS for path in (call.path, *call.aliases)}
        self._listed = ListedVolumes()
        self._schema = openapi.document(CALLS, ROUTES, _BASE)
        self._page = Page()
        self.stopping = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        started = time.monotonic()
        request_id = new_uid()[:16]
        name = "other"
        payload: dict[str, Any] = {}
        try:
            name, response = await self._route(request, payload)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  the one place that turns every error into an answer
            response = self._error_response(error, request_id, payload)
            name = self._name_of(scope["path"])
        response.headers.update(ROUTES.headers(_below_prefix(scope["path"]) or ""))
        response.headers["X-Request-ID"] = request_id
        self._metrics.observe(name, response.status_code, time.monotonic() - started)
        await response(scope, receive, send)

    def _error_response(self, error: Exception, request_id: str, payload: dict[str, Any]) -> Response:
        if isinstance(error, VolumeLocked):
            self._add_progress(error)
        log_fault(error, request_id)
        status, body = error_body(error, request_id, payload)
        headers = {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        elif status in (423, 503):
            headers["Retry-After"] = "1"
        elif isinstance(error, MethodNotAllowed):
            headers["Allow"] = str(error.details["allowed"])
        elif isinstance(error, RangeNotSatisfiable):
            headers["Content-Range"] = f"bytes */{error.details['size']}"
        return Response(schemas.encode(body), status, headers, _JSON)

    def _add_progress(self, error: VolumeLocked) -> None:
        locked = error.details.get("locked")
        if isinstance(locked, dict):
            try:
                locked["progress"] = round(self._core.jobs.get(locked["job"], None).progress.fraction, 4)
            except JobNotFound:
                locked["progress"] = None

    # -- routes --------------------------------------------------------------------------------------------

    def _name_of(self, path: str) -> str:
        rest = _below_prefix(path)
        if rest is None:
            return "other"
        return rest if rest in self._calls else ROUTES.named(rest) or "other"

    async def _route(self, request: Request, payload: dict[str, Any]) -> tuple[str, Response]:
        path = request.scope["path"]
        rest = _below_prefix(path)
        if rest is None:
            return await self._outside(request, path.rstrip("/"))
        call = self._calls.get(rest)
        if call is not None:
            return call.path, await self._serve_call(request, call, payload)
        return await self._serve_route(request, rest, payload)

    async def _outside(self, request: Request, path: str) -> tuple[str, Response]:
        if path in ("/schema", "/schema/openapi.json"):
            _require_method(request, "GET")
            if path == "/schema" and "text/html" in request.headers.get("accept", ""):
                return "schema", Response(openapi.page(self._schema), media_type="text/html")
            return "schema", Response(openapi.to_json(self._schema), media_type=_JSON)
        if request.method in ("GET", "HEAD") and (response := await self._page.answer(request)) is not None:
            return "page", response
        raise _no_route(request)

    async def _serve_route(self, request: Request, path: str, payload: dict[str, Any]) -> tuple[str, Response]:
        caller = self._authenticator.caller(request.headers)
        found = ROUTES.find(request.method, path)
        if found is None:
            raise _no_route(request)
        route, parameters = found
        if route.admin_only:
            caller.require_admin()
        exchange = Exchange(self._services, caller, request, parameters, self._metrics, self.stopping, payload)
        return ROUTES.named(path) or "other", await route.handle(exchange)

    # -- calls ---------------------------------------------------------------------------------------------

    async def _serve_call(self, request: Request, call: Call[Any], payload: dict[str, Any]) -> Response:
        caller = self._authenticator.caller(request.headers)
        if call.admin_only:
            caller.require_admin()
        from_query = request.method == "GET" and call.answers_get
        if from_query:
            body = b""
            values: dict[str, Any] = dict(request.query_params)
        else:
            _require_method(request, "GET, POST" if call.answers_get else "POST")
            body = await read_json(request, self._core.settings.max_body)
            values = parse_object(body)
        payload.update(values)
        fill = caller.stands_for(creates=call.creates)
        decoded, ignored = decode(values, call.request, fill=fill, from_query=from_query)
        ctx = Context(self._services, caller, request.headers, Progress(), self._listed, ignored, fill)
        patience_s = self._core.settings.disk_timeout
        if call.kind is Kind.READ:
            try:
                return _respond(await within(patience_s, call.handle(ctx, decoded)), ctx)
            except TimeoutError:
                raise self._too_slow("nothing was changed") from None
        key = idempotency_key(request.headers) if call.creates else None
        work = self._work(ctx, call, decoded, key, body)
        if call.kind is Kind.LONG and prefers_async(request):
            job = self._start_job(ctx, call, decoded, work)
            address = f"{_BASE}/jobs/{job.job_id}"
            headers = {"Location": address, "Preference-Applied": "respond-async", **ignored_keys(ctx.ignored)}
            return Response(schemas.encode({"job": job.job_id, "location": address}), 202, headers, _JSON)
        if call.kind is Kind.LONG and call.is_slow(decoded):
            job = self._start_job(ctx, call, decoded, work)
            await job.finished.wait()
            if job.error is not None:
                raise job.error
            return _respond(job.result, ctx)
        # The work goes on when the caller hangs up: it is a task of its own, which nothing cancels.
        try:
            return _respond(await within(patience_s, work(ctx.progress)), ctx)
        except TimeoutError:
            raise self._too_slow("it may still be carried out: look at the volume before you try again") from None

    def _work(
        self, ctx: Context, call: Call[Any], decoded: msgspec.Struct, key: str | None, body: bytes
    ) -> Callable[[Progress], Coroutine[Any, Any, object]]:
        async def plain(progress: Progress) -> object:
            ctx.progress = progress
            return await call.handle(ctx, decoded)

        if key is None:
            return plain

        async def once(progress: Progress) -> object:
            ctx.progress = progress

            async def work(seed: str) -> bytes:
                ctx.seed = seed
                answer = await call.handle(ctx, decoded)
                return schemas.encode(answer.answer if isinstance(answer, Reply) else answer)

            scope = idempotency_scope(ctx.caller, getattr(decoded, "creator_id", ""), call.path)
            answer, replayed = await self._services.idempotency.once(scope, key, body, work)
            return Reply(msgspec.Raw(answer), {"Idempotency-Replayed": "true"} if replayed else {})

        return once

    def _start_job(
        self,
        ctx: Context,
        call: Call[Any],
        decoded: msgspec.Struct,
        work: Callable[[Progress], Coroutine[Any, Any, object]],
    ) -> Job:
        named = getattr(decoded, "creator_id", None)
        return self._core.jobs.start(
            call.path.rpartition("/")[2] if call.path.startswith("update/") else call.path,
            work,
            client=ctx.actor(named).client,
            volume_id=getattr(decoded, "vid", None),
        )

    def _too_slow(self, consequence: str) -> Unavailable:
        return Unavailable(f"the storage did not answer within {self._core.settings.disk_timeout:g} s; {consequence}")


def _below_prefix(path: str) -> str | None:
    """The path without the API's prefix; None when it has none."""
    prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), None)
    return None if prefix is None else path[len(prefix) :].rstrip("/")


def _respond(answer: object, ctx: Context) -> Response:
    headers = ignored_keys(ctx.ignored)
    if isinstance(answer, Reply):
        headers |= answer.headers
        answer = answer.answer
    return Response(schemas.encode(answer), 200, headers, _JSON)


def _no_route(request: Request) -> RouteNotFound:
    return RouteNotFound(f"no such path: {request.url.path[:200]}; /schema lists the calls of {API_VERSION}")


def _require_method(request: Request, allowed: str) -> None:
    if request.method not in allowed.split(", "):
        raise MethodNotAllowed(f"{request.method} is not allowed here, use {allowed}", allowed=allowed)
