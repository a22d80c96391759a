"""Resumable uploads: tus 1.0.0 at ``uploads``, and what our own answers add to it."""

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from elemento_storage import API_VERSION
from elemento_storage.api import schemas, tus_headers
from elemento_storage.api.decode import UID_PATTERN, ignored_keys
from elemento_storage.api.route import Exchange, Json, Route, prefers_async
from elemento_storage.api.tus_headers import ALWAYS, Creation
from elemento_storage.api.upload_bodies import pour
from elemento_storage.api.upload_requests import told
from elemento_storage.api.upload_schemas import UploadAnswer, UploadProblem
from elemento_storage.errors import (
    BodyTooLarge,
    Conflict,
    Forbidden,
    InvalidRequest,
    InvalidValue,
    JobCancelled,
    LocationUnavailable,
    MethodNotAllowed,
    MissingKey,
    NoRoom,
    NotOwner,
    OffsetMismatch,
    StorageError,
    TusVersionUnsupported,
    Unavailable,
    UnsupportedMediaType,
    UploadBusy,
    UploadChecksumMismatch,
    UploadEnded,
    UploadFailed,
    UploadNotFound,
    UploadStalled,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.jobs import Job
from elemento_storage.model import MAX_VOLUME_BYTES, normalise_uid
from elemento_storage.service.access import Actor
from elemento_storage.service.upload_store import Upload
from elemento_storage.service.uploading import CHECKSUMS, Chunk, NewUpload, Uploading, failed
from elemento_storage.uploads.record import Phase
from elemento_storage.uploads.sparse import CONTENT_TYPE as SPARSE

_BASE: Final = f"/api/{API_VERSION}/uploads"
_GLANCE_S: Final = 10.0  # how long HEAD waits for a volume that is being made: its answer tells of the outcome then


async def options(exchange: Exchange) -> Response:
    """What of tus this server speaks."""
    return Response(
        status_code=204,
        headers={
            "Tus-Extension": ",".join(tus_headers.EXTENSIONS),
            "Tus-Max-Size": str(MAX_VOLUME_BYTES),
            "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
        },
    )


async def uploads(exchange: Exchange) -> Response:
    """The client's uploads, oldest first."""
    found = await _uploading(exchange).store.all(exchange.actor())
    return Response(schemas.encode([_answer(upload) for upload in found]), media_type="application/json")


async def begin(exchange: Exchange) -> Response:
    """Begin an upload, with its first bytes or without; or make one of parts that are complete.

    `Upload-Metadata` has the keys of `create/upload`, or those of `iso/create/upload`, or `volume_id` of an ISO volume
    that waits for its content.
    """
    headers = exchange.request.headers
    tus_headers.require_version(headers)
    asked = tus_headers.creation(headers)
    sparse = tus_headers.is_sparse(headers) if tus_headers.has_body(headers) else None
    new, ignored = _new_upload(exchange, asked)
    uploading = _uploading(exchange)
    answered: dict[str, str] = ignored_keys(ignored)
    job: Job | None = None
    if asked.parts:
        if sparse is not None:
            raise InvalidValue("an upload that is made of parts brings no bytes of its own")
        upload, job = await uploading.concatenate(exchange.actor(), new, asked.parts)
    else:
        upload = await uploading.begin(new)
        if sparse is not None or upload.is_complete:
            try:
                chunk = Chunk(offset=0, sparse=bool(sparse), checksum=tus_headers.checksum(headers))
                offset, job = await _receive(exchange, upload, chunk, new.owner)
                answered["Upload-Offset"] = str(offset)
            except (StorageError, ClientDisconnect):
                # Its client has not got its address.
                await uploading.terminate(exchange.actor(new.owner), upload.upload_id)
                raise
    answered |= await _outcome(exchange, upload, job)
    return Response(status_code=201, headers={"Location": f"{_BASE}/{upload.upload_id}", **answered})


def _new_upload(exchange: Exchange, asked: Creation) -> tuple[NewUpload, list[str]]:
    if asked.is_part:
        owner = exchange.actor(asked.values.get("creatorID") or None).client
        return NewUpload(owner=owner, incoming=None, length=asked.length, concat=asked.concat), []
    values = dict(asked.values)
    if "name" not in values and values.get("filename"):
        values["name"] = values["filename"]  # what clients of tus send by themselves
    said = told(exchange.caller, values)
    new = NewUpload(
        owner=said.incoming.creator_id or None,
        incoming=said.incoming,
        length=asked.length,
        metadata=asked.metadata,
        concat=asked.concat,
    )
    return new, said.ignored


async def look(exchange: Exchange) -> Response:
    """One upload, as JSON."""
    upload = await _uploading(exchange).store.find(exchange.actor(), _id(exchange))
    return Response(schemas.encode(_answer(upload)), media_type="application/json")


async def head(exchange: Exchange) -> Response:
    """Where an upload stands, and what has become of it."""
    tus_headers.require_version(exchange.request.headers)
    upload, job = await _uploading(exchange).finished(exchange.actor(), _id(exchange))
    if job is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.finished.wait(), _GLANCE_S)
        upload = await _uploading(exchange).store.find(exchange.actor(), upload.upload_id)
    record = upload.record
    if record.phase is Phase.FAILED:
        raise UploadEnded(failed(record).message, upload_id=upload.upload_id, state=record.phase.value)
    answered = {"Upload-Expires": _expires(upload), **_state(upload)}
    if not record.is_assembled or upload.is_complete:
        answered["Upload-Offset"] = str(upload.offset)
    if record.length is None:
        answered["Upload-Defer-Length"] = "1"
    else:
        answered["Upload-Length"] = str(record.length)
    if record.metadata:
        answered["Upload-Metadata"] = record.metadata
    if record.concat:
        answered["Upload-Concat"] = record.concat
    return Response(status_code=200, headers=answered)


