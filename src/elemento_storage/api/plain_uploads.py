"""Uploads in one request, for small tools: ``curl -T`` and ``curl -F``. Who wants to go on after a break uses tus."""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Final

import msgspec
from starlette.responses import Response

from elemento_storage import API_VERSION
from elemento_storage.api import schemas, tus_headers, upload_requests
from elemento_storage.api.call import idempotency_key, idempotency_scope
from elemento_storage.api.decode import UID_PATTERN, ignored_keys
from elemento_storage.api.image_schemas import UploadRequest
from elemento_storage.api.iso_schemas import IsoAnswer, iso_answer
from elemento_storage.api.multipart import Form
from elemento_storage.api.route import Exchange, Json, Route, prefers_async
from elemento_storage.api.schemas import CreateAnswer
from elemento_storage.api.upload_bodies import feed, pieces, pour
from elemento_storage.api.upload_requests import Told
from elemento_storage.api.upload_schemas import FillRequest, IsoUploadRequest
from elemento_storage.api.volume_calls import create_answer
from elemento_storage.errors import (
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    InvalidValue,
    JobCancelled,
    KeyReused,
    LocationUnavailable,
    MissingKey,
    NoRoom,
    NotOwner,
    UploadStalled,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.jobs import Job
from elemento_storage.model import MAX_VOLUME_BYTES, Volume, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.service.idempotency import derive_uid
from elemento_storage.service.services import Services
from elemento_storage.service.uploading import Whole
from elemento_storage.uploads.content import Hash

_FORM: Final = "multipart/form-data"
_FILLS: Final = ("volume_id", "vid", "volumeID")


async def create_upload(exchange: Exchange) -> Response:
    """Create a volume of the image in the body: its bytes, with the keys in the query; or a form with a file.

    In a form the fields come before the file, whose name is ignored.
    """
    return await _upload(exchange, "create/upload")


async def iso_create_upload(exchange: Exchange) -> Response:
    """Create an ISO volume with its content, or fill the one that waits for it and that `volume_id` names.

    The body is the ISO image, with the keys in the query; or a form, with the fields before the file.
    """
    return await _upload(exchange, "iso/create/upload")


async def _upload(exchange: Exchange, path: str) -> Response:
    request = exchange.request
    content_type = request.headers.get("content-type", "")
    values: dict[str, str] = dict(request.query_params)
    length = tus_headers.number(request.headers, "Content-Length")
    if length is not None and length > MAX_VOLUME_BYTES:
        raise BodyTooLarge(f"an image has at most {MAX_VOLUME_BYTES} bytes")
    key = idempotency_key(request.headers)
    form: Form | None = None
    if content_type.partition(";")[0].strip().lower() == _FORM:
        stall_s = exchange.services.core.settings.upload_stall
        form = Form(content_type, pieces(request, exchange.stopping, stall_s))
        values |= await form.fields()
    upload = _Upload(exchange, path, values, length, form)
    return await (upload.plain() if key is None else upload.once(key))


class _Kept(msgspec.Struct):
    """What is kept for an Idempotency-Key."""

    answer: msgspec.Raw
    digest: str  #: sha256 of the body, or of the file in the form


class _Upload:
    """One request."""

    def __init__(
        self, exchange: Exchange, path: str, values: Mapping[str, str], length: int | None, form: Form | None
    ) -> None:
        self._exchange = exchange
        self._path = path
        self._values = values
        self._length = length
        self._form = form
        self._ignored: dict[str, str] = {}

    async def plain(self) -> Response:
        """Nobody may send it again."""
        job = await self._begin(self._told(None))
        if prefers_async(self._exchange.request):
            return self._begun(job)
        await job.finished.wait()
        return _json(_result(job), 200, self._ignored)

    async def once(self, key: str) -> Response:
        """Sent again with the same key it makes no second volume. Raises KeyReused for another body."""
        begun: asyncio.Future[Job] = asyncio.get_running_loop().create_future()

        async def work(seed: str) -> bytes:
            volume_id = derive_uid(seed, 0)
            said = self._told(volume_id)
            if not said.incoming.fills and (made := await self._services.creating.made_before(volume_id)) is not None:
                # Its server died before it answered. What it was made of is not known any more.
                return _kept(_answer(made), await self._drain())
            hasher = hashlib.sha256()
            job = await self._begin(said, hasher)
            begun.set_result(job)
            await job.finished.wait()
            return _kept(_result(job), hasher.hexdigest())

        owner = self._told(None).incoming.creator_id
        scope = idempotency_scope(self._exchange.caller, owner, self._path)
        asked = msgspec.json.encode(sorted(self._values.items()))
        # A task of its own: a client that hangs up does not end it.
        task = asyncio.ensure_future(self._services.idempotency.once(scope, key, asked, work))
        _under_way.add(task)
        task.add_done_callback(_forget)
        if prefers_async(self._exchange.request):
            await asyncio.wait((task, begun), return_when=asyncio.FIRST_COMPLETED)
            if begun.done() and not task.done():
                return self._begun(begun.result())
        answer, replayed = await asyncio.shield(task)
        kept = msgspec.json.decode(answer, type=_Kept)
        if not replayed:
            return _json(kept.answer, 200, self._ignored)
        if await self._drain() != kept.digest:
            raise KeyReused("this Idempotency-Key was used with another image: take a new one")
        return _json(kept.answer, 200, {**self._ignored, "Idempotency-Replayed": "true"})

    @property
    def _services(self) -> Services:
        return self._exchange.services

    def _told(self, volume_id: str | None) -> Told:
        if any(key in self._values for key in _FILLS):
            said = upload_requests.told(self._exchange.caller, self._values)
        else:
            read = upload_requests.image if self._path == "create/upload" else upload_requests.iso
            said = read(self._exchange.caller, self._values, volume_id)
        self._ignored = ignored_keys(said.ignored)
        return said

    async def _begin(self, said: Told, hasher: Hash | None = None) -> Job:
        """Take the body; what makes a volume of it. ``hasher`` takes in all of it as well."""
        whole = await self._services.uploading.whole(said.incoming, self._length, hasher)
        try:
            await self._receive(whole)
        except BaseException:
            await whole.drop()
            raise

        async def work(progress: Progress) -> msgspec.Struct:
            return _answer(await whole.finish(progress))

        incoming = said.incoming
        return self._services.core.jobs.start(
            self._path, work, client=incoming.creator_id or None, volume_id=incoming.volume_id
        )

    async def _receive(self, whole: Whole) -> None:
        if self._form is not None:
            await feed(self._form.file(), whole.receiving)
            return
        uploading = self._services.uploading
        stall_s = self._services.core.settings.upload_stall
        await pour(self._exchange.request, whole.receiving, stall_s=stall_s, by_thread=uploading.has_thread)

    async def _drain(self) -> str:
        """The sha256 of a body of which nothing is made."""
        stall_s = self._services.core.settings.upload_stall
        body = pieces(self._exchange.request, self._exchange.stopping, stall_s)
        hasher = hashlib.sha256()
        async for piece in body if self._form is None else self._form.file():
            hasher.update(piece)
        return hasher.hexdigest()

    def _begun(self, job: Job) -> Response:
        address = f"/api/{API_VERSION}/jobs/{job.job_id}"
        headers = self._ignored | {"Location": address, "Preference-Applied": "respond-async"}
        return _json({"job": job.job_id, "location": address}, 202, headers)


_under_way: Final[set[asyncio.Future[tuple[bytes, bool]]]] = set()


def _forget(task: "asyncio.Future[tuple[bytes, bool]]") -> None:
    _under_way.discard(task)
    if not task.cancelled():
        task.exception()  # whoever still waits has heard of it; its job says so to the others


def _result(job: Job) -> object:
    if job.error is not None:
        raise job.error
    return job.result


def _kept(answer: object, digest: str) -> bytes:
    return msgspec.json.encode(_Kept(msgspec.Raw(schemas.encode(answer)), digest))


def _answer(volume: Volume) -> msgspec.Struct:
    if volume.meta.format is VolumeFormat.ISO:
        return iso_answer(volume)
    return create_answer(volume)


def _json(answer: object, status: int, headers: Mapping[str, str]) -> Response:
    return Response(schemas.encode(answer), status, headers, "application/json")


def _query(*kinds: type[msgspec.Struct]) -> tuple[Json, ...]:
    """The keys of all kinds of requests, as parameters of the query; what is required depends on the kind."""
    names = dict.fromkeys(key.encode_name for kind in kinds for key in msgspec.structs.fields(kind))
    return tuple({"name": name, "in": "query", "schema": _schema_of(name)} for name in names)


def _schema_of(name: str) -> Json:
    return {"type": "string", "pattern": UID_PATTERN} if name in ("creatorID", "volume_id") else {"type": "string"}


_BODY: Final[Json] = {
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        _FORM: {"schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}},
    }
}
_ERRORS: Final = (
    *(InvalidRequest, InvalidValue, MissingKey, BodyTooLarge, UploadStalled, NoRoom, LocationUnavailable),
    *(Conflict, JobCancelled, KeyReused, VolumeLocked, VolumeNotFound, NotOwner),
)


_KEY: Final[Json] = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key, keys and image get the same answer, once only done.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}


def _answers(kind: type[msgspec.Struct]) -> dict[str, Json]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    begun = {"type": "object", "properties": {"job": {"type": "string"}}}
    return {
        "200": {"description": "the volume is there", "content": {"application/json": {"schema": schema}}},
        "202": {
            "description": "all arrived; the Location header is the job's address",
            "content": {"application/json": {"schema": begun}},
        },
    }


PLAIN_UPLOAD_ROUTES: Final = tuple(
    Route(method, path, handle, _answers(answer), _ERRORS, (*parameters, _KEY), _BODY, (answer,))
    for path, handle, answer, parameters in (
        ("create/upload", create_upload, CreateAnswer, _query(UploadRequest)),
        ("iso/create/upload", iso_create_upload, IsoAnswer, _query(IsoUploadRequest, FillRequest)),
    )
    for method in ("PUT", "POST")
)
