"""The gateway's ASGI application: which face, which account, and every error as an answer."""

import asyncio
import logging
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elemento_storage import API_VERSION
from elemento_storage.api.auth import refuse_foreign_page
from elemento_storage.api.errors import error_body, log_fault
from elemento_storage.errors import MethodNotAllowed, RouteNotFound, TooManyAttempts
from elemento_storage.gateway.callers import account_of
from elemento_storage.gateway.client_face import ClientFace
from elemento_storage.gateway.configuration import Configuration
from elemento_storage.gateway.fleet import Fleet
from elemento_storage.gateway.login_face import LoginFace
from elemento_storage.model import new_uid

log = logging.getLogger(__name__)

_VOLUME_PREFIXES: Final = (f"/api/{API_VERSION}/client/volume/", "/api/v1/client/volume/")
_LOGIN_PREFIXES: Final = ("/api/v1/authenticate/", f"/api/{API_VERSION}/authenticate/")
_JSON: Final = "application/json"


class GatewayApp:
    """Both faces; the port that a connection came in by says which."""

    def __init__(
        self,
        configuration: Configuration,
        fleet: Fleet,
        client_face: ClientFace,
        login_face: LoginFace,
        login_port: int,
    ) -> None:
        self._origins = frozenset(configuration.origins)
        self._fleet = fleet
        self._client_face = client_face
        self._login_face = login_face
        self._login_port = login_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        request_id = new_uid()[:16]
        payload: dict[str, Any] = {}
        try:
            response = await self._route(request, payload)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  the one place that turns every error into an answer
            log_fault(error, request_id)
            status, body = error_body(error, request_id, payload)
            response = Response(msgspec.json.encode(body), status, _headers_of(error, status), _JSON)
        response.headers["X-Request-ID"] = request_id
        origin = request.headers.get("origin")
        if origin in self._origins:
            response.headers["Access-Control-Allow-Origin"] = str(origin)
            response.headers["Vary"] = "Origin"
        await response(scope, receive, send)

    async def _route(self, request: Request, payload: dict[str, Any]) -> Response:
        refuse_foreign_page(request.headers, loopback_only=True, origins=self._origins)
        if request.method == "OPTIONS" and request.headers.get("origin") in self._origins:
            return Response(headers={"Access-Control-Allow-Methods": "GET, POST",
                                     "Access-Control-Allow-Headers": "Content-Type, Idempotency-Key",
                                     "Access-Control-Max-Age": "600"})  # fmt: skip
        scope = request.scope
        is_login = scope["server"][1] == self._login_port
        path = scope["path"].rstrip("/")
        if not path:
            return self._health(is_login)
        prefixes = _LOGIN_PREFIXES if is_login else _VOLUME_PREFIXES
        prefix = next((one for one in prefixes if path.startswith(one)), None)
        if prefix is None:
            raise RouteNotFound(f"no such path: {path[:200]}; this face has {prefixes[0]}…")
        rest = path.removeprefix(prefix)
        account = await asyncio.to_thread(account_of, tuple(scope["client"]), tuple(scope["server"]))
        if is_login:
            return await self._login_face.answer(request, rest, account)
        return await self._client_face.answer(request, rest, self._login_face.user(account), payload)

    def _health(self, is_login: bool) -> Response:
        if is_login:
            return Response(msgspec.json.encode({"status": "ok"}), media_type=_JSON)
        servers = self._fleet.servers()
        silent = sum(server.answers is False for server in servers)
        told = {"status": "degraded" if silent else "ok", "servers": len(servers), "silent": silent}
        return Response(msgspec.json.encode(told), media_type=_JSON)


def _headers_of(error: Exception, status: int) -> dict[str, str]:
    if isinstance(error, TooManyAttempts):
        return {"Retry-After": str(error.details["retry_after"])}
    if isinstance(error, MethodNotAllowed):
        return {"Allow": str(error.details["allowed"])}
    return {"Retry-After": "1"} if status in (423, 503) else {}
