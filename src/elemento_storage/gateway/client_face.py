"""The client face: what the vendor's clients call under ``/api/v1.0/client/volume/``, for a user who has logged in."""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from elemento_storage.api.body import read_json
from elemento_storage.api.decode import parse_object
from elemento_storage.api.errors import status_of
from elemento_storage.api.metadata_routes import read_call
from elemento_storage.errors import (
    Forbidden,
    InvalidValue,
    MethodNotAllowed,
    MissingKey,
    NoRoom,
    RouteNotFound,
    ServersSilent,
    StorageError,
    Unavailable,
    VolumeNotFound,
)
from elemento_storage.gateway.configuration import Configuration, UserEntry
from elemento_storage.gateway.fleet import Fleet, Said, Silence
from elemento_storage.gateway.storage_server import Answer, Files, Silent, StorageServer
from elemento_storage.gateway.volumes import described, is_list_of_volumes, is_volume, merged
from elemento_storage.model import new_uid, normalise_uid

Json = dict[str, Any]

_MOST_JSON_BYTES: Final = 1024 * 1024
_VOLUME_KEYS: Final = ("volume_id", "vid", "volumeID")
_CLIENT_KEYS: Final = ("creatorID", "client_uid")
#: What a list can be narrowed down by; pages and orders of one server are none of all servers together.
_FILTERS: Final = frozenset(
    {"include_locked", "name", "format", "iso_type", "os_family", "os_flavour", "os_version"}
    | {"tool_scope", "tool_version", "client_uid"}
)
_METADATA: Final = "cloudinit/metadata"
_SEED_ROOM_GB: Final = 0.018
_LONGEST_HEADER: Final = 1000
_POLLS_MISSED: Final = 3
_POLL_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)

#: Calls that make a volume, and how many GB they take where the request does not say.
_PLACED: Final[Mapping[str, float | None]] = {"create": None, "iso/create": 15.0, "cloudinit/create": 1.0}
#: Calls about one volume, which go to the server that has it, and the server's name of each.
_ROUTED: Final = {
    "destroy": "destroy",
    "delete": "destroy",
    "update": "update",
    "update/resize": "update/resize",
    "update/convert": "update/convert",
    "transfer": "transfer",
    "update/transfer": "transfer",
}
_LONG: Final = frozenset({"cloudinit/create", "update/convert"})
_FLAGS: Final[Mapping[str, object]] = {"true": True, "false": False}
_JSON_TYPE: Final = "application/json"


@dataclass
class Asked:
    """One request: the user it is for, what it asks, and which servers have not answered so far."""

    request: Request
    user: UserEntry
    path: str
    values: Json = field(default_factory=dict)
    files: Files = field(default_factory=list)
    silences: list[Silence] = field(default_factory=list)

    def heard(self, said: Said) -> list[Answer]:
        """The answers; who gave none is remembered."""
        self.silences += said.silences
        return said.answers


