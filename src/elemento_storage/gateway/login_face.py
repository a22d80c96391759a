"""The login face: ``/api/v1/authenticate/`` of the vendor's clients, for the account at the other end."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from elemento_storage.api.body import read_json
from elemento_storage.api.decode import parse_object
from elemento_storage.errors import (
    InvalidValue,
    MethodNotAllowed,
    MissingKey,
    RouteNotFound,
    TooManyAttempts,
    Unauthenticated,
)
from elemento_storage.gateway.callers import account_name
from elemento_storage.gateway.configuration import UserEntry
from elemento_storage.gateway.passwords import verify
from elemento_storage.gateway.sessions import Sessions

log = logging.getLogger(__name__)

_MOST_BODY_BYTES: Final = 64 * 1024
_FREE_ATTEMPTS: Final = 3
_LONGEST_WAIT_S: Final = 60.0


@dataclass
class _Failures:
    count: int = 0
    until: float = 0.0


class LoginFace:
    """Logs accounts of this machine in as users of the configuration, and out again."""

    def __init__(
        self, users: dict[str, UserEntry], sessions: Sessions, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._users = users
        self._sessions = sessions
        self._clock = clock
        self._failures: dict[int, _Failures] = {}
        self._one_at_a_time = asyncio.Lock()

    def user(self, account: int) -> UserEntry:
        """Who the account has logged in as. Raises Unauthenticated."""
        return self._users[self._username(account)]

    async def answer(self, request: Request, path: str, account: int) -> Response:
        """``path`` is what follows ``authenticate/``."""
        if path == "login":
            _require_method(request, "POST")
            return await self._login(request, account)
        if path == "status":
            _require_method(request, "GET")
            return _answer({"authenticated": True, "username": self._username(account)})
        if path == "logout":
            _require_method(request, "POST")
            async with self._one_at_a_time:
                await asyncio.to_thread(self._sessions.end, account)
            return _answer({"authenticated": False})
        raise RouteNotFound(f"the gateway has no call {path[:200]!r}; licences are none of its business")

    def _username(self, account: int) -> str:
        username = self._sessions.username(account)
        if username is None or username not in self._users:
            raise Unauthenticated("nobody is logged in: use `elemento auth login`", authenticated=False)
        return username

    async def _login(self, request: Request, account: int) -> Response:
        values = parse_object(await read_json(request, _MOST_BODY_BYTES))
        username, password = _text(values, "username"), _text(values, "password")
        failures = self._failures.get(account, _Failures())
        async with self._one_at_a_time:  # a hash takes 16 MiB and half a core
            left_s = failures.until - self._clock()
            if left_s > 0:
                wait_s = math.ceil(left_s)
                raise TooManyAttempts(f"too many wrong passwords, try again in {wait_s} s", retry_after=wait_s)
            user = self._users.get(username)
            if not await asyncio.to_thread(verify, password, user.password if user is not None else None):
                failures.count += 1
                if failures.count >= _FREE_ATTEMPTS:
                    failures.until = self._clock() + min(2.0 ** (failures.count - _FREE_ATTEMPTS), _LONGEST_WAIT_S)
                self._failures[account] = failures
                log.warning("account %s gave a wrong name or password", account_name(account))
                raise Unauthenticated("the name or the password is wrong", authenticated=False)
            self._failures.pop(account, None)
            await asyncio.to_thread(self._sessions.begin, account, username)
        log.info("account %s is logged in as %s", account_name(account), username)
        return _answer({"authenticated": True, "username": username})


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        raise MissingKey(key)
    if not isinstance(value, str):
        raise InvalidValue(f"'{key}' has to be a text", key=key)
    return value


def _answer(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _require_method(request: Request, allowed: str) -> None:
    if request.method != allowed:
        raise MethodNotAllowed(f"{request.method} is not allowed here, use {allowed}", allowed=allowed)