async def patch(exchange: Exchange) -> Response:
    """Go on with an upload at `Upload-Offset`. After the last byte: when the volume is there.

    With `Prefer: respond-async` the answer does not wait for the volume; the header `Elemento-Job` names the job.
    """
    headers = exchange.request.headers
    tus_headers.require_version(headers)
    sparse = tus_headers.is_sparse(headers)
    chunk = Chunk(
        offset=tus_headers.offset(headers),
        length=tus_headers.length(headers),
        sparse=sparse,
        checksum=tus_headers.checksum(headers),
    )
    uploading, actor = _uploading(exchange), exchange.actor()
    upload, job = await uploading.finished(actor, _id(exchange))
    if upload.record.is_assembled:
        raise Forbidden("the upload was made of parts: nothing can be added to it")
    offset = upload.offset
    if job is None and upload.record.phase is not Phase.DONE:
        offset, job = await _receive(exchange, upload, chunk, actor.client)
    elif chunk.offset != offset:
        raise OffsetMismatch(f"the upload is complete, it has {offset} bytes", offset=offset)
    elif tus_headers.has_body(headers):
        raise BodyTooLarge("the upload is complete: nothing can be added to it")
    answered = await _outcome(exchange, upload, job)
    return Response(status_code=204, headers={"Upload-Offset": str(offset), **answered})


async def terminate(exchange: Exchange) -> Response:
    """End an upload and remove what arrived. A volume that was made of it stays."""
    tus_headers.require_version(exchange.request.headers)
    await _uploading(exchange).terminate(exchange.actor(), _id(exchange))
    return Response(status_code=204)


_OVERRIDES: Final = {"PATCH": patch, "DELETE": terminate, "HEAD": head}


async def override(exchange: Exchange) -> Response:
    """The method that `X-HTTP-Method-Override` names, for clients that can only POST."""
    method = exchange.request.headers.get("x-http-method-override", "").upper()
    if method not in _OVERRIDES:
        allowed = "DELETE, GET, HEAD, OPTIONS, PATCH"
        raise MethodNotAllowed(
            f"POST is not allowed here without X-HTTP-Method-Override, use {allowed}", allowed=allowed
        )
    return await _OVERRIDES[method](exchange)