class ClientFace:
    """Answers the vendor's clients. ``answer`` raises what the servers' API raises too, and ServersSilent."""

    def __init__(self, configuration: Configuration, fleet: Fleet) -> None:
        self._patience_s = configuration.patience
        self._work_patience_s = configuration.work_patience
        self._fleet = fleet
        self._calls: dict[str, Callable[[Asked], Awaitable[Response]]] = {
            "accessible": self._accessible,
            "has": self._has,
            "cancreate": self._can_create,
            "info": self._info,
            "servers": self._servers,
            **dict.fromkeys(_PLACED, self._create),
            **dict.fromkeys(_ROUTED, self._change),
        }

    async def answer(self, request: Request, path: str, user: UserEntry, payload: Json) -> Response:
        """``path`` is what follows ``client/volume/``; ``payload`` is filled with what was asked."""
        asked = Asked(request, user, path)
        if path == _METADATA or path.startswith(f"{_METADATA}/"):
            _require_method(request, "POST")
            in_path = path.removeprefix(_METADATA).lstrip("/") or None
            asked.values, files, _ = await read_call(request, in_path, _MOST_JSON_BYTES)
            asked.files = list(files.items())
            payload.update(asked.values)
            _fill_in(asked)
            return await self._metadata(asked)
        call = self._calls.get(path)
        if call is None:
            raise RouteNotFound(f"the gateway has no call {path[:200]!r}")
        if request.method == "GET" and path not in _PLACED and path not in _ROUTED:
            asked.values = {key: _FLAGS.get(value, value) for key, value in request.query_params.items()}
        else:
            _require_method(request, "POST")
            asked.values = parse_object(await read_json(request, _MOST_JSON_BYTES))
        payload.update(asked.values)
        _fill_in(asked)
        return await call(asked)

    # -- questions to all --------------------------------------------------------------------------------------

    async def _accessible(self, asked: Asked) -> Response:
        values = {key: value for key, value in asked.values.items() if key in _FILTERS}
        said = await self._fleet.ask_all("accessible", values, asked.user, usable=_answers_with(is_list_of_volumes))
        answers = asked.heard(said)
        if not answers:
            raise self._silent(asked, "no storage server answers")
        lists = ((answer.server, answer.json()) for answer in answers)
        return _respond(merged(lists, asked.user.client), asked)

    async def _has(self, asked: Asked) -> Response:
        volume_id = _volume_id(asked.values)
        holders = await self._holders(asked, volume_id)
        if not holders and asked.silences:
            raise self._silent(asked, f"no server that answers has {volume_id}")
        return _respond({"has": bool(holders), "volume_id": volume_id}, asked)

    async def _can_create(self, asked: Asked) -> Response:
        if asked.values.get("size") is None:
            raise MissingKey("size")
        return _respond(len(await self._with_room(asked, asked.values["size"])), asked)

    async def _info(self, asked: Asked) -> Response:
        holders = await self._require_holders(asked)
        volume = described(holders[0].json(), [one.server for one in holders], asked.user.client)
        # One published client looks for the keys here, and another for the same in `volume`.
        return _respond({**volume, "volume": volume, **_silent_key(asked)}, asked)

    async def _servers(self, asked: Asked) -> Response:
        said = await self._fleet.ask_all("health", {}, asked.user, usable=lambda answer: answer.status == 200)
        reasons = {one.server: one.reason for one in said.silences}
        rows = [
            {"name": one.name, "url": one.url, "answers": one not in reasons, "reason": reasons.get(one)}
            for one in self._fleet.servers()
        ]
        return _respond(rows, asked)

    # -- changes -----------------------------------------------------------------------------------------------

    async def _create(self, asked: Asked) -> Response:
        usual = 2.0 if asked.values.get("isotype") == "tool" else _PLACED[asked.path]
        size = asked.values.get("size")
        if size is None and usual is None:
            raise MissingKey("size")
        return await self._place(asked, usual if size is None else size)

    async def _change(self, asked: Asked) -> Response:
        holders = await self._require_holders(asked)
        server = holders[0].server
        call = _ROUTED[asked.path]
        answer = await self._work(asked, server, call, key=None)
        return _relay(answer, asked)

    async def _metadata(self, asked: Asked) -> Response:
        if all(asked.values.get(key) is None for key in _VOLUME_KEYS):
            return await self._place(asked, _SEED_ROOM_GB)
        holders = await self._require_holders(asked)
        return _relay(await self._work(asked, holders[0].server, _METADATA, key=None), asked)

    async def _place(self, asked: Asked, size: object) -> Response:
        """Make a volume on the first server that has room and takes it."""
        key = asked.request.headers.get("idempotency-key") or new_uid()
        full: list[str] = []
        for server in await self._with_room(asked, size):
            try:
                answer = await self._work(asked, server, _METADATA if asked.files else asked.path, key=key)
            except Silent as silent:  # nothing was sent, so nothing was made
                asked.silences.append(Silence(server, silent.reason))
                continue
            if answer.status != status_of(NoRoom):
                return _relay(answer, asked)
            full.append(server.name)
        if asked.silences and not full:
            raise self._silent(asked, "no storage server that answers has room")
        raise NoRoom("no storage server has room", **_silent_key(asked))

    async def _work(self, asked: Asked, server: StorageServer, call: str, *, key: str | None) -> Answer:
        """Have a server change something. Raises Silent if nothing was sent and another may do it, else Unavailable."""
        values = _without(asked.values, "server")
        path = call
        headers = {"Prefer": "respond-async"} if call in _LONG else {}
        if key is not None:
            headers["Idempotency-Key"] = key
        if call.startswith(_METADATA):
            path = _METADATA
            if asked.files:
                path += "/" + base64.urlsafe_b64encode(msgspec.json.encode(values)).decode()
        token = asked.user.tokens.get(server.name)
        # With a key a second try cannot make a second volume, so a connection that broke is no reason to give up.
        for attempt in (1, 2):
            try:
                answer = await server.ask(
                    path,
                    values,
                    token=token,
                    patience_s=self._work_patience_s if not headers.get("Prefer") else self._patience_s,
                    headers=headers,
                    files=asked.files or None,
                )
                break
            except Silent as silent:
                if not silent.sent and attempt == 1:
                    if key is not None:
                        raise
                    raise Unavailable(f"server {server.name} does not answer ({silent.reason}); nothing was changed",
                                      server=server.name) from None  # fmt: skip
                if key is None or attempt == 2:
                    raise Unavailable(
                        f"server {server.name} was told and did not answer ({silent.reason}); it may still do it: "
                        "look at the volumes before you try again",
                        server=server.name,
                    ) from None
        return await self._finished(asked, server, answer, token) if answer.status == 202 else answer

    async def _finished(self, asked: Asked, server: StorageServer, accepted: Answer, token: str | None) -> Answer:
        """The answer of a job, when it is done. Raises Unavailable when its server falls silent."""
        job = str((accepted.json() or {}).get("job"))
        missed, polls = 0, 0
        while True:
            await asyncio.sleep(_POLL_S[min(polls, len(_POLL_S) - 1)])
            polls += 1
            try:
                answer = await server.ask(
                    f"jobs/{job}?client_uid={asked.user.client}", None, token=token, patience_s=self._patience_s
                )
            except Silent as silent:
                missed += 1
                if missed < _POLLS_MISSED:
                    continue
                raise Unavailable(
                    f"server {server.name} does not answer any more ({silent.reason}); the work may go on there as "
                    f"job {job}",
                    server=server.name,
                    job=job,
                ) from None
            missed = 0
            told = answer.json()
            state = told.get("state") if isinstance(told, dict) else None
            if state in ("running", "cancelling"):
                continue
            if state == "done":
                return Answer(server, 200, msgspec.json.encode(told["result"]))
            error = told.get("error") if isinstance(told, dict) else None
            if not isinstance(error, dict):
                error = {"error": f"the job ended as {state}", "code": "job-cancelled"}
            return Answer(server, _STATUS_OF_CODE.get(str(error.get("code")), 500), msgspec.json.encode(error))

    # -- who has it, and who has room --------------------------------------------------------------------------

    def _chosen(self, asked: Asked) -> StorageServer | None:
        name = asked.values.get("server")
        return None if name is None else self._fleet.named(str(name))

    async def _holders(self, asked: Asked, volume_id: str) -> list[Answer]:
        values = {"volume_id": volume_id, "client_uid": asked.user.client}
        said = await self._fleet.ask_all(
            "info", values, asked.user, usable=_answers_or_lacks_volume, only=self._chosen(asked)
        )
        return [answer for answer in asked.heard(said) if answer.status == 200]

    async def _require_holders(self, asked: Asked) -> list[Answer]:
        volume_id = _volume_id(asked.values)
        holders = await self._holders(asked, volume_id)
        if not holders and asked.silences:
            raise self._silent(asked, f"no server that answers has {volume_id}")
        if not holders:
            raise VolumeNotFound(volume_id)
        return holders

    async def _with_room(self, asked: Asked, size: object) -> list[StorageServer]:
        only = self._chosen(asked)
        values = {"size": size}
        said = await self._fleet.ask_all("cancreate", values, asked.user, usable=_answers_about_room, only=only)
        answers = asked.heard(said)
        if not answers:
            raise self._silent(asked, "no storage server answers")
        wrong = next((answer.json() for answer in answers if answer.status == 400), None)
        if wrong is not None:
            raise InvalidValue(str(wrong.get("error", "")).removeprefix("request was badly formatted. "), key="size")
        return [answer.server for answer in answers if answer.json()["cancreate"]]

    def _silent(self, asked: Asked, what: str) -> ServersSilent:
        reasons = {one.server.name: one.reason for one in asked.silences}
        if not self._fleet.servers():
            return ServersSilent("no storage server is known: none is listed, and none was found", silent={})
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        return ServersSilent(f"{what} ({told})", silent=reasons)


def _fill_in(asked: Asked) -> None:
    """The user is the client, whoever the request says; a request that says somebody else is refused."""
    for key in _CLIENT_KEYS:
        named = asked.values.get(key)
        if named is not None and normalise_uid(str(named)) != asked.user.client:
            raise Forbidden(f"'{key}' is another client than the user who is logged in")
        asked.values.pop(key, None)
    name = "client_uid" if asked.path in ("accessible", "has", "info", "cancreate", "servers") else "creatorID"
    asked.values[name] = asked.user.client


def _volume_id(values: Json) -> str:
    for key in _VOLUME_KEYS:
        if values.get(key) is not None:
            volume_id = normalise_uid(str(values[key]))
            if volume_id is None:
                raise InvalidValue(f"'{key}' has to be 32 hex digits, or a UUID with dashes", key=key)
            return volume_id
    raise MissingKey("volume_id")


def _without(values: Json, key: str) -> Json:
    return {name: value for name, value in values.items() if name != key}


def _answers_with(is_right: Callable[[object], bool]) -> Callable[[Answer], bool]:
    return lambda answer: answer.status == 200 and is_right(answer.json())


def _answers_or_lacks_volume(answer: Answer) -> bool:
    if answer.status == 404:
        return isinstance(answer.json(), dict) and answer.json().get("code") == VolumeNotFound.code
    return answer.status == 200 and is_volume(answer.json())