async def _receive(exchange: Exchange, upload: Upload, chunk: Chunk, client: str | None) -> tuple[int, Job | None]:
    """The request's body into the upload; where it stands then, and the job that was its last byte's."""
    uploading = _uploading(exchange)
    coming = tus_headers.number(exchange.request.headers, "Content-Length") or 0
    stall_s = exchange.services.core.settings.upload_stall
    async with uploading.going_on(Actor(client), upload.upload_id, chunk) as going:
        length = going.record.length
        if not chunk.sparse and length is not None and chunk.offset + coming > length:
            raise BodyTooLarge(f"the body goes beyond the end of the upload: {length - chunk.offset} bytes are missing")
        await pour(exchange.request, going.receiving, stall_s=stall_s, by_thread=uploading.has_thread)
        return await going.finish()


async def _outcome(exchange: Exchange, upload: Upload, job: Job | None) -> dict[str, str]:
    """Headers that say how the upload stands, after the volume was made if it is complete.

    Raises UploadFailed, InvalidRequest; Unavailable where the server goes on with it later.
    """
    answered = {}
    if job is not None:
        if prefers_async(exchange.request):
            answered = {"Preference-Applied": "respond-async"}
        else:
            await job.finished.wait()
        if job.error is not None:
            raise _told_to_tus(job.error, upload.upload_id, stopping=exchange.stopping.is_set())
    upload = await _uploading(exchange).store.find(Actor(None), upload.upload_id)
    return {"Upload-Expires": _expires(upload), **_state(upload), **answered}


def _told_to_tus(error: StorageError, upload_id: str, *, stopping: bool) -> StorageError:
    """Clients of tus take 409 and every 5xx as "try again": only what may go well then may be one of these."""
    if isinstance(error, JobCancelled) and stopping:
        return Unavailable("the server stops; it goes on with the upload as soon as it runs again")
    if isinstance(error, InvalidRequest | Unavailable | VolumeLocked):
        return error
    return UploadFailed(
        f"no volume can be made of the upload: {error.message}", upload_id=upload_id, reason=error.code, **error.details
    )


def _state(upload: Upload) -> dict[str, str]:
    record = upload.record
    told = {"Elemento-State": record.phase.value}
    if record.job is not None:
        told["Elemento-Job"] = record.job
    if record.volume_id is not None:
        told["Elemento-Volume"] = record.volume_id
    return told


def _answer(upload: Upload) -> UploadAnswer:
    record = upload.record
    expires = datetime.fromtimestamp(min(upload.expires_s, 2**37), UTC).isoformat(timespec="seconds")
    return UploadAnswer(
        upload_id=record.upload_id,
        state=record.phase.value,
        offset=upload.offset,
        length=record.length,
        created=record.created,
        expires=expires.replace("+00:00", "Z"),
        creator_id=record.owner,
        job=record.job,
        vid=record.volume_id,
        error=UploadProblem(error=record.problem.message, code=record.problem.code) if record.problem else None,
    )


def _expires(upload: Upload) -> str:
    return tus_headers.http_date(upload.expires_s)


def _uploading(exchange: Exchange) -> Uploading:
    return exchange.services.uploading


def _id(exchange: Exchange) -> str:
    given = exchange.parameters["id"]
    upload_id = normalise_uid(given)
    if upload_id is None:
        raise UploadNotFound(given[:200])
    return upload_id


_CLIENT: Final[Json] = {"name": "client_uid", "in": "query", "schema": {"type": "string", "pattern": UID_PATTERN}}


def _header(name: str, pattern: str, *, required: bool = False) -> Json:
    return {"name": name, "in": "header", "required": required, "schema": {"type": "string", "pattern": pattern}}