def _answers_about_room(answer: Answer) -> bool:
    told = answer.json()
    return isinstance(told, dict) and (answer.status == 400 or (answer.status == 200 and "cancreate" in told))


def _silent_key(asked: Asked) -> Json:
    return {"silent": {one.server.name: one.reason for one in asked.silences}} if asked.silences else {}


def _relay(answer: Answer, asked: Asked) -> Response:
    """A server's answer, with the server's name and address."""
    told = answer.json()
    if not isinstance(told, dict):
        return _respond(told, asked, answer.status)
    if answer.status in (200, 206):
        told = {**told, "server": answer.server.address, "serverurl": answer.server.url, **_silent_key(asked)}
    else:
        told = {**told, "server": answer.server.name}
    return _respond(told, asked, answer.status)


def _respond(value: object, asked: Asked, status: int = 200) -> Response:
    headers = {}
    if asked.silences:
        told = "; ".join(f"{one.server.name}: {one.reason}" for one in asked.silences)
        shown = "".join(one if one.isascii() and one.isprintable() else "?" for one in told)
        headers["X-Silent-Servers"] = shown[:_LONGEST_HEADER]
    return Response(msgspec.json.encode(value), status, headers, _JSON_TYPE)


def _require_method(request: Request, allowed: str) -> None:
    if request.method != allowed:
        raise MethodNotAllowed(f"{request.method} is not allowed here, use {allowed}", allowed=allowed)


def _codes(base: type[StorageError]) -> dict[str, int]:
    found = {base.code: status_of(base)}
    for kind in base.__subclasses__():
        found |= _codes(kind)
    return found


_STATUS_OF_CODE: Final = _codes(StorageError)