_VERSION: Final = _header("Tus-Resumable", r"^1\.0\.0$", required=True)
_NUMBER: Final = "^[0-9]{1,18}$"
_CHECKSUM: Final = _header("Upload-Checksum", "^(sha1|sha256|md5) [A-Za-z0-9+/]+={0,2}$")
_CREATION: Final = (
    _VERSION,
    _header("Upload-Length", _NUMBER),
    _header("Upload-Defer-Length", "^1$"),
    _header("Upload-Metadata", "^[!-~ ]*$"),
    _header("Upload-Concat", "^(partial|final;.*)$"),
    _CHECKSUM,
)
_BODY: Final[Json] = {
    "content": {
        tus_headers.OFFSET_STREAM: {"schema": {"type": "string", "format": "binary"}},
        SPARSE: {"schema": {"type": "string", "format": "binary"}},
    }
}


def _done(status: int, description: str) -> dict[str, Json]:
    return {str(status): {"description": description}}


def _json(description: str, schema: Json) -> dict[str, Json]:
    return {"200": {"description": description, "content": {"application/json": {"schema": schema}}}}


_ANSWER: Final[Json] = {"$ref": "#/components/schemas/UploadAnswer"}
_FINDING: Final = (UploadNotFound, UploadEnded, InvalidValue)
_RECEIVING: Final = (
    *(InvalidRequest, MissingKey, InvalidValue, TusVersionUnsupported, UnsupportedMediaType, BodyTooLarge),
    *(UploadStalled, UploadChecksumMismatch, UploadBusy, UploadFailed, NoRoom, LocationUnavailable),
)

UPLOAD_ROUTES: Final = tuple(
    Route(method, path, handle, answers, errors, parameters, body, types, headers=ALWAYS)
    for method, path, handle, answers, errors, parameters, body, types in (
        ("OPTIONS", "uploads", options, _done(204, "the extensions, as headers"), (), (), None, ()),
        (
            "GET",
            "uploads",
            uploads,
            _json("the uploads", {"type": "array", "items": _ANSWER}),
            (InvalidValue,),
            (_CLIENT,),
            None,
            (UploadAnswer,),
        ),
        (
            "POST",
            "uploads",
            begin,
            _done(201, "begun; the Location header is the upload's address"),
            (*_RECEIVING, UploadNotFound, VolumeNotFound, VolumeLocked, NotOwner, Conflict),
            _CREATION,
            _BODY,
            (),
        ),
        ("OPTIONS", "uploads/{id}", options, _done(204, "the extensions, as headers"), (), (), None, ()),
        ("GET", "uploads/{id}", look, _json("the upload", _ANSWER), _FINDING, (_CLIENT,), None, (UploadAnswer,)),
        (
            "HEAD",
            "uploads/{id}",
            head,
            _done(200, "where it stands, as headers"),
            (*_FINDING, TusVersionUnsupported),
            (_CLIENT, _VERSION),
            None,
            (),
        ),
        (
            "PATCH",
            "uploads/{id}",
            patch,
            _done(204, "all that came is kept; Upload-Offset says where it stands"),
            (*_RECEIVING, *_FINDING, OffsetMismatch),
            (
                _CLIENT,
                _VERSION,
                _header("Upload-Offset", _NUMBER, required=True),
                _header("Upload-Length", _NUMBER),
                _CHECKSUM,
            ),
            _BODY,
            (),
        ),
        (
            "DELETE",
            "uploads/{id}",
            terminate,
            _done(204, "ended"),
            (*_FINDING, UploadBusy, TusVersionUnsupported),
            (_CLIENT, _VERSION),
            None,
            (),
        ),
        (
            "POST",
            "uploads/{id}",
            override,
            _done(204, "as the method that it stands for"),
            (*_RECEIVING, *_FINDING, OffsetMismatch, MethodNotAllowed),
            (_CLIENT, _VERSION, _header("X-HTTP-Method-Override", "^(PATCH|DELETE|HEAD)$", required=True)),
            _BODY,
            (),
        ),
    )
)
